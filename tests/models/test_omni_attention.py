"""`OmniMask` against the prose of spec §3, position by position, over random layouts."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from models import OmniMask
from models.vocabulary import IMAGE_FEATURE_ID, Vocabulary

VOCABULARY = Vocabulary(llm_vocab_size=20, num_new_special_tokens=10, codebook_size=8)


@dataclass
class Layout:
    """One row: its kind, its left pads, and its image blocks as (first, last) positions, boundaries included."""

    kind: str
    length: int
    num_pads: int = 0
    system_length: int = 0
    blocks: list[tuple[int, int]] = field(default_factory=list)
    num_right_pads: int = 0

    def sees(self, query: int, key: int) -> bool:
        """spec §3 in words: text looks back; t2i and mmu images look at themselves as a whole; the first image of an
        mmu row, and what comes before it, is seen by everybody; so are CLIP features; nothing sees a left pad but pads.
        """
        if key < self.num_pads:
            return key <= query < self.num_pads
        if key <= query:
            return True
        block = next((number for number, (first, last) in enumerate(self.blocks) if first <= key <= last), None)
        if self.kind == "mmu" and key <= self.blocks[0][1]:
            return True
        if self.kind in ("t2i", "mmu"):
            return block is not None and query >= self.blocks[block][0]
        if self.kind == "mmu_vit":
            return block is not None and key not in self.blocks[block]  # the features, not their <soi> and <eoi>
        assert self.kind == "lm"
        return False

    def dense(self) -> torch.Tensor:
        return torch.tensor([[self.sees(i, j) for j in range(self.length)] for i in range(self.length)])

    def ids(self, rng: random.Random) -> torch.Tensor:
        """A row of ids that has this layout."""
        v = VOCABULARY
        ids = [rng.randrange(v.llm_vocab_size) for _ in range(self.length)]
        ids[: self.num_pads] = [v.pad_id] * self.num_pads
        if self.num_right_pads:
            ids[-self.num_right_pads :] = [v.pad_id] * self.num_right_pads
        if self.kind != "lm":
            ids[self.num_pads] = v.t2i_id if self.kind == "t2i" else v.mmu_id
        for first, last in self.blocks:
            inside = [IMAGE_FEATURE_ID if self.kind == "mmu_vit" else v.image_offset + rng.randrange(9)]
            ids[first : last + 1] = [v.soi_id, *inside * (last - first - 1), v.eoi_id]
        return torch.tensor(ids)


def random_layout(rng: random.Random, kind: str, length: int) -> Layout:
    pads = rng.choice([0, rng.randrange(5)])
    if kind == "lm":
        return Layout("lm", length, num_right_pads=rng.randrange(4))
    if kind == "t2i":  # the block ends the row
        soi = rng.randrange(pads + 1, length - 2)
        return Layout("t2i", length, pads, blocks=[(soi, length - 1)])
    system_length = rng.randrange(4)
    soi = pads + 1 + system_length
    eoi = rng.randrange(soi + 2, length - 3)
    blocks = [(soi, eoi)]
    while kind == "mmu" and rng.random() < 0.5 and blocks[-1][1] + 4 < length:  # further images
        first = rng.randrange(blocks[-1][1] + 1, length - 3)
        blocks.append((first, rng.randrange(first + 2, length)))
    room = length - 1 - blocks[-1][1]
    return Layout(kind, length, pads, system_length, blocks, rng.randrange(room + 1))


def random_batch(seed: int, kinds=("lm", "t2i", "mmu", "mmu_vit")) -> tuple[list[Layout], torch.Tensor]:
    rng = random.Random(seed)
    length = rng.randrange(15, 24)
    layouts = [random_layout(rng, rng.choice(kinds), length) for _ in range(rng.randrange(1, 6))]
    return layouts, torch.stack([layout.ids(rng) for layout in layouts])


def oracle(layouts: list[Layout]) -> torch.Tensor:
    return torch.stack([layout.dense() for layout in layouts])[:, None]


# ---- constructors ----


def test_one_constructor_for_each_kind():
    rng = random.Random(1)
    for _ in range(100):
        length, pads = rng.randrange(12, 24), [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
        soi, eoi, system = rng.randrange(4, length - 2), rng.randrange(3, length), rng.randrange(4)
        features = rng.randrange(1, length - system - 3)
        t2i = [Layout("t2i", length, count, blocks=[(soi, length - 1)]) for count in pads]
        assert torch.equal(OmniMask.t2i(torch.tensor(pads), soi, length).dense(), oracle(t2i))
        mmu = Layout("mmu", length, blocks=[(1, eoi)])
        assert torch.equal(OmniMask.mmu(2, eoi, length).dense(), oracle([mmu] * 2))
        mmu_vit = Layout("mmu_vit", length, blocks=[(1 + system, 2 + system + features)])
        assert torch.equal(OmniMask.mmu_vit(2, system, features, length).dense(), oracle([mmu_vit] * 2))
        assert torch.equal(OmniMask.lm(3, length).dense(), oracle([Layout("lm", length)] * 3))


def test_from_ids_on_mixed_batches():
    for seed in range(400):
        layouts, ids = random_batch(seed)
        dense = OmniMask.from_ids(ids, VOCABULARY).dense()
        assert torch.equal(OmniMask.from_dense(dense).dense(), dense)
        assert torch.equal(dense, oracle(layouts)), layouts
        assert dense.any(-1).all(), "no row is fully masked"


def test_random_layouts_cover_what_they_should():
    """The generator above really makes pads on both sides, system prompts and several images."""
    layouts = [layout for seed in range(400) for layout in random_batch(seed)[0]]
    assert {layout.kind for layout in layouts} == {"lm", "t2i", "mmu", "mmu_vit"}
    assert any(len(layout.blocks) > 2 for layout in layouts)
    for kind in ("t2i", "mmu", "mmu_vit"):
        assert any(layout.num_pads for layout in layouts if layout.kind == kind)
    assert any(layout.num_right_pads and layout.num_pads and layout.system_length for layout in layouts)


@pytest.mark.parametrize("ids", [[3, VOCABULARY.soi_id, 31, 32, VOCABULARY.eoi_id, 5], [VOCABULARY.pad_id] * 6])
def test_special_ids_in_an_lm_row_and_a_row_of_pads_are_causal(ids):
    assert torch.equal(OmniMask.from_ids(torch.tensor([ids]), VOCABULARY).dense(), OmniMask.lm(1, 6).dense())


# ---- slices ----


def test_cat_and_select():
    for seed in range(60):
        layouts, ids = random_batch(seed)
        masks = [OmniMask.from_ids(row[None], VOCABULARY) for row in ids]
        both = OmniMask.cat(masks)
        assert torch.equal(both.dense(), oracle(layouts))
        order = list(range(len(layouts)))[::-1]
        assert torch.equal(both.select(order).dense(), oracle(layouts)[order])
        assert torch.equal(both.select(slice(1)).dense(), oracle(layouts)[:1])
        keep = torch.arange(len(layouts)) % 2 == 0
        assert torch.equal(both.select(keep).dense(), oracle(layouts)[keep])


def test_rows_are_a_slice_of_the_whole():
    rng = random.Random(5)
    for seed in range(100):
        layouts, ids = random_batch(seed)
        mask, whole, length = OmniMask.from_ids(ids, VOCABULARY), oracle(layouts), ids.shape[1]
        start = rng.randrange(length)
        stop = rng.choice([start + 1, length, rng.randrange(start + 1, length + 1)])  # one decode row, the rest, some
        part = mask.rows(start, stop)
        assert torch.equal(part.dense(), whole[:, :, start:stop, :stop])
        assert part.shape == tuple(part.dense().shape)
        chosen = part.select([0])
        assert torch.equal(chosen.dense(), whole[:1, :, start:stop, :stop])


def test_chosen_queries_in_every_form():
    """Other positions in each row, as a partial refresh has them, against the keys of a cache."""
    rng = torch.Generator().manual_seed(3)
    for seed in range(50):
        layouts, ids = random_batch(seed)
        mask, whole, length = OmniMask.from_ids(ids, VOCABULARY), oracle(layouts), ids.shape[1]
        queries = torch.rand(ids.shape, generator=rng).argsort(1)[:, : 1 + seed % length]
        expected = whole.gather(2, queries[:, None, :, None].expand(-1, 1, -1, length))
        assert torch.equal(mask.at(queries, length).dense(), expected)
        assert torch.equal(mask.at(queries[0], length - 1).dense(), whole[:, :, queries[0], :-1])
        assert torch.equal(mask.at(queries, length).select([0]).dense(), expected[:1])
        bias = mask.at(queries, length).for_attention("eager", torch.float32)
        assert torch.equal(bias == 0, expected) and (bias[~expected] == torch.finfo(torch.float32).min).all()


def test_block_mask_of_chosen_queries():
    mask = OmniMask.t2i(torch.tensor([0, 140]), 200, 450)
    for queries in (torch.stack([torch.arange(200, 330), torch.arange(320, 450)]), slice(449, 450), slice(0, 200)):
        part = mask.at(queries, 450)
        form = part.for_attention("flex_attention", torch.float32)
        assert torch.equal(expand(form, 2, *part.shape[2:]), part.dense())


def test_a_window_without_common_padding():
    for seed in range(200):
        layouts, ids = random_batch(seed, kinds=("t2i", "mmu", "mmu_vit"))
        count = min(layout.num_pads for layout in layouts)
        dropped = OmniMask.from_ids(ids, VOCABULARY).window(count)
        assert torch.equal(dropped.dense(), oracle(layouts)[:, :, count:, count:])
        assert torch.equal(dropped.dense(), OmniMask.from_ids(ids[:, count:], VOCABULARY).dense())


def test_extend_is_the_mask_of_the_longer_row():
    for seed in range(200):
        layouts, ids = random_batch(seed)
        count = seed % 4
        longer = OmniMask.from_ids(ids, VOCABULARY).extend(count).dense()
        text = torch.zeros(len(ids), count, dtype=torch.long)
        assert torch.equal(longer, OmniMask.from_ids(torch.cat([ids, text], 1), VOCABULARY).dense())
        for layout in layouts:
            layout.length += count  # causal text, also after the image of a t2i row
        assert torch.equal(longer, oracle(layouts))


# ---- spellings ----


def expand(block_mask, batch_size: int, num_queries: int, length: int) -> torch.Tensor:
    """What FlexAttention computes: partial blocks ask `mask_mod`, full blocks do not, others are skipped."""
    asked = create_mask(block_mask.mask_mod, batch_size, None, num_queries, length, device="cpu")
    size_q, size_k = block_mask.BLOCK_SIZE
    result = torch.zeros_like(asked)
    partial = (block_mask.kv_num_blocks, block_mask.kv_indices, False)
    lists = (partial, (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True))
    for counts, indices, full in lists:
        for batch, head, row in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            for column in indices[batch, head, row, : counts[batch, head, row]].tolist():
                queries, keys = slice(row * size_q, (row + 1) * size_q), slice(column * size_k, (column + 1) * size_k)
                result[batch, head, queries, keys] = True if full else asked[batch, head, queries, keys]
    return result


def test_block_mask_over_several_blocks():
    """Rows longer than FlexAttention's blocks of 128: full, partial and empty blocks all occur."""
    length, soi = 450, 200
    t2i = OmniMask.t2i(torch.tensor([0, 140]), soi, length)
    masks = [t2i, OmniMask.mmu(1, 300, length), OmniMask.mmu_vit(1, 28, 256, length), OmniMask.lm(1, length)]
    mask = OmniMask.cat(masks)
    block_mask = mask.block_mask()
    assert (block_mask.full_kv_num_blocks > 0).any() and (block_mask.to_dense() == 0).any()
    assert torch.equal(expand(block_mask, 5, length, length), mask.dense())


def test_vectors_must_fit_and_moving_keeps_the_slice():
    with pytest.raises(ValueError, match=r"must both be \(B, L\)"):
        OmniMask(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"must both be \(B, L\)"):
        OmniMask.lm(2, 3).select(0)
    mask = OmniMask.lm(1, 6).rows(3, 5).to("meta")
    assert mask.device.type == "meta" and mask.shape == (1, 1, 2, 5)


def test_keys_that_nobody_sees():
    """Hidden ones, also from text that comes later, and the unused slots of a cache."""
    mask = OmniMask.lm(2, 6)
    hidden = torch.tensor([[False, True, False, False, True, False], [False] * 6])
    assert torch.equal(mask.hide(hidden).dense(), mask.dense() & ~hidden[:, None, None])
    assert torch.equal(mask.rows(3, 5).hide(hidden[:, :5]).dense(), mask.hide(hidden).rows(3, 5).dense())
    assert not mask.hide(hidden).extend(2).dense()[0, 0, :, 1].any()
    padded = mask.pad_to(11).dense()
    assert torch.equal(padded[:, :, :6, :6], mask.dense()) and not padded[..., 6:].any()
    assert torch.equal(mask.window(0, 4).dense(), mask.dense()[:, :, :4, :4])
