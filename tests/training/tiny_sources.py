"""More data of the tiny world, one small set of every kind a configuration can name, and a CLIP tower."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.training.tiny import CAPTIONS, COLOURS, LLM_VOCAB_SIZE, MAX_TEXT, picture
from tools import small_clip

CLIP_WIDTH, NUM_FEATURES = 16, 9


def write_imagenet(folder: Path) -> Path:
    """Class folders ``train/n0000000k/*.JPEG``, one for each colour, with the data set's own file of names."""
    lines = []
    for number, colour in enumerate(COLOURS):
        place = folder / "train" / f"n{number:08d}"
        place.mkdir(parents=True)
        lines.append(f"n{number:08d} {colour} square, something {colour}")
        for index, caption in enumerate(text for text in CAPTIONS if colour in text):
            picture(caption).save(place / f"{index}.JPEG", "JPEG")
    (folder / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n")
    return folder


def turns(caption: str, rounds: int = 1) -> list[dict]:
    """A conversation in LLaVA's form; the first round names the picture, as LLaVA's pre-training set does."""
    _, colour, _, _, _, place = caption.split()
    asked = [("<image>\nWhat is it?", caption), ("Which colour?", colour), ("Where?", place)][:rounds]
    sides = [({"from": "human", "value": q}, {"from": "gpt", "value": a}) for q, a in asked]
    return [turn for pair in sides for turn in pair]


def write_llava(folder: Path, rounds: int = 1) -> Path:
    """`images/` and `llava_{rounds}.json`, one record a picture."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index, caption in enumerate(CAPTIONS):
        picture(caption).save(folder / "images" / f"{index}.png")
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns(caption, rounds)})
    file = folder / f"llava_{rounds}.json"
    file.write_text(json.dumps(records))
    return file


def write_clip(folder: Path) -> Path:
    """A tower that gives 9 features of 16 numbers."""
    sizes = {"image_size": 24, "patch_size": 8, "hidden_size": CLIP_WIDTH, "layers": 2, "heads": 2}
    small_clip.main([f"output_dir={folder}", *(f"{key}={value}" for key, value in sizes.items())])
    return folder


def clip_settings(world: Path, und_type: str = "llava_pretrain", **changes) -> dict:
    """What the CLIP-ViT branch needs beyond the tiny world's own settings."""
    pretrain = und_type == "llava_pretrain"
    return {
        "model.showo.w_clip_vit": True,
        "model.clip_vit_name": world / "clip",
        "dataset.und_type": und_type,
        "dataset.params.train_mmu_shards_path_or_url": world / f"llava_{1 if pretrain else 2}.json",
        "dataset.params.train_mmu_image_root": world / "images",
        # The system prompt has some 150 ids in the tiny tokenizer.
        "dataset.preprocessing.max_seq_length": MAX_TEXT if pretrain else 256,
        "training.max_train_steps": 2,
        "experiment.save_every": 1,
        "training.ema_decay": None,
    } | changes


def write_llm_weights(folder: Path, spare_rows: int = 30, tied: bool = False) -> Path:
    """Weights for the folder of `write_llm` as Phi-1.5 has them: half precision, and more rows than its tokenizer."""
    settings = {"vocab_size": LLM_VOCAB_SIZE + spare_rows, "tie_word_embeddings": tied}
    config = AutoConfig.from_pretrained(folder, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    return folder
