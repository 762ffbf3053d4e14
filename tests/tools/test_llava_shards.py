"""LLaVA's json as WebDataset shards that the captioning and llava flows read (spec §8, §9)."""

import json
from collections import Counter

import pytest

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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "???"}, "output not given"),
        ({"json": "nowhere.json"}, r"nowhere\.json does not exist"),
        ({"json": __file__}, "no valid JSON"),
        ({"repeat": "name"}, "repeat=name is not of the form"),
        ({"image_root": "none"}, r"record 'a': image .*0\.png does not exist; check image_root"),
    ],
)
def test_mistakes_are_named(source, settings, message):
    with pytest.raises(UserError, match=message):
        run(source, **settings)
    assert not (source / "out").exists()
