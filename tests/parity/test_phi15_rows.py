"""Rows and labels of every task equal the published system's with Phi-1.5's real tokenizer (spec §1, §2)."""

import json
from pathlib import Path

import pytest
import torch

from models import UniversalPrompting
from models.vocabulary import PAD_TOKEN, SPECIAL_TOKENS
from tests.parity.phi15 import phi15_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden/public/phi15_text.json").read_text())
CASE = GOLDEN["prompts"]
IMAGE_IDS = torch.tensor(CASE["image_ids"])


@pytest.fixture(scope="module")
def build():
    return UniversalPrompting(phi15_tokenizer(), max_text_len=CASE["max_text_len"], cond_dropout_prob=0.0)


def test_special_token_ids(build):
    names = [PAD_TOKEN, *SPECIAL_TOKENS]
    assert [build.special_token_ids[name] for name in names] == list(range(50295, 50305))
    assert (build.bos_id, build.eos_id) == (50256, 50256)
    assert len(build.tokenizer) == build.vocabulary.image_offset == 50305


@pytest.mark.parametrize(
    ("task", "inputs"),
    [
        ("t2i", (CASE["texts"], IMAGE_IDS, torch.tensor(CASE["t2i_labels_in"]))),
        ("t2i_gen", (CASE["texts"], IMAGE_IDS)),
        ("lm", (CASE["texts"], CASE["lm_len"])),
        ("mmu", (IMAGE_IDS, CASE["texts"])),
    ],
)
def test_rows_and_labels(build, task, inputs):
    rows = build(inputs, task)
    assert rows.input_ids.dtype == torch.int64
    assert rows.input_ids.tolist() == CASE[f"{task}_input_ids"]
    if task == "t2i_gen":
        assert rows.labels is None
    else:
        assert rows.labels.tolist() == CASE[f"{task}_labels"]


def test_clip_row_without_bos(build):
    """`<mmu>`, the 28 system ids, `<soi>`, features, `<eoi>`, and the question as it is tokenised."""
    system = build.tokenizer.decode(GOLDEN["system_prompt_ids"])
    question = "USER: What is this? ASSISTANT:"
    row = build(([question], 3, system), "mmu_vit").input_ids[0].tolist()
    ids = build.tokenizer(question)["input_ids"]
    assert row == [50301, *GOLDEN["system_prompt_ids"], 50296, -200, -200, -200, 50297, *ids]
