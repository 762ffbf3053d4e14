"""Packed rows against the rows they are made of: masks by the oracle, losses, gradients (spec §3, §5)."""

import json
import random

import pytest
import torch

from models import OmniMask
from tests.models.test_omni_attention import VOCABULARY, oracle, random_batch
from tests.parity.goldens import PHI, prompting, tiny_showo
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


def test_equal_rows_are_found():
    assert pack_bins([4, 4, 4, 4, 4, 4], 13) == [[0, 1, 2], [3, 4, 5]]
    assert pack_bins([7, 6, 5, 4, 3, 2, 1], 20) == [[0, 1, 6], [2, 3, 4, 5]]  # 14 and 14


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a sample of 9 positions does not fit into a row of 8"):
        pack_bins([3, 9], 8)


# ---- masks ----


@pytest.mark.parametrize("seed", range(30))
def test_no_sample_sees_another_and_each_sees_what_it_did(seed):
    layouts, ids = random_batch(seed)
    mask, used = OmniMask.from_ids(ids, VOCABULARY), ids != VOCABULARY.pad_id
    packing = Packing.from_mask(used, mask, random.Random(seed).randrange(ids.shape[1], 80))
    alone, packed = oracle(layouts)[:, 0], packing.mask.dense()[:, 0]
    filled = torch.zeros_like(packing.source_index, dtype=torch.bool)
    for number, row in enumerate(packing.samples):
        at = 0
        expected = torch.eye(packed.shape[1], dtype=torch.bool)
        for source, start, stop in row:
            there = slice(at, at + stop - start)
            expected[there, there] = alone[source, start:stop, start:stop]
            assert packing.source_index[number, there].tolist() == [
                source * ids.shape[1] + p for p in range(start, stop)
            ]
            assert packing.position_ids[number, there].tolist() == list(range(stop - start))
            at = there.stop
        filled[number, :at] = True
        assert torch.equal(packed[number], expected)
    assert filled.sum() == used.sum()
    places = packing.target_index.view_as(used)
    assert torch.equal(places >= 0, used) and torch.equal(
        packing.pack(ids)[filled], ids.flatten()[packing.source_index[filled]]
    )
    assert torch.equal(packing.pack(ids).flatten()[places[used]], ids[used])
    for row, masks in enumerate(packing.sample_masks()):
        assert [len(m[0, 0]) for m in masks] == packing.lengths()[row][:-1]
        assert torch.equal(
            torch.block_diag(*[m[0, 0] for m in masks]), packed[row][: filled[row].sum(), : filled[row].sum()]
        )


# ---- the model ----


def batch_of(seed: int, features: bool):
    """Random rows of all tasks as training makes them: ids, labels, mask, their numbers, CLIP features."""
    rng, build = random.Random(seed), prompting()
    torch.manual_seed(seed)
    counts = tuple(rng.randrange(4) for _ in range(3))
    counts = counts if sum(counts) else (1, 1, 1)

    def texts(count):
        return [" ".join(f"w{rng.randrange(1, 90)}" for _ in range(rng.randrange(14))) for _ in range(count)]

    rows, t2i, lm, mmu = [], *counts
    codes = 128 + torch.randint(0, 64, (t2i + mmu, NUM_TOKENS))
    if t2i:
        hidden = torch.rand(t2i, NUM_TOKENS) < 0.6
        image, labels = codes[:t2i].masked_fill(hidden, 192), codes[:t2i].masked_fill(~hidden, -100)
        rows.append(build((texts(t2i), image, labels), "t2i"))
    if lm:
        rows.append(build((texts(lm), LENGTH), "lm"))
    if mmu and not features:
        rows.append(build((codes[t2i:], texts(mmu)), "mmu"))
    if mmu and features:  # <mmu>, 2 ids of a system prompt, <soi>, features, <eoi>, text, pads
        ids = torch.full((mmu, LENGTH), PAD)
        ids[:, : 5 + NUM_FEATURES] = torch.tensor([124, 3, 4, 119, *[FEATURE] * NUM_FEATURES, 120])
        labels = torch.full_like(ids, -100)
        for row in range(mmu):
            text = slice(5 + NUM_FEATURES, 5 + NUM_FEATURES + rng.randrange(1, LENGTH - 5 - NUM_FEATURES))
            ids[row, text] = torch.randint(5, 90, (text.stop - text.start,))
            answer = slice(rng.randrange(text.start, text.stop), text.stop)
            labels[row, answer] = ids[row, answer]
        rows.append(type(rows[0])(ids, labels, None) if rows else build((["w1"], LENGTH), "lm"))
        rows[-1].input_ids, rows[-1].labels = ids, labels
        rows[-1].attention_mask = OmniMask.mmu_vit(mmu, 2, NUM_FEATURES, LENGTH)
    ids, labels = (torch.cat([getattr(row, name) for row in rows]) for name in ("input_ids", "labels"))
    pictures = torch.randn(mmu, NUM_FEATURES, CLIP_SIZE) if features and mmu else None
    return ids, labels, OmniMask.cat([row.attention_mask for row in rows]), counts, pictures


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
    for coefficients in (None, (1.0, 0.3, 2.0)):
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
