"""One Phi layer run from its weights: the arithmetic of transformers' module in half as many operations.

On a CPU in fp32 the products go into buffers that all layers share, since fresh memory costs a page fault every 4 KiB,
are added up where the sum already stands, and the MLP runs in slices of its width that stay in the processor's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import NewGELUActivation

from models.thin import rotate

# R rows, B distinct ones (R is a multiple), n positions of a piece in each row, m in all, u of them needed, H hidden
# size, d head size
CACHED_FLOATS, NARROWEST = 2**18, 512  # of a slice of the MLP, and its columns: narrower products are slower
GELU_LINEAR, GELU_CUBIC = 2 * (2 / torch.pi) ** 0.5, 2 * (2 / torch.pi) ** 0.5 * 0.044715

Linear = tuple[torch.Tensor, torch.Tensor]  # weight (out, in), bias (out,)


class Buffers:
    """Memory by name, taken once and used by every layer in turn; `in_use` where torch's out= serves."""

    def __init__(self):
        self.in_use = False
        self._flat: dict[str, torch.Tensor] = {}

    def look_at(self, hidden: torch.Tensor) -> None:
        """Decides for the piece that begins. out= knows neither gradients nor autocast; a GPU has its own allocator."""
        eager = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        self.in_use = eager and hidden.device.type == "cpu" and hidden.dtype == torch.float32

    def take(self, name: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """A tensor of undefined contents; the same name gives the same memory."""
        count, flat = torch.Size(shape).numel(), self._flat.get(name)
        if flat is None or flat.numel() < count:
            flat = self._flat[name] = like.new_empty(count)
        return flat[:count].view(shape)

    def linear(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """(m, in) -> (m, out), in the memory of that name if buffers are in use."""
        if not self.in_use:
            return F.linear(x, weight, bias)
        return torch.addmm(bias, x, weight.t(), out=self.take(name, (len(x), len(weight)), x))


@dataclass
class Place:
    """Where the positions of a piece stand among all R rows and their keys."""

    new: slice | torch.Tensor | tuple  # see `PlainLayer.keep`
    length: int  # keys that are there, the piece's included
    cos: torch.Tensor  # (1 or R, n, 1, r / 2); R where the rows differ
    sin: torch.Tensor
    bias: torch.Tensor | None  # (R, 1, n or 1, length), −inf where a key is hidden

    def rotation(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for the first rows."""
        return self.cos[:num_rows], self.sin[:num_rows]

    def only(self, needed: torch.Tensor) -> "Place":
        """The same for queries at (R or B, U) positions of the piece."""
        rows = torch.arange(len(needed), device=needed.device)[:, None]
        cos, sin = (x[rows if len(x) > 1 else 0, needed] for x in (self.cos, self.sin))
        bias = self.bias
        if bias is not None and bias.shape[2] > 1:
            bias = pick(bias[:, 0], needed.repeat(len(bias) // len(needed), 1))[:, None]
        return replace(self, cos=cos, sin=sin, bias=bias)


class PlainLayer:
    """The weights of a layer, and its keys and values (R, room, heads, d)."""

    def __init__(self, layer: nn.Module, buffers: Buffers):
        attention, mlp = layer.self_attn, layer.mlp
        self.heads = attention.q_proj.out_features // attention.head_dim, attention.head_dim
        self.shape, self.keys, self.values, self.buffers = (), None, None, buffers
        self.norm, self.query_norm, self.key_norm = map(
            norm_of, (layer.input_layernorm, attention.q_layernorm, attention.k_layernorm)
        )
        linears = attention.q_proj, attention.k_proj, attention.v_proj, attention.dense, mlp.fc1, mlp.fc2
        self.query, self.key, self.value, self.dense, self.fc1, self.fc2 = ((x.weight, x.bias) for x in linears)
        # transformers spells Phi's GELU out in seven passes over memory; torch has the same formula in one
        self.is_tanh_gelu = isinstance(mlp.activation_fn, NewGELUActivation)
        self.activation = partial(F.gelu, approximate="tanh") if self.is_tanh_gelu else mlp.activation_fn
        self.gelu_linear = torch.tensor(GELU_LINEAR)

    def make_room(self, num_rows: int, room: int) -> None:
        """For keys and values of so many rows and positions; what one row holds already is where all of them begin."""
        before, self.shape = (self.keys, self.values), (num_rows, room, *self.heads)
        self.keys = self.values = None
        if before[0] is not None:
            self.keys, self.values = (old.new_empty(self.shape) for old in before)
            self.keys[:, : before[0].shape[1]], self.values[:, : before[0].shape[1]] = before

    def keep(
        self, key: torch.Tensor, value: torch.Tensor, new: slice | torch.Tensor | tuple
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (rows, n, heads, d) of the new positions; returns all there is room for, (R, heads, room, d).

        Args:
            new: their slice; then only what stands before its end is returned. Or their indices (n,) as a tensor, or
                indices (R, 1) of the rows and (R, n) of the positions.
        """
        if self.keys is None:
            self.keys, self.values = key.new_empty(self.shape), value.new_empty(self.shape)
        groups = self.shape[0] // len(key)
        key, value = _repeat(key, groups), _repeat(value, groups)
        if isinstance(new, torch.Tensor):
            self.keys.index_copy_(1, new, key)
            self.values.index_copy_(1, new, value)
        elif isinstance(new, tuple):
            self.keys[new], self.values[new] = key, value
        else:
            for kept, states in ((self.keys, key), (self.values, value)):
                kept.narrow(1, new.start, new.stop - new.start).copy_(states)
            return tuple(kept.narrow(1, 0, new.stop).transpose(1, 2) for kept in (self.keys, self.values))
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def run(self, hidden: torch.Tensor, place: "Place", needed: torch.Tensor | None = None) -> torch.Tensor:
        """(R or B, n, H), overwritten -> (R, n or U, H); attention and MLP both start from the same normed input."""
        num_rows, length, size = hidden.shape
        wanted, queries = None, place
        if needed is not None:
            needed = needed.repeat(num_rows // len(needed), 1)  # (rows, U)
            wanted = (needed + length * torch.arange(num_rows, device=needed.device)[:, None]).flatten()
            queries = place.only(needed)
        return self.attend(self.project(hidden.reshape(-1, size), wanted), num_rows, place, queries)

    def project(self, hidden: torch.Tensor, wanted: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """What each position computes by itself.

        Args:
            hidden: (m, H), overwritten.
            wanted: (u,) int64, positions whose query and sum are wanted; default: all.

        Returns:
            query (u, heads, d), key and value (m, heads, d), none of them rotated; (u, H) the sum of input, MLP and
            biases. The value and the sum stand in memory that the next call uses again.
        """
        normed = F.layer_norm(hidden, *self.norm)
        key = F.layer_norm(self._linear("head", normed, self.key), *self.key_norm)
        value = self._linear("value", normed, self.value)
        if wanted is not None:
            normed, hidden = normed[wanted], hidden[wanted]
        query = F.layer_norm(self._linear("head", normed, self.query), *self.query_norm)
        return query, key, value, self._add_mlp(hidden, normed)

    def attend(
        self, projected: tuple[torch.Tensor, ...], num_rows: int, place: "Place", queries: "Place"
    ) -> torch.Tensor:
        """What `project` gave for num_rows (R or B) rows -> (R, n or U, H)."""
        query, key, value, own = (x.view(num_rows, -1, *x.shape[1:]) for x in projected)
        keys, values = self.keep(rotate(key, *place.rotation(num_rows)), value, place.new)
        groups = self.shape[0] // num_rows
        query, own = _repeat(rotate(query, *queries.rotation(num_rows)), groups), _repeat(own, groups)
        keys, values = keys[:, :, : place.length], values[:, :, : place.length]
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=queries.bias)
        return self._add_product(own, mixed.transpose(1, 2).flatten(2), self.dense[0])

    def _linear(self, name: str, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """(m, H) -> (m, heads, d)"""
        return self.buffers.linear(name, x, *linear).view(-1, *self.heads)

    def _add_product(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """total + x @ weight.T; written over `total` if buffers are in use."""
        if not self.buffers.in_use:
            return total + F.linear(x, weight)
        total.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t())
        return total

    def _add_mlp(self, hidden: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """(u, H) hidden states, MLP and the biases of MLP and attention added up."""
        bias, back = self.dense[1] + self.fc2[1], self.fc2[0]
        if not self.buffers.in_use:
            return self._add_product(hidden + bias, self.activation(F.linear(normed, *self.fc1)), back)
        total = hidden.add_(bias)
        width = max(NARROWEST, CACHED_FLOATS // max(1, len(normed)) // 256 * 256)
        slices = self.fc1[0].split(width), self.fc1[1].split(width), back.split(width, dim=1)
        for weight, bias, back in zip(*slices, strict=True):
            self._add_product(total, self._activate(self.buffers.linear("mlp", normed, weight, bias)), back)
        return total

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        """The activation, in place if it is Phi's: x/2 (1 + tanh z) is x sigmoid(2 z), which takes half the time."""
        if not self.is_tanh_gelu:
            return self.activation(x)
        gate = torch.addcmul(self.gelu_linear, x, x, value=GELU_CUBIC, out=self.buffers.take("gate", x.shape, x))
        return x.mul_(gate.mul_(x).sigmoid_())


class TokenMemo:
    """What the first layer computes from a token alone, kept by id: a drawing holds few new ones in each step."""

    def __init__(self, layer: PlainLayer, embed_tokens: nn.Embedding):
        self.layer, self.embed_tokens = layer, embed_tokens
        self.place = torch.full((embed_tokens.num_embeddings,), -1, device=embed_tokens.weight.device)
        self.parts: tuple[torch.Tensor, ...] | None = None  # as `PlainLayer.project` gives them, one row per known id

    def project(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `PlainLayer.project` for the tokens of ids (B, n), B * n positions."""
        ids = input_ids.flatten()
        new_ids = ids[self.place[ids] < 0].unique()
        if len(new_ids):
            parts = [part.clone() for part in self.layer.project(self.embed_tokens(new_ids))]
            known = 0 if self.parts is None else len(self.parts[0])
            self.place[new_ids] = torch.arange(known, known + len(new_ids), device=ids.device)
            self.parts = parts if not known else [torch.cat(both) for both in zip(self.parts, parts, strict=True)]
        return tuple(part[self.place[ids]] for part in self.parts)


def norm_of(norm: nn.LayerNorm) -> tuple:
    """The arguments of `F.layer_norm` after the first."""
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


def pick(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(rows, n, size) at the positions (rows, U)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def _repeat(x: torch.Tensor, groups: int) -> torch.Tensor:
    """All rows once more for each group."""
    return x.repeat(groups, *[1] * (x.dim() - 1)) if groups > 1 else x
