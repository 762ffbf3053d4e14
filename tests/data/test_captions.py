"""The text of a picture: its own or one from elsewhere, with an instruction or shortened (spec §15)."""

import json
import random
import re

import pytest

from training.data.captions import CAPTION_INSTRUCTIONS, OPENINGS, Captions, ExternalCaptions
from training.data.json_records import JsonTable
from training.data.skipping import SkipSample

LONG = "The image features a red kite. In this image, it flies over 3.5 km of sea! Two people watch."


@pytest.fixture
def external(tmp_path):
    files = {
        "sa1b/sa_1.txt": LONG + "\nanother line",
        "laion/00012/x/000120007.caption": "laion's words",
        "cc12m/cc12m-0003/42.caption": "cc12m's words",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "journeydb.json").write_text(json.dumps({"db/1": ["first", "second"], "db/2": "In this image, a dog."}))
    folders = (str(tmp_path / name) for name in ("sa1b", "laion", "cc12m"))
    return ExternalCaptions(*folders, JsonTable(str(tmp_path / "journeydb.json")))


def raw(key: str, url: str = "/data/other-0001.tar", **members) -> dict:
    return {"__key__": key, "__url__": url, "txt": b"its own words", **members}


def texts(captions: Captions, sample: dict, count: int = 60) -> set[str]:
    return {captions(sample, random.Random(seed)) for seed in range(count)}


def skipped(captions: Captions, sample: dict) -> str:
    with pytest.raises(SkipSample) as problem:
        captions(sample, random.Random(0))
    return problem.value.kind


# ---- the sample's own text ----


def test_a_sample_has_one_text_without_the_blanks_around_it():
    assert texts(Captions(), {"__key__": "a", "txt": "  ein Bär \n".encode()}) == {"ein Bär"}
    assert texts(Captions(), {"__key__": "a", "caption": b"c", "text": b"t", "txt": b"x"}) == {"t"}
    assert texts(Captions(), {"__key__": "a", "text": ["one", "two"]}) == {"one", "two"}, "of several one by chance"
    assert texts(Captions(shorten=True), {"__key__": "a", "txt": LONG.encode()}) == {LONG}, "own texts stay as they are"


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({}, "empty_text"),
        ({"txt": b""}, "empty_text"),
        ({"txt": b" \n "}, "empty_text"),
        ({"text": None}, "empty_text"),
        ({"text": []}, "empty_text"),
        ({"txt": b"\xff\xfe\xfa"}, "malformed_item"),
        ({"text": 3.5}, "malformed_item"),
        ({"text": "half of \ud83d"}, "malformed_item"),
    ],
)
def test_what_is_no_text_is_skipped(members, kind):
    assert skipped(Captions(), {"__key__": "a", **members}) == kind


# ---- instructions ----


def test_there_are_many_instructions_of_their_own():
    assert len(set(CAPTION_INSTRUCTIONS)) >= 30
    assert all(text == text.strip() and text[-1] in ".?" for text in CAPTION_INSTRUCTIONS)


@pytest.mark.parametrize("key", ["a", "SA1B/sa_1", "db/2"])
def test_an_instruction_stands_before_any_caption(external, key):
    found = texts(Captions(external, instructions=True), raw(key), 200)
    parts = [re.fullmatch(r"USER: \n(.+?[.?]) ASSISTANT: (.+)", text) for text in found]
    assert all(parts)
    assert {part[1] for part in parts} <= set(CAPTION_INSTRUCTIONS) and len(found) > 20
    expected = {"a": "its own words", "SA1B/sa_1": LONG, "db/2": "In this image, a dog."}[key]
    assert {part[2] for part in parts} == {expected}, "for understanding, captions are whole"


# ---- captions from elsewhere ----


def test_the_first_rule_that_matches_wins(external):
    captions = Captions(external)
    assert texts(captions, raw("SA1B/sa_1", "/laion/00012.tar")) == {LONG}, "the first line"
    assert texts(captions, raw("x/000120007", "/laion/00012.tar")) == {"laion's words"}
    assert texts(captions, raw("y/42", "/data/cc12m-0003.tar.gz")) == {"cc12m's words"}
    assert texts(captions, raw("db/1")) == {"first", "second"}
    assert texts(captions, raw("db/9")) == {"its own words"}


def test_rules_without_a_path_do_not_count(external):
    few = Captions(ExternalCaptions(external.folder))
    assert texts(few, raw("x/000120007", "/laion/00012.tar")) == {"its own words"}
    assert texts(few, raw("db/1")) == {"its own words"}


def test_a_missing_caption_is_an_empty_one(external):
    assert skipped(Captions(external), raw("SA1B/sa_2")) == "empty_text"
    assert skipped(Captions(external), raw("SA1B/../journeydb/x")) == "empty_text"


def test_for_generation_half_are_the_first_sentence_without_openings(external):
    found = [Captions(external, shorten=True)(raw("SA1B/sa_1"), random.Random(seed)) for seed in range(400)]
    whole = "a red kite. it flies over 3.5 km of sea! Two people watch."
    assert set(found) == {"a red kite", whole}
    assert 150 < found.count(whole) < 250


def test_captions_of_journeydb_stay_as_they_are(external):
    assert texts(Captions(external, shorten=True), raw("db/2")) == {"In this image, a dog."}


def test_fifteen_openings_are_removed_each_as_a_whole():
    assert len(set(OPENINGS)) == 15
    assert {"The image features ", "In this image, "} <= set(OPENINGS)
    assert not any(later.startswith(opening) for n, opening in enumerate(OPENINGS) for later in OPENINGS[n + 1 :]), (
        "the rest of a longer opening must not be left behind"
    )
