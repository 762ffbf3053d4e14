"""`CLIPVisionTower` on a tiny random CLIP: which features it gives, and that it stays frozen (spec §4)."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from models import CLIPVisionTower
from models.clip_encoder import image_processor_class

SIZE, PATCH, WIDTH, LAYERS = 28, 7, 32, 3
VISION = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
VISION |= {"image_size": SIZE, "patch_size": PATCH}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).half().save_pretrained(path)  # stored in half precision
    processor = image_processor_class()(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tower(folder):
    return CLIPVisionTower(str(folder))


def test_features_are_the_patches_of_the_layer_before_the_last(tower, folder):
    pixels = torch.randn(2, 3, SIZE, SIZE)
    features = tower(pixels)
    assert tower.num_features == (SIZE // PATCH) ** 2 == 16
    assert features.shape == (2, 16, WIDTH) and features.dtype == torch.float32
    model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    assert torch.equal(features, states[LAYERS - 1][:, 1:])  # −2; position 0 is CLS
    assert torch.equal(CLIPVisionTower(str(folder), layer=-1)(pixels), states[-1][:, 1:])
    assert torch.equal(tower(pixels.bfloat16()), tower(pixels.bfloat16().float()))  # brought to the weights' dtype


def test_frozen_and_in_evaluation_mode(tower):
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in tower.parameters())  # stored in fp16
    holder = torch.nn.ModuleDict({"clip": tower}).train()
    assert holder.training and tower.train() is tower and not any(module.training for module in tower.modules())
    assert not tower(torch.randn(1, 3, SIZE, SIZE, requires_grad=True)).requires_grad


def test_preprocess(tower):
    wide, tall = Image.new("RGB", (90, 40), (255, 0, 0)), Image.new("L", (31, 64), 128)
    pixels = tower.preprocess([wide, tall, Image.new("RGBA", (28, 28), (0, 0, 255, 0))])
    assert pixels.shape == (3, 3, SIZE, SIZE) and pixels.dtype == torch.float32
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    for picture, colour in zip(pixels, ([1, 0, 0], [128 / 255] * 3, [0, 0, 1]), strict=True):
        expected = ((torch.tensor(colour) - mean) / std)[:, None, None].expand(3, SIZE, SIZE)
        torch.testing.assert_close(picture, expected, atol=1e-4, rtol=1e-4)
    wide.paste((255, 255, 255), (20, 0, 70, 40))  # the centre, which is all that is left
    assert (tower.preprocess([wide]) > 1.5).all()


def test_a_whole_clip_folder_works_too(tmp_path, tower, transformers_log):
    """The published folder holds the text half as well; no table of its keys is printed."""
    whole = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
    whole.save_pretrained(tmp_path)
    tower.image_processor.save_pretrained(tmp_path)
    loaded = CLIPVisionTower(str(tmp_path))
    assert "UNEXPECTED" not in transformers_log.text
    pixels = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        states = whole.eval().vision_model(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(loaded(pixels), states[-2][:, 1:])


def test_weights_that_are_missing_are_not_made_up(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / "clip")
    weights = load_file(copy / "model.safetensors")
    del weights[next(key for key in sorted(weights) if "layers.1" in key)]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of the vision tower, first .*layers.1"):
        CLIPVisionTower(str(copy))
