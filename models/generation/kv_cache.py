"""Keys and values in preallocated memory, as a `transformers` cache that any decoder fills through its own modules."""

import torch
from transformers.cache_utils import Cache

# R rows of a batch, n positions of a step, D head size


class KVCache(Cache):
    """The keys and values of every layer, (R, heads, max_length, D) each.

    `write_at` says where the next forward pass puts its positions; the library's own caches can only append. Memory is
    taken at the first write, since only the decoder's modules know the number of heads, the dtype and the device.

    Args:
        num_layers: of the decoder.
        max_length: positions there is room for.
        static: every forward pass attends to all `max_length` slots (the mask hides those without a token), so that all
            shapes are fixed and one compiled step serves all lengths.
    """

    def __init__(self, num_layers: int, max_length: int, *, static: bool = False):
        super().__init__(layers=[])
        self.max_length, self.static = max_length, static
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers
        self.length = 0  # slots that hold a token
        self.slots: slice | torch.Tensor = slice(0, 0)

    def write_at(self, slots: slice | torch.Tensor) -> None:
        """Sets where the next forward pass writes: a slice, (n,) int64 for all rows, or (R, n) int64."""
        self.slots = slots

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Called by each attention module: stores (R, heads, n, D) and returns the keys and values to attend to."""
        if self.keys[layer_idx] is None:
            self.keys[layer_idx], self.values[layer_idx] = self._allocate(key_states), self._allocate(value_states)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        for kept, new in ((keys, key_states), (values, value_states)):
            if isinstance(self.slots, slice):
                kept[:, :, self.slots] = new
            elif self.slots.ndim == 1:
                kept.index_copy_(2, self.slots, new)
            else:
                kept.scatter_(2, self.slots[:, None, :, None].expand_as(new), new)
        if self.static:
            return keys, values
        return keys[:, :, : self.length], values[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Drops all positions from `length` on."""
        self.length = length

    def expand_from(self, prefix: "KVCache", num_rows: int) -> None:
        """Begins `num_rows` rows with the tokens of a batch-1 cache."""
        self.length = prefix.length
        for tensors, sources in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for layer, source in enumerate(sources):
                rows = source.expand(num_rows, -1, -1, -1)
                if tensors[layer] is None:
                    tensors[layer] = self._allocate(rows)
                tensors[layer][:, :, : self.length] = rows[:, :, : self.length]

    def reset(self) -> None:
        """Empties the cache, keeps its memory. Masked slots have weight 0, but a NaN left there would still spread."""
        self.length = 0
        for tensor in (*self.keys, *self.values):
            if tensor is not None:
                tensor.zero_()

    def __len__(self) -> int:
        return len(self.keys)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        shape = (*like.shape[:2], self.max_length, like.shape[3])
        with torch.inference_mode(False):  # it may be written outside of inference mode later
            memory = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if self.static:  # so that CUDA graphs write into it and do not copy it; torch has no public name for this
            torch._dynamo.mark_static_address(memory, guard=False)
        return memory
