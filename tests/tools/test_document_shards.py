"""Shards of documents, and of their codes."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from common.errors import UserError
from models.images import normalized
from tests.tools.sets import read_set
from tests.training.tiny import CAPTIONS, NUM_TOKENS, RESOLUTION, image_bytes, make_vq_model, picture
from tools import encode_images, make_shards
from training.data.documents import TurnWords, located, read_segments, record_of
from training.data.image_text import ImageTransform
from training.data.shards import CODES

TURNS = [{"from": "human", "value": "<image>\n<image>\nWhat changed?"}, {"from": "gpt", "value": "The colour."}]
EDIT = {"before": "0.png", "instruction": "make it green", "after": "1.png", "kind": "colour"}
RECORDS = [
    EDIT,
    {"images": ["1.png", "large.jpg"], "captions": CAPTIONS[:2]},
    {"images": [None, "0.png"], "texts": ["a", None]},
    {"image": ["0.png", "1.png"], "messages": TURNS, "id": 7},
    {"segments": [{"text": "only a text"}]},
]
WRITTEN = [
    {"segments": [{"image": "0.png", "loss": False}, {"text": "make it green", "loss": False},
                  {"image": "1.png", "loss": True}]},
    {"segments": [{"text": CAPTIONS[0], "loss": True}, {"image": "0.png", "loss": True},
                  {"text": CAPTIONS[1], "loss": True}, {"image": "1.jpg", "loss": True}]},
    {"segments": [{"text": "a", "loss": True}, {"image": "0.png", "loss": True}]},
    {"image": ["0.png", "1.png"], "conversations": TURNS},
    {"segments": [{"text": "only a text", "loss": True}]},
]  # fmt: skip


@pytest.fixture
def world(tmp_path) -> Path:
    """Three images, and one that is none."""
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.png").write_bytes(image_bytes(picture(CAPTIONS[number])))
    picture(CAPTIONS[2]).resize((70, 50)).save(tmp_path / "images" / "large.jpg")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return tmp_path


def documents(world: Path, records: list) -> Path:
    (world / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return world / "a.jsonl"


def run(world: Path, **settings) -> tuple[list[dict], dict]:
    values = {"source": world / "images", "output": world / "shards" / "train", "shuffle": False} | settings
    make_shards.main([f"{key}={value}" for key, value in values.items()])
    return read_set(world / "shards" / "train")


def records_of(samples: list[dict]) -> list[dict]:
    return [json.loads(sample["json"]) for sample in samples]


def test_every_form_becomes_segments_with_their_images_and_a_conversation_stays_one(world):
    samples, manifest = run(world, documents=documents(world, RECORDS), resize=40)
    assert records_of(samples) == WRITTEN and manifest["skipped"] == {} and manifest["samples"] == 5
    assert [set(sample) - {"__key__", "__url__", "json"} for sample in samples] == [
        {"0.png", "1.png"}, {"0.png", "1.jpg"}, {"0.png"}, {"0.png", "1.png"}, set()
    ]  # fmt: skip
    assert samples[1]["0.png"] == (world / "images" / "1.png").read_bytes()
    assert Image.open(io.BytesIO(samples[1]["1.jpg"])).size == (56, 40)
    kept, _ = run(world, documents=documents(world, RECORDS), metadata=True, overwrite=True)
    assert records_of(kept)[0] == WRITTEN[0] | {"kind": "colour"} and records_of(kept)[3] == WRITTEN[3] | {"id": 7}


def test_tables_and_parquet(world):
    (world / "a.csv").write_text("before,instruction,after\n0.png,make it green,1.png\n")
    table = [{"original_image": {"bytes": (world / "images" / f"{n}.png").read_bytes(), "path": None},
              "edit_prompt": f"{n}", "edited_image": {"bytes": None, "path": "1.png"}} for n in range(2)]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), world / "a.parquet", row_group_size=1)
    assert records_of(run(world, documents=world / "a.csv")[0]) == WRITTEN[:1]
    samples, _ = run(world, documents=world / "a.parquet", overwrite=True)
    assert [record["segments"][1]["text"] for record in records_of(samples)] == ["0", "1"]
    assert samples[0]["0.png"] != samples[1]["0.png"] == samples[1]["1.png"]
    shuffled = [run(world, documents=world / "a.parquet", overwrite=True, shuffle=True, seed=s)[0] for s in range(4)]
    assert len({sample["json"] for samples in shuffled for sample in samples[:1]}) == 2


def test_bad_documents_are_left_out_whole_and_counted(world, capsys):
    bad = [EDIT | {"after": after} for after in ("broken.png", "none.png", [1, 2], " ")] + [{"text": "a"}]
    bad += [{"image": ["0.png"], "conversations": TURNS}, EDIT | {"instruction": ""}]
    samples, manifest = run(world, documents=documents(world, [EDIT, *bad]))
    assert records_of(samples) == WRITTEN[:1]
    kinds = {"unreadable_image": 1, "missing_file": 2, "malformed_item": 2, "bad_document": 1, "empty_text": 1}
    assert manifest["skipped"] == kinds and "skipped 7 of 8 samples" in capsys.readouterr().out


def test_documents_that_begin_with_the_same_image_are_held_out_together(world):
    records = [EDIT | {"before": f"{n % 2}.png", "instruction": f"{n}"} for n in range(6)] + [RECORDS[4]]
    samples, manifest = run(world, documents=documents(world, records), holdout=0.4)
    kept = {record["segments"][1]["text"] for record in records_of(samples) if len(record["segments"]) > 1}
    assert manifest["heldout"] and kept in ({"0", "2", "4"}, {"1", "3", "5"}, {str(n) for n in range(6)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"documents": "{0}/images/0.png"}, "documents: .*0.png is no file of .parquet, .json, .jsonl, .csv, .tsv"),
        ({"documents": "{0}/none.json"}, "documents: 1 of 1 files do not exist: .*none.json"),
        ({"documents": "{0}/a.jsonl", "captions": "b.csv"}, "captions=b.csv is of images with captions; leave it out"),
    ],
)
def test_mistakes_are_named(world, settings, message):
    documents(world, [EDIT])
    with pytest.raises(UserError, match=message):
        run(world, **{key: value.format(world) for key, value in settings.items()})


@pytest.mark.parametrize(("batch_size", "keep_images"), [(4, False), pytest.param(1, True, marks=pytest.mark.slow)])
def test_codes_of_documents(world, batch_size, keep_images):
    samples, _ = run(world, documents=documents(world, RECORDS[:4]))
    make_vq_model().save_pretrained(world / "magvitv2")
    settings = {"shards": world / "shards" / "train-000000.tar", "output": world / "codes" / "train", "device": "cpu"}
    settings |= {"vq_model_name": world / "magvitv2", "resolution": RESOLUTION}
    settings |= {"batch_size": batch_size, "keep_images": keep_images}
    encode_images.main([f"{key}={value}" for key, value in settings.items()])
    encoded, manifest = read_set(world / "codes" / "train")
    assert manifest["num_vq_tokens"] == NUM_TOKENS and manifest["samples"] == 4
    images, vq_model = ImageTransform(RESOLUTION, NUM_TOKENS, 64), make_vq_model()
    for raw, source in zip(encoded, samples, strict=True):
        assert raw["json"] == source["json"] and any(name[1:] in (".png", ".jpg") for name in raw) == keep_images
        for segment in read_segments(record_of(raw), "", TurnWords()):
            if "image" in segment:
                codes = images.of(located(segment["image"], raw, None), None)["codes"]
                pixels = images.of(located(segment["image"], source, None), None)["image"]
                expected = vq_model.get_code(normalized(pixels)[None])[0]
                assert CODES not in raw and codes.tolist() == expected.tolist()
