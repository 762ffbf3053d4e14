"""GenEval, COCO and reconstruction on small sets in the official formats, with figures worked by hand."""

import json
import sys
import types
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

import evaluate
from common.errors import UserError
from models import ShowoPipeline
from tests.evaluation.official import save_picture, solid

# ---- GenEval ----


def results(evaluation, rights: str) -> str:
    """What the official script writes for 2 prompts x 4 drawings; `rights` is one of 01 for each."""
    lines = []
    for number, right in enumerate(rights):
        prompt, sample = divmod(number, 4)
        name = f"/elsewhere/images/{prompt:05d}/samples/{sample:04d}.png"
        record = {"filename": name, "tag": "x", "prompt": "x", "correct": right == "1", "reason": "no clock\n"}
        lines.append(json.dumps(record | {"metadata": "{}", "details": "{}"}) + "\n")
    return "".join(lines)


def test_geneval_by_hand(evaluation):
    """4 of 4 benches, 1 of 4 clocks: the tags' mean is 62.5."""
    evaluation.run("geneval", "batch_size=3")
    folder = evaluation.folder / "geneval"
    table = (evaluation.folder / "results.md").read_text()
    assert "not scored | 68.0 |" in table and "the detector (mmdet) is not installed here" in table
    names = sorted(str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.*"))
    one = ["grid.png", "metadata.jsonl", *(f"samples/000{n}.png" for n in range(4))]
    assert names == [f"{prompt}/{name}" for prompt in ("00000", "00001") for name in one]
    metadata = json.loads((folder / "images/00001/metadata.jsonl").read_text())
    assert metadata["tag"] == "counting" and metadata["exclude"] == [{"class": "clock", "count": 3}]
    drawings = {(folder / f"images/00000/samples/000{n}.png").read_bytes() for n in range(4)}
    assert len(drawings) == 4  # four draws, not one
    (folder / "results.jsonl").write_text(results(evaluation, "11110100"))
    figures = {
        name: figure["value"]
        for name, figure in evaluation.run("geneval", "batch_size=3")["geneval"]["figures"].items()
    }
    expected = {"overall": 62.5, "drawings right": 62.5, "prompts with a right drawing": 100}
    assert figures == expected | {"single_object": 100, "counting": 25}
    line = json.loads((folder / "predictions.jsonl").read_text().splitlines()[4])
    assert line["key"] == "00001/samples/0000.png" and line["parsed"] == "no clock" and line["score"] == 0


def test_geneval_results_of_other_drawings(evaluation):
    evaluation.run("geneval")
    (evaluation.folder / "geneval/results.jsonl").write_text(results(evaluation, "1111"))
    with pytest.raises(UserError, match="names 4 images, but not .../00001/samples/0000.png .4 are missing"):
        evaluation.run("geneval")


SCRIPT = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("imagedir"), parser.add_argument("--outfile"), parser.add_argument("--model-path")
args = parser.parse_args()
with open(args.outfile, "w") as file:
    for path in sorted(pathlib.Path(args.imagedir).glob("*/samples/*.png")):
        json.loads((path.parents[1] / "metadata.jsonl").read_text())
        file.write(json.dumps({"filename": str(path), "correct": True, "reason": "", "tag": args.model_path}) + "\\n")
"""


@pytest.mark.slow
def test_geneval_runs_the_official_script(evaluation, tmp_path, monkeypatch):
    script = tmp_path / "official/evaluation/evaluate_images.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)
    given = [f"geneval_repository={tmp_path / 'official'}", "geneval_detector=weights"]
    monkeypatch.setattr("evaluation.tasks.text_to_image.find_spec", lambda name: types.SimpleNamespace())
    assert evaluation.run("geneval", *given)["geneval"]["figures"]["overall"]["value"] == 100
    script.write_text("import sys\nsys.exit('no detector')")
    (evaluation.folder / "geneval/results.jsonl").unlink()
    with pytest.raises(UserError, match="evaluate_images.py failed .no detector."):
        evaluation.run("geneval", *given)


# ---- COCO ----


@pytest.mark.slow
def test_coco_by_hand(evaluation):
    """One feature, the mean grey: 0, 100, 200 against 30, 60, 90: 40² + 10000 + 900 − 2 · √9000000 = 6500."""
    run = evaluation.prepared("coco")
    assert len(run.items) == 3 and all(
        item.prompt in ("a b 11", "a b 12", "a b 13", "c d 11", "c d 12", "c d 13") for item in run.items
    )
    answers = {}
    for item, grey in zip(run.items, (30, 60, 90), strict=True):
        answers[item.key] = run.task.file_of(item)
        solid(evaluation.folder / "coco" / answers[item.key], grey)
    figures = evaluation.answer("coco", answers)
    assert figures["FID-30K"] == pytest.approx(6500)
    model = CLIPModel.from_pretrained(evaluation.root / "clip")
    processor = CLIPProcessor.from_pretrained(evaluation.root / "clip")
    scores = []
    for item in run.items:
        picture = Image.open(evaluation.folder / "coco" / answers[item.key])
        with torch.no_grad():
            out = model(**processor(text=[item.prompt], images=picture, return_tensors="pt"))
        scores.append(max(0, 100 * float((out.text_embeds * out.image_embeds).sum())))
    assert figures["CLIPScore"] == pytest.approx(sum(scores) / 3, abs=1e-3)
    row = next(line for line in (evaluation.folder / "results.md").read_text().splitlines() if "| coco | FID" in line)
    assert "| 6500.0 | 9.24 |" in row and "3 images, through the network in inception.pt" in row
    assert "both sets: shorter side to 16 by PIL's bicubic, centre crop" in row and "CLIPScore by clip" in row


def test_coco_compared(evaluation, monkeypatch):
    """FID has no interval, so no p; CLIPScore has both. Comparing needs no networks."""
    evaluation.run("coco")
    for network in ("fid_metric", "clip_network"):
        monkeypatch.setattr(f"evaluation.tasks.text_to_image.{network}", None)
    evaluate.main(evaluation.arguments("coco", f"compare={evaluation.folder},{evaluation.folder}"))
    found = json.loads((evaluation.folder / "compare.json").read_text())["tasks"]["coco"]
    assert found["FID-30K"]["difference"] == {"value": 0, "low": None, "high": None} and found["FID-30K"]["p"] is None
    assert found["CLIPScore"]["p"] == 1


def test_what_is_missing_is_named(evaluation, monkeypatch):
    missing = [("coco", "fid_features=null", "FID needs torch-fidelity, which is not installed; pip install")]
    missing += [("coco", "fid_features=nowhere.pt", "fid_features=nowhere.pt does not exist")]
    missing += [("reconstruction", "reconstruction_images=null", "reconstruction_images is not given")]
    missing += [("geneval", "geneval_repository=nowhere", "nowhere/evaluation/evaluate_images.py does not exist")]
    missing += [("coco", "coco_scores=fid,x", "coco_scores is 'fid,x'; allowed: fid, clip or fid,clip")]
    for task, setting, message in missing:
        with pytest.raises(UserError) as error:
            evaluation.run(task, setting)
        assert message in str(error.value) and "\n" not in str(error.value).strip()
    assert not evaluation.folder.exists()
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setattr("evaluation.images.find_spec", lambda name: None)
    with pytest.raises(UserError, match="CLIPScore needs torchmetrics"):
        evaluation.run("coco", "coco_scores=clip")


def unreachable(*_, **__):
    raise URLError("no route")


@pytest.mark.parametrize("task", ["coco", "reconstruction"])
def test_networks_that_do_not_serve(evaluation, tmp_path, monkeypatch, task):
    """They are opened before anything is drawn, and before any weights of Show-o are read."""
    monkeypatch.setattr(ShowoPipeline, "from_config", None)
    monkeypatch.setattr("evaluation.images.find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", unreachable)
    (tmp_path / "broken.pt").write_bytes(b"x")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    wrong = [([f"fid_features={tmp_path / 'broken.pt'}"], "broken.pt is no TorchScript network")]
    wrong += [(["fid_features=null", f"fid_weights={tmp_path / 'broken.pt'}"], "broken.pt does not give the weights")]
    wrong += [
        (["fid_features=null"], "the hub does not give the weights of .*Inception .*no route.*; give fid_weights")
    ]
    if task == "coco":
        wrong += [(["coco_scores=clip", f"clip_score_model={tmp_path}"], "holds no usable CLIP model")]
    for settings, message in wrong:
        with pytest.raises(UserError, match=message):
            evaluation.run(task, *settings)
        assert not evaluation.folder.exists()


# ---- reconstruction ----


def test_reconstruction_by_hand(evaluation):
    """Greys 100 and 200 restored as 110 and 200; two of 64 codes, equally often.

    rFID of the mean grey: means 150 and 155, variances 5000 and 4050: 25 + 9050 − 2 · √(5000 · 4050) = 75.
    """
    folder = evaluation.folder / "reconstruction"
    answers = {}
    items = evaluation.prepared("reconstruction").items
    for item, (grey, codes) in zip(items, ((110, [0, 0]), (200, [63, 63])), strict=True):
        answers[item.key] = f"images/{item.facts['file']}.png"
        solid(folder / answers[item.key], grey)
        np.save(folder / f"images/{item.facts['file']}.npy", np.array(codes, dtype=np.int32))
    (folder / "codebook.json").write_text('{"codebook_size": 64}')
    figures = evaluation.answer("reconstruction", answers)
    first = 20 * np.log10(255 / 10)
    ssim = (2 * 100 * 110 + (0.01 * 255) ** 2) / (100**2 + 110**2 + (0.01 * 255) ** 2)
    assert figures["PSNR"] == pytest.approx((first + 100) / 2)
    assert figures["SSIM x 100"] == pytest.approx(50 * (1 + ssim), rel=1e-4)
    assert figures["codes used"] == 2 and figures["perplexity"] == 2
    assert figures["codebook use, %"] == pytest.approx(100 / 32)
    assert figures["rFID"] == pytest.approx(75, rel=1e-4)


def test_reconstruction_of_the_model(evaluation):
    found = evaluation.run("reconstruction", "batch_size=1", "reconstruction_fid=false")["reconstruction"]["figures"]
    assert "rFID" not in found and 1 <= found["codes used"]["value"] <= 32
    files = list((evaluation.folder / "reconstruction/images").glob("*.npy"))
    assert len(files) == 2 and np.load(files[0]).shape == (16,)


@pytest.mark.slow
def test_reconstruction_of_a_folder_that_changed(evaluation, tmp_path):
    """What is there stays with its picture when others come or one changes; another folder is refused."""
    pictures, settings = tmp_path / "pictures", ["reconstruction_fid=false"]
    settings.append(f"reconstruction_images={pictures}")
    for name, grey in (("b.png", 40), ("c.png", 200)):
        solid(pictures / name, grey)
    evaluation.run("reconstruction", *settings)
    solid(pictures / "a.png", 120)
    save_picture(pictures / "c.png", 3)
    before = (evaluation.folder / "reconstruction/answers-000.jsonl").read_text()
    grown = evaluation.run("reconstruction", *settings)["reconstruction"]["figures"]
    asked = (evaluation.folder / "reconstruction/answers-000.jsonl").read_text().removeprefix(before)
    assert [json.loads(line)["image"] for line in asked.splitlines()] == ["a.png", "c.png"]
    anew = replace(evaluation, folder=tmp_path / "anew").run("reconstruction", *settings)["reconstruction"]["figures"]
    assert grown == anew
    solid(tmp_path / "other/b.png", 41)
    with pytest.raises(UserError, match="reconstruction_images=.*pictures, now it is .*other"):
        evaluation.run("reconstruction", *settings[:1], f"reconstruction_images={tmp_path / 'other'}")
