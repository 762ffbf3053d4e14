"""Runs chosen positions of a batch through any decoder, against the cached keys and values of all others (spec §7, §8).

One `step(ids, positions)` serves every task: a MaskGIT step (the image block), a decode step (one position), the check
of drafted tokens (1 + k positions), a partial refresh (some positions of the block). The decoder runs through its own
modules, so adapters, hooks and quantised or sharded weights take effect without anything here knowing of them.
"""

from collections.abc import Callable
from functools import cache, wraps
from inspect import signature
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from models.generation.kv_cache import KVCache
from models.omni_attention import OmniMask
from models.vocabulary import Vocabulary

# R rows, B distinct rows of ids (R is a multiple of B), n positions of a step, L positions in all, H hidden size
BUCKET = 64  # slots; a compiled step serves all lengths up to the same multiple of it
MAX_SPARE = 8  # caches of fixed size that are kept for later, as many as torch compiles shapes


class Model(Protocol):
    """What generation needs of a `Showo`."""

    showo: PreTrainedModel  # the language model
    vocabulary: Vocabulary
    step_caches: dict[tuple, KVCache] | None  # None: steps run eagerly

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor: ...

    def get_input_embeddings(self) -> nn.Embedding: ...

    def greedy_chooser(self, count: int) -> Callable: ...

    multinomial_at: Callable


class Runner:
    """The rows of a batch on their way through a decoder.

    Args:
        model: after its `compile_steps()`, steps run compiled, at fixed shapes.
        mask: attention of the R rows over every position that will come.
        position_ids: (R, L) int64 rotary positions; default: 0, 1, … in every row.
    """

    def __init__(self, model: Model, mask: OmniMask, position_ids: torch.Tensor | None = None):
        self.model, self.decoder = model, model.showo.get_decoder()
        # renamed in transformers 5.24, which warns of the old name and will drop it in 5.40
        parameters = signature(self.decoder.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._begin(mask, position_ids)

    def _begin(self, mask: OmniMask, position_ids: torch.Tensor | None) -> None:
        """Sets the rows, with an empty cache for them."""
        self.num_rows, length = mask.shape[0], mask.shape[3]
        num_layers, spare = self.decoder.config.num_hidden_layers, self.model.step_caches
        if spare is None:
            self.cache = KVCache(num_layers, length)
        else:
            fixed = -(-length // BUCKET) * BUCKET
            weight = self.model.get_input_embeddings().weight
            self.cache_key = self.num_rows, fixed, weight.dtype, weight.device
            new = KVCache(num_layers, fixed, static=True)
            self.cache = spare.pop(self.cache_key, new)
            self.cache.reset()
        self.attend(mask, position_ids)

    def attend(self, mask: OmniMask, position_ids: torch.Tensor | None = None) -> None:
        """Sets who sees whom from now on, where that was not known at the beginning; what is cached stays as it is."""
        if position_ids is None:
            position_ids = torch.arange(mask.shape[3], device=mask.device)[None]
        missing = (0, self.cache.max_length - mask.shape[3])
        # over the slots of the cache
        self.mask = mask.pad_to(self.cache.max_length)
        self.position_ids = nn.functional.pad(position_ids, missing)
        self.last_slice, self.last_attention = None, None

    @property
    def length(self) -> int:
        """Positions that are cached."""
        return self.cache.length

    def prefill(self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Final hidden states (R, n, H) of the next n positions. Never compiled, since prompts have all lengths.

        Args:
            input_ids: (B, n) int64; with B < R the rows are repeated as a whole.
            image_features: for the −200 positions, see `Showo.embed`.
        """
        embeds = self.model.embed(input_ids, image_features)
        return self._run(run_decoder, embeds, slice(self.length, self.length + input_ids.shape[1]))

    def step(self, input_ids: torch.Tensor, positions: slice | torch.Tensor | None = None) -> torch.Tensor:
        """Final hidden states (R, n, H) of tokens (B, n) at `positions`, whose keys and values they replace.

        Args:
            positions: a slice, or (B, n) int64 among the cached positions; default: the next n.
        """
        if positions is None:
            positions = slice(self.length, self.length + input_ids.shape[1])
        run = run_decoder if self.model.step_caches is None else compiled_decoder(input_ids.device.type)
        return self._run(run, self.model.get_input_embeddings()(input_ids), positions)

    def crop(self, length: int) -> None:
        """Drops the positions from `length` on."""
        self.cache.crop(length)

    def expand(self, mask: OmniMask, position_ids: torch.Tensor | None = None) -> None:
        """Broadcasts the cached positions of a single row to the batch of `mask` (shared-prefix prefill)."""
        prefix = self.cache
        self.release()
        self._begin(mask, position_ids)
        self.cache.expand_from(prefix, self.num_rows)

    def release(self) -> None:
        """Leaves a cache of fixed size to the next runner: CUDA graphs are recorded for its addresses."""
        spare = self.model.step_caches
        if spare is not None:
            spare[self.cache_key] = self.cache
            while len(spare) > MAX_SPARE:
                spare.pop(next(iter(spare)))  # the one that was released first

    def _run(self, run, embeds: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
        groups = self.num_rows // len(embeds)
        if isinstance(positions, slice):
            self.cache.length = max(self.length, positions.stop)
        else:
            positions = positions.repeat(groups, 1)
        mask, position_ids, slots = self._attention_at(positions)
        self.cache.write_at(slots)
        inputs = {"attention_mask": mask, "position_ids": position_ids, self.cache_argument: self.cache}
        return run(self.decoder, inputs | {"inputs_embeds": embeds.repeat(groups, 1, 1) if groups > 1 else embeds})

    def _attention_at(self, positions: slice | torch.Tensor) -> tuple:
        """(mask in the back end's form, rotary positions, cache slots) of a step; kept for a slice that comes again."""
        is_slice = isinstance(positions, slice)
        if is_slice and (positions, self.length) == self.last_slice:
            return self.last_attention
        num_keys = self.cache.max_length if self.cache.static else self.length
        implementation, dtype = self.decoder.config._attn_implementation, self.model.get_input_embeddings().weight.dtype
        mask = self.mask.at(positions, num_keys).for_attention(implementation, dtype)
        if not is_slice:
            return mask, self.position_ids.expand(self.num_rows, -1).gather(1, positions), positions
        slots = positions
        if self.cache.static:  # a slice would be compiled in
            slots = torch.arange(positions.start, positions.stop, device=self.mask.device)
        self.last_slice = positions, self.length
        self.last_attention = mask, self.position_ids[:, positions], slots
        return self.last_attention


def inference(method):
    """Runs a method without gradients, in evaluation mode: in training mode, activation checkpointing drops caches."""

    @wraps(method)
    def run(self, *args, **kwargs):
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        finally:
            for module in training:  # parts that are frozen in evaluation mode stay so
                module.training = True

    return run


def is_plain_linear(module: nn.Module) -> bool:
    """Whether weight and bias alone say what a module computes: no adapter, hook or quantised weight."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    if not isinstance(module, nn.Linear) or type(module.weight) is not nn.Parameter or hooked:
        return False
    return {name for name, _ in module.named_parameters()} <= {"weight", "bias"}


def run_decoder(decoder: nn.Module, inputs: dict) -> torch.Tensor:
    """Final hidden states (R, n, H)."""
    return decoder(**inputs, use_cache=True).last_hidden_state


@cache
def compiled_decoder(device_type: str):
    """`run_decoder` compiled for fixed shapes; on a GPU its kernels are replayed as one CUDA graph."""
    mode = "reduce-overhead" if device_type == "cuda" else None
    run = torch.compile(run_decoder, dynamic=False, mode=mode)

    def run_step(decoder: nn.Module, inputs: dict) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the hidden states of the step before may be overwritten
        return run(decoder, inputs)

    return run_step
