"""Documents in every form in which people keep them."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from common.errors import UserError
from common.files import REPOSITORY
from examples.scenes.make import main as make_scenes
from llava import QuestionFormat
from models import UniversalPrompting
from models.images import preprocess
from tests.tiny_llms import qwen_like
from tests.training.tiny import CAPTIONS, config_of, image_bytes, picture, write_shard, write_world
from training.data.documents import DocumentSample, TurnWords, document_length, open_documents, read_segments
from training.data.flows import MixedReader, Reading, check_data, open_flows
from training.data.image_text import ImageTransform
from training.data.sources import CUT_DOCUMENT, ROTATED, Skipped

A, B, C = CAPTIONS[:3]
N = 16  # codes of an image
TRAIN = "dataset.params.train_mixed_shards_path_or_url"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(world):
    return UniversalPrompting(AutoTokenizer.from_pretrained(world / "llm")).tokenizer


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images, and one that is none."""
    for number, text in enumerate((A, B, C)):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(picture(text)))
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def transform(tokenizer, max_length=1000, conversation="vicuna", is_clean=True, **settings) -> DocumentSample:
    images = ImageTransform(32, num_codes=N, codebook_size=64, **settings)
    return DocumentSample(images, tokenizer, TurnWords.of(conversation, tokenizer), max_length, is_clean)


def raws(units) -> list:
    return [raw for index in range(len(units)) for raw in units.read(index, random.Random(0))]


def made(found: list, transform: DocumentSample) -> list:
    """The samples, and in place of one that is skipped its kind."""
    samples = []
    for raw in found:
        try:
            samples.append(transform(raw, random.Random(0)) if isinstance(raw, dict) else raw.kind)
        except Skipped as skipped:
            samples.append(skipped.kind)
    return samples


def plain(sample: dict) -> list[tuple]:
    """(text, or which of the images it is; whether it is learned) of each segment."""
    known = {np.asarray(picture(text)).tobytes(): number for number, text in enumerate((A, B, C))}
    return [(s["text"] if "text" in s else known[s["image"].numpy().tobytes()], s["loss"]) for s in sample["segments"]]


def write_records(folder: Path, records: list, name: str = "a.jsonl") -> str:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (folder / name).write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    return str(folder / name)


def of_record(folder: Path, record, tokenizer, **settings):
    """The sample of one record, or the kind of why there is none."""
    return made(raws(open_documents([write_records(folder, [record])])), transform(tokenizer, **settings))[0]


# ---- every form ----

STORY = [(A, True), (0, True), (B, True), (1, True)]
EDIT = [(0, False), ("make it green", False), (1, True)]
CHAT = [
    {"from": "human", "value": "<image>\n<image>\nWhat changed?"},
    {"from": "gpt", "value": "The colour."},
    {"from": "human", "value": "And here?\n<image>"},
    {"from": "gpt", "value": "The place."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]
TURNS = [
    (0, False),
    (1, False),
    ("USER: \nWhat changed? ASSISTANT:", False),
    (" The colour.", True),
    (2, False),
    ("USER: \nAnd here? ASSISTANT:", False),
    (" The place.<|endoftext|>", True),
    ("USER: \nSure? ASSISTANT:", False),
    (" Yes.", True),
]
FORMS = {
    "segments": ({"segments": [{"image": "0.png", "loss": False}, {"text": " a ", "loss": None}, {"image": "1.png"}]},
                 [(0, False), (" a ", True), (1, True)]),
    "story": ({"images": ["0.png", "1.png"], "captions": [f" {A}\n", B]}, STORY),
    "interleaved": ({"images": [None, "0.png", None, "1.png"], "texts": [A, None, B, None]}, STORY),
    "llava": ({"image": ["0.png", "1.png", "2.png"], "conversations": CHAT}, TURNS),
    "messages": ({"images": ["0.png"], "messages": [{"role": "system", "content": "Be kind."},
                                                   {"role": "user", "content": "Who?"},
                                                   {"role": "assistant", "content": "I"},
                                                   {"role": "user", "content": "What is <image> here?"}]},
                 [("USER: \nWho? ASSISTANT:", False), (" I", True), (0, False),
                  ("USER: \nWhat is  here? ASSISTANT:", False)]),
    "tags within": ({"image": ["0.png", "1.png", "2.png"], "conversations": [
        {"from": "human", "value": "<image> is A, <image> B and\n<image>"}, {"from": "gpt", "value": "So?"}]},
                    [(0, False), ("USER: \nis A,", False), (1, False), ("B and", False), (2, False),
                     (" ASSISTANT:", False), (" So?", True)]),
    "edit": ({"before": "0.png", "instruction": "make it green ", "after": "1.png"}, EDIT),
    "InstructPix2Pix": ({"original_prompt": "x", "original_image": "0.png", "edit_prompt": "make it green",
                         "edited_image": "1.png"}, EDIT),
    "MagicBrush": ({"source_img": "0.png", "mask_img": "2.png", "instruction": "make it green", "target_img": "1.png"},
                   EDIT),
}  # fmt: skip


def with_data(value, folder: Path, form: str):
    """A record of parquet: names of images as names, bytes, or both."""
    if isinstance(value, dict):
        return {key: with_data(one, folder, form) for key, one in value.items() if key != "mask_img"}
    if isinstance(value, list):
        return [with_data(one, folder, form) for one in value]
    if form == "names" or not (isinstance(value, str) and value.endswith(".png")):
        return value
    data = (folder / value).read_bytes()
    return data if form == "bytes" else {"bytes": data, "path": "elsewhere.png"}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kept_in", ["jsonl", "json", "names", "bytes", "both", "shard"])
def test_a_form_is_told_by_its_keys_wherever_it_is_kept(folder, tokenizer, name, kept_in):
    record, expected = FORMS[name]
    if kept_in.startswith("json"):
        found = raws(open_documents([write_records(folder, [record], f"a.{kept_in}")]))
    elif kept_in == "shard":
        members = {f"{n}.png": (folder / f"{n}.png").read_bytes() for n in range(3)}
        found = [{"__key__": "7", "__url__": "elsewhere/a.tar", "json": json.dumps(record).encode(), **members}]
    else:
        table = pyarrow.Table.from_pylist([with_data(record, folder, kept_in)])
        pyarrow.parquet.write_table(table, folder / "a.parquet")
        found = raws(open_documents([str(folder / "a.parquet")]))
    (sample,) = made(found, transform(tokenizer))
    assert plain(sample) == expected and sample["key"] == found[0]["__key__"] and "notes" not in sample
    assert all(s["image"].shape == (32, 32, 3) and s["image"].dtype == torch.uint8
               for s in sample["segments"] if "image" in s)  # fmt: skip


def test_the_examples_of_the_documentation(tokenizer):
    section = (REPOSITORY / "docs" / "data.md").read_text().partition("## Documents")[2]
    lines = section.partition("```json\n")[2].partition("\n```")[0].splitlines()
    words = TurnWords.of("vicuna", tokenizer)
    kinds = [["text" in s for s in read_segments(json.loads(line), "", words)] for line in lines]
    assert kinds == [[True, False, True, False], [True, False, True, False], [False, True, False]]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_edits_in_a_table(folder, tokenizer, name, mark):
    rows = [["after", "before", "instruction"], ["1.png", "0.png", '"make it ""green"""'], ["1.png", "0.png"]]
    (folder / name).write_text("\n".join(map(mark.join, rows)))
    (edit, bad) = made(raws(open_documents([str(folder / name)])), transform(tokenizer))
    assert plain(edit) == [(0, False), ('make it "green"', False), (1, True)] and bad == "malformed_item"
    (folder / name).write_text("before,instruction\n0.png,x")
    with pytest.raises(UserError, match="holds no documents; its columns are before, instruction, needed are"):
        open_documents([str(folder / name)])


def test_a_question_has_the_words_of_inference(folder, tokenizer):
    chat = UniversalPrompting(qwen_like()).tokenizer
    for conversation, own in (("vicuna", tokenizer), ("chat", chat)):
        words = QuestionFormat.of(conversation, own, with_features=False)
        found = plain(of_record(folder, FORMS["llava"][0], own, conversation=conversation))
        asked, first, second, _, third, _ = (text for text, _ in found if isinstance(text, str))
        assert asked == words.prompt("What changed?") and first.startswith(f"{words.answer_gap}The colour.")
        if conversation == "chat":  # the end of a turn is not the row's, so it is learned
            assert first == "The colour.<|im_end|>" and second == "\n" + words.prompt("And here?")
            assert third == "\n" + words.prompt("Sure?")


# ---- what cannot be used ----


def edit_of(**changes) -> dict:
    return {"before": "0.png", "instruction": "make it green", "after": "1.png"} | changes


def question_on(images, *values) -> dict:
    sides = ("human", "gpt")
    return {"image": images, "conversations": [{"from": sides[n % 2], "value": v} for n, v in enumerate(values)]}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (edit_of(after="broken.png"), "unreadable_image"),
        (edit_of(after=""), "unreadable_image"),
        (edit_of(before="none.png"), "missing_file"),
        (edit_of(before="https://host/0.png"), "missing_file"),
        (edit_of(before=[1, 2, 3]), "bad_codes"),
        (edit_of(before=7), "malformed_item"),
        (edit_of(instruction=" \n"), "empty_text"),
        (edit_of(instruction=7), "malformed_item"),
        (edit_of(after=None), "malformed_item"),  # of no known form
        ({"image": "0.png", "text": "a"}, "malformed_item"),
        ('{"segments": [', "malformed_item"),
        (["0.png"], "malformed_item"),
        ({"segments": []}, "bad_document"),
        ({"segments": [{"text": "a", "loss": False}]}, "bad_document"),
        ({"segments": {"text": "a"}}, "malformed_item"),
        ({"segments": ["a"]}, "malformed_item"),
        ({"segments": [{"text": "a", "image": "0.png"}]}, "malformed_item"),
        ({"segments": [{"text": "a", "loss": 1}]}, "malformed_item"),
        ({"segments": [{"text": ""}, {"image": "0.png"}]}, "empty_text"),
        ({"images": ["0.png"], "captions": ["a", "b"]}, "bad_document"),
        ({"images": ["0.png", None], "captions": ["a", "b"]}, "malformed_item"),
        ({"images": ["0.png"], "texts": ["a"]}, "bad_document"),
        ({"images": ["0.png", None], "texts": [None, None]}, "bad_document"),
        ({"images": ["0.png"], "texts": [None, "a"]}, "bad_document"),
        (question_on(["0.png"], "<image><image>What?", "A."), "bad_document"),
        (question_on(["0.png", "1.png"], "<image>What?", "A."), "bad_document"),
        (question_on(["0.png"], "What?", "A. <image>"), "bad_document"),
        (question_on("0.png", "<image>What?", " "), "empty_text"),
        (question_on("0.png", "<image>What?"), "bad_document"),  # no answer
        (question_on("0.png"), "bad_conversation"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "bad_conversation"),
    ],
)  # fmt: skip
def test_a_bad_record_is_skipped_by_kind(folder, tokenizer, record, kind):
    records = [edit_of(), record, edit_of()]
    found = made(raws(open_documents([write_records(folder, records)])), transform(tokenizer))
    assert [one if isinstance(one, str) else "sample" for one in found] == ["sample", kind, "sample"]


def test_a_missing_image_is_named_with_where_it_was_looked_for(folder, tokenizer):
    raw = raws(open_documents([write_records(folder, [edit_of(after="no.png")])]))[0]
    with pytest.raises(Skipped) as problem:
        transform(tokenizer, root="/images")(raw, random.Random(0))
    assert problem.value.detail == f"{folder}/a.jsonl: record 0 names no.png, which is not in /images or {folder}"


def test_files_without_documents_are_refused(folder):
    with pytest.raises(UserError, match=r"hold\(s\) no document"):
        open_documents([write_records(folder, [])])
    pyarrow.parquet.write_table(pyarrow.table({"image": ["0.png"], "text": ["a"]}), folder / "a.parquet")
    with pytest.raises(UserError, match="holds no documents; its columns are image, text, needed are segments; images"):
        open_documents([str(folder / "a.parquet")])


# ---- images ----


def test_names_are_of_members_then_of_files_under_the_root_then_beside_the_file(folder, tokenizer):
    (folder / "root").mkdir()
    (folder / "root" / "0.png").write_bytes(image_bytes(picture(C)))
    root = str(folder / "root")
    assert plain(of_record(folder, edit_of(), tokenizer, root=root)) == [(2, False), EDIT[1], EDIT[2]]
    member = {"0.png": image_bytes(picture(B)), "json": json.dumps(edit_of()).encode()}
    raw = {"__key__": "a", "__url__": str(folder / "a.tar"), **member}
    assert plain(transform(tokenizer, root=root)(raw, random.Random(0))) == [(1, False), EDIT[1], EDIT[2]]


def npy(codes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(codes))
    return buffer.getvalue()


def test_codes_stand_in_for_images(folder, tokenizer):
    """In place of an image in a shard, beside it, or in a record itself."""
    members = {"0.npy": npy(range(N)), "1.npy": npy(range(N)), "1.png": (folder / "1.png").read_bytes()}
    for before in ("0.png", "0.npy", list(range(N))):
        record = json.dumps(edit_of(before=before, after="1.PNG")).encode()
        raw = {"__key__": "a", "__url__": "a.tar", "json": record, **members}
        segments = transform(tokenizer)(raw, random.Random(0))["segments"]
        assert [s["codes"].tolist() for s in segments if "codes" in s] == [list(range(N))] * 2
        assert segments[0].keys() == {"codes", "loss"} and segments[0]["codes"].dtype == torch.int64


def test_a_rotation_is_noted_once(folder, tokenizer):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("0.png", "1.png"):
        picture(A).save(folder / name, exif=exif)
    assert of_record(folder, edit_of(), tokenizer)["notes"] == (ROTATED,)


# ---- length ----


def text(digits: int, loss: bool = True) -> dict:
    return {"text": "0" * digits, "loss": loss}


def image(loss: bool = True) -> dict:
    return {"image": "0.png", "loss": loss}


@pytest.mark.parametrize(
    ("segments", "plain_length", "clean_length"),
    [
        ([image()], 3 + 18, 3 + 18),
        ([text(5), image()], 3 + 7 + 18, 3 + 7 + 18),
        ([text(5), text(4, False), text(3)], 3 + 14, 3 + 14),  # joined
        ([image(), text(5)], 3 + 18 + 7, 3 + 36 + 7),
        ([image(False), text(5), image()], 3 + 18 + 7 + 18, 3 + 18 + 7 + 18),
        ([image(), image(), text(2)], 3 + 18 + 18 + 4, 3 + 36 + 36 + 4),
    ],
)
def test_documents_that_fit_exactly_are_whole(folder, tokenizer, segments, plain_length, clean_length):
    for is_clean, length in ((False, plain_length), (True, clean_length)):
        lengths = [N if "image" in s else len(s["text"]) for s in segments]
        assert document_length(segments, lengths, is_clean) == length
        settings = {"is_clean": is_clean, "max_length": length}
        whole = of_record(folder, {"segments": segments}, tokenizer, **settings)
        assert len(whole["segments"]) == len(segments) and "notes" not in whole
        cut = of_record(folder, {"segments": segments}, tokenizer, **settings | {"max_length": length - 1})
        assert cut == "bad_document" if len(segments) == 1 else cut["notes"] == (CUT_DOCUMENT,)


def test_what_does_not_fit_is_cut_after_a_segment_and_not_decoded(folder, tokenizer):
    story = [text(5, False), image(), text(4), {"image": "none.png", "loss": True}]
    length = 3 + 7 + 36 + 6  # the first image twice, as a text follows it
    settings = [(length + 17, 3), (length, 3), (length - 1, 2), (3 + 7 + 18, 2)]
    for max_length, kept in settings:
        sample = of_record(folder, {"segments": story}, tokenizer, max_length=max_length)
        assert len(sample["segments"]) == kept and sample["notes"] == (CUT_DOCUMENT,)
        assert [segment.get("is_cut", False) for segment in sample["segments"]] == [False] * (kept - 1) + [True]
    assert of_record(folder, {"segments": story}, tokenizer, max_length=3 + 7 + 17) == "bad_document"
    tokens = len(tokenizer(A, add_special_tokens=False)["input_ids"])
    story = {"images": ["0.png"], "captions": [A]}
    assert tokens < len(A) and len(of_record(folder, story, tokenizer, max_length=3 + tokens + 2 + 18)["segments"]) == 2


# ---- the flow ----


def reader(world, path, split="train", **overrides) -> MixedReader:
    paths = {f"dataset.params.{split}_mixed_shards_path_or_url": path}
    return MixedReader(config_of(world, overrides={"training.batch_size_mixed": 3} | paths | overrides), "mixed", split)


def flow_of(world, tokenizer, path, split="train", **overrides):
    one = reader(world, path, split, **overrides)
    check_data([one])
    return open_flows([one], Reading(tokenizer=tokenizer))["mixed"]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_of_different_documents(world, folder, tokenizer, num_workers):
    path = write_records(folder, [FORMS[name][0] for name in ("segments", "story", "edit")])
    overrides = {"dataset.preprocessing.random_flip": True, "dataset.params.num_workers": num_workers}
    batch = next(flow_of(world, tokenizer, path, **overrides))
    by_key = {sample["key"][-1]: sample["segments"] for sample in batch}
    whose = {"0": [0, None, 1], "1": [None, 0, None, 1], "2": [0, None, 1]}
    assert by_key.keys() == whose.keys(), "an epoch"
    for key, segments in by_key.items():
        for segment, number in zip(segments, whose[key], strict=True):
            if number is None:
                assert segment.keys() == {"text", "loss"}
            else:  # never mirrored
                assert torch.equal(segment["image"], preprocess(picture((A, B)[number]), 32))
    assert [segment["loss"] for segment in by_key["2"]] == [False, False, True]


def test_shards_of_pixels_and_codes_in_one_batch(world, folder, tokenizer):
    json_of = {"json": json.dumps(edit_of()).encode()}
    samples = [json_of | {"0.png": image_bytes(picture(A)), "1.npy": npy(range(N))}, json_of | {"0.npy": npy([5] * N)}]
    samples[1]["1.npy"] = npy([7] * N)
    shard = write_shard(folder / "a.tar", samples)
    overrides = {"experiment.max_train_examples_mixed": 12, "training.batch_size_mixed": 4}
    flow = flow_of(world, tokenizer, shard, **overrides)
    assert flow.batches_per_epoch == 3
    found = {tuple(segment.get("codes", torch.zeros(1)).tolist()) for _ in range(3) for sample in next(flow)
             for segment in sample["segments"] if "text" not in segment}  # fmt: skip
    assert found == {(0.0,), tuple(range(N)), (5,) * N, (7,) * N}
    held_out = next(flow_of(world, tokenizer, shard, "eval", **{"training.batch_size_mixed": 2}))
    assert [sample["key"] for sample in held_out] == ["a-000", "a-001"]


def test_null_has_room_for_four_learned_images_with_texts(world, tokenizer):
    for overrides, expected in (
        ({}, 3 + 4 * (16 + 18) + 3 * 18),
        ({"mixed.history": "masked"}, 3 + 4 * (16 + 18)),
        ({"mixed.max_length": 50}, 50),
    ):
        made = reader(world, "/nowhere.json", **overrides).transform(Reading(tokenizer=tokenizer))
        assert made.max_length == expected and made.is_clean == (overrides.get("mixed.history") is None)


def test_paths_and_words_are_checked(world, folder, tokenizer):
    root = {"dataset.params.train_mixed_image_root": "/nowhere"}
    with pytest.raises(UserError, match=f"{TRAIN}: 1 of 1 files do not exist: /a.json; .*train_mixed_image_root"):
        check_data([reader(world, "/a.json", **root)])
    with pytest.raises(UserError, match=r"the mixed flow reads files of one sort of .*\.csv, \.tsv; got .*corpus\.txt"):
        check_data([reader(world, world / "corpus.txt")])
    with pytest.raises(UserError, match="conversation=chat: the tokenizer has no chat template"):
        flow_of(world, tokenizer, write_records(folder, [edit_of()]), conversation="chat")
    both = {"model.showo.w_clip_vit": True}
    with pytest.raises(UserError, match="batch_size_mixed is not 0, but documents cannot be read with CLIP-ViT"):
        reader(world, "/a.json", **both)
    assert not reader(world, "/a.json", "eval", **{"training.batch_size_mixed": 0}).is_on


# ---- the scenes ----


def test_the_parts_of_the_scene_world_are_documents(tmp_path, world, tokenizer):
    parts = ("edits", "stories", "several")
    none = ("captions", "crowds", "questions", "texts", "pairs", "classes")
    counts = [*(f"{part}=3" for part in parts), *(f"{part}=0" for part in none), "held_out=0"]
    make_scenes([f"output_dir={tmp_path / 'scenes'}", *counts])
    edits, stories, several = (tmp_path / "scenes" / part for part in parts)
    files = [edits / "train.jsonl", stories / "train.jsonl", several / "train.json"]
    root = {"dataset.params.train_mixed_image_root": several / "images", "mixed.max_length": 1000}
    flow = flow_of(world, tokenizer, f"[{','.join(map(str, files))}]", **root)
    samples = {sample["key"]: sample["segments"] for _ in range(3) for sample in next(flow)}
    assert len(samples) == 9 and not flow.skipped
    for file in files[:2]:
        for number, line in enumerate(file.read_text().splitlines()):
            segments, written = samples[f"{file}: record {number}"], json.loads(line)["segments"]
            assert [(s.get("text"), s["loss"]) for s in segments] == [(s.get("text"), s["loss"]) for s in written]
    for number, record in enumerate(json.loads(files[2].read_text())):
        segments = samples[f"{files[2]}: record {number}"]
        assert ["image" in s for s in segments] == [True] * len(record["image"]) + [False, False]
        assert segments[-1] == {"text": f" {record['conversations'][1]['value']}", "loss": True}
