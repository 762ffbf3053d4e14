"""LLaVA samples equal the published system's, case by case (spec §8, §9), with Phi-1.5's real tokenizer."""

import json
from pathlib import Path

import pytest
import torch

from llava import SYSTEM_PROMPT, collate, encode_conversation, encode_plain
from tests.parity.phi15 import phi15_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden/public/phi15_text.json").read_text())
SYSTEM_LENGTH = 28  # tuning rows are collated to max_length − 28 (spec §9)


@pytest.fixture(scope="module")
def tokenizer():
    return phi15_tokenizer()


def check(got, case):
    for key in ("input_ids", "labels"):
        assert got[key].dtype == torch.int64
        assert got[key].tolist() == case[key]


def test_tokenizer_is_phi15(tokenizer):
    assert len(tokenizer) == 50295
    expected = [4299, 277, 33529, 198, 50284, 7783, 352, 50294, 87, 50286, 88]
    assert tokenizer("def f():\n    return 1\t\tx  y").input_ids == expected


def test_system_prompt(tokenizer):
    ids = tokenizer(SYSTEM_PROMPT).input_ids
    assert len(ids) == SYSTEM_LENGTH
    assert ids == GOLDEN["system_prompt_ids"]
    assert all(case["system_ids"] == ids for case in GOLDEN["conversations"])


@pytest.mark.parametrize("case", GOLDEN["conversations"])
def test_conversation(case, tokenizer):
    check(encode_conversation(case["conversation"], tokenizer), case)


@pytest.mark.parametrize("case", GOLDEN["plain"])
def test_plain(case, tokenizer):
    check(encode_plain(case["conversation"], tokenizer), case)


@pytest.mark.parametrize("max_length", GOLDEN["collated"])
@pytest.mark.parametrize("with_pad", [False, True])
def test_collation(max_length, with_pad):
    tokenizer = phi15_tokenizer()
    if with_pad:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    samples = [encode_conversation(case["conversation"], tokenizer) for case in GOLDEN["conversations"]]
    check(collate(samples, tokenizer, int(max_length) - SYSTEM_LENGTH), GOLDEN["collated"][max_length])
