"""Conversations on images, in LLaVA's form."""

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
from training.data.llava import LlavaRecords, LlavaSample
from training.data.sources import CUT, Skipped

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red square."}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PHI)


def record(**changes) -> dict:
    return {"id": "1", "image": "a/0.png", "conversations": TURNS} | changes


def write(folder, records, name="llava.json") -> str:
    (folder / "a").mkdir(exist_ok=True)
    (folder / "a" / "0.png").write_bytes(image_bytes(picture(CAPTIONS[0])))
    (folder / "a" / "broken.png").write_bytes(b"no image")
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / name).write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    return str(folder / name)


def transform(tokenizer, encode=encode_conversation, text_length=40, **settings) -> LlavaSample:
    return LlavaSample(ImageTransform(32, num_codes=16, codebook_size=64, **settings), encode, tokenizer, text_length)


def made(units: LlavaRecords, transform: LlavaSample) -> list:
    """The samples, and in place of one that is skipped its kind."""
    found = []
    for raw in (raw for index in range(len(units)) for raw in units.read(index, random.Random(0))):
        try:
            found.append(transform(raw, random.Random(0)))
        except Skipped as skipped:
            found.append(skipped.kind)
    return found


@pytest.mark.parametrize("encode", [encode_conversation, encode_plain])
def test_a_sample_is_the_image_and_the_conversation(tmp_path, tokenizer, encode):
    (item,) = made(LlavaRecords([write(tmp_path, [record()])]), transform(tokenizer, encode))
    assert item["image"].shape == (32, 32, 3)
    expected = encode(TURNS, tokenizer)
    assert torch.equal(item["input_ids"], expected["input_ids"]) and torch.equal(item["labels"], expected["labels"])


def test_images_are_found_under_their_root_and_shards_bring_them_along(tmp_path, tokenizer):
    units = LlavaRecords([write(tmp_path, [record(image="0.png")])])
    assert made(units, transform(tokenizer)) == ["missing_file"], "beside the json"
    (item,) = made(units, transform(tokenizer, root=str(tmp_path / "a")))
    raw = sample(CAPTIONS[0]) | {"__key__": "a", "json": json.dumps(record(image="elsewhere.png")).encode()}
    assert torch.equal(transform(tokenizer)(raw, random.Random(0))["image"], item["image"])
    with pytest.raises(Skipped, match="malformed_item"):
        transform(tokenizer)(sample(CAPTIONS[0]) | {"__key__": "a"}, random.Random(0))


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_records_without_an_image_are_left_out(tmp_path, name):
    path = write(tmp_path, [record(id=1), {"conversations": TURNS}, record(image=None), record(id=4)], name)
    units = LlavaRecords([path, path])
    raws = [next(units.read(index, random.Random(0))) for index in range(len(units))]
    assert [json.loads(raw["json"])["id"] for raw in raws] == [1, 4, 1, 4] and units.samples == 4
    assert raws[3]["__key__"] == f"{path}: record 1"
    (tmp_path / name).unlink()
    assert [raw.kind for raw in units.read(0, random.Random(0))] == ["missing_file"]
    with pytest.raises(UserError, match="no record with an image"):
        LlavaRecords([write(tmp_path, [{"conversations": TURNS}], name)])


def test_other_words_and_forms_mean_the_same(tmp_path, tokenizer):
    chat = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "\ufeffA red square."},
    ]
    (plain,) = made(LlavaRecords([write(tmp_path, [record()])]), transform(tokenizer))
    other = {
        "image": ["a/0.png"],
        "conversations": None,
        "messages": [{"role": "system", "content": "Be kind."}, *chat],
    }
    (tmp_path / "wrapped.json").write_bytes(
        json.dumps({"v": 1, "info": ["x"], "data": [other, {"messages": chat}]}).encode("utf-16")
    )
    (item,) = made(LlavaRecords([str(tmp_path / "wrapped.json")]), transform(tokenizer))
    assert all(torch.equal(item[key], plain[key]) for key in ("image", "input_ids", "labels"))


def test_a_missing_image_names_the_setting_and_the_json(tmp_path, tokenizer):
    path = write(tmp_path, [record(image="gone.png")])
    raw = next(LlavaRecords([path]).read(0, random.Random(0)))
    with pytest.raises(Skipped) as problem:
        transform(tokenizer, root="/pictures")(raw, random.Random(0))
    assert problem.value.detail == (
        f"/pictures/gone.png, named by {path}: record 0, relative to dataset.params.train_mmu_image_root=/pictures"
    )


def test_a_conversation_that_is_cut_is_noted(tmp_path, tokenizer):
    length = len(encode_conversation(TURNS, tokenizer)["input_ids"])
    for room, notes in ((length, None), (length - 1, (CUT,))):
        (item,) = made(LlavaRecords([write(tmp_path, [record()])]), transform(tokenizer, text_length=room))
        assert item.get("notes") == notes


def turns(*values) -> dict:
    sides = ("human", "gpt")
    return record(conversations=[{"from": sides[n % 2], "value": value} for n, value in enumerate(values)])


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        (record(image="a/broken.png"), "unreadable_image"),
        (record(image="a/none.png"), "missing_file"),
        ("[" * 50_000, "malformed_item"),
        (record(conversations={"0": 1}), "bad_conversation"),
        (record(conversations=[7, []]), "bad_conversation"),
        (record(conversations=[{"from": ["human"], "value": "x"}]), "bad_conversation"),
        *((bad, "malformed_item") for bad in ({"image": "a/0.png"}, '"text"', ["a"], '{"image": "a/0.png", "conv')),
        *((record(image=image), "malformed_item") for image in (["a/0.png", "a/1.png"], 7)),
        (turns("What?", "half of \ud83d"), "malformed_item"),
        *((record(conversations=bad), "bad_conversation") for bad in (None, [], [{"from": "human"}])),
        (record(conversations=[{"from": "system", "value": "x"}]), "bad_conversation"),
        (record(conversations=[TURNS[0], TURNS[0]]), "bad_conversation"),
        (turns("What?", "a ASSISTANT: b"), "bad_conversation"),
        (turns("w " * 60, "A red square."), "bad_conversation"),  # no label within the row
    ],
)
def test_malformed_records_and_conversations_without_labels_are_skipped(tmp_path, tokenizer, changed, kind):
    units = LlavaRecords([write(tmp_path, [record(), changed, record()], "llava.jsonl")])
    found = made(units, transform(tokenizer))
    assert [item if isinstance(item, str) else "sample" for item in found] == ["sample", kind, "sample"]
