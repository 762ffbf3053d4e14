"""LLaVA's json as WebDataset shards that the captioning and llava flows read (spec §8, §9)."""

import io
import json
import os
from collections import Counter

import pytest
from PIL import Image

from common.errors import UserError
from tests.training.tiny import CAPTIONS, image_bytes, picture
from tools.llava_shards import main, questions_and_answers
from training.data.shards import read_shard


def turns(*texts: str, roles=("human", "gpt")) -> list[dict]:
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


RECORDS = [
    {"id": "a", "image": "0.png", "task": "name", "conversations": turns("<image>\nWhat is it?", "A square.")},
    {"id": "b", "image": "1.png", "conversations": turns("Which?\n<image>", "Red.", "Where?", "Left.", "Sure?")},
    {"id": "text only", "conversations": turns("Hello?", "Hello!")},
]
IMAGES = [image_bytes(picture(caption)) for caption in CAPTIONS[:2]]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "images").mkdir()
    for index, data in enumerate(IMAGES):
        (tmp_path / "images" / f"{index}.png").write_bytes(data)
    (tmp_path / "qa.json").write_text(json.dumps(RECORDS))
    return tmp_path


def run(source, **settings) -> list[dict]:
    values = {"json": source / "qa.json", "image_root": source / "images", "output": source / "out" / "qa"} | settings
    main([f"{key}={value}" for key, value in values.items()])
    shards = sorted(source.glob("out/qa-*.tar"))
    return sorted((raw for shard in shards for raw in read_shard(str(shard))), key=lambda raw: raw["__key__"])


def test_each_question_is_a_sample_in_the_words_of_the_inference_script(source, capsys):
    samples = run(source)
    texts = ["What is it? ASSISTANT: A square.", "Which? ASSISTANT: Red.", "Where? ASSISTANT: Left."]
    assert [raw["txt"].decode() for raw in samples] == [f"USER: \n{text}" for text in texts]
    assert [raw["png"] for raw in samples] == [IMAGES[0], IMAGES[1], IMAGES[1]]
    assert capsys.readouterr().out.strip().endswith("3 samples")
    assert questions_and_answers(turns("Hi.", "<image>Q?", "A.", "B?", roles=("gpt", "human"))) == [("Q?", "A.")]
    assert questions_and_answers([]) == []


def test_whole_records_are_kept_for_the_llava_flows(source):
    """Images can then be encoded, which leaves the member `json` as it is."""
    samples = run(source, records="true", repeat="name:2")
    assert [json.loads(raw["json"]) for raw in samples] == [RECORDS[0], RECORDS[0], RECORDS[1]]
    assert samples[2]["png"] == IMAGES[1] and "txt" not in samples[2]


def test_tasks_are_repeated_and_the_seed_fixes_the_bytes(source):
    shards = []
    for seed in (0, 0, 1):
        texts = Counter(raw["txt"] for raw in run(source, repeat="name:4", shard_size=3, seed=seed, overwrite="true"))
        shards.append([file.read_bytes() for file in sorted(source.glob("out/*.tar"))])
    assert sorted(texts.values()) == [1, 1, 4] and len(shards[0]) == 2
    assert shards[0] == shards[1] != shards[2]


CHAT = [{"role": "user", "content": "<image>Q?"}, {"role": "assistant", "content": "A."}]
RECORD = RECORDS[0]


@pytest.mark.parametrize(
    ("name", "content", "count", "told"),
    [
        ("a.json", [RECORD, RECORD | {"image": None}], 1, ""),
        ("a.json", [RECORD, RECORD | {"image": ["0.png"]}], 2, ""),
        ("a.json", [RECORD, RECORD | {"image": ["0.png", "1.png"]}], 1, "record 2: 'image' is a list of 2, expected"),
        ("a.json", {"version": 1, "data": [RECORD]}, 1, ""),
        ("a.json", [{"image": "0.png", "messages": CHAT}], 1, ""),
        ("a.json", [RECORD, {"image": "0.png"}], 1, "record 2: a record needs 'conversations'"),
        ("a.json", [RECORD, {"image": "0.png", "conversations": CHAT[:1] * 2}], 1, "record 2: questions and answers"),
        ("a.json", [RECORD, {"image": "0.png", "conversations": [{"from": "human"}]}], 1, "record 2: turn 0 is"),
        ("a.json", [RECORD, 7, RECORD | {"image": 7}, RECORD | {"conversations": 7}], 1, "skipped 3 of 4"),
        ("a.json", [RECORD] + [RECORD | {"image": f"{n}.jpg"} for n in range(3)], 1, "3 missing_file (such as"),
        ("a.json", [RECORD, RECORD | {"image": "fifo.png"}, RECORD | {"task": ["x"]}], 2, "1 missing_file"),
        ("a.jsonl", json.dumps(RECORD) + "\n{broken\n" + json.dumps(RECORD), 2, "skipped 1 of 3"),
        ("a.JSONL", "\ufeff" + json.dumps(RECORD) + "\n\ufeff" + json.dumps(RECORD), 2, ""),
        ("a.json", "\ufeff" + json.dumps([RECORD]), 1, ""),
        ("a.json", json.dumps([RECORD]).encode("utf-16"), 1, ""),
    ],
)
@pytest.mark.parametrize("records", [False, True])
def test_records_are_read_as_the_flow_reads_them(source, capsys, name, content, count, told, records):
    data = content if isinstance(content, str | bytes) else json.dumps(content)
    (source / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    os.mkfifo(source / "images" / "fifo.png")
    assert len(run(source, json=source / name, records=records)) == count
    assert told in capsys.readouterr().out


def test_images_of_any_format_become_members_that_are_read(source):
    forms = {"a.gif": ("GIF", "P"), "b.jpg": ("GIF", "P"), "c.PNG": ("PNG", "I;16"), "d": ("WEBP", "RGB")}
    for name, (form, mode) in forms.items():
        Image.new(mode, (8, 8)).save(source / "images" / name, form)
    (source / "qa.json").write_text(json.dumps([RECORD | {"image": name} for name in forms]))
    samples = run(source)
    assert [("png" in raw, "webp" in raw) for raw in samples] == [(True, False)] * 3 + [(False, True)]
    assert all(Image.open(io.BytesIO(raw["png"])).mode == "RGB" for raw in samples[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "???"}, "output not given"),
        ({"json": "nowhere.json"}, r"nowhere\.json does not exist"),
        ({"json": __file__}, "no valid JSON"),
        ({"repeat": "name"}, "repeat=name is not of the form"),
        ({"repeat": "name:-1"}, "repeat=name:-1: a record can be repeated 0 to 10,000 times"),
        ({"repeat": "name:99999999999"}, "a record can be repeated 0 to 10,000 times"),
        ({"image_root": "none"}, r"record 'a': image .*0\.png does not exist; check image_root"),
    ],
)
def test_mistakes_are_named(source, settings, message):
    with pytest.raises(UserError, match=message):
        run(source, **settings)
    assert not list((source / "out").glob("*"))
