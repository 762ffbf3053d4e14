"""`Showo`'s transformer over positions that come piece by piece, their keys and values kept (SPEC §7, §8).

`incremental(model, mask)` picks the runner: `PlainPhi` runs the layers straight from their weights, `ModulePhi` goes
through transformers' modules for what only they carry: other attention back ends, compiled code, and hooks (sharded or
offloaded weights, adapters). Both return the same hidden states.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from models.omni_attention import OmniMask
from models.plain_layer import Buffers, Place, PlainLayer, TokenMemo, norm_of, pick
from models.thin import Desk, ThinLayers, is_thin

# R rows, B distinct rows of ids (R is a multiple), n positions of a piece, U needed ones, H hidden size


def incremental(
    model, mask: OmniMask, positions: torch.Tensor | None = None, *, ids_recur: bool = False
) -> "PlainPhi | ModulePhi":
    """A runner for rows with the attention of `mask`, which covers all positions that will come.

    Args:
        positions: (R, room) int64 rotary positions; default: 0, 1, … in every row.
        ids_recur: few ids will come that did not come before, which saves most of the first layer.
    """
    # Compiled, a GPU replays a decode step as a graph (models/decode_graph.py); a CPU runs the compiled modules.
    if is_plain(model.showo) and (mask.device.type == "cuda" or not is_compiled(model.showo)):
        return PlainPhi(model, mask, positions, ids_recur=ids_recur)
    return ModulePhi(model, mask, positions)


class PlainPhi:
    """Phi's layers run from their weights: the arithmetic of transformers' modules in half as many operations.

    Rows that are equal in a piece share what the first layer computes of them alone, and the last layer runs only at
    the positions that are asked for.
    """

    def __init__(self, model, mask: OmniMask, positions: torch.Tensor | None = None, *, ids_recur: bool = False):
        self.phi = phi = model.showo.model
        self.embed, self.embed_tokens, self.final_norm = model.embed, phi.embed_tokens, norm_of(phi.final_layernorm)
        self.buffers = Buffers()
        self.layers = [PlainLayer(layer, self.buffers) for layer in phi.layers]
        self.memo = TokenMemo(self.layers[0], self.embed_tokens) if ids_recur and len(self.layers) > 1 else None
        self.length, self.thin, self.desks = 0, None, {}
        self._lay_out(mask, positions)

    def _lay_out(self, mask: OmniMask, positions: torch.Tensor | None) -> None:
        """Room for rows of this mask, and the rotation of every position."""
        self.mask, self.bias_of, self.bias, self.sees_all = mask, None, None, None
        for layer in self.layers:
            layer.make_room(mask.shape[0], mask.shape[3])
        if positions is None:
            positions = torch.arange(mask.shape[3], device=mask.device)[None]
        cos, sin = self.phi.rotary_emb(self.embed_tokens.weight, positions)  # (1 or R, room, r), both halves equal
        half = cos.shape[-1] // 2
        self.cos, self.sin = cos[:, :, None, :half], sin[:, :, None, :half]  # (1 or R, room, 1, r / 2)

    def spread(self, mask: OmniMask, positions: torch.Tensor | None = None) -> None:
        """What has been read, as one row, becomes the beginning of all rows of another mask."""
        self._lay_out(mask, positions)

    def extend(
        self,
        input_ids: torch.Tensor,
        *,
        image_features: torch.Tensor | None = None,
        needed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final hidden states (R, n or U, H) of the next n positions.

        Args:
            input_ids: (B, n) int64; with fewer rows than the mask they are repeated as a whole.
            image_features: for the −200 positions, which only the first piece may hold.
            needed: (B, U) int64 positions within the piece; default: all.
        """
        start, self.length = self.length, self.length + input_ids.shape[1]
        new = slice(start, self.length)
        place = Place(new, self.length, self.cos[:, new], self.sin[:, new], self._bias(start))
        embed = partial(self.embed, image_features=image_features) if start == 0 else self.embed_tokens
        return self._run(input_ids, place, needed, embed)

    def rewrite(
        self, input_ids: torch.Tensor, positions: torch.Tensor, needed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `extend` for tokens (B, n) at positions (B, n) that are there already; all others keep keys and values."""
        at = positions.repeat(self.mask.shape[0] // len(positions), 1)  # (R, n)
        rows = torch.arange(len(at), device=at.device)[:, None]
        visible = self.mask.rows(0, self.length).dense()[rows, 0, at][:, None]  # (R, 1, n, length)
        cos, sin = (x[rows if len(x) > 1 else 0, at] for x in (self.cos, self.sin))
        place = Place((rows, at), self.length, cos, sin, _bias_of(visible, cos.dtype))
        return self._run(input_ids, place, needed, self.embed_tokens)

    def _run(self, input_ids: torch.Tensor, place: Place, needed: torch.Tensor | None, embed) -> torch.Tensor:
        self.buffers.look_at(self.embed_tokens.weight)
        *layers, last = self.layers
        if self.memo is not None:
            first, *layers = layers
            hidden = first.attend(self.memo.project(input_ids), len(input_ids), place, place)
        else:
            hidden = embed(input_ids)
            appends = isinstance(place.new, slice) and place.new.start and len(input_ids) == self.mask.shape[0]
            if needed is None and appends and is_thin(hidden) and not torch.is_grad_enabled():
                hidden = self.desk(hidden).run(hidden, place.new, (place.cos, place.sin), place.bias)
                return F.layer_norm(hidden, *self.final_norm)
        for layer in layers:
            hidden = layer.run(hidden, place)
        return F.layer_norm(last.run(hidden, place, needed), *self.final_norm)

    def desk(self, hidden: torch.Tensor) -> Desk:
        """Where a few rows of the shape of (R, n, H) run through all layers."""
        self.thin = self.thin or ThinLayers.of(self.phi, self.layers)
        if hidden.shape not in self.desks:
            self.desks[hidden.shape] = Desk(self.thin, self.layers, hidden, 2 * self.cos.shape[-1])
        return self.desks[hidden.shape]

    def forget(self, count: int) -> None:
        """Drops the last `count` positions."""
        self.length -= count

    def _bias(self, start: int) -> torch.Tensor | None:
        """Of the positions from `start` on; kept for a piece that comes again."""
        if self.length - start == 1:  # a decode step
            self.sees_all = self.sees_all or self.mask.sees_all().tolist()
            if self.sees_all[start]:
                return None
        if self.bias_of != (start, self.length):
            self.bias_of = start, self.length
            self.bias = _bias_of(self.mask.rows(start, self.length).dense(), self.cos.dtype)
        return self.bias


def _bias_of(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """(R, 1, n, length) bool -> (R, 1, n or 1, length), −inf where a key is hidden, or None if all is visible."""
    if (visible == visible[:, :, :1]).all():
        visible = visible[:, :, :1]
    if visible.all():
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)


class ModulePhi:
    """The same through transformers' modules and cache."""

    def __init__(self, model, mask: OmniMask, positions: torch.Tensor | None = None):
        self.model, self.mask, self.positions, self.length = model, mask, positions, 0
        num_layers = model.showo.config.num_hidden_layers
        self.cache = Cache(layers=[_RoomyLayer(mask.shape[3]) for _ in range(num_layers)])

    def extend(
        self,
        input_ids: torch.Tensor,
        *,
        image_features: torch.Tensor | None = None,
        needed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `PlainPhi.extend`."""
        groups = self.mask.shape[0] // len(input_ids)
        start, self.length = self.length, self.length + input_ids.shape[1]
        hidden = self.model.hidden_states(
            input_ids.repeat(groups, 1),
            self.mask.rows(start, self.length),
            image_features=image_features,
            position_ids=None if self.positions is None else self.positions[:, start : self.length],
            past_key_values=self.cache,
        )
        return hidden if needed is None else pick(hidden, needed.repeat(groups, 1))

    def forget(self, count: int) -> None:
        """Drops the last `count` positions."""
        self.length -= count
        self.cache.crop(-count)  # transformers takes the number of positions to drop as negative

    def spread(self, mask: OmniMask, positions: torch.Tensor | None = None) -> None:
        """As `PlainPhi.spread`."""
        self.mask, self.positions = mask, positions
        for layer in self.cache.layers:
            layer.spread(mask.shape[0], mask.shape[3])


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values (R, heads, length, d), written into room that is taken once.

    The library's own layer copies everything whenever a position comes to it.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length = room, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            shape = (*key_states.shape[:2], self.room, key_states.shape[3])
            self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
            self.is_initialized = True
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def spread(self, num_rows: int, room: int) -> None:
        """What one row holds becomes the beginning of so many rows, with room for so many positions."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(num_rows, old.shape[1], room, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        self.length += tokens_to_remove  # negative, as in transformers


def is_compiled(showo: nn.Module) -> bool:
    """Whether `torch.compile` was asked for."""
    return showo.model._compiled_call_impl is not None


def is_plain(showo: nn.Module) -> bool:
    """Whether the weights alone say what the layers compute."""
    config, phi = showo.config, showo.model
    heads_agree = config.num_key_value_heads == config.num_attention_heads
    fixed_rotation = config.rope_parameters["rope_type"] == "default"
    if not config._attn_implementation.endswith("sdpa") or not heads_agree or not fixed_rotation:
        return False
    return not any(_is_changed(module) for module in phi.modules())


def _is_changed(module: nn.Module) -> bool:
    """Hooks, a replaced forward, or a class of another origin (adapted, quantised, sharded)."""
    hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    return bool(hooked) or not type(module).__module__.startswith(("torch.nn.modules.", "transformers."))
