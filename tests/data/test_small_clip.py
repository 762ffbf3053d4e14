"""The folder that takes CLIP ViT-L's place in a small Show-o."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.errors import UserError
from models.loading import load_clip
from training.data.small_clip import main

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "layers": 2, "heads": 2}


def make(folder, **changes):
    main([f"{key}={value}" for key, value in ({"output_dir": folder} | SIZES | changes).items()])
    return folder


def test_the_tower_loads_and_gives_one_feature_a_patch(tmp_path):
    tower = load_clip(str(make(tmp_path / "clip")), feature_size=16)
    assert type(tower.vision_tower).__name__ == "CLIPVisionModel" and tower.num_features == 16
    picture = Image.new("RGB", (80, 48), "white")
    picture.paste((200, 30, 30), (24, 0, 80, 48))
    features = tower(tower.preprocess([picture, Image.new("RGB", (40, 40), "blue")]))
    assert features.shape == (2, 16, 16) and features.isfinite().all()
    distances = torch.cdist(features[0], features[1])
    assert distances.min() > 0.1, "what is seen depends on the picture"
    assert torch.cdist(features[0], features[0]).max() > 0.1, "and on the patch"


def test_the_seed_fixes_the_weights_and_disturbs_nothing_else(tmp_path):
    before = torch.get_rng_state()
    weights = [
        load_file(make(tmp_path / str(number), seed=seed) / "model.safetensors")
        for number, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert any(not torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_the_defaults_make_what_the_small_stages_expect(tmp_path):
    """64 features, as many as a picture of the emoji world has codes; run as users do, from another folder."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "training/data/small_clip.py"), "output_dir=clip"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "64 features of 192 numbers" in done.stdout and "Warning" not in done.stderr
    assert load_clip(str(tmp_path / "clip"), feature_size=192).num_features == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 7}, r"image_size is 32, it must be a multiple of patch_size \(7\)"),
        ({"heads": 3}, r"hidden_size is 16, it must be a multiple of heads \(3\)"),
        ({"patch_size": 0, "layers": -1}, "patch_size is 0, it must be 1 or more; layers is -1"),
        ({"depth": 3}, "depth.*the settings are output_dir, image_size"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "clip", **changes)
    assert not (tmp_path / "clip").exists()
