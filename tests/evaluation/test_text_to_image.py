"""GenEval and COCO on small sets in the official formats, by hand; networks for images (also reconstruction's)."""

import types
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from models import ShowoPipeline
from tests.evaluation.official import save_image, write_lines, write_text


def write_results(evaluation, rights: str) -> None:
    """What the official script writes for 2 prompts x 4 images; `rights` is one of 01 for each."""
    names = [f"/elsewhere/images/{n // 4:05d}/samples/{n % 4:04d}.png" for n in range(len(rights))]
    records = [
        {"filename": name, "correct": right == "1", "reason": "no clock\n"}
        for name, right in zip(names, rights, strict=True)
    ]
    write_lines(evaluation.folder / "geneval/results.jsonl", records)


def test_geneval_by_hand(evaluation):
    """4 of 4 benches, 1 of 4 clocks: the tags' mean is 62.5. Results that lack images are refused."""
    evaluation.run("geneval", "batch_size=3")
    table, images = evaluation.text("results.md"), evaluation.folder / "geneval/images"
    assert "not scored | 68.0 |" in table and "the detector (mmdet) is not installed here" in table
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.*"))
    one = ["grid.png", "metadata.jsonl", *(f"samples/000{n}.png" for n in range(4))]
    assert names == [f"{prompt}/{name}" for prompt in ("00000", "00001") for name in one]
    (metadata,) = evaluation.lines("geneval/images/00001/metadata.jsonl")
    assert metadata["tag"] == "counting" and metadata["exclude"] == [{"class": "clock", "count": 3}]
    assert len({(images / f"00000/samples/000{n}.png").read_bytes() for n in range(4)}) == 4  # four samples, not one
    write_results(evaluation, "1111")
    evaluation.refuses("names 4 images, but not .../00001/samples/0000.png .4 are missing", "geneval", "batch_size=3")
    write_results(evaluation, "11110100")
    expected = {"overall": 62.5, "drawings right": 62.5, "prompts with a right drawing": 100}
    expected |= {"single_object": 100, "counting": 25}
    assert evaluation.figures("geneval", "batch_size=3") == expected
    line = evaluation.lines("geneval/predictions.jsonl")[4]
    assert line["key"] == "00001/samples/0000.png" and line["parsed"] == "no clock" and line["score"] == 0


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
    write_text(script, SCRIPT)
    monkeypatch.setattr("evaluation.tasks.text_to_image.find_spec", lambda name: types.SimpleNamespace())
    assert "give geneval_repository and geneval_detector" in evaluation.run("geneval")["geneval"]["differs"]
    given = [f"geneval_repository={tmp_path / 'official'}", "geneval_detector=weights"]
    assert evaluation.figures("geneval", *given)["overall"] == 100
    script.write_text("import sys\nsys.exit('no detector')")
    (evaluation.folder / "geneval/results.jsonl").unlink()
    evaluation.refuses("evaluate_images.py failed .no detector.", "geneval", *given)


@pytest.mark.slow
def test_coco_by_hand(evaluation):
    """One feature, the mean grey: 0, 100, 200 against 30, 60, 90: 40² + 10000 + 900 − 2 · √9000000 = 6500."""
    run = evaluation.prepared("coco")
    captions = {f"{caption} {number}" for caption in ("a b", "c d") for number in (11, 12, 13)}
    assert len(run.items) == 3 and {item.prompt for item in run.items} < captions
    answers = {item.key: run.task.file_of(item) for item in run.items}
    for name, grey in zip(answers.values(), (30, 60, 90), strict=True):
        save_image(evaluation.folder / "coco" / name, grey)
    figures = evaluation.answer("coco", answers)
    assert figures["FID-30K"] == pytest.approx(6500)
    model = CLIPModel.from_pretrained(evaluation.root / "clip")
    processor = CLIPProcessor.from_pretrained(evaluation.root / "clip")
    images = [Image.open(evaluation.folder / "coco" / answers[item.key]) for item in run.items]
    texts = [item.prompt for item in run.items]
    with torch.no_grad():
        out = model(**processor(text=texts, images=images, return_tensors="pt", padding=True))
    scores = 100 * (out.text_embeds * out.image_embeds).sum(-1).clamp(min=0)
    assert figures["CLIPScore"] == pytest.approx(float(scores.mean()), abs=1e-3)
    row = next(line for line in evaluation.text("results.md").splitlines() if "| coco | FID" in line)
    assert "| 6500.0 | 9.24 |" in row and "3 images, through the network in inception.pt" in row
    assert "both sets: shorter side to 16 by PIL's bicubic, centre crop" in row and "CLIPScore by clip" in row


@pytest.mark.parametrize("task", ["coco", "reconstruction"])
def test_unusable_networks(evaluation, tmp_path, monkeypatch, task):
    """They are opened before anything is generated, and before any weights of Show-o are read."""
    monkeypatch.setattr(ShowoPipeline, "from_config", None)
    monkeypatch.setattr("evaluation.images.find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", Mock(side_effect=URLError("no route")))
    broken, flat = tmp_path / "broken.pt", tmp_path / "flat.pt"
    broken.write_bytes(b"x")
    torch.jit.script(torch.nn.Flatten(0)).save(flat)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    wrong = [
        ([f"fid_features={broken}"], "broken.pt is no TorchScript network"),
        ([f"fid_features={flat}"], r"flat.pt does not give \(B, F\) features"),
        (["fid_features=null", f"fid_weights={broken}"], "broken.pt does not give the weights"),
        (["fid_features=null"], "the hub does not give the weights of .*Inception .*no route.*; give fid_weights"),
    ]
    if task == "coco":
        wrong += [(["coco_scores=clip", f"clip_score_model={tmp_path}"], "holds no usable CLIP model")]
    for settings, message in wrong:
        evaluation.refuses(message, task, *settings)
        assert not evaluation.folder.exists()
