"""`tools/make_pairs.py` from published-format folders to lines that the task of preference pairs reads."""

import json
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from models import ShowoPipeline
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import tiny_vq
from tools import make_pairs

FAST = ["seed=42", "guidance_scale=2", "generation_timesteps=2", "samples=3", "max_new_tokens=3"]
SCORER = "scorer=tests.end_to_end.test_make_pairs:first_pixel"


def first_pixel(prompts, images, records) -> list[float]:
    """A score that differs from image to image; the record shifts it."""
    pixels = [image.getpixel((0, 0)) for image in images]
    return [sum(pixel) / 765 + record.get("bonus", 0) for pixel, record in zip(pixels, records, strict=True)]


def run(places, output_dir: Path, *arguments: str) -> list[dict]:
    make_pairs.main([f"config={places['demo']}", f"output_dir={output_dir}", *FAST, *arguments])
    lines = output_dir / "results.jsonl"
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": "w1", "bonus": 1}, {"prompt": "w2", "bonus": -1}, {"prompt": "w3", "bonus": 1}]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_the_best_and_the_worst_of_each_prompt_if_the_best_is_good(places, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    lines = run(places, out, f"prompts={prompts}", SCORER)
    assert [line["caption"] for line in lines] == ["w1", "w3"], "the best of w2 is no better than 0.6"
    assert "2 pairs; 1 prompts or questions gave none" in capsys.readouterr().out
    pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    made = pipeline.text_to_image(
        ["w3"], num_images_per_prompt=3, generator=[48, 49, 50], guidance_scale=2, timesteps=2
    )
    ordered = sorted(made, key=lambda image: sum(image.getpixel((0, 0))))
    chosen, rejected = (Image.open(out / lines[1][name]) for name in ("chosen", "rejected"))
    assert chosen.tobytes() == ordered[-1].tobytes() and rejected.tobytes() == ordered[0].tobytes()
    assert lines[1]["scores"][0] > lines[1]["scores"][1] and lines[1]["kind"] == "image"
    assert (out / "grid.png").is_file()
    assert run(places, tmp_path / "far", f"prompts={prompts}", SCORER, "min_gap=2") == []
    assert len(run(places, tmp_path / "one", f"prompts={prompts}", SCORER, "limit=1")) == 1


def test_the_models_own_answers_score_its_images(places, tmp_path, monkeypatch):
    """Two of three questions of an image are answered as expected."""
    answers = iter([["Yes.", "no", "two"], ["no", "no", "two"], ["yes", "no", "three"]])
    monkeypatch.setattr(ShowoPipeline, "answer_each", lambda *_, **__: next(answers))
    asked = [{"question": f"w{n}?", "answer": answer} for n, answer in enumerate(("yes", "no", "Two"))]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "w1", "questions": asked}))
    (line,) = run(places, tmp_path / "out", f"prompts={tmp_path}/p.jsonl", "scorer=questions")
    assert line["scores"] == pytest.approx([1.0, 2 / 3])
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "w1"}))
    with pytest.raises(UserError, match="the record of 'w1': field 'questions' is missing"):
        run(places, tmp_path / "none", f"prompts={tmp_path}/p.jsonl", "scorer=questions")


def test_images_that_were_scored_before_stay_where_they_are(places, tmp_path):
    records = [("a", 0.9), ("a", 0.1), ("a", 0.5), ("b", 0.3), ("b", 0.2)]
    lines = [{"file": f"{n}.png", "prompt": text, "score": score} for n, (text, score) in enumerate(records)]
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored/s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for record in lines:
        (tmp_path / "scored" / record["file"]).touch()
    (line,) = run(places, tmp_path / "out", f"scorer={tmp_path}/scored/s.jsonl")
    assert (line["caption"], line["chosen"], line["rejected"]) == ("a", "../scored/0.png", "../scored/1.png")
    (tmp_path / "scored/s.jsonl").write_text(json.dumps({"file": "0.png", "prompt": "a"}))
    with pytest.raises(UserError, match="line 1: field 'score' is missing"):
        run(places, tmp_path / "none", f"scorer={tmp_path}/scored/s.jsonl")
    for record, message in (
        ({"score": float("nan")}, "line 1: field 'score' is nan, expected a finite number"),
        ({"score": 1, "file": "gone.png"}, "line 1: image .*gone.png does not exist"),
    ):
        (tmp_path / "scored/s.jsonl").write_text(json.dumps({"file": "0.png", "prompt": "a"} | record))
        with pytest.raises(UserError, match=message):
            run(places, tmp_path / "none", f"scorer={tmp_path}/scored/s.jsonl")
    with pytest.raises(UserError, match="prompts has no effect with a file of scores"):
        run(places, tmp_path / "none", f"scorer={tmp_path}/scored/s.jsonl", "prompts=p.txt")


def test_an_answer_as_expected_and_one_that_is_not(places, tmp_path, monkeypatch):
    answers = iter([["red", "It is blue.", ""], ["blue", "Blue.", "blue"]])
    monkeypatch.setattr(ShowoPipeline, "answer_each", lambda *_, **__: next(answers))
    picture = places["image"].name
    records = [{"image": picture, "question": f"w{n}?", "answer": answer} for n, answer in enumerate(("Red", "blue"))]
    file = places["pictures"] / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    (line,) = run(places, tmp_path / "out", f"questions={file}")
    assert (line["kind"], line["question"], line["chosen"], line["rejected"]) == ("answer", "w0?", "red", "It is blue.")
    assert (tmp_path / "out" / line["image"]).resolve() == places["image"].resolve()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "nothing to make pairs of; give prompts and a scorer, or questions=FILE"),
        (["prompts=p.jsonl"], "scorer is not given; pairs of images need both"),
        ([SCORER], "prompts is not given; pairs of images need both"),
        (["prompts=p.jsonl", "scorer=nothing:there"], "scorer=nothing:there cannot be imported"),
        (["prompts=/nowhere.jsonl", SCORER], "prompts: 1 of 1 files do not exist: /nowhere.jsonl"),
        (["questions=/nowhere.jsonl"], "questions=/nowhere.jsonl does not exist"),
        (["scorer=/nowhere.jsonl"], "scorer=/nowhere.jsonl does not exist"),
    ],
)
def test_mistakes(places, tmp_path, monkeypatch, arguments, part):
    """Told before any weights are read; nothing is written."""
    monkeypatch.setattr(ShowoPipeline, "from_config", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError) as error:
        run(places, tmp_path / "out", *arguments)
    assert part in str(error.value) and not (tmp_path / "out").exists()
