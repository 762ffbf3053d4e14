"""Cross-entropy of the vocabulary head at chosen positions, without ever holding their logits (SPEC §5).

torch has `linear_cross_entropy` from 2.13 on; it knows no label smoothing and does not tell what was predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from models.devices import send
from models.vocabulary import IGNORE_ID

# B rows, L positions, S supervised positions, H hidden size, V vocabulary
TASKS = ("t2i", "lm", "mmu")  # the order of the rows
CHUNK = 2**24  # logits at a time: 64 MiB in fp32, whatever the vocabulary and the batch


@dataclass(frozen=True)
class Supervised:
    """The positions whose hidden state predicts a label, task by task.

    Args:
        index: (S,) int64, row·L + position.
        labels: (S,) int64, what is predicted there.
        counts: positions of t2i, lm and mmu; they add up to S.
    """

    index: torch.Tensor
    labels: torch.Tensor
    counts: tuple[int, int, int]

    @classmethod
    def of(cls, labels: torch.Tensor, rows: tuple[int, int, int], max_seq_length: int) -> "Supervised":
        """What the labels (B, L) of `rows` of t2i, lm and mmu supervise; on a GPU this waits for them.

        Raises:
            ValueError: the rows do not add up to B.
        """
        if sum(rows) != len(labels):
            raise ValueError(f"batch_size_t2i, _lm, _mmu are {rows}, but there are {len(labels)} rows")
        first = max_seq_length + 1
        # Faithful: t2i is unshifted, so <soi> and <eoi> are predicted from themselves (pinned by tests/parity).
        t2i, lm, mmu = labels.split(rows)
        wanted = torch.full_like(labels, IGNORE_ID)
        wanted[: len(t2i), first:] = t2i[:, first:]
        wanted[len(t2i) :, :-1] = torch.cat([lm, mmu])[:, 1:]
        counts = tuple(int((part != IGNORE_ID).sum()) for part in wanted.split(rows))
        index = (wanted.flatten() != IGNORE_ID).nonzero()[:, 0]
        return cls(index, wanted.flatten()[index], counts)

    def factors(self, coefficients: Sequence[float]) -> torch.Tensor:
        """(S,) float32: with them, the sum over all positions is that of the tasks' means times their coefficients."""
        shares = zip(coefficients, self.counts, strict=True)
        parts = [torch.full((n,), c / max(n, 1), device=self.index.device) for c, n in shares]
        return torch.cat(parts)

    def to(self, device) -> "Supervised":
        return replace(self, index=send(self.index, device), labels=send(self.labels, device))


class _HeadLoss(torch.autograd.Function):
    """Σ factor·cross-entropy. Its gradients are made along the way, chunk by chunk, since it is a sum: backward only
    multiplies them. So no logits are kept, and none are computed twice."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, factors, label_smoothing, predict, dtype):
        wanted_grads = ctx.needs_input_grad[:3]
        grads = [
            torch.zeros_like(t, dtype=torch.float32) if wanted else None
            for t, wanted in zip((hidden, weight, bias), wanted_grads, strict=True)
        ]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        predicted = torch.empty_like(labels) if predict else None
        inputs, head, offset = hidden.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None
        for part in _chunks(len(hidden), len(weight)):
            logits = F.linear(inputs[part], head, offset).float()  # (C, V)
            if predict:
                predicted[part] = logits.argmax(-1)
            losses[part] = _softmax_(logits, labels[part], label_smoothing)
            if any(wanted_grads):
                _cross_entropy_grad_(logits, labels[part], factors[part], label_smoothing)
                _add_grads(grads, logits.to(dtype), inputs[part], head, part)
        ctx.grads = [g if g is None else g.to(t.dtype) for g, t in zip(grads, (hidden, weight, bias), strict=True)]
        ctx.mark_non_differentiable(losses, *([predicted] if predict else []))
        return torch.dot(losses, factors), losses, predicted

    @staticmethod
    def backward(ctx, grad_output, *_):
        if ctx.grads is None:
            raise RuntimeError("the gradients of the head's loss can be asked for once only")
        grads, ctx.grads = ctx.grads, None
        return *(grad if grad is None else grad.mul_(grad_output) for grad in grads), *[None] * 5


def _chunks(num_positions: int, vocabulary: int):
    size = max(1, CHUNK // vocabulary)
    return [slice(start, start + size) for start in range(0, num_positions, size)]


def _softmax_(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy (C,) of logits (C, V), which become probabilities."""
    logits -= logits.amax(-1, keepdim=True)
    picked = logits.gather(1, labels[:, None])[:, 0]
    if label_smoothing:
        picked = (1 - label_smoothing) * picked + label_smoothing * logits.mean(-1)
    total = logits.exp_().sum(-1)
    logits /= total[:, None]
    return total.log() - picked


def _cross_entropy_grad_(probabilities, labels, factors, label_smoothing: float) -> None:
    """Makes factor·(probability − target) of probabilities (C, V)."""
    if label_smoothing:
        probabilities -= label_smoothing / probabilities.shape[1]
    probabilities *= factors[:, None]
    probabilities.scatter_add_(1, labels[:, None], (label_smoothing - 1) * factors[:, None])


def _add_grads(grads, grad_logits, inputs, head, part: slice) -> None:
    """Of one chunk: to its own rows of the first, to all of the others."""
    of_hidden, of_weight, of_bias = grads
    if of_hidden is not None:
        of_hidden[part] = grad_logits @ head
    if of_weight is not None and of_weight.dtype == grad_logits.dtype:
        of_weight.addmm_(grad_logits.T, inputs)
    elif of_weight is not None:
        of_weight += grad_logits.T @ inputs
    if of_bias is not None:
        of_bias += grad_logits.sum(0, dtype=torch.float32)


@torch.compiler.disable  # a loop over a number of chunks that changes from step to step
def head_loss(
    head: nn.Linear,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    factors: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    predict: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Σ factor·cross-entropy over the whole vocabulary, each position's cross-entropy and its likeliest token.

    Under autocast the products run in its precision, softmax and sums in fp32.

    Args:
        hidden: (S, H). labels: (S,) int64. factors: (S,) float32.
        predict: whether the likeliest tokens are wanted.

    Returns:
        A float32 scalar, the only one with a graph, for one backward pass; (S,) float32; (S,) int64 or None.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    with torch.autocast(kind, enabled=False):
        return _HeadLoss.apply(hidden, head.weight, head.bias, labels, factors, label_smoothing, predict, dtype)
