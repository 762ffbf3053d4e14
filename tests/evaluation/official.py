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

from evaluation.tasks.mme import SUBTASKS
from models.clip_encoder import image_processor_class
from tests.parity.goldens import fill_


def picture(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((40, 32))


def save_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def coco_name(number: int, split: str = "val2014") -> str:
    return f"COCO_{split}_{number:012d}.jpg"


def write_pope(root: Path) -> None:
    """Two pictures, two questions about each in each split."""
    for split in ("random", "popular", "adversarial"):
        lines = []
        for number in range(4):
            name, label = coco_name(number // 2), ("yes", "no")[number % 2]
            save_picture(root / "coco/val2014" / name, number // 2)
            text = f"Is there a {split} thing {number} in the image?"
            lines.append({"question_id": number + 1, "image": name, "text": text, "label": label})
        path = root / f"pope/coco_pope_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_mme(root: Path) -> None:
    """Two pictures a subtask; `landmark` keeps questions and pictures apart, as some of the official folders do."""
    for number, subtask in enumerate(SUBTASKS):
        folder = root / "mme/MME_Benchmark_release_version" / subtask
        apart = subtask == "landmark"
        for index in range(2):
            image = folder / ("images" if apart else "") / f"{index:03d}.{'png' if subtask == 'OCR' else 'jpg'}"
            save_picture(image, 10 * number + index)
            text = folder / ("questions_answers_YN" if apart else "") / f"{index:03d}.txt"
            text.parent.mkdir(exist_ok=True)
            text.write_text("Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n")


def human(answers: list[str]) -> list[dict]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(answers, 1)]


VQA_QUESTIONS = [  # question id, picture, kind, ten answers
    (9001, 7, "number", ["2"] * 3 + ["3"] * 7),
    (9002, 7, "yes/no", ["yes"] * 10),
    (9003, 8, "other", ["don't know"] * 2 + ["a dog."] + ["cat"] * 7),
]


def write_vqav2(root: Path, split: str = "val2014", pictures: str = "val2014") -> None:
    for _, image, _, _ in VQA_QUESTIONS:
        save_picture(root / "coco" / pictures / coco_name(image, pictures), image)
    questions = [{"image_id": i, "question": f"What is {q}?", "question_id": q} for q, i, _, _ in VQA_QUESTIONS]
    header = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": split, "license": {}}
    write_json(root / f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json", header | {"questions": questions})
    if split == "val2014":
        annotations = [
            {"question_type": "what", "multiple_choice_answer": max(a, key=a.count), "answers": human(a)}
            | {"image_id": i, "answer_type": kind, "question_id": q}
            for q, i, kind, a in VQA_QUESTIONS
        ]
        write_json(root / "vqav2/v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})


def write_gqa(root: Path) -> None:
    records = {}
    for key, image, structural, answer in (
        ("201", "n1", "query", "table"),
        ("202", "n1", "verify", "yes"),
        ("203", "n2", "choose", "left"),
    ):
        save_picture(root / f"gqa/images/{image}.jpg", int(key))
        types = {"detailed": "x", "semantic": "rel", "structural": structural}
        records[key] = {
            "question": f"What {key}?",
            "imageId": image,
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
        }
        records[key] |= {"types": types, "isBalanced": True, "groups": {}, "semantic": [], "entailed": []}
    write_json(root / "gqa/testdev_balanced_questions.json", records)


def mmmu_row(key: str, question: str, options: list[str], answer: str, kind: str = "multiple-choice") -> dict:
    buffer = io.BytesIO()
    picture(len(question)).save(buffer, format="PNG")
    row = {"id": key, "question": question, "options": str(options), "explanation": "", "answer": answer}
    row |= {"image_1": {"bytes": buffer.getvalue(), "path": "1.png"}, "image_2": None, "img_type": "['Plots']"}
    return row | {"topic_difficulty": "Easy", "question_type": kind, "subfield": "x"}


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


def write_mmmu(root: Path, split: str = "validation") -> None:
    for subject, rows in MMMU_ROWS.items():
        folder = root / "mmmu" / subject
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


CAPTIONS = [
    ["A dog runs.", "A brown dog is running fast.", "Dog runs outside!", "A dog", "The dog runs."],
    ["Two men sit.", "Two men are sitting on a bench.", "Men sit.", "Two guys", "The men sit down."],
]


def write_flickr30k(root: Path) -> None:
    images = []
    for number, (name, split) in enumerate((("1.jpg", "test"), ("2.jpg", "train"), ("3.jpg", "test"))):
        captions = CAPTIONS[number // 2]
        sentences = [
            {"tokens": raw.lower().split(), "raw": raw, "imgid": number, "sentid": 5 * number + index}
            for index, raw in enumerate(captions)
        ]
        sentids = [sentence["sentid"] for sentence in sentences]
        images.append({"sentids": sentids, "imgid": number, "sentences": sentences, "split": split, "filename": name})
        if split == "test":
            save_picture(root / "flickr30k/flickr30k-images" / name, number)
    write_json(root / "flickr30k/dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def solid(path: Path, colour: int | tuple[int, int, int], side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (colour,) * 3 if isinstance(colour, int) else colour).save(path)


EMOJI = [  # name, group, style, colour, held out
    ("red apple", "food & drink", "noto", (255, 0, 0), False),
    ("red apple", "food & drink", "twemoji", (245, 0, 0), True),
    ("leaf", "animals & nature", "noto", (0, 255, 0), False),
    ("leaf", "animals & nature", "fluent 3d", (0, 200, 0), False),
]


def emoji_key(name: str, style: str) -> str:
    return f"{name}_{style}".replace(" ", "-")


def write_emoji(root: Path) -> None:
    """The manifest as examples/emoji_world/make.py writes it, as far as the evaluation reads it."""
    names = {name: {"name": name, "group": group, "tags": []} for name, group, *_ in EMOJI}
    pictures = [
        {"key": emoji_key(name, style), "name": name, "style": style, "held_out": held_out}
        for name, _, style, _, held_out in EMOJI
    ]
    for name, _, style, colour, _ in EMOJI:
        solid(root / f"emoji_world/images/{emoji_key(name, style)}.png", colour)
    write_json(root / "emoji_world/manifest.json", {"names": list(names.values()), "pictures": pictures})


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
]


def write_geneval(root: Path) -> None:
    (root / "geneval").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in GENEVAL)
    (root / "geneval/evaluation_metadata.jsonl").write_text(lines)


COCO_GREYS = {11: 0, 12: 100, 13: 200}


class MeanColour(torch.nn.Module):
    """One feature, in the place of Inception."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(1, 2, 3))[:, None]


def write_networks(root: Path) -> None:
    """`inception.pt` and `clip/`, tiny ones of the classes that the real ones have."""
    torch.jit.script(MeanColour()).save(root / "inception.pt")
    (root / "clip").mkdir(exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words += [chr(ord("a") + number) for number in range(26)]
    vocabulary = {word: number for number, word in enumerate(words)}
    write_json(root / "clip/vocab.json", vocabulary)
    (root / "clip/merges.txt").write_text("#version: 0.2\n")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 24}
    config = CLIPConfig(text_config=text | ids, vision_config=text | {"image_size": 24, "patch_size": 8})
    config.projection_dim = 8
    fill_(CLIPModel(config)).save_pretrained(root / "clip")
    side = {"height": 24, "width": 24}
    image_processor = image_processor_class()(size={"shortest_edge": 24}, crop_size=side)
    tokenizer = CLIPTokenizer(str(root / "clip/vocab.json"), str(root / "clip/merges.txt"))
    CLIPProcessor(image_processor, tokenizer).save_pretrained(root / "clip")


def write_coco(root: Path) -> None:
    images, annotations = [], []
    for number, grey in COCO_GREYS.items():
        name = coco_name(number)
        solid(root / "coco/val2014" / name, grey)
        images.append({"id": number, "file_name": name, "height": 32, "width": 32})
        for caption in ("a b", "c d\n"):
            annotations.append({"image_id": number, "id": len(annotations) + 1, "caption": f"{caption} {number}"})
    write_json(root / "coco/annotations/captions_val2014.json", {"images": images, "annotations": annotations})
    write_networks(root)


def write_reconstruction(root: Path) -> None:
    solid(root / "pictures/a.png", 100)
    solid(root / "pictures/more/b.JPG", 200)
    write_networks(root)


WRITERS = {
    "pope": write_pope,
    "mme": write_mme,
    "vqav2": write_vqav2,
    "gqa": write_gqa,
    "mmmu": write_mmmu,
    "flickr30k": write_flickr30k,
    "geneval": write_geneval,
    "coco": write_coco,
    "reconstruction": write_reconstruction,
    "emoji": write_emoji,
}
