"""Several samples in one row, so that no padding runs through the layers (SPEC §3).

A batch keeps its rows, one sample each; `Packing` says where the used part of every row stands in fewer, fuller rows.
Embeddings are gathered into those before the first layer, and losses look up their positions there after the last one,
so everything else (labels, statistics, sample sheets) knows nothing of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.devices import send
from models.omni_attention import OmniMask

# B rows of L positions, packed into R rows of C
PACKED_SDPA = "packed_sdpa"

Piece = tuple[int, int, int]  # row, start, stop: positions start … stop − 1 of one row


@dataclass(frozen=True)
class Packing:
    """Where the positions of a batch run.

    Args:
        rows: for each packed row its pieces in order, from the left; what is left over on the right is filler.
        index: (R, C) int64, row·L + position of what runs there; 0 at filler.
        place: (B·L,) int64, where a position of the batch runs, as packed row·C + position; −1 for what does not run.
        position_ids: (R, C) int64, places within the own sample, for the rotary embedding.
        mask: over the packed rows; no sample sees another, and filler sees itself alone.
    """

    rows: tuple[tuple[Piece, ...], ...]
    index: torch.Tensor
    place: torch.Tensor
    position_ids: torch.Tensor
    mask: OmniMask

    @classmethod
    def of(cls, used: torch.Tensor, mask: OmniMask, longest: int) -> "Packing":
        """Packs the used stretch of every row; all on the CPU, where its sizes are needed.

        Args:
            used: (B, L) bool; a row's first to last True run, and none of them may see a position outside.
            mask: of the rows as they are.
            longest: most positions of a packed row.
        """
        batch_size, length = used.shape
        starts = used.int().argmax(1)
        stops = length - used.flip(1).int().argmax(1)
        pieces = [(row, *ends) for row, ends in enumerate(zip(starts.tolist(), stops.tolist(), strict=True))]
        lengths = [stop - start for _, start, stop in pieces]
        rows = tuple(tuple(pieces[number] for number in row) for row in fit(lengths, longest))
        columns = max(sum(stop - start for _, start, stop in row) for row in rows)
        index = torch.zeros(len(rows), columns, dtype=torch.long)
        place = torch.full((batch_size * length,), -1)
        position_ids = torch.zeros_like(index)
        for number, row in enumerate(rows):
            at = 0
            for source, start, stop in row:
                size = stop - start
                index[number, at : at + size] = torch.arange(start, stop) + source * length
                position_ids[number, at : at + size] = torch.arange(size)
                at += size
            filled = index[number, :at]
            place[filled] = torch.arange(at) + number * columns
        return cls(rows, index, place, position_ids, mask.packed(rows, columns))

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(B, L, …) → (R, C, …)."""
        return values.flatten(0, 1)[self.index]

    def to(self, device) -> "Packing":
        moved = {name: send(getattr(self, name), device) for name in ("index", "place", "position_ids")}
        return replace(self, mask=self.mask.to(device), **moved)

    def lengths(self) -> list[list[int]]:
        """Sizes of the pieces of each packed row, and of its filler."""
        sizes = [[stop - start for _, start, stop in row] for row in self.rows]
        return [[*row, self.index.shape[1] - sum(row)] for row in sizes]

    def piece_masks(self) -> list[list[torch.Tensor]]:
        """(1, 1, n, n) bool of each piece."""
        masks = []
        for row, sizes in enumerate(self.lengths()):
            stops = torch.tensor(sizes).cumsum(0).tolist()
            masks.append(
                [self.mask.window(row, stop - n, stop).dense() for n, stop in zip(sizes[:-1], stops, strict=False)]
            )
        return masks


def fit(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Numbers of the lengths that share a row: as few rows as first-fit decreasing finds, and then as even ones.

    Raises:
        ValueError: a length is more than `longest`.
    """
    if max(lengths) > longest:
        raise ValueError(f"a sample of {max(lengths)} positions does not fit into a row of {longest}")
    rows = _first_fit(lengths, longest)
    low, high = max(max(lengths), -(-sum(lengths) // len(rows))), longest
    while low < high:  # MULTIFIT: the shortest rows in which as few of them suffice
        middle = (low + high) // 2
        narrower = _first_fit(lengths, middle)
        if len(narrower) <= len(rows):
            rows, high = narrower, middle
        else:
            low = middle + 1
    return rows


def _first_fit(lengths: Sequence[int], longest: int) -> list[list[int]]:
    rows, room = [], []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        place = next((row for row, free in enumerate(room) if free >= lengths[number]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(longest)
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows


def packed_sdpa(module, query, key, value, attention_mask, *, pieces=None, piece_masks=None, scaling=None, **kwargs):
    """sdpa of each piece by itself, which a dense mask over the packed row would pay for many times over.

    Without pieces it is transformers' sdpa.

    Args:
        query, key, value: (R, heads, C, D); keys and values may have fewer heads, which are shared then.
        pieces, piece_masks: of `Packing.lengths` and `Packing.piece_masks`.

    Returns:
        (R, C, heads, D), 0 at filler, and None for the weights.
    """
    if pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows = []
    for row, (sizes, masks) in enumerate(zip(pieces, piece_masks, strict=True)):
        parts = zip(*(states[row : row + 1].split(sizes, dim=2) for states in (query, key, value)), strict=True)
        outputs = [  # transformers' own, which repeats keys and values where several heads share them
            sdpa_attention_forward(module, *part, mask, scaling=scaling)[0]  # (1, n, heads, D)
            for part, mask in zip(parts, masks, strict=False)
        ]
        filler = query.new_zeros(1, sizes[-1], query.shape[1], query.shape[3])
        rows.append(torch.cat([*outputs, filler], dim=1))
    return torch.cat(rows), None


ALL_ATTENTION_FUNCTIONS.register(PACKED_SDPA, packed_sdpa)
