"""`inference_mmu.py` from published-format folders to answers on the terminal, in results.jsonl, grid and wandb."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference_mmu
from common.results import copies_in
from models import CLIPVisionTower, ShowoPipeline
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import RESOLUTION, clip_showo, tiny_vq

QUESTIONS = ["w3 w4 w5", "w6"]


def run(places, output_dir: Path, *arguments: str, demo: str = "demo") -> list[dict]:
    given = [f"config={places[demo]}", f"output_dir={output_dir}", "seed=42", "max_new_tokens=8"]
    given += [f"mmu_image_root={places['pictures']}", f"question={' *** '.join(QUESTIONS)}"]
    inference_mmu.main([*given, *arguments])
    return [json.loads(line) for line in (output_dir / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("demo", "batch_size"), [("demo", 1), ("demo", 4), ("demo_clip", 4)])
def test_every_question_about_every_image(places, tmp_path, capsys, demo, batch_size):
    """In batches that cut across images, the answers are those of each question alone; they go to the terminal, too."""
    lines = run(places, tmp_path, f"batch_size={batch_size}", demo=demo)
    if demo == "demo":
        pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    else:
        pipeline = ShowoPipeline(clip_showo(), tiny_vq(), prompting(), clip=CLIPVisionTower(places["clip"]))
    expected, terminal = [], []
    for number, name in enumerate(("a.jpg", "b.png", "c.png")):
        terminal.append(name)
        for question in QUESTIONS:
            answer = pipeline.answer(places["pictures"] / name, question, max_new_tokens=8)[0][0]
            line = {"file": f"{number:04d}.png", "mode": "mmu", "image": name, "question": question, "answer": answer}
            expected.append(line | {"seed": 42})
            terminal += [f"  User: {question}", f"  Answer: {answer}"]
    assert lines == expected and len({line["answer"] for line in lines}) > 2
    assert capsys.readouterr().out.splitlines()[:-1] == terminal
    seen = Image.open(tmp_path / "0001.png")
    assert seen.size == (RESOLUTION, RESOLUTION)
    assert seen.tobytes() == pipeline.view(places["pictures"] / "b.png").tobytes()
    assert Image.open(tmp_path / "grid.png").width > 3 * 128


@pytest.mark.parametrize("demo", ["demo", "demo_clip"])
def test_questions_about_all_images_together(places, tmp_path, capsys, demo):
    lines = run(places, tmp_path, "mmu_together=true", demo=demo)
    clip = {} if demo == "demo" else {"clip": CLIPVisionTower(places["clip"])}
    pipeline = ShowoPipeline(clip_showo() if clip else tiny_showo(), tiny_vq(), prompting(), **clip)
    names = ["a.jpg", "b.png", "c.png"]
    (answers,) = pipeline.answer([[places["pictures"] / name for name in names]], QUESTIONS, max_new_tokens=8)
    files = ["0000.png", "0001.png", "0002.png"]
    assert lines == [
        {"files": files, "mode": "mmu", "images": names, "question": question, "answer": answer, "seed": 42}
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    assert capsys.readouterr().out.startswith(f"a.jpg, b.png, c.png\n  User: {QUESTIONS[0]}\n  Answer: {answers[0]}\n")
    assert Image.open(tmp_path / "grid.png").width == 8 + 4 * (128 + 8), "the images, then questions and answers"
    assert copies_in(tmp_path) == {*files, "grid.png"}, "which later runs do not ask about"


def test_words_are_printed_when_they_come_and_in_order(capsys):
    """Of a batch the answer whose turn it is at once; an answer that is ready early waits for its turn."""
    transcript = inference_mmu.Transcript(["a.png"], ["q0", "q1"])
    transcript.add(0, 0, "yes, ")
    assert capsys.readouterr().out == "a.png\n  User: q0\n  Answer: yes, "
    transcript.add(0, 1, "no")
    transcript.add(0, 1, "")
    assert capsys.readouterr().out == ""
    transcript.add(0, 0, "indeed")
    transcript.add(0, 0, "")
    assert capsys.readouterr().out == "indeed\n  User: q1\n  Answer: no\n"


def test_what_is_no_image_is_skipped_with_a_line(places, tmp_path, capsys):
    """Images that cannot be read by name, whatever else lies there by its number, hidden files without a word."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    whole = (places["pictures"] / "b.png").read_bytes()
    (folder / "good.png").write_bytes(whole)
    (folder / "no suffix").write_bytes(whole)
    for number in range(12):
        (folder / f"cut{number:02}.png").write_bytes(whole[: len(whole) // 2])
        (folder / f"good{number}.txt").write_text("a caption")
    (folder / "table.csv").write_text("a,b")
    for name in ("._good.png", ".hidden.png", "half.png.partial"):
        (folder / name).write_bytes(whole)
    Image.new("L", (1, 200_000)).save(folder / "narrow.png")  # enormous once it is as wide as the model's images
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe.png")
    lines = run(places, tmp_path / "out", f"mmu_image_root={folder}")
    assert [line["image"] for line in lines] == ["good.png"] * 2 + ["no suffix"] * 2
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert all(f"cut{number:02}.png" in line for number, line in enumerate(skipped[:10]))
    assert skipped[10:] == [
        "skipped: 3 more images that cannot be read",
        "skipped: 13 files that are no images (12 .txt, 1 .csv)",
    ]


def test_names_that_are_no_text_are_shown(places, tmp_path, capsys):
    folder = tmp_path / "old archive"
    folder.mkdir()
    for name in (b"caf\xe9.png", "кот.png".encode()):
        (Path(folder) / os.fsdecode(name)).write_bytes((places["pictures"] / "b.png").read_bytes())
    lines = run(places, tmp_path / "out", f"mmu_image_root={folder}")
    assert {line["image"] for line in lines} == {r"caf\xe9.png", "кот.png"}
    assert r"caf\xe9.png" in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_images_and_results_in_one_folder(places, tmp_path):
    """The user's own images stay and are asked about, also by a later run, which does not ask about results."""
    names = ["0000.png", "a.png", "grid.png"]
    for name in names:
        (tmp_path / name).write_bytes((places["pictures"] / "b.png").read_bytes())
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for count, more in enumerate(([], [], ["overwrite=true"]), 1):
        lines = run(places, tmp_path, f"mmu_image_root={tmp_path}", *more)
        assert [line["image"] for line in lines] == [name for name in names for _ in range(2)] * (
            count if count < 3 else 1
        )
        assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_rotated_and_deep_images_are_seen_as_people_see_them(places, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "pictures"
    folder.mkdir()
    photo = Image.new("RGB", (48, 32), "blue")
    photo.paste("red", (0, 0, 48, 16))
    photo.save(folder / "photo.png", exif=exif)
    Image.fromarray(np.linspace(0, 65535, 64)[None].repeat(64, 0).astype(np.uint16)).save(folder / "ramp.png")
    for exif in ("ignore", "apply"):
        run(places, tmp_path / exif, f"mmu_image_root={folder}", f"image.exif={exif}")
        told = "1 image carries a rotation (EXIF), ignored; image.exif=apply turns it" in capsys.readouterr().out
        seen = Image.open(tmp_path / exif / "0000.png")
        assert told == (exif == "ignore") and seen.getpixel((30, 4)) == (255, 0, 0)
        assert seen.getpixel((4, 4)) == ((255, 0, 0) if told else (0, 0, 255))
        ramp = np.asarray(Image.open(tmp_path / exif / "0001.png"))[5, :, 0].astype(int)
        assert ramp[0] < 10 and ramp[-1] > 245 and abs(ramp[len(ramp) // 2] - 128) < 10


def test_one_image_may_be_named(places, tmp_path):
    lines = run(places, tmp_path, f"mmu_image_root={places['image']}")
    assert [line["image"] for line in lines] == ["c.png"] * 2


def test_the_bare_caption(places, tmp_path, capsys):
    lines = run(places, tmp_path, "question=null")
    pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    captions = pipeline.caption([places["pictures"] / line["image"] for line in lines], max_new_tokens=8)
    assert [line["answer"] for line in lines] == captions and {line["question"] for line in lines} == {None}
    assert f"a.jpg\n  Caption: {captions[0]}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_sampling_follows_its_settings_and_the_seed(places, tmp_path):
    sampled = ["top_k=null", "top_p=0.95", "temperature=3"]
    sampled.append("overwrite=true")
    runs = [run(places, tmp_path, *sampled, f"seed={seed}") for seed in (1, 1, 2)]
    runs.append(run(places, tmp_path, "overwrite=true"))
    first, again, other, greedy = ([line["answer"] for line in lines] for lines in runs)
    assert first == again != other != greedy != first
    assert len(run(places, tmp_path / "short", "max_new_tokens=2")[0]["answer"].split()) <= 2


@pytest.mark.slow
def test_wandb_holds_the_published_panel(places, tmp_path):
    lines = run(places, tmp_path, "wandb.mode=offline")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len(list((folder / "files/media/images").glob("multimodal understanding_0_*.png"))) == 3
    (record,) = folder.glob("run-*.wandb")
    caption = "".join(f"User: {line['question']}\n Answer : {line['answer']}\n" for line in lines[:2])
    for text in ("multimodal understanding", json.dumps(caption)[1:-1], "tiny_mmu"):
        assert text.encode() in record.read_bytes()
