"""The pictures of a run: drawings of the prompts, and predictions at masked positions only (spec §15)."""

import numpy as np
import pytest
import torch

from models.images import to_pil
from tests.training import tiny
from tests.training.tiny import CAPTIONS, MAX_TEXT, NUM_TOKENS
from training.samples import generate_images, predict_masked

IMAGE = slice(MAX_TEXT + 2, MAX_TEXT + 2 + NUM_TOKENS)


def make(world, **training):
    config = tiny.config_of(world, overrides={f"training.{key}": value for key, value in training.items()})
    torch.manual_seed(1)
    model = tiny.make_model(config).eval()
    builder = tiny.make_builder(config, model)
    return model, builder, builder({name: next(flow) for name, flow in tiny.build_flows(config).items()})


def bytes_of(images) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_drawing_is_seeded_and_leaves_the_global_random_numbers_alone(world):
    model, builder, _ = make(world)
    settings = {"guidance_scale": 1.5, "timesteps": 3, "temperature": 1.0}
    before = torch.get_rng_state()
    images = generate_images(model, builder, CAPTIONS[:3], seed=1, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert [image.size for image in images] == [(32, 32)] * 3
    assert bytes_of(images) == bytes_of(generate_images(model, builder, CAPTIONS[:3], seed=1, **settings))
    assert bytes_of(images) != bytes_of(generate_images(model, builder, CAPTIONS[:3], seed=2, **settings))


def test_drawing_is_guided_as_asked(world):
    model, builder, _ = make(world)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # an untrained model hardly listens to the text
    pictures = [
        generate_images(model, builder, CAPTIONS[:2], guidance_scale=scale, timesteps=3, temperature=0.0, seed=1)
        for scale in (0.0, 8.0)
    ]
    assert bytes_of(pictures[0]) != bytes_of(pictures[1])


@pytest.mark.parametrize("settings", [{}, {"noise_type": "random_replace"}, {"predict_all_tokens": True}])
def test_predictions_fill_the_masked_positions_only(world, settings):
    model, builder, batch = make(world, cond_dropout_prob=0.0, min_masking_rate=0.3, **settings)
    images, captions = predict_masked(model, builder, batch, limit=3)
    assert [image.size for image in images] == [(96, 32)] * 3, "the first rows"

    vq_model, offset = tiny.make_vq_model(), builder.noise.image_offset
    codes = vq_model.get_code(batch.pixels)
    hidden = batch.input_ids[:4, IMAGE] != codes + offset
    assert 0 < hidden.sum() < hidden.numel()
    with torch.no_grad():
        logits = model(batch.input_ids[:4], batch.attention_mask.select(slice(0, 4))).logits
        predicted = logits[:, IMAGE, offset : offset + 64].argmax(-1)
        filled = vq_model.decode_code(torch.where(hidden, predicted, codes))
        expected = torch.cat([batch.pixels, vq_model.decode_code(codes), filled], dim=-1)
    assert np.array_equal(np.stack(images), np.stack(to_pil(expected[:3])))
    shown = zip(batch.mask_prob.tolist()[:3], batch.texts, strict=False)
    assert captions == [f"mask ratio: {ratio:.2f}, {text}" for ratio, text in shown]
