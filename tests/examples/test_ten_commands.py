"""The ten commands of docs/training.md, as examples/own_images/train.sh has them, on a messy folder at a tiny size."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.examples.messy import NUM_SAMPLES, SKIPPED, write_messy_folder
from tools import make_shards
from tools.shard_writing import read_manifest
from training.data.shards import read_shard

SCRIPT = "examples/own_images/train.sh"
# Enough for four steps; the model's own sizes are small already.
TOKENIZER = "training.max_train_steps=4 experiment.eval_every=2 experiment.log_every=2"
TRAINING = f"{TOKENIZER} experiment.generate_every=4 training.batch_size_t2i=4 training.batch_size_mmu=4"


def commands_of(text: str) -> list[list[str]]:
    """The words of each command that runs one of our scripts."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith(("python3", "accelerate"))]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_page_and_the_script_have_the_same_commands(repository):
    page = (repository / "docs/training.md").read_text().partition("in ten commands")[2]
    documented = commands_of(re.search(r"```\n(.*?)```", page, re.DOTALL)[1])
    script = (repository / SCRIPT).read_text()
    for word in ("$ROOT/", "$TOKENIZER", "$TRAINING"):
        script = script.replace(word, "")
    assert commands_of(script) == documented and len(documented) == 9  # the first is `make setup`


def check_shards(prefix: Path) -> None:
    """What may be used of the folder is there, with its caption; what may not is counted."""
    manifest = read_manifest(prefix)
    files = [prefix.parent / entry["file"] for name in ("shards", "heldout") for entry in manifest[name]]
    texts = [sample["txt"].decode() for file in files for sample in read_shard(str(file))]
    assert manifest["skipped"] == SKIPPED and len(texts) == NUM_SAMPLES
    assert manifest["heldout"][0]["samples"] == 3
    assert all(re.fullmatch(r"a \w+ square on \w+,\s+number \d+", text) for text in texts)
    assert len({text.split()[-1] for text in texts}) == NUM_SAMPLES


def test_the_messy_folder_becomes_shards(repository, tmp_path, monkeypatch, capsys):
    write_messy_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    make_shards.main(["source=photos", "output=data/mine/train", "holdout=0.05"])
    check_shards(tmp_path / "data/mine/train")
    figures = re.compile(rf"\d+ (?:samples|{'|'.join(SKIPPED)})")
    told = figures.findall(capsys.readouterr().out)
    for page in ("own_images", "own_data"):  # they show what the command says of this folder
        block = re.search(r"^data/mine/train: .*?```", (repository / f"docs/{page}.md").read_text(), re.M | re.S)[0]
        assert figures.findall(block) == told and len(told) == 3 + len(SKIPPED)


@pytest.mark.slow
def test_from_a_messy_folder_to_a_model_that_draws_and_answers(repository, tmp_path):
    photos = write_messy_folder(tmp_path / "photos")
    pages = sorted((repository / "docs").glob("*.md"))
    (tmp_path / "prose.txt").write_text("\n\n".join(page.read_text() for page in pages))
    (tmp_path / "prompts.txt").write_text("a red square on blue\na green square on grey\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"TOKENIZER_SETTINGS": TOKENIZER, "TRAINING_SETTINGS": TRAINING, "PATH": path, "OMP_NUM_THREADS": "1"}
    run = ["bash", str(repository / SCRIPT)]
    ended = subprocess.run(run, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    check_shards(tmp_path / "data/mine/train")
    outputs = tmp_path / "outputs"
    for name in ("mine-vq", "mine"):
        lines = [json.loads(line) for line in (outputs / name / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 4 and any(key.startswith("eval") for line in lines for key in line)
    assert Image.open(outputs / "mine/curves.png").size[0] > 200
    images = [json.loads(line) for line in (outputs / "mine-images/results.jsonl").read_text().splitlines()]
    assert [image["prompt"] for image in images] == ["a red square on blue", "a green square on grey"]
    captions = [json.loads(line) for line in (outputs / "mine-captions/results.jsonl").read_text().splitlines()]
    shown = [path for path in photos.iterdir() if path.is_file() and not path.name.startswith("._")]
    suffixes = (".jpg", ".png", ".webp", ".gif", ".bmp", ".tiff")
    names = {path.name for path in shown if path.suffix.lower() in suffixes} - {"IMG 22 [a].jpg", "IMG 21 [a].jpg"}
    assert len(captions) == len(names) and all(caption["question"] is None for caption in captions)
