"""The published system's outputs and the tiny model they came from."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from models import OmniMask, Showo, ShowoConfig, UniversalPrompting
from tests.parity.golden.fill import fill_

FOLDER = Path(__file__).parent / "golden"
PHI = FOLDER / "public" / "phi"


@cache
def tensors(name: str = "golden") -> dict:
    return load_file(FOLDER / "public" / f"{name}.safetensors")


@cache
def facts() -> dict:
    return json.loads((FOLDER / "public" / "golden.json").read_text())


def prompting(cond_dropout_prob: float = 0.0) -> UniversalPrompting:
    tokenizer = AutoTokenizer.from_pretrained(PHI, padding_side="left")
    return UniversalPrompting(tokenizer, max_text_len=facts()["max_text_len"], cond_dropout_prob=cond_dropout_prob)


def task_rows() -> dict:
    """Rows of the forward golden: t2i ×3 (with left pads), lm ×2, mmu ×2 (with right pads)."""
    build, golden, texts = prompting(), tensors(), facts()
    images, labels = golden["prompt.t2i_image_ids"], golden["prompt.t2i_image_labels"]
    return {
        "t2i": build((texts["t2i_texts"], images, labels), "t2i"),
        "lm": build((texts["lm_texts"], 31), "lm"),
        "mmu": build((golden["prompt.mmu_image_ids"], texts["mmu_texts"]), "mmu"),
    }


def mixed_batch() -> tuple[torch.Tensor, torch.Tensor, OmniMask]:
    """Ids, labels and mask of all of them."""
    rows = task_rows().values()
    ids, labels = (torch.cat([getattr(row, name) for row in rows]) for name in ("input_ids", "labels"))
    return ids, labels, OmniMask.cat([row.attention_mask for row in rows])


def tiny_config(**overrides) -> ShowoConfig:
    f = facts()
    settings = {"vocab_size": f["vocab_size"], "llm_vocab_size": f["llm_vocab_size"]}
    settings |= {"codebook_size": f["codebook_size"], "num_vq_tokens": f["num_vq_tokens"]}
    return ShowoConfig(llm_model_path=str(PHI), **settings | overrides)


def tiny_showo(**overrides) -> Showo:
    """The golden tiny model, weights filled from names."""
    attn = {"attn_implementation": overrides.pop("attn_implementation")} if "attn_implementation" in overrides else {}
    return fill_(Showo._from_config(tiny_config(**overrides), **attn)).eval()
