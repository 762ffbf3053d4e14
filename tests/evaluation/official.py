"""Small data sets in the official file formats and layouts, as docs/evaluation.md describes them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from evaluation.tasks.yes_no import SUBTASKS
from models.clip_encoder import image_processor_class
from tests.parity.goldens import fill_


def noise(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((40, 32))


def save_image(path: Path, image: Image.Image | int | tuple[int, int, int]) -> None:
    """An image, or one of a single grey or colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.new("RGB", (32, 32), (image,) * 3 if isinstance(image, int) else image)
    image.save(path)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value))


def write_lines(path: Path, records: list[dict]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def coco_name(number: int, split: str = "val2014") -> str:
    return f"COCO_{split}_{number:012d}.jpg"


def write_pope(root: Path) -> None:
    """Two images, two questions about each in each split."""
    for number in range(2):
        save_image(root / "coco/val2014" / coco_name(number), noise(number))
    for split in ("random", "popular", "adversarial"):
        records = [
            {"question_id": n + 1, "image": coco_name(n // 2), "label": ("yes", "no")[n % 2]}
            | {"text": f"Is there a {split} thing {n} in the image?"}
            for n in range(4)
        ]
        write_lines(root / f"pope/coco_pope_{split}.json", records)


MME = "mme/MME_Benchmark_release_version"


def write_mme(root: Path) -> None:
    """Two images a subtask; `landmark` keeps questions and images apart, as some of the official folders do."""
    for number, subtask in enumerate(SUBTASKS):
        folder = root / MME / subtask
        images, texts = ("images", "questions_answers_YN") if subtask == "landmark" else ("", "")
        for n in range(2):
            save_image(folder / images / f"{n:03d}.{'png' if subtask == 'OCR' else 'jpg'}", noise(10 * number + n))
            questions = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
            write_text(folder / texts / f"{n:03d}.txt", questions)


VQA_QUESTIONS = [  # question id, image, kind, ten answers
    (9001, 7, "number", ["2"] * 3 + ["3"] * 7),
    (9002, 7, "yes/no", ["yes"] * 10),
    (9003, 8, "other", ["don't know"] * 2 + ["a dog."] + ["cat"] * 7),
]


def write_vqav2(root: Path, split: str = "val2014", images: str = "val2014") -> None:
    for _, image, _, _ in VQA_QUESTIONS:
        save_image(root / "coco" / images / coco_name(image, images), noise(image))
    questions = [{"image_id": i, "question": f"What is {q}?", "question_id": q} for q, i, _, _ in VQA_QUESTIONS]
    write_json(root / f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json", {"info": {}, "questions": questions})
    if split == "val2014":
        annotations = [
            {"question_id": q, "image_id": i, "answer_type": kind, "multiple_choice_answer": max(a, key=a.count)}
            | {"answers": [{"answer": text, "answer_id": n} for n, text in enumerate(a, 1)]}
            for q, i, kind, a in VQA_QUESTIONS
        ]
        write_json(root / "vqav2/v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})


def write_gqa(root: Path) -> None:
    questions = (("201", "n1", "query", "table"), ("202", "n1", "verify", "yes"), ("203", "n2", "choose", "left"))
    for key, image, _, _ in questions:
        save_image(root / f"gqa/images/{image}.jpg", noise(int(key)))
    records = {
        key: {"question": f"What {key}?", "imageId": image, "answer": answer, "types": {"structural": structural}}
        for key, image, structural, answer in questions
    }
    write_json(root / "gqa/testdev_balanced_questions.json", records)


def mmmu_row(key: str, question: str, options: list[str], answer: str, kind: str = "multiple-choice") -> dict:
    buffer = io.BytesIO()
    noise(len(question)).save(buffer, format="PNG")
    row = {"id": key, "question": question, "options": str(options), "explanation": "", "answer": answer}
    return row | {"image_1": {"bytes": buffer.getvalue(), "path": "1.png"}, "image_2": None, "question_type": kind}


MMMU_ROWS = {
    "Accounting": [
        mmmu_row("validation_Accounting_1", "<image 1> Which?", ["$6", "$7", "$8"], "B"),
        mmmu_row("validation_Accounting_2", "How much?", [], "['24/7', '3.429']", "open"),
    ],
    "Math": [
        mmmu_row("validation_Math_1", "Choose.", ["<image 2>", "<image 3>"], "A"),
        mmmu_row("validation_Math_2", "What is it?", ["one red apple", "two"], "A"),
    ],
}


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_mmmu(root: Path) -> None:
    for subject, rows in MMMU_ROWS.items():
        write_parquet(root / f"mmmu/{subject}/validation-00000-of-00001.parquet", rows)


CAPTIONS = {
    "1.jpg": ["A dog runs.", "A brown dog is running fast.", "Dog runs outside!", "A dog", "The dog runs."],
    "3.jpg": ["Two men sit.", "Two men are sitting on a bench.", "Men sit.", "Two guys", "The men sit down."],
}


def write_flickr30k(root: Path, captions: dict[str, list[str]] = CAPTIONS) -> None:
    """And an image of another split, which is not there."""
    images = [{"imgid": 9, "filename": "9.jpg", "split": "train", "sentences": []}]
    for number, (name, texts) in enumerate(captions.items()):
        save_image(root / "flickr30k/flickr30k-images" / name, noise(number))
        sentences = [{"raw": raw, "tokens": raw.lower().split()} for raw in texts]
        images.append({"imgid": number, "filename": name, "split": "test", "sentences": sentences})
    write_json(root / "flickr30k/dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


EMOJI = [  # name, group, style, colour, held out
    ("red apple", "food & drink", "noto", (255, 0, 0), False),
    ("red apple", "food & drink", "twemoji", (245, 0, 0), True),
    ("leaf", "animals & nature", "noto", (0, 255, 0), False),
    ("leaf", "animals & nature", "fluent 3d", (0, 200, 0), False),
]
EMOJI_KEYS = [f"{name}_{style}".replace(" ", "-") for name, _, style, *_ in EMOJI]


def write_emoji(root: Path) -> None:
    """The manifest as examples/emoji_world/make.py writes it, as far as the evaluation reads it."""
    names = {name: {"name": name, "group": group, "tags": []} for name, group, *_ in EMOJI}
    images = []
    for key, (name, _, style, colour, held_out) in zip(EMOJI_KEYS, EMOJI, strict=True):
        save_image(root / f"emoji_world/images/{key}.png", colour)
        images.append({"key": key, "name": name, "style": style, "held_out": held_out})
    write_json(root / "emoji_world/manifest.json", {"names": list(names.values()), "pictures": images})


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"}
    | {"exclude": [{"class": "clock", "count": 3}]},
]


def write_geneval(root: Path) -> None:
    write_lines(root / "geneval/evaluation_metadata.jsonl", GENEVAL)


class MeanColour(torch.nn.Module):
    """One feature, in the place of Inception."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(1, 2, 3))[:, None]


def write_networks(root: Path) -> None:
    """`inception.pt` and `clip/`, tiny ones of the classes that the real ones have."""
    torch.jit.script(MeanColour()).save(root / "inception.pt")
    letters = [chr(ord("a") + number) for number in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in letters), *letters]
    write_json(root / "clip/vocab.json", {word: number for number, word in enumerate(words)})
    write_text(root / "clip/merges.txt", "#version: 0.2\n")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 24}
    config = CLIPConfig(text_config=text | ids, vision_config=text | {"image_size": 24, "patch_size": 8})
    config.projection_dim = 8
    fill_(CLIPModel(config)).save_pretrained(root / "clip")
    image_processor = image_processor_class()(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    tokenizer = CLIPTokenizer(str(root / "clip/vocab.json"), str(root / "clip/merges.txt"))
    CLIPProcessor(image_processor, tokenizer).save_pretrained(root / "clip")


def write_coco(root: Path) -> None:
    images, annotations = [], []
    for number, grey in {11: 0, 12: 100, 13: 200}.items():
        save_image(root / "coco/val2014" / coco_name(number), grey)
        images.append({"id": number, "file_name": coco_name(number)})
        for caption in ("a b", "c d\n"):
            annotations.append({"image_id": number, "id": len(annotations) + 1, "caption": f"{caption} {number}"})
    write_json(root / "coco/annotations/captions_val2014.json", {"images": images, "annotations": annotations})
    write_networks(root)


def write_reconstruction(root: Path) -> None:
    save_image(root / "images/a.png", 100)
    save_image(root / "images/more/b.JPG", 200)
    if not (root / "inception.pt").exists():
        write_networks(root)


_WRITERS = (write_pope, write_mme, write_vqav2, write_gqa, write_mmmu, write_flickr30k, write_geneval, write_coco)
_WRITERS += (write_reconstruction, write_emoji)
WRITERS = {write.__name__.removeprefix("write_"): write for write in _WRITERS}
