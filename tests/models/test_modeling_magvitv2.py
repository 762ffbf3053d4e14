"""Small tokenizers of the same class: sizes by configuration, codes and bits, what is refused, saving and loading."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from models import MAGVITv2, MAGVITv2Config
from models.modeling_magvitv2 import LookupFreeQuantizer, bit_entropy
from tests.training.tiny import make_vq_model

SIZES = {"num_groups": 4, "code_bits": 6}
TWO_LEVELS = SIZES | {
    "ch": 8,
    "encoder_ch_mult": (1, 2),
    "decoder_ch_mult": (1, 3),
    "encoder_num_res_blocks": (1, 2),
    "decoder_num_res_blocks": (2, 1),
}
PATCHED = TWO_LEVELS | {"stem_patch_size": 4, "encoder_mid": False, "decoder_mid": False}


def tiny(**overrides) -> MAGVITv2:
    return MAGVITv2(MAGVITv2Config(**PATCHED | overrides)).eval()


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape) * 2 - 1


@pytest.mark.parametrize(("sizes", "factor"), [(TWO_LEVELS, 2), (PATCHED, 8), (PATCHED | {"stem_patch_size": 2}, 4)])
def test_any_height_and_width_that_the_factor_divides(sizes, factor):
    model = MAGVITv2(MAGVITv2Config(**sizes)).eval()
    assert model.downsampling_factor == factor
    pixels = random_pixels(2, 3, 3 * factor, 5 * factor)
    codes = model.get_code(pixels)
    assert codes.shape == (2, 15) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 64
    assert model.decode_code(codes, shape=(3, 5)).shape == pixels.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda model, shape=shape: model.get_code(torch.zeros(shape)), "multiples of 8")
            for shape in ((1, 3, 20, 16), (1, 3, 16, 12), (1, 1, 16, 16), (3, 16, 16))
        ),
        (lambda model: model.decode_code(torch.arange(15)[None]), "15 codes do not fill a grid of 3 x 3"),
        (lambda model: model.decode_code(torch.arange(16)[None], (3, 5)), "16 codes do not fill a grid of 3 x 5"),
        (lambda model: model.decode_code(torch.full((1, 16), 64)), r"codes must lie in \[0, 64\)"),
        (lambda model: model.decode_code(torch.full((1, 16), -1)), r"codes must lie in \[0, 64\)"),
    ],
)
def test_pixels_and_codes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder_ch_mult": (1,)}, "must be equally long, got lengths"),
        ({"num_groups": 5}, r"num_groups=5 must divide every width, but does not divide \[8, 16, 24\]"),
        ({"decoder_num_res_blocks": (0, 1)}, r"decoder_num_res_blocks is \(0, 1\); it must be a list"),
        ({"local_encoder": True, "encoder_mid": False}, "local_encoder needs one level and encoder_mid=False"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        MAGVITv2Config(**TWO_LEVELS | overrides)


def test_a_local_encoder_gives_a_patch_the_same_code_in_all_surroundings():
    one_level = {"encoder_ch_mult": (1,), "decoder_ch_mult": (1,)}
    one_level |= {"encoder_num_res_blocks": (2,), "decoder_num_res_blocks": (1,)}
    here, there = random_pixels(1, 3, 16, 16), random_pixels(1, 3, 16, 16)
    there[..., 4:8, 12:16] = here[..., 8:12, 0:4]
    local, usual = (tiny(**one_level, local_encoder=is_local) for is_local in (True, False))
    codes = [model.encode(pixels) for model in (local, usual) for pixels in (here, there)]  # (1, K, 4, 4) each
    torch.testing.assert_close(codes[0][..., 2, 0], codes[1][..., 1, 3])
    assert (codes[2][..., 2, 0] - codes[3][..., 1, 3]).abs().max() > 0.01


def test_codes_to_bits_and_back():
    quantizer = LookupFreeQuantizer(6)
    codes = torch.arange(64).reshape(2, 32)
    bits = quantizer.latents_of(codes)  # (2, 32, 6)
    assert torch.equal(bits, quantizer.embedding[codes])
    assert torch.equal(quantizer.codes_of(bits.mT.unflatten(2, (4, 8))), codes)
    latents = torch.tensor([0.0, 1e-9, -1e-9]).reshape(1, 3, 1, 1)
    assert LookupFreeQuantizer(3).codes_of(latents).tolist() == [[0b010]]  # zero counts as a cleared bit
    assert torch.equal(LookupFreeQuantizer(3)(latents).sign().flatten(), torch.tensor([-1.0, 1.0, -1.0]))


def test_the_gradient_passes_straight_through_the_quantiser():
    latents, weight = torch.randn(2, 6, 3, 3, requires_grad=True), torch.randn(2, 6, 3, 3)
    (LookupFreeQuantizer(6)(latents) * weight).sum().backward()
    assert torch.equal(latents.grad, weight)


def test_quantiser_losses_equal_their_definition():
    latents = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    commit, entropy = LookupFreeQuantizer(5).losses(latents)
    commit.backward()
    distance = latents - latents.sign()
    probabilities = torch.stack([-((latents - 1) ** 2), -((latents + 1) ** 2)]).softmax(0)  # (2, B, K, h, w)
    mean = probabilities.mean((1, 3, 4))  # (2, K)
    per_token = -(probabilities * probabilities.log()).sum(0).mean()
    of_the_mean = -(mean * mean.log()).sum(0).mean()
    assert commit.item() == pytest.approx(0.125 * distance.square().mean().item(), rel=1e-5)
    assert entropy.item() == pytest.approx(0.1 * (per_token - of_the_mean).item(), abs=1e-6)
    # the commitment pulls with three quarters of its weight
    torch.testing.assert_close(latents.grad, 0.1 * 0.75 * 2 * distance.detach() / latents.numel())


def test_quantiser_losses_and_their_gradients_stay_finite_at_sure_bits():
    latents = torch.full((1, 6, 2, 2), 1e4, requires_grad=True)
    sum(LookupFreeQuantizer(6).losses(latents)).backward()
    assert latents.grad.isfinite().all()
    assert bit_entropy(torch.tensor([0.0, 1e4, -1e4])).tolist() == pytest.approx([0.6931472, 0, 0])


def test_forward_trains_every_parameter():
    model = tiny(encoder_mid=True, decoder_mid=True)
    pixels = random_pixels(2, 3, 16, 16)
    output = model(pixels)
    loss = (output.reconstruction - pixels).square().mean() + output.loss_commit + output.loss_entropy
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias on the keys shifts all attention scores of a row alike, and softmax forgets it
    assert all(name.endswith("attn_1.k.bias") for name in silent), silent


def test_saved_and_loaded_it_gives_the_same_images(tmp_path):
    model, pixels = tiny(), random_pixels(1, 3, 16, 24)
    model.save_pretrained(tmp_path)
    codes = model.get_code(pixels)
    for again in (MAGVITv2.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(again.get_code(pixels), codes)
        assert torch.equal(again.decode_code(codes, shape=(2, 3)), model.decode_code(codes, shape=(2, 3)))
    assert again.config.encoder_ch_mult == [1, 2] and again.config.stem_patch_size == 4


def test_half_precision_weights_keep_the_codebook_exact(tmp_path):
    tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["quantize.embedding"].float(), LookupFreeQuantizer(6).embedding)
    model = MAGVITv2.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.decode_code(torch.arange(16)[None]).dtype == torch.bfloat16


def test_bf16_weights_take_fp32_pixels():
    """As DeepSpeed trains them: it casts the weights, not the inputs."""
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    assert make_vq_model().bfloat16()(pixels).reconstruction.shape == pixels.shape
