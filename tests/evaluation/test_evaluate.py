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
from evaluation.schema import EvaluationConfig
from evaluation.task import QuestionTask
from evaluation.tasks import GROUPS, TASKS
from models import CLIPVisionTower, ShowoPipeline
from tests.evaluation.official import write_gqa
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import clip_showo, tiny_vq

SCRIPT = str(Path(__file__).resolve().parents[2] / "evaluate.py")
# The scene world's want another size, and edits the branch that sees codes: test_scenes.py, test_editing.py.
NAMES = [name for name in TASKS if not name.startswith("scenes_") and name != "editing"]
ALL = ",".join(NAMES)
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "MASTER_ADDR")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["demo", "demo_clip"])
def test_every_task_with_both_branches(evaluation, places, demo):
    """Batches that cut across images give the answers of each question alone."""
    evaluation = replace(evaluation, yaml=places[demo])
    results = evaluation.run(ALL, "batch_size=3")
    assert list(results) == NAMES
    model, clip = (tiny_showo(), None) if demo == "demo" else (clip_showo(), CLIPVisionTower(places["clip"]))
    pipeline, seen = ShowoPipeline(model, tiny_vq(), prompting(), clip=clip), set()
    for name in NAMES:
        predictions, run = evaluation.lines(f"{name}/predictions.jsonl"), evaluation.prepared(name, "batch_size=3")
        assert run.task.name == name and [line["key"] for line in predictions] == [item.key for item in run.items]
        if isinstance(run.task, QuestionTask):
            for line, item in list(zip(predictions, run.items, strict=True))[::7]:
                assert line["answer"] == pipeline.answer(item.open_image(), item.prompt, max_new_tokens=4)[0][0]
                seen.add(line["answer"])
        judged = name != "geneval"  # its detector is not installed
        assert (results[name]["headline"] in results[name]["figures"]) == judged
        for figure in results[name]["figures"].values():
            assert figure["low"] is None or figure["low"] <= figure["high"]
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("task", "number", "prompt"),
    [
        ("pope", 0, f"Is there a random thing 0 in the image?{SHORT}"),
        ("mme", 0, "Is it red? Please answer yes or no."),  # as distributed
        ("vqav2", 0, f"What is 9001?{SHORT}"),
        ("gqa", 0, f"What 201?{SHORT}"),
        ("mmmu", 0, f"<image 1> Which?\n(A) $6\n(B) $7\n(C) $8\n\n{LETTER}"),
        ("mmmu", 1, f"How much?{SHORT}"),
    ],
)
def test_prompts(evaluation, task, number, prompt):
    assert evaluation.prepared(task).items[number].prompt == prompt


def test_a_group_is_its_tasks(evaluation):
    config = load_config(evaluation.arguments("gqa,emoji,emoji_naming"), EvaluationConfig)
    assert [task.name for task in evaluate.choose_tasks(config)] == ["gqa", *GROUPS["emoji"]]


def test_table_predictions_and_sheet(evaluation):
    evaluation.answer("gqa", {"201": "Table", "202": "yes", "203": "right"})
    table = evaluation.text("results.md")
    row = r"\n\| gqa \| accuracy \(%\) \| 66\.7 \[\d+\.\d, \d+\.\d\] \| 58\.0 \| 61\.0 \| testdev-balanced.* 12578 \|\n"
    assert re.search(row, table)
    assert "| gqa | binary | 50.0 [" in table
    expected = {"key": "201", "image": "n1.jpg", "prompt": f"What 201?{SHORT}", "answer": "Table"}
    expected |= {"expected": "table", "parsed": "table", "score": 1.0}
    assert evaluation.lines("gqa/predictions.jsonl")[0] == expected
    assert Image.open(evaluation.folder / "gqa/best_worst.png").width > 2 * 128


@pytest.mark.slow
def test_a_broken_image_ends_the_run_on_the_way(own):
    """A line names it; what was answered is kept, and its repair is all that is missing."""
    write_gqa(own.root)
    broken = own.root / "gqa/images/n2.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    own.refuses(f"image {broken} cannot be read", "gqa", "batch_size=2")
    assert [line["key"] for line in own.lines("gqa/answers-000.jsonl")] == ["201", "202"]
    broken.write_bytes(whole)
    assert own.run("gqa", "batch_size=2")["gqa"]["items"] == 3


@pytest.mark.slow
def test_answers_of_other_settings_do_not_mix(evaluation):
    evaluation.run("gqa,flickr30k")
    for change, named in {
        "max_new_tokens=5": "max_new_tokens=4, now it is 5",
        "top_k=3": "top_k=1, now it is 3",
        "dtype=bf16": "dtype=float32, now it is bfloat16",
        "flickr30k_prompt=Describe it.": "now asks 'Describe it.'",
    }.items():
        evaluation.refuses(named, "gqa,flickr30k", change)
    settings = evaluation.folder / "gqa/settings.json"
    settings.write_text(re.sub(r"showo \(\w+\)", "showo (000000000000)", settings.read_text()))
    evaluation.refuses("checkpoint=showo", "gqa")


@pytest.mark.slow
def test_results_of_earlier_commands_are_kept(evaluation, capsys):
    """Both files show every task of this model; those of another one are dropped, which one line says."""
    whole = evaluation.inside("whole")
    whole.run("emoji_drawing,gqa,pope", "max_items=7")
    evaluation.run("emoji_drawing,gqa", "max_items=7")
    results = evaluation.run("pope", "max_items=7")
    assert list(results) == ["emoji_drawing", "gqa", "pope"]
    assert results["pope"]["items"] == 6 and "6 of 12 items" in results["pope"]["differs"]
    for name in ("results.json", "results.md"):
        assert evaluation.text(name) == whole.text(name)
    capsys.readouterr()
    assert list(evaluation.run("mme", "dtype=bf16")) == ["mme"]
    assert "results.json loses emoji_drawing, gqa, pope: evaluated with another" in capsys.readouterr().out
    assert "| gqa |" not in evaluation.text("results.md")


def test_two_runs_compared(evaluation, places):
    """Answers that differ in one item; then two checkpoints, which are evaluated first."""
    first, second = evaluation.inside("a"), evaluation.inside("b")
    first.answer("gqa", {"201": "chair", "202": "yes", "203": "left"})
    second.answer("gqa", {"201": "table", "202": "yes", "203": "left"})
    found = evaluation.compare("gqa", first.folder, second.folder)["gqa"]
    assert found["open"]["first"] == 0 and found["open"]["second"] == 100
    assert found["accuracy"]["difference"]["value"] == pytest.approx(100 / 3)
    assert found["binary"]["difference"] == {"value": 0, "low": 0, "high": 0} and found["binary"]["p"] == 1
    assert "| gqa | accuracy | 66.7 | 100.0 | 33.3 [" in evaluation.text("compare.md")
    assert evaluation.compare("gqa", places["showo"], places["showo"])["gqa"]["accuracy"]["difference"]["value"] == 0
    assert evaluation.text("1-showo/results.md") == evaluation.text("2-showo/results.md")


@pytest.mark.slow
def test_runs_that_asked_something_else_are_not_compared(evaluation):
    """Another part of the items; or other questions of the same names, which another seed chooses."""
    first, second = evaluation.inside("a"), evaluation.inside("b")
    first.run("pope,emoji_yes_no,emoji_naming", "seed=0")
    second.run("pope", "max_items=6")
    second.run("emoji_yes_no,emoji_naming")
    evaluation.compare("emoji_naming", first.folder, second.folder)
    for tasks, message in {
        "pope": "did not ask the same of pope: 1 groups",
        "gqa": "has no gqa, only pope",
        "emoji_yes_no": "not ask the same of emoji_yes_no: questions is seed 0 and seed 1; evaluate",
    }.items():
        evaluation.refuses(message, tasks, f"compare={first.folder},{second.folder}")


@pytest.mark.slow
def test_figures_of_images_compared(evaluation, monkeypatch):
    """Two guidance scales: sums and Fréchet distances, each with an interval and a p, without any network.
    A figure that one run did not compute is left out."""
    tasks, name = "emoji_drawing,reconstruction,coco", "seen Fréchet distance (EfficientNet-Lite0)"
    first, second = evaluation.inside("a"), evaluation.inside("b")
    one = first.run(tasks, "reconstruction_fid=false", "coco_scores=clip")["emoji_drawing"]["figures"][name]["value"]
    two = second.run(tasks, "guidance_scale=5", "coco_scores=fid")["emoji_drawing"]["figures"][name]["value"]
    for network in ("fid_metric", "clip_network"):
        monkeypatch.setattr(f"evaluation.tasks.text_to_image.{network}", None)
    found = evaluation.compare(tasks, first.folder, second.folder)
    distance, ceiling = (found["emoji_drawing"][key] for key in (name, f"{name}: reconstructions"))
    assert (distance["first"], distance["second"]) == (one, two) and one != two
    assert distance["difference"]["low"] < two - one < distance["difference"]["high"]
    assert 0 <= distance["p"] <= 1 and found["emoji_drawing"]["seen top-1, pixels"]["p"] <= 1
    assert ceiling["difference"]["value"] == 0 and ceiling["p"] == 1
    assert "PSNR" in found["reconstruction"] and found["coco"] == {}
    assert evaluation.text("compare.md").endswith("has it: reconstruction rFID, coco CLIPScore, coco FID-30K.\n")


@pytest.mark.slow
def test_wandb_gets_tables(evaluation):
    evaluation.run("gqa,emoji_drawing", "wandb.mode=offline")
    (folder,) = (evaluation.folder / "wandb").glob("offline-run-*")
    tables = [json.loads(path.read_text()) for path in folder.glob("files/media/table/*.table.json")]
    assert sorted(table["columns"][:2] for table in tables) == [["figure", "value"]] * 2 + [["picture", "which"]] * 2


SMALL_BATCHES = ("batch_size=2", "device=cpu")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mme", "geneval"])
def test_killed_and_started_again(evaluation, task, monkeypatch):
    """SIGKILL once some answers are there, and within a line. What is whole is not asked again, and the table is that
    of a run in peace; when nothing is missing no weights are read."""
    whole = evaluation.inside("whole")
    whole.run(ALL, *SMALL_BATCHES)
    command = [sys.executable, SCRIPT, *evaluation.arguments(ALL, *SMALL_BATCHES)]
    process = subprocess.Popen(command, cwd=evaluation.root, env=ENVIRONMENT)
    file = evaluation.folder / task / "answers-000.jsonl"
    deadline = time.monotonic() + 200
    while not (file.exists() and file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    kept = file.read_bytes()[:-5]
    file.write_bytes(kept)
    assert kept and not (evaluation.folder / "results.md").exists()
    items = evaluation.run(ALL, *SMALL_BATCHES)[task]["items"]
    monkeypatch.setattr(ShowoPipeline, "from_config", None)
    evaluation.run(ALL, *SMALL_BATCHES)
    found = file.read_bytes()
    assert found.startswith(kept + b"\n") and found.count(b"\n") == items + 1, "each once, and the cut line"
    assert evaluation.text("results.md") == whole.text("results.md")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_the_same_table(evaluation):
    one, two, settings = evaluation.inside("one"), evaluation.inside("two"), ("top_k=null", "temperature=2")
    one.run(ALL, *SMALL_BATCHES, *settings)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    done = call([*launch, *two.arguments(ALL, *SMALL_BATCHES, *settings)], two.root)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("results.md", *(f"{task}/predictions.jsonl" for task in NAMES)):
        assert two.text(name) == one.text(name)
    images = [sorted((run.folder / "geneval/images").rglob("samples/*.png")) for run in (one, two)]
    assert [path.read_bytes() for path in images[0]] == [path.read_bytes() for path in images[1]]
    assert [len(two.lines(f"mme/answers-00{rank}.jsonl")) for rank in (0, 1)] == [28, 28]
    assert done.stdout.count("pope: 12 items") == 1


@pytest.mark.slow
def test_a_mistake_ends_with_one_line_and_code_2(evaluation, tmp_path):
    """Also one of a later task: nothing is asked before all files are read."""
    done = call([sys.executable, SCRIPT, *evaluation.arguments("pope,emoji", "emoji_world=nowhere")], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert "nowhere/manifest.json (the manifest of an emoji world, which `make data-emoji` writes, see" in done.stderr
    assert not evaluation.folder.exists()
