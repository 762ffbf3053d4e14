"""The baseline of the benchmarks is the published algorithm: equal to the goldens, and ours equal to it."""

from functools import partial

import pytest
import torch

from benchmarks import published
from models import OmniMask, get_mask_schedule
from tests.parity.goldens import facts, prompting, tensors, tiny_showo

TEXTS, MASK_ID = facts()["t2i_texts"], facts()["mask_token_id"]


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


def generated(generate, image_ids: torch.Tensor, schedule: str, seed: int, **settings) -> tuple[torch.Tensor, ...]:
    """The codes of the golden prompts, and the state that their generator has then."""
    build, unknown = prompting(), torch.full((3, 16), MASK_ID)
    rows = build((TEXTS, image_ids), "t2i_gen"), build(([""] * len(TEXTS), unknown), "t2i_gen")
    generator = torch.Generator().manual_seed(seed)
    settings |= {"noise_schedule": get_mask_schedule(schedule), "generator": generator}
    return generate(*(part.input_ids for part in rows), **settings), generator.get_state()


@pytest.mark.parametrize("case", range(4))
def test_images_equal_goldens(model, case):
    settings = dict(facts()["generate"][case])
    known = tensors()[f"generate.{case}.image_ids"] if settings.pop("partial") else torch.full((3, 16), MASK_ID)
    codes, _ = generated(partial(published.t2i_generate, model), known, **settings)
    assert torch.equal(codes, tensors()[f"generate.{case}.tokens"])


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_images_equal_ours(model, guidance_scale, seed):
    settings = {"guidance_scale": guidance_scale, "timesteps": 7, "temperature": 1.0, "schedule": "cosine"}
    theirs, ours = (
        generated(generate, torch.full((3, 16), MASK_ID), seed=seed, **settings)
        for generate in (partial(published.t2i_generate, model), model.t2i_generate)
    )
    assert torch.equal(theirs[0], ours[0])
    assert torch.equal(theirs[1], ours[1])  # so the next batch of a run draws the same, too


@pytest.mark.parametrize("case", range(2))
def test_answering_equals_goldens_and_ours(model, case):
    ids = tensors()[f"mmu.{case}.input_ids"]
    new_ids = published.mmu_generate(model, ids, max_new_tokens=24, eot_token=[117])
    assert torch.equal(new_ids[0], tensors()[f"mmu.{case}.new_ids"])
    endless = published.mmu_generate(model, ids, max_new_tokens=40)
    assert torch.equal(endless, model.mmu_generate(ids, max_new_tokens=40, top_k=1))


def test_losses_equal_goldens_and_ours(model):
    golden, build = tensors(), prompting()
    t2i = build((TEXTS, golden["prompt.t2i_image_ids"], golden["prompt.t2i_image_labels"]), "t2i")
    rows = (
        t2i,
        build((facts()["lm_texts"], 31), "lm"),
        build((golden["prompt.mmu_image_ids"], facts()["mmu_texts"]), "mmu"),
    )
    ids, labels = (torch.cat([getattr(part, name) for part in rows]) for name in ("input_ids", "labels"))
    mask = OmniMask.cat([part.attention_mask for part in rows])
    losses = torch.stack(published.losses(model, ids, mask, labels, (3, 2, 2), max_seq_length=12))
    torch.testing.assert_close(losses, golden["forward.losses"], atol=1e-5, rtol=1e-5)
    counts = {"batch_size_t2i": 3, "batch_size_lm": 2, "batch_size_mmu": 2}
    out = model(ids, mask, labels=labels, **counts, max_seq_length=12)
    torch.testing.assert_close(torch.stack([out.loss_t2i, out.loss_lm, out.loss_mmu]), losses, atol=1e-6, rtol=1e-6)
