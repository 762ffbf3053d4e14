"""LLaVA's json as WebDataset shards that the captioning flow reads (spec §8, §9)."""

import json
from itertools import islice

import pytest

from common.errors import UserError
from tests.training.tiny import CAPTIONS, image_bytes, picture
from training.data.llava_shards import main, questions_and_answers
from training.data.shards import read_shards


def turns(*texts: str, first: str = "human") -> list[dict]:
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(3):
        (tmp_path / "images" / f"{index}.png").write_bytes(image_bytes(picture(CAPTIONS[index])))
    records = [
        {"id": "a", "image": "0.png", "task": "name", "conversations": turns("<image>\nWhat is it?", "A square.")},
        {"id": "b", "image": "1.png", "conversations": turns("Which?\n<image>", "Red.", "Where?", "Left.", "Sure?")},
        {"id": "text only", "conversations": turns("Hello?", "Hello!")},
    ]
    (tmp_path / "qa.json").write_text(json.dumps(records))
    return tmp_path


def arguments(source, **settings) -> list[str]:
    values = {"json": source / "qa.json", "image_root": source / "images", "output": source / "out" / "qa"}
    return [f"{key}={value}" for key, value in (values | settings).items()]


def written(source) -> list[dict]:
    """Every sample once, whatever the order of reading."""
    urls = sorted(map(str, (source / "out").glob("qa-*.tar")))
    found = {raw["__key__"]: raw for raw in islice(read_shards(urls, 0, {}, 0), 60)}
    return [found[key] for key in sorted(found)]


def test_each_question_is_a_sample_in_the_words_of_the_inference_script(source, capsys):
    main(arguments(source))
    samples = written(source)
    assert [raw["txt"].decode() for raw in samples] == [
        "USER: \nWhat is it? ASSISTANT: A square.",
        "USER: \nWhich? ASSISTANT: Red.",
        "USER: \nWhere? ASSISTANT: Left.",
    ]
    assert samples[0]["png"] == (source / "images" / "0.png").read_bytes()
    assert samples[1]["png"] == samples[2]["png"] == (source / "images" / "1.png").read_bytes()
    assert capsys.readouterr().out.strip().endswith("3 samples")


def test_whole_records_are_kept_for_the_llava_flows(source):
    """Images can then be encoded, which leaves the member `json` as it is."""
    main(arguments(source, records="true", repeat="name:2"))
    samples = written(source)
    records = json.loads((source / "qa.json").read_text())
    assert [json.loads(raw["json"]) for raw in samples] == [records[0], records[0], records[1]]
    assert samples[2]["png"] == (source / "images" / "1.png").read_bytes() and "txt" not in samples[2]


def test_tasks_are_repeated_and_shards_cut(source):
    main(arguments(source, repeat="name:4,style:2", shard_size=3))
    texts = [raw["txt"].decode() for raw in written(source)]
    assert sorted(texts.count(text) for text in set(texts)) == [1, 1, 4]
    assert len(list((source / "out").glob("*.tar"))) == 2


def test_the_same_seed_writes_the_same_bytes(source):
    main(arguments(source, repeat="name:9"))
    first = (source / "out" / "qa-000000.tar").read_bytes()
    main(arguments(source, repeat="name:9", output=source / "again" / "qa"))
    assert (source / "again" / "qa-000000.tar").read_bytes() == first
    main(arguments(source, repeat="name:9", output=source / "other" / "qa", seed=1))
    assert (source / "other" / "qa-000000.tar").read_bytes() != first


def test_a_leading_answer_and_a_trailing_question_are_dropped():
    assert questions_and_answers(turns("Hi.", "<image>Q?", "A.", "B?", first="gpt")) == [("Q?", "A.")]
    assert questions_and_answers([]) == []


def test_mistakes_are_named(source):
    with pytest.raises(UserError, match="output not given"):
        main(arguments(source)[:2])
    with pytest.raises(UserError, match="unknown key qx"):
        main([*arguments(source), "qx=1"])
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        main(arguments(source, json="nowhere.json"))
    with pytest.raises(UserError, match="repeat=name is not of the form"):
        main(arguments(source, repeat="name"))
    (source / "images" / "1.png").unlink()
    with pytest.raises(UserError, match=r"record 'b': image .*1\.png does not exist; check image_root"):
        main(arguments(source))
    (source / "qa.json").write_text("[{")
    with pytest.raises(UserError, match="no valid JSON"):
        main(arguments(source))
    assert not (source / "out").exists()
