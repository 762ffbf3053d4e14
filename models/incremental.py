"""`Showo`'s transformer over positions that come piece by piece, their keys and values kept (SPEC §7, §8).

`incremental(model, mask)` picks the runner: `PlainPhi` runs the layers straight from their weights, `ModulePhi` goes
through transformers' modules for what only they carry: other attention back ends, compiled code, and hooks (sharded or
offloaded weights, adapters). Both return the same hidden states.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache, DynamicLayer

from models.omni_attention import OmniMask
from models.packing import PACKED_SDPA
from models.thin import ThinLayers, is_thin, rotate

# R rows, B distinct rows of ids (R is a multiple), n positions of a piece, U needed ones, H hidden size, d head size


def incremental(model, mask: OmniMask, positions: torch.Tensor | None = None) -> "PlainPhi | ModulePhi":
    """A runner for rows with the attention of `mask`, which covers all positions that will come.

    Args:
        positions: (R, room) int64 rotary positions; default: 0, 1, … in every row.
    """
    return (PlainPhi if _is_plain(model.showo) else ModulePhi)(model, mask, positions)


class PlainPhi:
    """Phi's layers run from their weights: the arithmetic of transformers' modules in half as many operations.

    Rows that are equal in a piece share what the first layer computes of them alone, and the last layer runs only at
    the positions that are asked for.
    """

    def __init__(self, model, mask: OmniMask, positions: torch.Tensor | None = None):
        self.phi = phi = model.showo.model
        self.embed, self.embed_tokens, self.final_norm = model.embed, phi.embed_tokens, _norm(phi.final_layernorm)
        self.layers = [_PlainLayer(layer) for layer in phi.layers]
        self.length, self.thin = 0, None
        self._lay_out(mask, positions)

    def _lay_out(self, mask: OmniMask, positions: torch.Tensor | None) -> None:
        """Room for rows of this mask, and the rotation of every position."""
        self.mask, self.bias_of, self.bias = mask, None, None
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
        hidden = self.embed_tokens(input_ids) if self.length else self.embed(input_ids, image_features)
        start, self.length = self.length, self.length + input_ids.shape[1]
        new = slice(start, self.length)
        rotation, bias = (self.cos[:, new], self.sin[:, new]), self._bias(start, hidden)
        if needed is None and start and is_thin(hidden):
            self.thin = self.thin or ThinLayers.of(self.phi, self.layers)
            return F.layer_norm(self.thin.run(hidden, self.layers, new, rotation, bias), *self.final_norm)
        for layer in self.layers[:-1]:
            hidden = layer.run(hidden, new, rotation, bias)
        hidden = self.layers[-1].run(hidden, new, rotation, bias, needed)
        return F.layer_norm(hidden, *self.final_norm)

    def forget(self, count: int) -> None:
        """Drops the last `count` positions."""
        self.length -= count

    def _bias(self, start: int, like: torch.Tensor) -> torch.Tensor | None:
        """(R, 1, n or 1, length), −inf where a key is hidden, or None; kept for a piece that comes again."""
        if self.bias_of != (start, self.length):
            self.bias_of = start, self.length
            visible = self.mask.rows(start, self.length).dense()
            if (visible == visible[:, :, :1]).all():
                visible = visible[:, :, :1]
            self.bias = None if visible.all() else like.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)
        return self.bias


class _PlainLayer:
    """The weights of a layer, and its keys and values (R, room, heads, d)."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.heads = attention.q_proj.out_features // attention.head_dim, attention.head_dim
        self.shape, self.keys, self.values = (), None, None
        self.norm, self.query_norm, self.key_norm = map(
            _norm, (layer.input_layernorm, attention.q_layernorm, attention.k_layernorm)
        )
        linears = attention.q_proj, attention.k_proj, attention.v_proj, attention.dense, mlp.fc1, mlp.fc2
        self.query, self.key, self.value, self.dense, self.fc1, self.fc2 = ((x.weight, x.bias) for x in linears)
        # transformers spells Phi's GELU out in seven passes over memory; torch has the same formula in one
        is_tanh_gelu = isinstance(mlp.activation_fn, NewGELUActivation)
        self.activation = partial(F.gelu, approximate="tanh") if is_tanh_gelu else mlp.activation_fn

    def make_room(self, num_rows: int, room: int) -> None:
        """For keys and values of so many rows and positions; what one row holds already is where all of them begin."""
        before, self.shape = (self.keys, self.values), (num_rows, room, *self.heads)
        self.keys = self.values = None
        if before[0] is not None:
            self.keys, self.values = (old.new_empty(self.shape) for old in before)
            self.keys[:, : before[0].shape[1]], self.values[:, : before[0].shape[1]] = before

    def run(
        self,
        hidden: torch.Tensor,
        new: slice,
        rotation: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None,
        needed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(R or B, n, H) -> (R, n or U, H); attention and MLP both start from the same normed input."""
        normed = F.layer_norm(hidden, *self.norm)
        groups = self.shape[0] // len(hidden)
        keys, values = self._keep(normed, new, rotation)
        if needed is not None:
            needed = needed.repeat(len(hidden) // len(needed), 1)
            row = torch.arange(len(needed), device=needed.device)[:, None] if len(rotation[0]) > 1 else 0
            normed, hidden, rotation = _pick(normed, needed), _pick(hidden, needed), [x[row, needed] for x in rotation]
            if bias is not None and bias.shape[2] > 1:
                bias = _pick(bias[:, 0], needed.repeat(groups, 1))[:, None]
        query = rotate(F.layer_norm(self._heads(normed, self.query), *self.query_norm), *rotation).transpose(1, 2)
        own = hidden + F.linear(self.activation(F.linear(normed, *self.fc1)), *self.fc2)
        if groups > 1:
            query, own = query.repeat(groups, 1, 1, 1), own.repeat(groups, 1, 1)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
        return own + F.linear(mixed.transpose(1, 2).flatten(2), *self.dense)

    def _keep(self, normed: torch.Tensor, new: slice, rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values, written; all so far."""
        key = rotate(F.layer_norm(self._heads(normed, self.key), *self.key_norm), *rotation)
        return self.keep(key, self._heads(normed, self.value), new)

    def keep(
        self, key: torch.Tensor, value: torch.Tensor, new: slice | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (rows, n, heads, d) of the new positions; returns all so far, (R, heads, length, d).

        Args:
            new: their slice, or their indices (n,) as a tensor; then the whole room is returned.
        """
        if self.keys is None:
            self.keys, self.values = key.new_empty(self.shape), value.new_empty(self.shape)
        groups = self.shape[0] // len(key)
        if groups > 1:
            key, value = key.repeat(groups, 1, 1, 1), value.repeat(groups, 1, 1, 1)
        if isinstance(new, torch.Tensor):
            self.keys.index_copy_(1, new, key)
            self.values.index_copy_(1, new, value)
            return self.keys.transpose(1, 2), self.values.transpose(1, 2)
        self.keys[:, new], self.values[:, new] = key, value
        return self.keys[:, : new.stop].transpose(1, 2), self.values[:, : new.stop].transpose(1, 2)

    def _heads(self, normed: torch.Tensor, projection: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(rows, n, H) -> (rows, n, heads, d)"""
        return F.linear(normed, *projection).view(*normed.shape[:2], *self.heads)


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
        return hidden if needed is None else _pick(hidden, needed.repeat(groups, 1))

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


def _is_plain(showo: nn.Module) -> bool:
    """Whether the weights alone say what the layers compute."""
    config, phi = showo.config, showo.model
    heads_agree = config.num_key_value_heads == config.num_attention_heads
    fixed_rotation = config.rope_parameters["rope_type"] == "default"
    if config._attn_implementation not in ("sdpa", PACKED_SDPA) or phi._compiled_call_impl is not None:
        return False
    return heads_agree and fixed_rotation and not any(_is_changed(module) for module in phi.modules())


def _is_changed(module: nn.Module) -> bool:
    """Hooks, a replaced forward, or a class of another origin (adapted, quantised, sharded)."""
    hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    return bool(hooked) or not type(module).__module__.startswith(("torch.nn.modules.", "transformers."))


def _norm(norm: nn.LayerNorm) -> tuple:
    """The arguments of `F.layer_norm` after the first."""
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


def _pick(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(rows, n, size) at the positions (rows, U)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
