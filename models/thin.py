"""A few rows through Phi's layers on a CPU: decode steps and the checking of guessed tokens (SPEC §8).

With few rows the time goes into reading the weights and into starting many small operations. So a layer's weights are
read by the product that reads them fastest, and in small models they are joined to two matrices per layer: what takes
the normed input (q, k, v, first half of the MLP), and what is added to the residual (attention output, second half).
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

# R rows, n positions of a piece, M = R n, H hidden size, d head size

FEW_ROWS = 32  # M up to which `product` is faster than `F.linear`
BLOCKS = 8  # of the weights that one row is multiplied with at once: their product in one piece runs on a single core
JOINED_SIZE = 2**28  # weights in all layers; beyond, a copy costs much memory and saves little time

Pair = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias
_copies: "WeakKeyDictionary[nn.Module, ThinLayers]" = WeakKeyDictionary()


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of (M, K), for a few rows in fp32 on a CPU as the product of the weights and the transposed rows.

    BLAS reads the weights at up to twice the speed that way. A single row is multiplied with blocks of the weights, or
    given twice where they do not divide: its kernel is the slowest.
    """
    num_rows = len(rows)
    if not is_thin(rows):
        return F.linear(rows, weight, bias)
    if _divides(rows, weight):
        return _in_blocks(weight, bias)(rows)
    columns = (torch.cat([rows, rows]) if num_rows == 1 else rows.contiguous()).t()
    thin = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return thin.t()[:num_rows].contiguous()


def product_into(out: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """`product` as a function of the rows alone that writes (M, N) `out`; what does not depend on them is done here."""
    if not is_thin(out):
        return lambda rows: torch.addmm(bias, rows, weight.t(), out=out)
    if _divides(out, weight):
        return _in_blocks(weight, bias, out)
    return lambda rows: out.copy_(product(rows, weight, bias))


def _divides(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    return len(rows) == 1 and len(weight) % BLOCKS == 0


def _in_blocks(
    weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`product` of a single row (1, K), which gives (1, N)."""
    blocks, out = weight.unflatten(0, (BLOCKS, -1)), None if out is None else out.view(BLOCKS, -1, 1)
    if bias is None:
        return lambda row: torch.bmm(blocks, row.t().expand(BLOCKS, -1, 1), out=out).view(1, -1)
    bias = bias.view(BLOCKS, -1, 1)
    return lambda row: torch.baddbmm(bias, blocks, row.t().expand(BLOCKS, -1, 1), out=out).view(1, -1)


def is_thin(x: torch.Tensor) -> bool:
    """Whether (…, size) are so few rows, of a kind that `product` serves."""
    few = 0 < x.shape[:-1].numel() <= FEW_ROWS
    return few and x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class ThinLayers:
    """The layers' weights as few rows run through them.

    Args:
        layers: the `PlainLayer`s of a model (`models/plain_layer.py`).
    """

    def __init__(self, layers: list):
        self.inner = [(x.query, x.key, x.value, x.fc1) for x in layers]
        self.outer = [(x.dense, x.fc2) for x in layers]
        self.norms = [_joined_norms(x) for x in layers]
        self.seen = None
        if sum(weight.numel() for weight, _ in self._pairs()) <= JOINED_SIZE:
            self.seen = self._products(layers)
            self.inner = [(_joined(pairs),) for pairs in self.inner]
            self.outer = [((torch.cat([a, b], dim=1), c + d),) for (a, c), (b, d) in self.outer]

    @classmethod
    def of(cls, phi: nn.Module, layers: list) -> "ThinLayers":
        """Those of a model; joined weights are kept from call to call, and made again when the model's have changed."""
        kept = _copies.get(phi)
        if kept is None or not kept.is_copy_of(layers):
            kept = cls(layers)
            if kept.seen is not None:
                _copies[phi] = kept
        return kept

    def is_copy_of(self, layers: list) -> bool:
        """Whether the weights still are what was copied: their products with one random row are the same."""
        return all(map(torch.equal, self.seen, self._products(layers)))

    @staticmethod
    def _products(layers: list) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        found = []
        for x in layers:
            for weight, bias in (x.query, x.key, x.value, x.fc1, x.dense, x.fc2):
                probe = torch.randn(1, weight.shape[1], generator=generator).to(weight)  # also half precision, on a GPU
                found.append(product(probe, weight, bias))
            found += [*x.query_norm[1:3], *x.key_norm[1:3]]
        return [tensor.clone() for tensor in found]

    def _pairs(self) -> list[Pair]:
        return [pair for pairs in (*self.inner, *self.outer) for pair in pairs]


class Desk:
    """A few rows of one shape on their way through all layers.

    It holds a layer's intermediate results, all views of them, and the products that write them: made anew in every
    layer, these small things are a sixth of a step's time.

    Args:
        thin: the weights of `layers`, the `PlainLayer`s that keep keys and values; for one caller alone.
        hidden: (R, n, H), for its shape.
        rotated: r, how much of a head is rotated.
    """

    def __init__(self, thin: ThinLayers, layers: list, hidden: torch.Tensor, rotated: int):
        num_rows, length, size = hidden.shape
        heads, self.layers, self.norms = layers[0].heads, layers, thin.norms
        mixed = hidden.new_empty(num_rows * length, sum(len(weight) for weight, _ in thin.inner[0]))  # q, k, v, MLP
        joined = hidden.new_empty(num_rows * length, sum(weight.shape[1] for weight, _ in thin.outer[0]))
        self.sum = hidden.new_empty(num_rows * length, size)
        into = mixed.split([len(weight) for weight, _ in thin.inner[0]], dim=1)
        self.inner = [[product_into(x, *pair) for x, pair in zip(into, pairs, strict=True)] for pairs in thin.inner]
        self.outer = [[product_into(self.sum, *pair) for pair in pairs] for pairs in thin.outer]
        self.parts = joined.split([weight.shape[1] for weight, _ in thin.outer[0]], dim=1)
        in_heads = mixed[:, : 3 * size].view(num_rows, length, 3, *heads)
        self.both = in_heads[:, :, :2]
        self.halves = self.both[..., :rotated].chunk(2, dim=-1)
        self.query, self.key, self.value = in_heads[:, :, 0].transpose(1, 2), in_heads[:, :, 1], in_heads[:, :, 2]
        self.attended = joined[:, :size].view(num_rows, length, *heads).transpose(1, 2)
        self.activated_of, self.activated = mixed[:, 3 * size :], joined[:, size:]

    def run(self, hidden: torch.Tensor, new: slice | torch.Tensor, rotation, bias: torch.Tensor | None) -> torch.Tensor:
        """(R, n, H) -> (R, n, H) without gradients; writes the keys and values of the positions `new`.

        Args:
            new: see `PlainLayer.keep`.
            rotation: cos and sin (1 or R, n, 1, r / 2).
            bias: (R, 1, n or 1, length) or None.
        """
        cos, sin = (x[:, :, None] for x in rotation)  # for queries and keys together
        total = hidden.flatten(0, 1).clone()  # (M, H)
        for layer, (scale, shift), inner, outer in zip(self.layers, self.norms, self.inner, self.outer, strict=True):
            normed = F.layer_norm(total, *layer.norm)
            for multiply in inner:
                multiply(normed)
            both = F.layer_norm(self.both, self.both.shape[-1:], eps=layer.query_norm[3])
            torch.addcmul(shift, both, scale, out=self.both)
            rotate_halves(*self.halves, cos, sin)
            keys, values = layer.keep(self.key, self.value, new)
            self.attended.copy_(F.scaled_dot_product_attention(self.query, keys, values, attn_mask=bias))
            self.activated.copy_(layer.activation(self.activated_of))
            for multiply, part in zip(outer, self.parts, strict=True):
                multiply(part)
                total += self.sum
        return total.view(hidden.shape)


def _joined(pairs: tuple[Pair, ...]) -> Pair:
    return torch.cat([weight for weight, _ in pairs]), torch.cat([bias for _, bias in pairs])


def _joined_norms(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (2, 1, d) of the norms of queries and keys."""
    pairs = zip(layer.query_norm[1:3], layer.key_norm[1:3], strict=True)
    return tuple(torch.stack(pair)[:, None] for pair in pairs)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, in place on the first two halves of a head (…, d); the rest is left alone (SPEC §4)."""
    half = cos.shape[-1]
    rotate_halves(x[..., :half], x[..., half : 2 * half], cos, sin)
    return x


def rotate_halves(first: torch.Tensor, second: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`rotate` of the two halves (…, r / 2) themselves."""
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(crossed)
