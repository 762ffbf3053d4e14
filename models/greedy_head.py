"""The likeliest token of a row, found by reading a quarter of the vocabulary head (SPEC §8).

One new token costs one pass over the head's weights, more than a small transformer itself. `GreedyHead` goes over a
copy in 8 bits first, bounds what rounding can have changed, and computes in fp32 only the tokens that can still win:
the answer is the argmax of the whole head.
"""

from weakref import WeakKeyDictionary

import torch
from torch import nn

from models.thin import product

# V tokens, H hidden size, B rows, K candidates
SMALLEST = 2**22  # weights; below, one plain product is as fast
COLUMNS = 32  # torch's 8-bit kernels read up to so many at once, and past the end of rows that are no multiple
MOST_ROWS = 4  # beyond, a plain product reads the weights for many rows at once
BF16_ERROR = 2.0**-8  # largest relative rounding error
SLACK = 1.01  # for the rounding of the fp32 sums

_copies: "WeakKeyDictionary[nn.Linear, GreedyHead]" = WeakKeyDictionary()


class GreedyHead:
    """An 8-bit copy of a head (V, H) on the CPU, and how far it is from the original."""

    def __init__(self, head: nn.Linear):
        weight, self.bias = head.weight.detach(), _bias(head)
        self.weight = weight
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
        self.seen = product(self.probe, weight)

    def is_copy_of(self, head: nn.Linear) -> bool:
        """Whether the weights still are what was copied: all products with one random row are the same."""
        return torch.equal(product(self.probe, head.weight), self.seen) and torch.equal(_bias(head), self.bias)

    def argmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, H) fp32 -> (B,) int64: ``(hidden @ weight.T + bias).argmax(1)``."""
        rough_hidden = hidden.bfloat16()
        rough = torch._weight_int8pack_mm(rough_hidden, self.rounded, self.scale).float()  # (B, V)
        # |x·w − x̃·w̃| <= |x − x̃||w| + |x̃||w − w̃|, and the result is rounded to bf16
        bound = (hidden - rough_hidden).norm(dim=1) * self.norm + rough_hidden.float().norm(dim=1) * self.error
        bound = SLACK * (bound + BF16_ERROR * rough.abs().amax(1))
        rough += self.bias
        can_win = rough >= (rough.amax(1) - 2 * bound)[:, None]
        candidates = can_win.any(0).nonzero()[:, 0]  # (K,), ascending, so equal logits are resolved as by argmax
        logits = product(hidden, self.weight[candidates], self.bias[candidates])
        return candidates[logits.argmax(-1)]


def _bias(head: nn.Linear) -> torch.Tensor:
    return torch.zeros(head.out_features) if head.bias is None else head.bias.detach()


def is_plain_linear(head: nn.Module) -> bool:
    """Whether weight and bias alone say what the module computes."""
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


def greedy_head(head: nn.Linear, num_rows: int) -> GreedyHead | None:
    """The head's `GreedyHead`, made at the first call and again when the weights have changed; None where a plain
    product is better (small heads, many rows, other devices, precisions and widths)."""
    weight = head.weight
    is_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not is_plain_linear(head) or not is_cpu or num_rows > MOST_ROWS:
        return None
    if weight.numel() < SMALLEST or weight.shape[1] % COLUMNS:
        return None
    if head not in _copies or not _copies[head].is_copy_of(head):
        _copies[head] = GreedyHead(head)
    return _copies[head]
