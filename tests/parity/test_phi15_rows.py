"""Rows of all tasks (spec §1, §2) and LLaVA samples (§8, §9) equal the published ones, by Phi-1.5's real tokenizer."""

import pytest
import torch

from llava import SYSTEM_PROMPT, collate, encode_conversation, encode_plain
from models import UniversalPrompting
from models.vocabulary import PAD_TOKEN, SPECIAL_TOKENS
from tests.parity.phi15 import GOLDEN, phi15_tokenizer

CASE = GOLDEN["prompts"]
IMAGE_IDS = torch.tensor(CASE["image_ids"])
SYSTEM_LENGTH = 28  # tuning rows are collated to max_length − 28 (spec §9)


@pytest.fixture(scope="module")
def tokenizer():
    return phi15_tokenizer()


def test_tokenizer_is_phi15(tokenizer):
    assert len(tokenizer) == 50295
    expected = [4299, 277, 33529, 198, 50284, 7783, 352, 50294, 87, 50286, 88]
    assert tokenizer("def f():\n    return 1\t\tx  y").input_ids == expected


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
    labels = None if rows.labels is None else rows.labels.tolist()
    assert labels == CASE.get(f"{task}_labels")


def test_clip_row_without_bos(build):
    """`<mmu>`, the 28 system ids, `<soi>`, features, `<eoi>`, and the question as it is tokenised."""
    system = build.tokenizer.decode(GOLDEN["system_prompt_ids"])
    question = "USER: What is this? ASSISTANT:"
    row = build(([question], 3, system), "mmu_vit").input_ids[0].tolist()
    ids = build.tokenizer(question)["input_ids"]
    assert row == [50301, *GOLDEN["system_prompt_ids"], 50296, -200, -200, -200, 50297, *ids]


def test_system_prompt(tokenizer):
    ids = tokenizer(SYSTEM_PROMPT).input_ids
    assert len(ids) == SYSTEM_LENGTH and ids == GOLDEN["system_prompt_ids"]
    assert all(case["system_ids"] == ids for case in GOLDEN["conversations"])


def check(got, case):
    for key in ("input_ids", "labels"):
        assert got[key].dtype == torch.int64
        assert got[key].tolist() == case[key]


@pytest.mark.parametrize("case", [*GOLDEN["conversations"], *GOLDEN["plain"]])
def test_conversations(case, tokenizer):
    encode = encode_conversation if "system_ids" in case else encode_plain
    check(encode(case["conversation"], tokenizer), case)


@pytest.mark.parametrize("max_length", GOLDEN["collated"])
@pytest.mark.parametrize("with_pad", [False, True])
def test_collation(max_length, with_pad):
    tokenizer = phi15_tokenizer()
    if with_pad:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    samples = [encode_conversation(case["conversation"], tokenizer) for case in GOLDEN["conversations"]]
    check(collate(samples, tokenizer, int(max_length) - SYSTEM_LENGTH), GOLDEN["collated"][max_length])
