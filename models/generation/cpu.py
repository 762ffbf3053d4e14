"""Optional float32 speed-ups for CPUs, for any model: `enable(model)` installs them, and nothing else knows of them.

- Few rows through a linear layer as W xᵀ, which BLAS reads up to twice as fast as x Wᵀ (`SkinnyLinear`).
- The likeliest token from an 8-bit copy of the vocabulary head, then exactly among those that can win (`GreedyHead`).
- `torch.multinomial` at some rows: the same random numbers, but logarithms for those rows only (`multinomial_at`).

None of it changes a token. What a piece does not serve runs as it is: other devices and dtypes, gradients, autocast,
quantised and sharded weights.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models.generation import sampling
from models.generation.runner import is_plain_linear
from models.generation.text import greedy_ids

# B rows of a batch, n positions, M = B n, V tokens, H hidden size, K candidates

# Numbers of rows for which W xᵀ is faster: up to 32, on Intel's processors only from 8 on (docs/performance.md).
CPUINFO = Path("/proc/cpuinfo")
FEW_ROWS = range(1 if CPUINFO.is_file() and "AuthenticAMD" in CPUINFO.read_text() else 8, 33)
BLOCKS = 8  # of the weights that a single row is multiplied with at once; in one piece the product runs on one core


def enable(model: nn.Module) -> None:
    """Installs all of them in a `Showo` on a CPU; parameters, their names, hooks and adapters stay."""
    for module in model.showo.modules():
        if type(module) is nn.Linear:
            module.__class__ = SkinnyLinear
    model.greedy_chooser = GreedyHead(model).chooser
    model.multinomial_at = multinomial_at


def is_plain(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a product of these is one of ordinary float32 tensors on a CPU, without a graph."""
    plain = type(weight) is nn.Parameter and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class SkinnyLinear(nn.Linear):
    """`nn.Linear` that multiplies a few rows as W xᵀ."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[:-1].numel() in FEW_ROWS and is_plain(self.weight, x):
            return skinny_product(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)


def skinny_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of a few rows (M, in) in float32, as the product of the weights and the transposed rows."""
    num_rows = len(rows)
    if num_rows == 1 and len(weight) % BLOCKS == 0:
        blocks, column = weight.unflatten(0, (BLOCKS, -1)), rows.t().expand(BLOCKS, -1, 1)
        product = torch.bmm(blocks, column) if bias is None else torch.baddbmm(bias.view(BLOCKS, -1, 1), blocks, column)
        return product.view(1, -1)
    # a single row is given twice: BLAS's kernel for one is the slowest
    columns = (torch.cat([rows, rows]) if num_rows == 1 else rows.contiguous()).t()
    product = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.t()[:num_rows].contiguous()


class GreedyHead:
    """The argmax of a vocabulary head by reading a quarter of its weights.

    Choosing a token costs one pass over the head, more than a small decoder itself. So an 8-bit copy is read first,
    what rounding can have changed is bounded, and the tokens that can still win are computed in float32: the result is
    the argmax of the whole head. The copy is made at the first use, and again once the weights have changed.
    """

    MIN_WEIGHTS = 2**22  # weights; below, one plain product is as fast
    COLUMN_MULTIPLE = 32  # of the width; torch's 8-bit kernels read past the end of other rows
    MAX_ROWS = 4  # beyond, a plain product reads the weights for many rows at once
    MIN_TOKENS = 16  # answers this long amortise the check that the copy is current
    BF16_ERROR = 2.0**-8  # largest relative rounding error
    SLACK = 1.01  # for the rounding of the float32 sums

    def __init__(self, model: nn.Module):
        self.model, self.rounded = model, None

    @property
    def head(self) -> nn.Module:
        return self.model.showo.get_output_embeddings()

    def chooser(self, count: int) -> Callable[[torch.Tensor], Iterator[torch.Tensor]]:
        """As `TextGeneration.greedy_chooser`; looks at the weights once for all `count` tokens of an answer."""
        if count < self.MIN_TOKENS or not self.serves_head():
            return partial(greedy_ids, self.head)
        if self.rounded is None or not self.is_current():
            self.quantize()
        return self.greedy_ids

    def greedy_ids(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """As `text.greedy_ids`, in small groups of positions: after a rejected draft token none is needed."""
        if not self.serves(hidden):
            yield from greedy_ids(self.head, hidden)
            return
        for part in hidden.split(self.MAX_ROWS, dim=1):
            yield from self.argmax(part.flatten(0, 1)).view(part.shape[:2]).unbind(1)

    def serves(self, hidden: torch.Tensor) -> bool:
        """Whether these are few rows of a kind that the head's copy serves."""
        return self.serves_head() and len(hidden) <= self.MAX_ROWS and is_plain(self.head.weight, hidden)

    def serves_head(self) -> bool:
        """Whether the head is a plain product, large enough, and of a width that torch's 8-bit kernel can read."""
        if not is_plain_linear(self.head):
            return False
        weight = self.head.weight
        readable = weight.dtype == torch.float32 and weight.shape[1] % self.COLUMN_MULTIPLE == 0
        return readable and weight.device.type == "cpu" and weight.numel() >= self.MIN_WEIGHTS

    def quantize(self) -> None:
        """Rounds the head's rows to 8 bits and measures how far that moves them."""
        weight = self.head.weight.detach()
        self.bias = weight.new_zeros(len(weight)) if self.head.bias is None else self.head.bias.detach().clone()
        self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()  # (V,)
        self.rounded = torch.empty(weight.shape, dtype=torch.int8)
        self.norm = self.error = 0.0  # of the longest row; of the row that rounding moved furthest
        for rows in range(0, len(weight), 1024):  # a block stays in the processor's cache
            block, scale = weight[rows : rows + 1024], self.scale[rows : rows + 1024, None].float()
            rounded = (block / scale).round_().clamp_(-127, 127)
            self.rounded[rows : rows + 1024] = rounded
            self.norm = max(self.norm, float(block.norm(dim=1).max()))
            self.error = max(self.error, float((block - rounded.mul_(scale)).norm(dim=1).max()))
        self.probe = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
        self.probe_product = skinny_product(self.probe, weight)

    def is_current(self) -> bool:
        """Whether the weights still are what was copied: all products with one random row are the same."""
        head = self.head
        same_bias = head.bias is None or torch.equal(head.bias, self.bias)
        return same_bias and torch.equal(skinny_product(self.probe, head.weight), self.probe_product)

    def argmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """(M, H) float32 -> (M,) int64: ``(hidden @ weight.T + bias).argmax(1)``."""
        rough_hidden = hidden.bfloat16()
        # torch has no public product of bf16 rows and 8-bit weights
        rough = torch._weight_int8pack_mm(rough_hidden, self.rounded, self.scale).float()  # (M, V)
        # |x·w − x̃·w̃| <= |x − x̃||w| + |x̃||w − w̃|, and the result is rounded to bf16
        bound = (hidden - rough_hidden).norm(dim=1) * self.norm + rough_hidden.float().norm(dim=1) * self.error
        bound = self.SLACK * (bound + self.BF16_ERROR * rough.abs().amax(1))
        rough += self.bias
        can_win = rough >= (rough.amax(1) - 2 * bound)[:, None]
        candidates = can_win.any(0).nonzero()[:, 0]  # (K,), ascending, so equal logits are resolved as by argmax
        logits = skinny_product(hidden, self.head.weight[candidates], self.bias[candidates])
        return candidates[logits.argmax(-1)]


def multinomial_at(
    probabilities: torch.Tensor, positions: torch.Tensor, num_positions: int, generator: torch.Generator | None
) -> torch.Tensor:
    """As `sampling.multinomial_at`.

    `torch.multinomial` is the argmax of p / q with exponential q. Here all rows take their random numbers, but only the
    wanted ones become exponentials, with vectorised logarithms instead of torch's one at a time.
    """
    if (
        probabilities.device.type != "cpu"
        or probabilities.dtype != torch.float32
        or not exponential_is_log_of_uniform()
    ):
        return sampling.multinomial_at(probabilities, positions, num_positions, generator)
    batch_size, _, num_codes = probabilities.shape
    first_rows = num_positions * torch.arange(batch_size)[:, None]
    wanted, num_rows = (first_rows + positions).flatten(), batch_size * num_positions  # rows of the whole, ascending
    probabilities, chunk = probabilities.flatten(0, 1), 32  # rows that stay in the processor's cache
    uniform = probabilities.new_empty(chunk, num_codes, dtype=torch.float64)
    drawn = torch.empty_like(wanted)
    firsts = range(0, num_rows, chunk)
    bounds = torch.searchsorted(wanted, torch.tensor([*firsts, num_rows])).tolist()
    for first, start, stop in zip(firsts, bounds, bounds[1:], strict=False):
        numbers = uniform[: num_rows - first].uniform_(generator=generator)
        if stop - start < len(numbers):
            numbers = numbers[wanted[start:stop] - first]
        minus_exponential = numbers.neg_().add_(1).log_().float()
        torch.argmin(probabilities[start:stop] / minus_exponential, -1, out=drawn[start:stop])
    return drawn.view(positions.shape)


@cache
def exponential_is_log_of_uniform() -> bool:
    """Whether this build of torch makes its exponential numbers as −log(1 − u), u uniform in float64."""
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    uniform = torch.empty(4096, dtype=torch.float64).uniform_(generator=ours)
    same = torch.equal(-(1 - uniform).log().float(), torch.empty(4096).exponential_(generator=theirs))
    return same and torch.equal(ours.get_state(), theirs.get_state())
