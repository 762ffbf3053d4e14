"""`inference_mmu.py` from published-format folders to answers on the terminal, in results.jsonl, grid and wandb."""

import json
from pathlib import Path

import pytest
from PIL import Image

import inference_mmu
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


def test_words_are_printed_when_they_come_and_in_order(capsys):
    """Of a batch the answer whose turn it is at once; an answer that is ready early waits for its turn."""
    transcript = inference_mmu.Transcript([Path("a.png")], ["q0", "q1"])
    transcript.add(0, 0, "yes, ")
    assert capsys.readouterr().out == "a.png\n  User: q0\n  Answer: yes, "
    transcript.add(0, 1, "no")
    transcript.add(0, 1, "")
    assert capsys.readouterr().out == ""
    transcript.add(0, 0, "indeed")
    transcript.add(0, 0, "")
    assert capsys.readouterr().out == "indeed\n  User: q1\n  Answer: no\n"


def test_what_is_no_image_is_skipped_with_a_line(places, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    whole = (places["pictures"] / "b.png").read_bytes()
    (folder / "good.png").write_bytes(whole)
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "SOURCES.md").write_text("no image")
    Image.new("L", (1, 200_000)).save(folder / "narrow.png")  # enormous once it is as wide as the model's images
    (folder / "sub").mkdir()
    lines = run(places, tmp_path / "out", f"mmu_image_root={folder}")
    assert {line["image"] for line in lines} == {"good.png"} and len(lines) == 2
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    for name, line in zip(("SOURCES.md", "cut.png", "narrow.png"), skipped, strict=True):
        assert name in line


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
    runs = [run(places, tmp_path, *sampled, f"seed={seed}") for seed in (1, 1, 2)] + [run(places, tmp_path)]
    first, again, other, greedy = ([line["answer"] for line in lines] for lines in runs)
    assert first == again != other != greedy != first
    assert len(run(places, tmp_path, "max_new_tokens=2")[0]["answer"].split()) <= 2


@pytest.mark.slow
def test_wandb_holds_the_published_panel(places, tmp_path):
    lines = run(places, tmp_path, "wandb.mode=offline")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len(list((folder / "files/media/images").glob("multimodal understanding_0_*.png"))) == 3
    (record,) = folder.glob("run-*.wandb")
    caption = "".join(f"User: {line['question']}\n Answer : {line['answer']}\n" for line in lines[:2])
    for text in ("multimodal understanding", json.dumps(caption)[1:-1], "tiny_mmu"):
        assert text.encode() in record.read_bytes()
