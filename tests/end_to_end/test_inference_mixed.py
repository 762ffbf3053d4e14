"""`inference_mixed.py` from published-format folders to images, lines, sheet and wandb."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

import inference_mixed
from common.progress import progress
from models import ShowoPipeline
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import tiny_vq

FAST = {"timesteps": 2, "max_new_tokens": 4, "guidance_scale": 2.0}
STORY = ["image", "text", "image"]


def run(places, output_dir: Path, *arguments: str) -> list[dict]:
    """The lines of the results of one run."""
    given = [f"config={places['demo']}", f"output_dir={output_dir}", "seed=42", "guidance_scale=2"]
    given += ["generation_timesteps=2", "max_new_tokens=4"]
    inference_mixed.main([*given, *arguments])
    return [json.loads(line) for line in (output_dir / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pipeline():
    return ShowoPipeline(tiny_showo(), tiny_vq(), prompting())


def segments_of(segments: list, is_new: bool, names) -> list[dict]:
    """As a line has them; images get the next of `names`."""
    one = [{"text": s} if isinstance(s, str) else {"image": next(names)} for s in segments]
    return [segment | {"new": is_new} for segment in one]


def same_images(folder: Path, segments: list) -> bool:
    images = [segment for segment in segments if not isinstance(segment, str)]
    files = sorted(folder.glob("[0-9]*.png"))
    return [Image.open(file).tobytes() for file in files] == [image.tobytes() for image in images] and bool(files)


@pytest.mark.parametrize("batch_size", [1, 20])
def test_every_instruction_for_every_image(places, pipeline, tmp_path, capsys, batch_size):
    """Each with a seed of its own, whatever is in its batch."""
    lines = run(
        places,
        tmp_path,
        "mode=edit",
        f"image_path={places['pictures']}",
        "prompt=w1 *** w2",
        f"batch_size={batch_size}",
    )
    pairs = [(name, text) for name in ("a.jpg", "b.png", "c.png") for text in ("w1", "w2")]
    images = [places["pictures"] / name for name, _ in pairs]
    made = pipeline.edit(images, [text for _, text in pairs], generator=42, **FAST)
    assert same_images(tmp_path, made)
    for number, (line, (name, text)) in enumerate(zip(lines, pairs, strict=True)):
        file = f"{number:04d}.png"
        segments = [{"image": name, "new": False}, {"text": text, "new": False}, {"image": file, "new": True}]
        assert line == {"files": [file], "mode": "edit", "segments": segments, "seed": 42 + number}
    assert "[a.jpg] w1 → [0000.png]" in capsys.readouterr().out.splitlines()
    assert Image.open(tmp_path / "grid.png").width == 8 + 3 * (128 + 8), "a row is a document"


def test_images_and_folders_may_be_listed(places, tmp_path):
    listed = f"image_path={places['image']} *** {places['pictures']}"
    lines = run(places, tmp_path, "mode=edit", listed, "prompt=w1")
    assert [line["segments"][0]["image"] for line in lines] == ["c.png", "a.jpg", "b.png", "c.png"]


def test_two_scales_for_edits(places, pipeline, tmp_path):
    scales = {"text_guidance_scale": 3.0, "image_guidance_scale": 1.5}
    given = [f"{key}={value}" for key, value in scales.items()]
    run(places, tmp_path, "mode=edit", f"image_path={places['image']}", "prompt=w1", *given)
    two = pipeline.edit(places["image"], "w1", generator=42, **FAST | scales)
    assert same_images(tmp_path, two)
    assert not same_images(tmp_path, pipeline.edit(places["image"], "w1", generator=42, **FAST))


def test_stories(places, pipeline, tmp_path, monkeypatch):
    """The bar counts the steps of all images."""
    bars = []
    monkeypatch.setattr(inference_mixed, "progress", lambda **more: bars.append(progress(**more)) or bars[-1])
    lines = run(places, tmp_path, "mode=story", "num_images=2", "prompt=w1 w2 *** w3")
    stories = pipeline.tell(["w1 w2", "w3"], num_images=2, generator=42, **FAST)
    assert same_images(tmp_path, [segment for story in stories for segment in story])
    names = (f"{number:04d}.png" for number in range(4))
    for line, story in zip(lines, stories, strict=True):
        assert line["segments"] == segments_of(story[:1], False, names) + segments_of(story[1:], True, names)
        assert line["files"] == [segment["image"] for segment in line["segments"] if "image" in segment]
    assert [(bar.n, bar.total) for bar in bars] == [(8, 8)]
    assert Image.open(tmp_path / "grid.png").width == 8 + 4 * (128 + 8)


DOCUMENTS = [
    [{"text": "w1"}, {"image": "b.png"}, {"text": "w2", "loss": False}],
    [{"image": "a.jpg", "loss": False}, {"text": "w3", "loss": False}],
]


@pytest.mark.parametrize(("mode", "plan"), [("free", None), ("edit", STORY[:1]), ("story", STORY)])
def test_documents_of_a_file(places, pipeline, tmp_path, mode, plan):
    """Images are beside the file; what is learned of a document in training counts for nothing here."""
    file = places["pictures"] / f"{mode}.jsonl"
    file.write_text("\n".join(json.dumps({"segments": segments, "id": 1}) for segments in DOCUMENTS))
    lines = run(places, tmp_path, f"mode={mode}", f"documents={file}", "max_images=2", "num_images=2")
    file.unlink()
    given = [[one.get("text") or places["pictures"] / one["image"] for one in segments] for segments in DOCUMENTS]
    null = "text" if mode == "edit" else "all"
    made = pipeline.generate(given, plan=plan, max_images=2, null=null, generator=42, **FAST)
    names = iter([f"{number:04d}.png" for number in range(9)])
    for line, known, new in zip(lines, given, made, strict=True):
        assert line["segments"][len(known) :] == segments_of(new, True, names)
        assert [one["new"] for one in line["segments"][: len(known)]] == [False] * len(known)


def test_what_the_model_makes_of_one(places, pipeline, tmp_path):
    """An image, a text, or both; a document without a new image has a line, too."""
    for number, given in enumerate((["prompt=w1"], [f"image_path={places['image']}"], ["prompt=w1"])):
        given += [f"image_path={places['image']}"] if number == 2 else []
        lines = run(places, tmp_path / str(number), "mode=free", "max_images=0", *given)
        document = [[*([places["image"]] if number else []), *(["w1"] if number != 1 else [])]]
        (made,) = pipeline.generate(document, max_images=0, generator=42, **FAST)
        assert lines[0]["files"] == [] and lines[0]["segments"][len(document[0]) :] == segments_of(made, True, None)
        assert (tmp_path / str(number) / "grid.png").is_file()


def test_results_are_added_or_replaced(places, tmp_path, capsys):
    arguments = ["mode=story", "num_images=1", "prompt=w1"]
    counts = [len(run(places, tmp_path, *arguments, *more)) for more in ([], [], ["overwrite=true"])]
    assert counts == [1, 2, 1]
    assert "2 images of earlier runs, which are replaced" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0000.png", "grid.png"]


def test_without_a_seed_documents_differ_and_can_be_made_again(places, tmp_path):
    first = run(places, tmp_path / "first", "mode=story", "num_images=1", "prompt=w1", "seed=null")
    again = ["mode=story", "num_images=1", "prompt=w1", f"seed={first[0]['seed']}"]
    assert run(places, tmp_path / "again", *again) == first
    assert (tmp_path / "again/0000.png").read_bytes() == (tmp_path / "first/0000.png").read_bytes()


@pytest.mark.slow
def test_wandb_holds_the_panel(places, tmp_path):
    run(places, tmp_path, "mode=story", "num_images=1", "prompt=w1 *** w2", "wandb.mode=offline")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len(list((folder / "files/media/images").glob("mixed_modal_0_*.png"))) == 2
    (record,) = folder.glob("run-*.wandb")
    texts = [text.encode() for text in ("mixed_modal", "w1 → [0000.png]", "tiny_mixed_story")]
    stop = time.monotonic() + 20  # a process of wandb's writes the file, which may come later
    while time.monotonic() < stop and not all(text in record.read_bytes() for text in texts):
        time.sleep(0.1)
    assert [text for text in texts if text not in record.read_bytes()] == []
