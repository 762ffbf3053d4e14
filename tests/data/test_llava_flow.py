"""Conversations on pictures, in LLaVA's form."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from common.errors import UserError
from llava import encode_conversation, encode_plain
from tests.parity.goldens import PHI
from tests.training.tiny import CAPTIONS, image_bytes, picture, sample
from training.data.image_text import ImageTransform
from training.data.llava_flow import LlavaRecords, LlavaSample
from training.data.skipping import SkipSample


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PHI)


TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red square."}]


def record(**changes) -> dict:
    return {"id": "1", "image": "a/0.png", "conversations": TURNS} | changes


def write(tmp_path, records, name="llava.json") -> str:
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / "0.png").write_bytes(image_bytes(picture(CAPTIONS[0])))
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (tmp_path / name).write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    return str(tmp_path / name)


def transform(tokenizer, encode=encode_conversation, text_length=40, **settings) -> LlavaSample:
    pictures = ImageTransform(32, num_codes=16, codebook_size=64, **settings)
    return LlavaSample(pictures, encode, tokenizer, text_length)


def items(units: LlavaRecords, item: LlavaSample) -> list:
    """The items, and in place of one that is skipped its kind."""
    made = []
    for index in range(len(units)):
        for raw in units.read(index, random.Random(0)):
            try:
                made.append(item(raw, random.Random(0)))
            except SkipSample as skipped:
                made.append(skipped.kind)
    return made


def test_an_item_is_the_picture_at_the_configured_resolution_and_the_conversation(tmp_path, tokenizer):
    (item,) = items(LlavaRecords([write(tmp_path, [record()])]), transform(tokenizer))
    assert item["image"].shape == (32, 32, 3)
    expected = encode_conversation(TURNS, tokenizer)
    assert torch.equal(item["input_ids"], expected["input_ids"]) and torch.equal(item["labels"], expected["labels"])


def test_pre_training_learns_the_whole_answer(tmp_path, tokenizer):
    (item,) = items(LlavaRecords([write(tmp_path, [record()])]), transform(tokenizer, encode_plain))
    assert torch.equal(item["input_ids"], item["labels"])
    assert torch.equal(item["labels"], encode_plain(TURNS, tokenizer)["labels"])


def test_pictures_are_found_under_their_root_or_beside_the_json(tmp_path, tokenizer):
    write(tmp_path, [])
    (tmp_path / "json").mkdir()
    path = write(tmp_path / "json", [record(image="0.png")])
    units = LlavaRecords([path])
    assert items(units, transform(tokenizer)) == ["missing_file"]
    (item,) = items(units, transform(tokenizer, root=str(tmp_path / "a")))
    assert item["image"].shape == (32, 32, 3)


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_records_without_a_picture_are_left_out(tmp_path, name):
    path = write(tmp_path, [record(id=1), {"conversations": TURNS}, record(image=None), record(id=4)], name)
    units = LlavaRecords([path, path])
    assert len(units) == units.samples == 4
    raws = [next(units.read(index, random.Random(0))) for index in range(4)]
    assert [json.loads(raw["json"])["id"] for raw in raws] == [1, 4, 1, 4]
    assert raws[3]["__key__"] == f"{path}: record 1"
    with pytest.raises(UserError, match="no record with an image"):
        LlavaRecords([write(tmp_path, [{"conversations": TURNS}], name)])


BAD = {
    "unreadable_image": record(image="a/broken.png"),
    "missing_file": record(image="a/none.png"),
    "malformed_item": {"image": "a/0.png"},
    "bad_conversation": record(conversations=[TURNS[0], TURNS[0]]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_records_are_skipped_by_kind(tmp_path, tokenizer, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    made = items(LlavaRecords([write(tmp_path, [record(), BAD[kind], record()])]), transform(tokenizer))
    assert [item if isinstance(item, str) else "item" for item in made] == ["item", kind, "item"]


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ('"text"', "malformed_item"),
        (["a"], "malformed_item"),
        (record(image=["a/0.png", "a/1.png"]), "malformed_item"),
        (record(image=7), "malformed_item"),
        (record(conversations=None), "bad_conversation"),
        (record(conversations=[]), "bad_conversation"),
        (record(conversations=[{"from": "human"}]), "bad_conversation"),
        (record(conversations=[{"from": "system", "value": "x"}]), "bad_conversation"),
        (record(conversations=[TURNS[0], {"from": "gpt", "value": "half of \ud83d"}]), "malformed_item"),
        (record(conversations=[TURNS[0], {"from": "gpt", "value": "a ASSISTANT: b"}]), "bad_conversation"),
        (record(conversations=[{"from": "human", "value": "w " * 60}, TURNS[1]]), "bad_conversation"),
    ],
)
def test_malformed_records_and_conversations_without_labels_are_skipped(tmp_path, tokenizer, changed, kind):
    assert items(LlavaRecords([write(tmp_path, [changed])]), transform(tokenizer)) == [kind]


def test_a_broken_line_of_a_jsonl_file_is_skipped(tmp_path, tokenizer):
    path = write(tmp_path, [record(), '{"image": "a/0.png", "conv', record()], "llava.jsonl")
    made = items(LlavaRecords([path]), transform(tokenizer))
    assert made[1] == "malformed_item" and not any(isinstance(made[n], str) for n in (0, 2))


def test_shards_bring_record_and_picture_along(tokenizer):
    raw = sample(CAPTIONS[0]) | {"__key__": "a", "json": json.dumps(record(image="elsewhere.png")).encode()}
    item = transform(tokenizer)(raw, random.Random(0))
    assert item["image"].shape == (32, 32, 3) and "input_ids" in item
    with pytest.raises(SkipSample, match="malformed_item"):
        transform(tokenizer)(sample(CAPTIONS[0]) | {"__key__": "a"}, random.Random(0))


def test_a_file_that_has_gone_is_counted(tmp_path):
    units = LlavaRecords([write(tmp_path, [record()])])
    (tmp_path / "llava.json").unlink()
    assert [raw.kind for raw in units.read(0, random.Random(0))] == ["missing_file"]
