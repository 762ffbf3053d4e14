"""The full-size image tokenizer gives the published codes, pictures and losses (spec §10)."""

import pytest
import torch

from models import MAGVITv2, MAGVITv2Config
from tests.parity.goldens import fill_, tensors


@pytest.fixture(scope="module")
def model():
    return fill_(MAGVITv2(MAGVITv2Config())).eval()


@pytest.mark.parametrize("case", ["a", "b"])
@torch.no_grad()
def test_pixels_codes_losses_and_pictures(model, case):
    golden = {key.split(".")[2]: value for key, value in tensors().items() if key.startswith(f"magvit.{case}.")}
    output = model(golden["pixels"])
    torch.testing.assert_close(output.latents, golden["hidden"], rtol=0, atol=2e-5)
    assert torch.equal(output.codes, golden["codes"]) and torch.equal(model.get_code(golden["pixels"]), golden["codes"])
    losses = torch.stack([output.loss_commit, output.loss_entropy])
    torch.testing.assert_close(losses, golden["losses"], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.reconstruction, golden["recon"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("case", "shape"), [("a", None), ("rect", (4, 6))])
def test_pictures_from_codes_alone_also_of_a_grid_that_is_no_square(model, case, shape):
    recon = model.decode_code(tensors()[f"magvit.{case}.codes"], shape=shape)
    torch.testing.assert_close(recon, tensors()[f"magvit.{case}.recon"], rtol=0, atol=1e-4)


def test_the_codebook_buffers_spell_every_code_in_bits(model):
    codes = torch.tensor([0, 1, 4096, 8191])
    expected = torch.tensor([[code >> (12 - c) & 1 for c in range(13)] for code in codes.tolist()]) * 2.0 - 1
    assert torch.equal(model.quantize.embedding[codes], expected)
    assert model.quantize.power_vals.tolist() == [2 ** (12 - c) for c in range(13)]
