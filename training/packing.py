"""Sample packing (spec §3, `dataset.packing`): several samples in one row, so that the layers compute no padding.

The batch itself keeps one sample in a row. `Packing` says where the unpadded stretch of every row runs in fewer, fuller
rows: embeddings are gathered into them before the first layer, and the losses look their positions up there after the
last one, so that labels, statistics and sample sheets need not know of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.errors import UserError
from models.devices import send
from models.omni_attention import OmniMask

# B rows of L positions, packed into R rows of C
PACKED_SDPA = "packed_sdpa"  # the attention implementation that attends sample by sample

Span = tuple[int, int, int]  # row, start, stop: positions start … stop − 1 of one row of the batch


@dataclass(frozen=True)
class Packing:
    """Where the positions of a batch run.

    Args:
        samples: of each packed row, from the left; the rest on the right is filler.
        source_index: (R, C) int64, row·L + position of the batch that runs there; 0 at filler.
        target_index: (B·L,) int64, packed row·C + position at which a position of the batch runs; −1 for padding.
        position_ids: (R, C) int64, of the samples, for the rotary embedding.
        mask: the document mask of the packed rows: no sample sees another, filler sees itself alone.
    """

    samples: tuple[tuple[Span, ...], ...]
    source_index: torch.Tensor
    target_index: torch.Tensor
    position_ids: torch.Tensor
    mask: OmniMask

    @classmethod
    def from_mask(
        cls, is_used: torch.Tensor, mask: OmniMask, capacity: int, position_ids: torch.Tensor | None = None
    ) -> "Packing":
        """Packs the unpadded stretch of every row; on the CPU, where its sizes are needed.

        Args:
            is_used: (B, L) bool; the positions from a row's first True to its last run, and may see none outside.
            mask: of the rows as they are.
            capacity: most positions of a packed row.
            position_ids: (B, L) int64; default: counted from the first that runs.

        Raises:
            ValueError: a sample is longer than that.
        """
        batch_size, length = is_used.shape
        starts = is_used.int().argmax(1)
        stops = length - is_used.flip(1).int().argmax(1)
        spans = [(row, *ends) for row, ends in enumerate(zip(starts.tolist(), stops.tolist(), strict=True))]
        lengths = [stop - start for _, start, stop in spans]
        samples = tuple(tuple(spans[number] for number in row) for row in pack_bins(lengths, capacity))
        columns = max(sum(stop - start for _, start, stop in row) for row in samples)
        source_index = torch.zeros(len(samples), columns, dtype=torch.long)
        target_index = torch.full((batch_size * length,), -1)
        packed_ids = torch.zeros_like(source_index)
        for number, row in enumerate(samples):
            at = 0
            for source, start, stop in row:
                size = stop - start
                source_index[number, at : at + size] = torch.arange(start, stop) + source * length
                own = torch.arange(size) if position_ids is None else position_ids[source, start:stop]
                packed_ids[number, at : at + size] = own
                at += size
            target_index[source_index[number, :at]] = torch.arange(at) + number * columns
        return cls(samples, source_index, target_index, packed_ids, mask.packed(samples, columns))

    @property
    def num_positions(self) -> int:
        """Positions that run, filler included."""
        return self.source_index.numel()

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """(B, L, …) → (R, C, …)."""
        return values.flatten(0, 1)[self.source_index]

    def decoder_arguments(self, implementation: str) -> dict:
        """Keyword arguments of `Showo.hidden_states` for packed embeddings under an attention implementation."""
        arguments = {"attention_mask": self.mask, "position_ids": self.position_ids}
        if implementation == PACKED_SDPA:  # each sample brings a mask of its own
            arguments |= {"attention_mask": None, "sample_lengths": self.lengths(), "sample_masks": self.sample_masks()}
        return arguments

    def to(self, device) -> "Packing":
        moved = {name: send(getattr(self, name), device) for name in ("source_index", "target_index", "position_ids")}
        return replace(self, mask=self.mask.to(device), **moved)

    def lengths(self) -> list[list[int]]:
        """Lengths of the samples of each packed row, and of its filler."""
        lengths = [[stop - start for _, start, stop in row] for row in self.samples]
        return [[*row, self.source_index.shape[1] - sum(row)] for row in lengths]

    def sample_masks(self) -> list[list[torch.Tensor]]:
        """(1, 1, n, n) bool of each sample of each packed row."""
        masks = []
        for number, row in enumerate(self.lengths()):
            stops = torch.tensor(row).cumsum(0).tolist()
            ends = zip(row[:-1], stops, strict=False)
            masks.append([self.mask.select([number]).window(stop - size, stop).dense() for size, stop in ends])
        return masks


def packing_length(dataset, row_length: int) -> int | None:
    """Length limit of packed rows, by default that of four rows; None without sample packing.

    Args:
        dataset: the section of a `TrainingConfig`.
        row_length: of a row with one sample.

    Raises:
        UserError: shorter than the longest sample.
    """
    if not dataset.packing:
        return None
    longest = dataset.packing_length or 4 * row_length
    if longest < row_length:
        raise UserError(
            f"dataset.packing_length is {longest}, but a sample may have {row_length} positions; give that or more"
        )
    return longest


def pack_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bin packing: numbers of the lengths that share a row.

    As few rows as first-fit decreasing finds, then the smallest capacity at which as few suffice (MULTIFIT), so that
    they are about equally full and hold little filler.

    Raises:
        ValueError: a length is more than `capacity`.
    """
    if max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} positions does not fit into a row of {capacity}")
    rows = _first_fit_decreasing(lengths, capacity)
    low, high = max(max(lengths), -(-sum(lengths) // len(rows))), capacity
    while low < high:
        middle = (low + high) // 2
        narrower = _first_fit_decreasing(lengths, middle)
        if len(narrower) <= len(rows):
            rows, high = narrower, middle
        else:
            low = middle + 1
    return rows


def _first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows, free = [], []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = next((row for row, room in enumerate(free) if room >= lengths[number]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(number)
        free[row] -= lengths[number]
    return rows


def packed_sdpa(
    module, query, key, value, attention_mask, *, sample_lengths=None, sample_masks=None, scaling=None, **kwargs
):
    """sdpa of each sample by itself: a dense mask over the packed row would cost as many times more as it has samples.

    Without samples, as in generation, it is transformers' sdpa.

    Args:
        query, key, value: (R, heads, C, D); of keys and values perhaps fewer heads.
        sample_lengths, sample_masks: of `Packing.lengths` and `Packing.sample_masks`.

    Returns:
        (R, C, heads, D), 0 at filler, and None for the weights.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows = []
    # split, not indexed: the gradient of an index is a zero tensor of the whole
    one_by_one = (part.split(1) for part in (query, key, value))
    for lengths, masks, *row in zip(sample_lengths, sample_masks, *one_by_one, strict=True):
        samples = zip(*(part.split(lengths, dim=2) for part in row), strict=True)
        outputs = [  # transformers' own, which repeats keys and values where several heads share them
            sdpa_attention_forward(module, *sample, mask, scaling=scaling)[0]  # (1, n, heads, D)
            for sample, mask in zip(samples, masks, strict=False)
        ]
        filler = query.new_zeros(1, lengths[-1], query.shape[1], query.shape[3])
        rows.append(torch.cat([*outputs, filler], dim=1))
    return torch.cat(rows), None


ALL_ATTENTION_FUNCTIONS.register(PACKED_SDPA, packed_sdpa)
