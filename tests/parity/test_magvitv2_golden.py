"""The full-size image tokenizer gives the published codes, pictures and losses (spec §10)."""

import json

import pytest
import torch

from models import MAGVITv2, MAGVITv2Config
from tests.parity.goldens import FOLDER, fill_, tensors


@pytest.fixture(scope="module")
def model():
    return fill_(MAGVITv2(MAGVITv2Config())).eval()


def test_every_parameter_has_its_published_name_and_shape(model):
    published = json.loads((FOLDER / "state_dict_shapes.json").read_text())["magvitv2"]
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published


@pytest.mark.parametrize("case", ["a", "b"])
@torch.no_grad()
def test_pixels_codes_losses_and_pictures(model, case):
    golden = {key.split(".")[2]: value for key, value in tensors().items() if key.startswith(f"magvit.{case}.")}
    output = model(golden["pixels"])
    torch.testing.assert_close(output.latents, golden["hidden"], rtol=0, atol=2e-5)
    assert torch.equal(output.codes, golden["codes"])
    losses = torch.stack([output.loss_commit, output.loss_entropy])
    torch.testing.assert_close(losses, golden["losses"], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.reconstruction, golden["recon"], rtol=0, atol=1e-4)


def test_codes_alone_and_pictures_from_codes_alone(model):
    codes = model.get_code(tensors()["magvit.a.pixels"])
    assert torch.equal(codes, tensors()["magvit.a.codes"])
    torch.testing.assert_close(model.decode_code(codes), tensors()["magvit.a.recon"], rtol=0, atol=1e-4)


def test_a_grid_of_codes_that_is_no_square(model):
    recon = model.decode_code(tensors()["magvit.rect.codes"], shape=(4, 6))
    torch.testing.assert_close(recon, tensors()["magvit.rect.recon"], rtol=0, atol=1e-4)


def test_the_codebook_buffers_spell_every_code_in_bits(model):
    codes = torch.tensor([0, 1, 4096, 8191])
    expected = torch.tensor([[code >> (12 - c) & 1 for c in range(13)] for code in codes.tolist()]) * 2.0 - 1
    assert torch.equal(model.quantize.embedding[codes], expected)
    assert model.quantize.power_vals.tolist() == [2 ** (12 - c) for c in range(13)]
