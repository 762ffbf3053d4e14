"""Packed rows against the rows they are made of: masks by the oracle, losses, gradients (spec §3, §5)."""

import json
import random

import pytest
import torch

from models import OmniMask
from tests.models.test_omni_attention import VOCABULARY, oracle, random_batch
from tests.parity.goldens import PHI, mixed_batch, tiny_showo
from training import packing as packing_module
from training.loss import Objective
from training.packing import PACKED_SDPA, Packing, pack_bins

MAX_TEXT, NUM_TOKENS, LENGTH = 12, 16, 31  # of the golden tiny model
PAD, FEATURE, CLIP_SIZE, NUM_FEATURES = 118, -200, 24, 5
IMPLEMENTATIONS = (PACKED_SDPA, "sdpa", "eager")


# ---- which samples share a row ----


def test_rows_hold_every_sample_once_and_are_few_and_even():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 30))]
        capacity = rng.randrange(max(lengths), 120)
        rows = pack_bins(lengths, capacity)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        fullest = max(sum(lengths[number] for number in row) for row in rows)
        fewest = -(-sum(lengths) // capacity)
        assert fullest <= capacity and fewest <= len(rows) <= 1.5 * fewest + 1
        assert fullest <= max(max(lengths), sum(lengths) / len(rows)) + max(lengths)


def test_equal_rows_are_found_and_a_sample_longer_than_a_row_is_refused():
    assert pack_bins([4, 4, 4, 4, 4, 4], 13) == [[0, 1, 2], [3, 4, 5]]
    assert pack_bins([7, 6, 5, 4, 3, 2, 1], 20) == [[0, 1, 6], [2, 3, 4, 5]]  # 14 and 14
    with pytest.raises(ValueError, match="a sample of 9 positions does not fit into a row of 8"):
        pack_bins([3, 9], 8)


# ---- masks ----


@pytest.mark.parametrize("seed", range(30))
def test_no_sample_sees_another_and_each_sees_what_it_did(seed):
    layouts, ids = random_batch(seed)
    mask, used = OmniMask.from_ids(ids, VOCABULARY), ids != VOCABULARY.pad_id
    packing = Packing.from_mask(used, mask, random.Random(seed).randrange(ids.shape[1], 80))
    alone, packed, width = oracle(layouts)[:, 0], packing.mask.dense()[:, 0], ids.shape[1]
    filled = torch.zeros_like(packing.source_index, dtype=torch.bool)
    for number, (row, masks) in enumerate(zip(packing.samples, packing.sample_masks(), strict=True)):
        places = [source * width + p for source, start, stop in row for p in range(start, stop)]
        positions = [p for _, start, stop in row for p in range(stop - start)]
        filled[number, : len(places)] = True
        assert packing.source_index[number, : len(places)].tolist() == places
        assert packing.position_ids[number, : len(places)].tolist() == positions
        blocks = [alone[source, start:stop, start:stop] for source, start, stop in row]
        rest = torch.eye(packed.shape[1] - len(places), dtype=torch.bool)
        assert torch.equal(packed[number], torch.block_diag(*blocks, rest))
        assert all(torch.equal(mask[0, 0], block) for mask, block in zip(masks, blocks, strict=True))
        assert [len(block) for block in blocks] == packing.lengths()[number][:-1]
    assert filled.sum() == used.sum()
    places = packing.target_index.view_as(used)
    assert torch.equal(places >= 0, used) and torch.equal(packing.pack(ids).flatten()[places[used]], ids[used])
    assert torch.equal(packing.pack(ids)[filled], ids.flatten()[packing.source_index[filled]])


# ---- the model ----


def batch_of(seed: int, features: bool):
    """Some rows of all tasks as training makes them: ids, labels, mask, their numbers, CLIP features."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ids, labels, mask = mixed_batch()  # 3 of t2i, 2 of lm, 2 of mmu
    if features:  # <mmu>, 2 ids of a system prompt, <soi>, features, <eoi>, text, pads
        head = torch.tensor([124, 3, 4, 119, *[FEATURE] * NUM_FEATURES, 120])
        ids[5:], labels[5:], ids[5:, : len(head)] = PAD, -100, head
        for row in (5, 6):
            stop = rng.randrange(len(head) + 1, LENGTH)
            ids[row, len(head) : stop] = torch.randint(5, 90, (stop - len(head),))
            answer = slice(rng.randrange(len(head), stop), stop)
            labels[row, answer] = ids[row, answer]
        mask = OmniMask.cat([mask.select(slice(0, 5)), OmniMask.mmu_vit(2, 2, NUM_FEATURES, LENGTH)])
    rows = sorted(rng.sample(range(7), rng.randrange(1, 8)))
    counts = tuple(sum(first <= row < stop for row in rows) for first, stop in ((0, 3), (3, 5), (5, 7)))
    pictures = torch.randn(counts[2], NUM_FEATURES, CLIP_SIZE) if features and counts[2] else None
    return ids[rows], labels[rows], mask.select(rows), counts, pictures


def objective_of(batch, capacity: int | None = None, **settings) -> Objective:
    ids, labels, mask, counts, _ = batch
    packing = Packing.from_mask(ids != PAD, mask, capacity) if capacity else None
    return Objective.from_labels(labels, counts, MAX_TEXT, packing=packing, statistics=True, **settings)


def losses_and_gradients(model, batch, objective: Objective):
    ids, _, mask, _, pictures = batch
    model.zero_grad()
    out = model(ids, mask, objective, image_features=pictures)
    (out.loss_t2i + 0.3 * out.loss_lm + 2 * out.loss_mmu if out.loss is None else out.loss).backward()
    losses = torch.stack([out.loss_t2i, out.loss_lm, out.loss_mmu]).detach()
    return losses, out.statistics, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("features", [False, True], ids=["codes", "clip"])
@pytest.mark.parametrize("seed", range(6))
def test_losses_gradients_and_statistics_equal_those_of_rows_with_padding(implementation, features, seed):
    clip = {"w_clip_vit": True, "clip_feature_size": CLIP_SIZE} if features else {}
    batch = batch_of(seed, features)
    smoothing = {"label_smoothing": 0.1 * (seed % 2)}
    expected = losses_and_gradients(tiny_showo(**clip), batch, objective_of(batch, **smoothing))
    model = tiny_showo(attn_implementation=implementation, **clip)
    for coefficients in (None, {"t2i": 1.0, "lm": 0.3, "mmu": 2.0}):
        objective = objective_of(batch, LENGTH + 17 * seed, coefficients=coefficients, **smoothing)
        assert objective.packing.num_positions <= batch[0].numel()
        found = losses_and_gradients(model, batch, objective)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_fewer_key_and_value_heads_than_query_heads():
    """Grouped-query attention, as most language models have it."""
    llm = json.loads((PHI / "config.json").read_text())
    llm["num_key_value_heads"] = llm["num_attention_heads"] // 2
    batch, found = batch_of(3, features=False), []
    for implementation, capacity in (("sdpa", None), (PACKED_SDPA, 60)):
        model = tiny_showo(attn_implementation=implementation, llm_config=llm)
        found.append(losses_and_gradients(model, batch, objective_of(batch, capacity)))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_recomputes_the_same():
    batch = batch_of(3, features=False)
    objective = objective_of(batch, 60)
    plain, checkpointed = (tiny_showo(attn_implementation=PACKED_SDPA).train() for _ in range(2))
    getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    torch.testing.assert_close(
        losses_and_gradients(checkpointed, batch, objective),
        losses_and_gradients(plain, batch, objective),
        atol=0,
        rtol=0,
    )


@torch.no_grad()
def test_sdpa_over_packed_rows_attends_sample_by_sample(monkeypatch):
    """And never to a mask over whole packed rows."""
    batch, shapes = batch_of(3, features=False), []
    attend = packing_module.sdpa_attention_forward
    monkeypatch.setattr(
        packing_module,
        "sdpa_attention_forward",
        lambda *args, **rest: (shapes.append(args[4].shape[-1]), attend(*args, **rest))[1],
    )
    objective = objective_of(batch, 60)
    tiny_showo(attn_implementation=PACKED_SDPA)(batch[0], batch[2], objective)
    lengths = [n for row in objective.packing.lengths() for n in row[:-1]]
    assert shapes == lengths * (len(shapes) // len(lengths)) and shapes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_over_packed_rows_equals_sdpa_forward_and_backward(dtype):
    """FlexAttention has no backward on a CPU."""
    objective, found = objective_of(batch_of(2, features=True), 128).to("cuda"), []
    batch = [part.to("cuda") if hasattr(part, "to") else part for part in batch_of(2, features=True)]
    for implementation in ("flex_attention", PACKED_SDPA, "sdpa"):
        model = tiny_showo(attn_implementation=implementation, w_clip_vit=True, clip_feature_size=CLIP_SIZE).to("cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses, _, gradients = losses_and_gradients(model, batch, objective)
        found.append((losses, torch.cat([g.flatten() for g in gradients.values()])))
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for one in found[1:]:
        torch.testing.assert_close(found[0][0], one[0], atol=tolerance, rtol=tolerance)
        assert (found[0][1] - one[1]).norm() <= tolerance * one[1].norm()
