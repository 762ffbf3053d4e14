"""Transfer of batches from loader workers: few large tensors instead of many small ones.

Every tensor sent between processes takes a file handle. With one per image, 32 workers would exhaust the usual limit of
a thousand.
"""

from typing import Any

import torch

from models.images import normalized


class Batch(list):
    """A list of samples. `stacked[key]` is the (B, …) tensor whose rows are the samples' tensors of that key."""

    def __init__(self, samples: list, stacked: dict[str, torch.Tensor] | None = None):
        super().__init__(samples)
        self.stacked = stacked or {}


def pack(samples: list) -> Any:
    """Samples that are dictionaries → columns: tensors of one shape stacked, others concatenated, the rest as lists.

    Texts, and batches in which some samples have pixels and others codes, are returned unchanged.
    """
    if not isinstance(samples[0], dict) or any(sample.keys() != samples[0].keys() for sample in samples):
        return samples
    return {key: _column([sample[key] for sample in samples]) for key in samples[0]}


def _column(values: list) -> torch.Tensor | tuple[torch.Tensor, list[int]] | list:
    if not isinstance(values[0], torch.Tensor):
        return values
    if len({value.shape for value in values}) == 1:
        return torch.stack(values)
    return torch.cat(values), [len(value) for value in values]


def unpack(packed: Any) -> Batch:
    """The inverse of `pack`; tensors are views of the columns. Images become (3, H, W) float32 in [-1, 1]."""
    if not isinstance(packed, dict):
        return Batch([_with_pixels(sample) for sample in packed])
    packed = _with_pixels(packed)
    stacked = {key: column for key, column in packed.items() if isinstance(column, torch.Tensor)}
    columns = [_values(column) for column in packed.values()]
    samples = [dict(zip(packed, values, strict=True)) for values in zip(*columns, strict=True)]
    return Batch(samples, stacked)


def _with_pixels(sample: Any) -> Any:
    """A sample, or the columns of several, with normalised images; they are sent as uint8, a quarter of the size."""
    image = sample.get("image") if isinstance(sample, dict) else None
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        return sample | {"image": normalized(image)}
    return sample


def _values(column: torch.Tensor | tuple | list) -> list:
    if isinstance(column, torch.Tensor):
        return list(column.unbind())
    if isinstance(column, tuple):
        joined, lengths = column
        return list(joined.split(lengths))
    return column


def pin(packed: Any) -> Any:
    """Copies the tensors to page-locked memory."""
    return {key: _pinned(column) for key, column in packed.items()} if isinstance(packed, dict) else packed


def _pinned(column: torch.Tensor | tuple | list) -> torch.Tensor | tuple | list:
    if isinstance(column, tuple):
        return column[0].pin_memory(), column[1]
    return column.pin_memory() if isinstance(column, torch.Tensor) else column


def stack(samples: list[dict], key: str) -> torch.Tensor:
    """The samples' tensors of one key as (B, …), without a copy if they are rows of one tensor already."""
    stacked = samples.stacked if isinstance(samples, Batch) else {}
    return stacked[key] if key in stacked else torch.stack([sample[key] for sample in samples])
