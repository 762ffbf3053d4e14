"""The baseline of the benchmarks is the published algorithm: equal to the goldens, and ours equal to it."""

import pytest
import torch

from benchmarks import published
from models import OmniMask, get_mask_schedule
from tests.parity.goldens import facts, prompting, tensors, tiny_showo

TEXTS, MASK_ID = facts()["t2i_texts"], facts()["mask_token_id"]


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


def drawing_rows(image_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and unconditional `t2i_gen` rows of the golden prompts."""
    build = prompting()
    return build((TEXTS, image_ids), "t2i_gen").input_ids, build(([""] * len(TEXTS), image_ids), "t2i_gen").input_ids


@pytest.mark.parametrize("case", range(4))
def test_drawing_equals_goldens(model, case):
    settings = facts()["generate"][case]
    known = tensors()[f"generate.{case}.image_ids"] if settings["partial"] else torch.full((3, 16), MASK_ID)
    ids, _ = drawing_rows(known)
    _, uncond_ids = drawing_rows(torch.full((3, 16), MASK_ID))
    codes = published.t2i_generate(
        model,
        ids,
        uncond_ids,
        guidance_scale=settings["guidance_scale"],
        timesteps=settings["timesteps"],
        temperature=settings["temperature"],
        noise_schedule=get_mask_schedule(settings["schedule"]),
        generator=torch.Generator().manual_seed(settings["seed"]),
    )
    assert torch.equal(codes, tensors()[f"generate.{case}.tokens"])


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_drawing_equals_ours(model, guidance_scale, seed):
    ids, uncond_ids = drawing_rows(torch.full((3, 16), MASK_ID))
    settings = {"guidance_scale": guidance_scale, "timesteps": 7, "temperature": 1.0}
    settings["noise_schedule"] = get_mask_schedule("cosine")
    theirs, ours = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    codes = published.t2i_generate(model, ids, uncond_ids, **settings, generator=theirs)
    assert torch.equal(codes, model.t2i_generate(ids, uncond_ids, **settings, generator=ours))
    assert torch.equal(theirs.get_state(), ours.get_state())  # so the next batch of a run draws the same, too


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
    lm = build((facts()["lm_texts"], 31), "lm")
    mmu = build((golden["prompt.mmu_image_ids"], facts()["mmu_texts"]), "mmu")
    ids = torch.cat([rows.input_ids for rows in (t2i, lm, mmu)])
    labels = torch.cat([rows.labels for rows in (t2i, lm, mmu)])
    mask = OmniMask.cat([rows.attention_mask for rows in (t2i, lm, mmu)])
    losses = torch.stack(published.losses(model, ids, mask, labels, (3, 2, 2), max_seq_length=12))
    torch.testing.assert_close(losses, golden["forward.losses"], atol=1e-5, rtol=1e-5)
    counts = {"batch_size_t2i": 3, "batch_size_lm": 2, "batch_size_mmu": 2}
    out = model(ids, mask, labels=labels, **counts, max_seq_length=12)
    torch.testing.assert_close(torch.stack([out.loss_t2i, out.loss_lm, out.loss_mmu]), losses, atol=1e-6, rtol=1e-6)
