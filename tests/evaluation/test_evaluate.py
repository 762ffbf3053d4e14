"""`evaluate.py` with tiny models of both branches: every task, resuming, comparing, what is left on disk."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import evaluate
from common.config import load_config
from common.errors import UserError, run_cli
from evaluation.schema import EvaluationConfig
from evaluation.task import QuestionTask
from evaluation.tasks import GROUPS, TASKS
from models import CLIPVisionTower, ShowoPipeline
from tests.evaluation.conftest import Evaluation
from tests.evaluation.official import WRITERS
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import clip_showo, tiny_vq

ROOT = Path(__file__).resolve().parents[2]
ALL = ",".join(TASKS)
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "MASTER_ADDR")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["demo", "demo_clip"])
def test_every_task_with_both_branches(evaluation, places, demo):
    """Batches that cut across pictures give the answers of each question alone."""
    evaluation = replace(evaluation, yaml=places[demo])
    results = evaluation.run(ALL, "batch_size=3")
    assert list(results) == list(TASKS)
    if demo == "demo":
        pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    else:
        pipeline = ShowoPipeline(clip_showo(), tiny_vq(), prompting(), clip=CLIPVisionTower(places["clip"]))
    seen = set()
    for name in TASKS:
        predictions = lines(evaluation.folder / name / "predictions.jsonl")
        run = evaluation.prepared(name, "batch_size=3")
        items, questions = run.items, isinstance(run.task, QuestionTask)
        assert [line["key"] for line in predictions] == [item.key for item in items]
        for line, item in list(zip(predictions, items, strict=True))[::7]:
            if questions:
                answer = pipeline.answer(item.open_image(), item.prompt, max_new_tokens=4)[0][0]
                assert line["answer"] == answer
                seen.add(answer)
        judged = name != "geneval"  # its detector is not installed
        assert (results[name]["headline"] in results[name]["figures"]) == judged
        for figure in results[name]["figures"].values():
            assert figure["low"] is None or figure["low"] <= figure["high"]
    assert len(seen) > 2


def test_the_table_has_the_papers_figures(evaluation):
    answers = {"201": "table", "202": "yes", "203": "right"}
    evaluation.answer("gqa", answers)
    table = (evaluation.folder / "results.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| gqa | accuracy (%)"))
    assert re.search(
        r"\| 66\.7 \[\d+\.\d, \d+\.\d\] \| 58\.0 \| 61\.0 \| testdev-balanced.* official ones 12578 \|$", row
    )
    assert "| gqa | binary | 50.0 [" in table


def test_predictions_sheet_and_records(evaluation):
    evaluation.answer("gqa", {"201": "Table", "202": "no", "203": "left"})
    first = lines(evaluation.folder / "gqa/predictions.jsonl")[0]
    assert first == {
        "key": "201",
        "image": "n1.jpg",
        "prompt": "What 201?\nAnswer the question using a single word or phrase.",
        "answer": "Table",
        "expected": "table",
        "parsed": "table",
        "score": 1.0,
    }
    assert Image.open(evaluation.folder / "gqa/best_worst.png").width > 2 * 128


@pytest.mark.slow
def test_what_is_answered_is_not_asked_again(evaluation, monkeypatch):
    """A run that was killed within a line goes on; the model gets only what is missing, and the table is the same."""
    evaluation.run("gqa,flickr30k", "batch_size=1")
    table = (evaluation.folder / "results.md").read_text()
    file = evaluation.folder / "gqa/answers-000.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text(whole[0] + whole[1][:20])
    asked = []
    answer_each = ShowoPipeline.answer_each

    def counted(self, images, questions, **settings):
        asked.extend(questions)
        return answer_each(self, images, questions, **settings)

    monkeypatch.setattr(ShowoPipeline, "answer_each", counted)
    evaluation.run("gqa,flickr30k", "batch_size=1")
    assert [question.split("?")[0] for question in asked] == ["What 202", "What 203"]
    assert (evaluation.folder / "results.md").read_text() == table
    monkeypatch.setattr(ShowoPipeline, "from_config", None)  # when nothing is missing no weights are read
    evaluation.run("gqa,flickr30k")
    assert (evaluation.folder / "results.md").read_text() == table


@pytest.mark.slow
def test_a_broken_picture_ends_the_run_on_the_way(places, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line that names it; what was answered is kept, and its repair is all that is missing."""
    WRITERS["gqa"](tmp_path)
    broken = tmp_path / "gqa/images/n2.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    evaluation = Evaluation(places["demo"], tmp_path, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *evaluation.arguments("gqa", "batch_size=2")])
    with pytest.raises(SystemExit) as exited:
        run_cli(evaluate.main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exited.value.code == 2 and f"image {broken} cannot be read" in line
    assert [line["key"] for line in lines(evaluation.folder / "gqa/answers-000.jsonl")] == ["201", "202"]
    broken.write_bytes(whole)
    assert evaluation.run("gqa", "batch_size=2")["gqa"]["items"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["max_new_tokens=5"], "max_new_tokens=4, now it is 5"),
        (["top_k=3"], "top_k=1, now it is 3"),
        (["dtype=bf16"], "dtype=float32, now it is bfloat16"),
    ],
)
def test_answers_of_other_settings_do_not_mix(evaluation, change, named):
    evaluation.run("gqa")
    with pytest.raises(UserError, match=named):
        evaluation.run("gqa", *change)


def test_answers_of_other_weights_do_not_mix(evaluation, places):
    evaluation.run("gqa")
    settings = evaluation.folder / "gqa/settings.json"
    settings.write_text(re.sub(r"showo \(\w+\)", "showo (000000000000)", settings.read_text()))
    with pytest.raises(UserError, match="checkpoint=showo"):
        evaluation.run("gqa")


@pytest.mark.slow
def test_answers_to_other_questions_do_not_mix(evaluation):
    evaluation.run("flickr30k")
    with pytest.raises(UserError, match="now asks 'Describe it.'"):
        evaluation.run("flickr30k", "flickr30k_prompt=Describe it.")


@pytest.mark.slow
def test_results_of_earlier_commands_are_kept(evaluation, capsys):
    """Both files show every task of this model; those of another one are dropped, which one line says."""
    whole = replace(evaluation, folder=evaluation.folder / "whole")
    whole.run("emoji_drawing,gqa,pope")
    evaluation.run("emoji_drawing,gqa")
    assert list(evaluation.run("pope")) == list(evaluation.run("gqa")) == ["emoji_drawing", "gqa", "pope"]
    for name in ("results.json", "results.md"):
        assert (evaluation.folder / name).read_text() == (whole.folder / name).read_text()
    capsys.readouterr()
    assert list(evaluation.run("mme", "dtype=bf16")) == ["mme"]
    assert "results.json loses emoji_drawing, gqa, pope: evaluated with another" in capsys.readouterr().out
    assert "| gqa |" not in (evaluation.folder / "results.md").read_text()


def test_a_part_says_so(evaluation):
    results = evaluation.run("pope", "max_items=7")
    assert results["pope"]["items"] == 6 and "6 of 12 items" in results["pope"]["differs"]


def test_two_runs_compared(evaluation):
    first = replace(evaluation, folder=evaluation.folder / "a")
    second = replace(evaluation, folder=evaluation.folder / "b")
    first.answer("gqa", {"201": "chair", "202": "yes", "203": "left"})
    second.answer("gqa", {"201": "table", "202": "yes", "203": "left"})
    evaluate.main(evaluation.arguments("gqa", f"compare={first.folder},{second.folder}"))
    found = json.loads((evaluation.folder / "compare.json").read_text())["tasks"]["gqa"]
    assert found["open"]["first"] == 0 and found["open"]["second"] == 100
    assert found["accuracy"]["difference"]["value"] == pytest.approx(100 / 3)
    assert found["binary"]["difference"] == {"value": 0, "low": 0, "high": 0} and found["binary"]["p"] == 1
    assert "| gqa | accuracy | 66.7 | 100.0 | 33.3 [" in (evaluation.folder / "compare.md").read_text()


@pytest.mark.slow
def test_two_checkpoints_compared(evaluation, places):
    evaluate.main(evaluation.arguments("gqa", f"compare={places['showo']},{places['showo']}"))
    found = json.loads((evaluation.folder / "compare.json").read_text())["tasks"]["gqa"]
    assert found["accuracy"]["difference"]["value"] == 0
    assert (evaluation.folder / "1-showo/results.md").is_file() and (evaluation.folder / "2-showo/results.md").is_file()


@pytest.mark.slow
def test_runs_that_asked_something_else_are_not_compared(evaluation):
    first = replace(evaluation, folder=evaluation.folder / "a")
    second = replace(evaluation, folder=evaluation.folder / "b")
    first.run("pope")
    second.run("pope", "max_items=6")
    for tasks, message in (("pope", "did not ask the same of pope: 1 groups"), ("gqa", "has no gqa, only pope")):
        with pytest.raises(UserError, match=message):
            evaluate.main(evaluation.arguments(tasks, f"compare={first.folder},{second.folder}"))


@pytest.mark.slow
def test_other_questions_under_the_same_names_are_not_compared(evaluation):
    """Another seed chooses other questions to be answered no."""
    folders = [evaluation.folder / name for name in "ab"]
    for seed, folder in enumerate(folders):
        replace(evaluation, folder=folder).run("emoji_yes_no,emoji_naming", f"seed={seed}")
    compared = f"compare={folders[0]},{folders[1]}"
    evaluate.main(evaluation.arguments("emoji_naming", compared))
    with pytest.raises(UserError, match="not ask the same of emoji_yes_no: questions is seed 0 and seed 1; evaluate"):
        evaluate.main(evaluation.arguments("emoji_yes_no", compared))


@pytest.mark.slow
def test_a_figure_of_one_run_is_left_out(evaluation):
    """rFID, and of COCO FID and CLIPScore, which stand for nothing where they were not computed."""
    folders = [evaluation.folder / name for name in "ab"]
    settings = (["reconstruction_fid=false", "coco_scores=clip"], ["coco_scores=fid"])
    for folder, given in zip(folders, settings, strict=True):
        replace(evaluation, folder=folder).run("reconstruction,coco", *given)
    evaluate.main(evaluation.arguments("reconstruction,coco", f"compare={folders[0]},{folders[1]}"))
    found = json.loads((evaluation.folder / "compare.json").read_text())["tasks"]
    assert "rFID" not in found["reconstruction"] and "PSNR" in found["reconstruction"] and found["coco"] == {}
    end = "has it: reconstruction rFID, coco CLIPScore, coco FID-30K.\n"
    assert (evaluation.folder / "compare.md").read_text().endswith(end)


def test_a_group_is_its_tasks(evaluation):
    config = load_config(evaluation.arguments("gqa,emoji,emoji_naming"), EvaluationConfig)
    assert [task.name for task in evaluate.choose_tasks(config)] == ["gqa", *GROUPS["emoji"]]


@pytest.mark.slow
def test_drawings_compared(evaluation):
    """Two guidance scales: sums and Fréchet distances, each with an interval and a p."""
    first = replace(evaluation, folder=evaluation.folder / "a")
    second = replace(evaluation, folder=evaluation.folder / "b")
    first.run("emoji_drawing")
    second.run("emoji_drawing", "guidance_scale=5")
    evaluate.main(evaluation.arguments("emoji_drawing", f"compare={first.folder},{second.folder}"))
    found = json.loads((evaluation.folder / "compare.json").read_text())["tasks"]["emoji_drawing"]
    distance = found["seen Fréchet distance (EfficientNet-Lite0)"]
    results = [
        json.loads((one.folder / "results.json").read_text())["tasks"]["emoji_drawing"] for one in (first, second)
    ]
    values = [one["figures"]["seen Fréchet distance (EfficientNet-Lite0)"]["value"] for one in results]
    assert [distance["first"], distance["second"]] == values and values[0] != values[1]
    assert distance["difference"]["low"] < values[1] - values[0] < distance["difference"]["high"]
    assert 0 <= distance["p"] <= 1 and found["seen top-1, pixels"]["p"] <= 1
    ceiling = found["seen Fréchet distance (EfficientNet-Lite0): reconstructions"]
    assert ceiling["difference"]["value"] == 0 and ceiling["p"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gqa", "emoji_drawing"])
def test_wandb_gets_tables(evaluation, task):
    evaluation.run(task, "wandb.mode=offline")
    (folder,) = (evaluation.folder / "wandb").glob("offline-run-*")
    tables = [json.loads(path.read_text()) for path in folder.glob("files/media/table/*.table.json")]
    assert {tuple(table["columns"][:2]) for table in tables} == {("figure", "value"), ("picture", "which")}


def command(evaluation: Evaluation, *more: str) -> list[str]:
    return [str(ROOT / "evaluate.py"), *evaluation.arguments(ALL, "batch_size=2", "device=cpu", *more)]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mme", "geneval"])
def test_killed_and_started_again(evaluation, task):
    """SIGKILL once some answers are there; the second run keeps them, and the table is that of a run in peace."""
    whole = replace(evaluation, folder=evaluation.folder / "whole")
    whole.run(ALL, "batch_size=2", "device=cpu")
    process = subprocess.Popen([sys.executable, *command(evaluation)], cwd=evaluation.root, env=ENVIRONMENT)
    file = evaluation.folder / task / "answers-000.jsonl"
    deadline = time.monotonic() + 200
    while not (file.exists() and file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    kept = file.read_bytes()
    assert kept and not (evaluation.folder / "results.md").exists()
    evaluation.run(ALL, "batch_size=2", "device=cpu")
    assert file.read_bytes().startswith(kept)
    assert (evaluation.folder / "results.md").read_text() == (whole.folder / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_the_same_table(evaluation):
    one, two = (replace(evaluation, folder=evaluation.folder / name) for name in ("one", "two"))
    one.run(ALL, "batch_size=2", "device=cpu", "top_k=null", "temperature=2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    sampled = ("top_k=null", "temperature=2")
    done = subprocess.run(
        [*launch, *command(two, *sampled)], cwd=two.root, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("results.md", *(f"{task}/predictions.jsonl" for task in TASKS)):
        assert (two.folder / name).read_text() == (one.folder / name).read_text()
    drawings = [sorted((run.folder / "geneval/images").rglob("samples/*.png")) for run in (one, two)]
    assert [path.read_bytes() for path in drawings[0]] == [path.read_bytes() for path in drawings[1]]
    shares = [len(lines(two.folder / "mme" / f"answers-00{rank}.jsonl")) for rank in (0, 1)]
    assert shares == [28, 28]
    assert done.stdout.count("pope: 12 items") == 1


@pytest.mark.slow
def test_a_mistake_ends_with_one_line_and_code_2(evaluation, tmp_path):
    for write in WRITERS.values():
        write(tmp_path / "data")
    (tmp_path / "data/gqa/testdev_balanced_questions.json").unlink()
    evaluation = replace(evaluation, root=tmp_path / "data")
    done = subprocess.run(
        [sys.executable, *command(evaluation)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert "gqa/testdev_balanced_questions.json does not exist; expected GQA's questions by their ids" in done.stderr
    assert not evaluation.folder.exists()
