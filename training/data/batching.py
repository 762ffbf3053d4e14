"""Items of a batch on their way from a loader worker: few large tensors instead of many small ones.

Every tensor that crosses the border of a process takes a file handle; with one per image, 32 workers use up the
thousand that a process may have.
"""

from typing import Any

import torch

from models.images import normalized


class Batch(list):
    """The items of a batch. `stacked[key]` is the (B, …) tensor whose rows are the items' tensors of that key."""

    def __init__(self, items: list, stacked: dict[str, torch.Tensor] | None = None):
        super().__init__(items)
        self.stacked = stacked or {}


def pack(items: list) -> Any:
    """Items that are dictionaries → columns: equally shaped tensors stacked, others joined, the rest as lists.

    Texts, and a batch in which some items hold pixels and others codes, stay as they are.
    """
    if not isinstance(items[0], dict) or any(item.keys() != items[0].keys() for item in items):
        return items
    return {key: _column([item[key] for item in items]) for key in items[0]}


def _column(values: list) -> torch.Tensor | tuple[torch.Tensor, list[int]] | list:
    if not isinstance(values[0], torch.Tensor):
        return values
    if len({value.shape for value in values}) == 1:
        return torch.stack(values)
    return torch.cat(values), [len(value) for value in values]


def unpack(packed: Any) -> Batch:
    """What `pack` packed; the items' tensors are views of the columns. Images become (3, H, W) in [-1, 1]."""
    if not isinstance(packed, dict):
        return Batch([_with_pixels(item) for item in packed])
    packed = _with_pixels(packed)
    stacked = {key: column for key, column in packed.items() if isinstance(column, torch.Tensor)}
    columns = [_values(column) for column in packed.values()]
    items = [dict(zip(packed, values, strict=True)) for values in zip(*columns, strict=True)]
    return Batch(items, stacked)


def _with_pixels(item: Any) -> Any:
    """An item, or the columns of several. Images cross the border between processes as bytes, a quarter as many."""
    image = item.get("image") if isinstance(item, dict) else None
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        return item | {"image": normalized(image)}
    return item


def _values(column: torch.Tensor | tuple | list) -> list:
    if isinstance(column, torch.Tensor):
        return list(column.unbind())
    if isinstance(column, tuple):
        joined, lengths = column
        return list(joined.split(lengths))
    return column


def pin(packed: Any) -> Any:
    """The same with its tensors in page-locked memory."""
    return {key: _pinned(column) for key, column in packed.items()} if isinstance(packed, dict) else packed


def _pinned(column: torch.Tensor | tuple | list) -> torch.Tensor | tuple | list:
    if isinstance(column, tuple):
        return column[0].pin_memory(), column[1]
    return column.pin_memory() if isinstance(column, torch.Tensor) else column


def stack(items: list[dict], key: str) -> torch.Tensor:
    """The items' tensors of one key as (B, …); without copying them again where they came as one."""
    stacked = items.stacked if isinstance(items, Batch) else {}
    return stacked[key] if key in stacked else torch.stack([item[key] for item in items])
