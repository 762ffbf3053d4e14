"""Omni-attention as two integer vectors (spec §3): causal for text, full inside images.

Key j is visible to the rows i with ``visible_from[j] <= i < visible_until[j]``. Every attention rule of the paper has
this shape, and so have a cached prefix, a decode step and several samples packed in one row. No other module writes a
mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.attention.flex_attention import create_block_mask

from models.devices import send
from models.vocabulary import IMAGE_FEATURE_ID, Vocabulary

# B rows of a batch, L keys (the whole sequence), Q queries (L, or fewer after `at`)
Span = tuple[int, int]  # start, stop: positions start … stop − 1


@dataclass(frozen=True)
class OmniMask:
    """Which keys each query may attend to.

    Args:
        visible_from: (B, L) int64, first row that sees key j.
        visible_until: (B, L) int64, one past the last row that sees key j.
        queries: (Q,) or (B, Q) int64, positions of the query rows; None means all of 0 … L − 1.
    """

    visible_from: torch.Tensor
    visible_until: torch.Tensor
    queries: torch.Tensor | None = None

    def __post_init__(self):
        if self.visible_from.ndim != 2 or self.visible_from.shape != self.visible_until.shape:
            raise ValueError(
                f"visible_from and visible_until must both be (B, L); got {tuple(self.visible_from.shape)} "
                f"and {tuple(self.visible_until.shape)}"
            )

    # ---- constructors, one per row kind of spec §3 ----

    @classmethod
    def lm(cls, batch_size: int, length: int, device=None) -> "OmniMask":
        """Causal rows."""
        position = torch.arange(length, device=device).expand(batch_size, length)
        return cls(position, torch.full_like(position, length))

    @classmethod
    def t2i(cls, num_pads: torch.Tensor, soi_index: int, length: int) -> "OmniMask":
        """Causal text, a full image block from `soi_index` to the end, left padding hidden from everything after it.

        Args:
            num_pads: (B,) int64, left pads of each row.
        """
        mask = cls.lm(len(num_pads), length, num_pads.device)
        return cls(mask.visible_from.clamp(max=soi_index), _hide_left_pads(mask.visible_until, num_pads))

    @classmethod
    def mmu(cls, batch_size: int, eoi_index: int, length: int, device=None) -> "OmniMask":
        """Everything up to and with `<eoi>` is seen by all rows; text after it is causal."""
        mask = cls.lm(batch_size, length, device)
        return cls(mask.visible_from.masked_fill(mask.visible_from <= eoi_index, 0), mask.visible_until)

    @classmethod
    def mmu_vit(cls, batch_size: int, system_length: int, num_features: int, length: int, device=None) -> "OmniMask":
        """Image features (after `<mmu>`, the system prompt and `<soi>`) are seen by all rows; the rest is causal."""
        mask, first = cls.lm(batch_size, length, device), 1 + system_length + 1
        visible_from = mask.visible_from.clone()
        visible_from[:, first : first + num_features] = 0
        return cls(visible_from, mask.visible_until)

    @classmethod
    def mixed(cls, images: Sequence[Sequence[Span]], private: Sequence[Sequence[Span]], length: int) -> "OmniMask":
        """Documents: causal, each image full inside, private spans unseen by what comes after them (docs/mixed.md).

        Args:
            images: for each row its image blocks (start, stop), `<soi>` and `<eoi>` included.
            private: for each row spans (start, stop) that no row from `stop` on sees: the masked copy of an image, of
                which there is a clean one, too.
            length: of the rows.
        """
        mask = cls.lm(len(images), length)
        visible_from, visible_until = mask.visible_from.clone(), mask.visible_until
        for row, (blocks, spans) in enumerate(zip(images, private, strict=True)):
            for start, stop in blocks:
                visible_from[row, start:stop] = start
            for start, stop in spans:
                visible_until[row, start:stop] = stop
        return cls(visible_from, visible_until)

    @classmethod
    def from_ids(cls, input_ids: torch.Tensor, vocabulary: Vocabulary) -> "OmniMask":
        """The mask that a batch of rows of any kind asks for, read off its ids.

        The first id after left padding tells the kind. Beyond the published single-image rows, a further
        ``<soi> … <eoi>`` block of an mmu row is full inside and causal towards the rest.

        Args:
            input_ids: (B, L) int64.
        """
        batch_size, length = input_ids.shape
        is_text = input_ids != vocabulary.pad_id
        num_pads = is_text.int().cumsum(1).eq(0).sum(1)  # (B,) leading pads
        mask = cls.lm(batch_size, length, input_ids.device)
        first_id = input_ids.gather(1, num_pads.clamp(max=length - 1)[:, None])  # (B, 1)
        position = mask.visible_from

        block_start = image_block_start(input_ids, vocabulary)  # (B, L), own position outside image blocks
        is_eoi = input_ids == vocabulary.eoi_id
        up_to_first_eoi = (is_eoi.int().cumsum(1) - is_eoi.int()).eq(0) & is_eoi.any(1, keepdim=True)
        has_features = (input_ids == IMAGE_FEATURE_ID).any(1, keepdim=True)
        is_mmu = (first_id == vocabulary.mmu_id) & ~has_features
        is_t2i = first_id == vocabulary.t2i_id

        visible_from = torch.where(is_t2i | is_mmu, block_start, position)
        visible_from = torch.where(is_mmu & up_to_first_eoi, 0, visible_from)
        visible_from = torch.where(input_ids == IMAGE_FEATURE_ID, 0, visible_from)
        visible_from = torch.where(position < num_pads[:, None], position, visible_from)
        return cls(visible_from, _hide_left_pads(mask.visible_until, num_pads))

    @classmethod
    def from_dense(cls, dense: torch.Tensor) -> "OmniMask":
        """The mask that a dense one says: bool, True = may attend, or of numbers that are added to the scores.

        Args:
            dense: (B, 1, L, L).

        Raises:
            ValueError: another shape, or a key that is hidden between rows that see it.
        """
        if dense.ndim != 4 or dense.shape[1] != 1 or dense.shape[2] != dense.shape[3]:
            raise ValueError(f"a dense attention_mask must be (B, 1, L, L); got {tuple(dense.shape)}")
        allowed = (dense if dense.dtype == torch.bool else dense >= 0)[:, 0]  # (B, L, L)
        count, first = allowed.sum(1), allowed.int().argmax(1)  # (B, L), of each key
        mask = cls(first, first + count)
        if (mask.dense()[:, 0] != allowed).any():
            raise ValueError("a dense attention_mask must not hide a key between two rows that see it")
        return mask

    @classmethod
    def cat(cls, masks: Sequence["OmniMask"]) -> "OmniMask":
        """Joins the rows of whole batches (no `queries`) of one length."""
        assert all(mask.queries is None for mask in masks), "masks of chosen queries cannot be joined"
        return cls(torch.cat([m.visible_from for m in masks]), torch.cat([m.visible_until for m in masks]))

    # ---- slices ----

    def at(self, queries: slice | torch.Tensor, num_keys: int) -> "OmniMask":
        """Some query rows against the keys 0 … num_keys − 1, as a step over a key/value cache needs them.

        Args:
            queries: positions, a slice with both ends or (Q,) or (B, Q) int64.
        """
        if isinstance(queries, slice):
            queries = torch.arange(queries.start, queries.stop, device=self.device)
        return OmniMask(self.visible_from[:, :num_keys], self.visible_until[:, :num_keys], queries)

    def rows(self, start: int, stop: int) -> "OmniMask":
        """Queries start … stop − 1 against the keys 0 … stop − 1: what a cached prefix and these rows attend to."""
        return self.at(slice(start, stop), stop)

    def window(self, start: int, stop: int | None = None) -> "OmniMask":
        """Positions start … stop − 1 alone, keys and queries both, none of which may need to see another position."""
        return OmniMask(self.visible_from[:, start:stop] - start, self.visible_until[:, start:stop] - start)

    def extend(self, count: int) -> "OmniMask":
        """With `count` causal positions (newly generated text, or padding) at the end.

        Keys that every later row saw stay visible to the new rows; hidden padding stays hidden.
        """
        batch_size, length = self.visible_from.shape
        new = torch.arange(length, length + count, device=self.device).expand(batch_size, count)
        until = torch.where(self.visible_until >= length, length + count, self.visible_until)
        return OmniMask(
            torch.cat([self.visible_from, new], dim=1),
            torch.cat([until, torch.full_like(new, length + count)], dim=1),
        )

    def hide(self, keys: torch.Tensor) -> "OmniMask":
        """Without the keys where the (B, L) bool tensor is True: no row sees them (pads before an answer)."""
        return replace(self, visible_until=self.visible_until.masked_fill(keys, 0))

    def pad_to(self, length: int) -> "OmniMask":
        """With keys up to `length` that no row sees: the unused slots of a cache of fixed size."""
        missing = (0, length - self.visible_from.shape[1])
        return replace(
            self,
            visible_from=torch.nn.functional.pad(self.visible_from, missing),
            visible_until=torch.nn.functional.pad(self.visible_until, missing),
        )

    def packed(self, rows: Sequence[Sequence[tuple[int, int, int]]], length: int) -> "OmniMask":
        """Pieces of these rows one after another in new rows; no piece sees another, and what is left over sees itself.

        Args:
            rows: for each new row its pieces (row, start, stop): positions start … stop − 1 of one of these rows, none
                of which may see a position outside.
            length: of the new rows.
        """
        position = torch.arange(length, device=self.device).repeat(len(rows), 1)
        visible_from, visible_until = position, position + 1
        for number, row in enumerate(rows):
            at = 0
            for source, start, stop in row:
                there, shift = slice(at, at + stop - start), at - start
                visible_from[number, there] = self.visible_from[source, start:stop].clamp(min=start) + shift
                visible_until[number, there] = self.visible_until[source, start:stop].clamp(max=stop) + shift
                at = there.stop
        return OmniMask(visible_from, visible_until)

    def select(self, index) -> "OmniMask":
        """Some rows of the batch, by index, slice or boolean tensor."""
        queries = self.queries[index] if self.queries is not None and self.queries.ndim == 2 else self.queries
        return OmniMask(self.visible_from[index], self.visible_until[index], queries)

    def to(self, device) -> "OmniMask":
        queries = None if self.queries is None else send(self.queries, device)
        return OmniMask(send(self.visible_from, device), send(self.visible_until, device), queries)

    @property
    def device(self) -> torch.device:
        return self.visible_from.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, 1, Q, L), the shape of `dense()`."""
        batch_size, length = self.visible_from.shape
        return (batch_size, 1, length if self.queries is None else self.queries.shape[-1], length)

    # ---- the forms that attention back ends take ----

    def dense(self) -> torch.Tensor:
        """(B, 1, Q, L) bool, True = may attend: what sdpa takes."""
        query = self._query_positions()[..., :, None]  # (Q, 1) or (B, Q, 1)
        return ((self.visible_from[:, None] <= query) & (query < self.visible_until[:, None]))[:, None]

    def block_mask(self):
        """The same mask as a FlexAttention `BlockMask`."""
        visible_from, visible_until = self.visible_from, self.visible_until
        queries = self._query_positions().expand(self.shape[0], -1)

        def mask_mod(batch, head, query, key):
            row = queries[batch, query]
            return (visible_from[batch, key] <= row) & (row < visible_until[batch, key])

        batch_size, _, num_queries, length = self.shape
        return create_block_mask(mask_mod, batch_size, None, num_queries, length, device=self.device)

    def for_attention(self, implementation: str, dtype: torch.dtype):
        """The form that one of transformers' attention implementations takes; `dtype` is that of the queries."""
        if implementation == "flex_attention":
            return self.block_mask()
        return dense_for_attention(self.dense(), implementation, dtype)

    def _query_positions(self) -> torch.Tensor:
        return torch.arange(self.shape[3], device=self.device) if self.queries is None else self.queries


def dense_for_attention(dense: torch.Tensor, implementation: str, dtype: torch.dtype):
    """As `OmniMask.for_attention`, of a mask that is given as (B, 1, Q, L) bool."""
    if implementation == "flex_attention":  # takes no tensors; on a CPU they crash the process
        batch_size, _, num_queries, length = dense.shape
        mask_mod = lambda batch, head, query, key: dense[batch, 0, query, key]  # noqa: E731
        return create_block_mask(mask_mod, batch_size, None, num_queries, length, device=dense.device)
    if implementation == "eager":  # adds the mask to the scores, so a bool one would be wrong without an error
        return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill(~dense, torch.finfo(dtype).min)
    return dense


def _hide_left_pads(visible_until: torch.Tensor, num_pads: torch.Tensor) -> torch.Tensor:
    """Left pads are seen by pads only, so no row is fully masked and none after them sees them."""
    position = torch.arange(visible_until.shape[1], device=visible_until.device)
    return torch.where(position < num_pads[:, None], num_pads[:, None], visible_until)


def image_block_start(input_ids: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """(B, L): index of the `<soi>` that opens the image block a position lies in, else the position itself."""
    position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    is_soi, is_eoi = input_ids == vocabulary.soi_id, input_ids == vocabulary.eoi_id
    opened = is_soi.int().cumsum(1)
    closed_before = is_eoi.int().cumsum(1) - is_eoi.int()
    last_soi = torch.where(is_soi, position, -1).cummax(1).values
    return torch.where(opened > closed_before, last_soi, position)
