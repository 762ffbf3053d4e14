"""The training objective (spec §5): each flow's mean cross-entropy over the whole vocabulary at supervised positions.

`Objective` is made for each batch on the host and handed to `Showo.forward` as its `labels`. It runs inside `forward`,
since DDP, DeepSpeed and FSDP2 prepare parameters and gradients around one call of the wrapped module.

The logits of a batch are never held at once: at the full vocabulary they would take several times the memory of
everything else. `linear_cross_entropy` goes through the vocabulary head in chunks of positions instead. torch has a
function of that name from 2.13 on; it knows no label smoothing and does not give the predicted tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn

from models.devices import send
from models.modeling_showo import Showo, ShowoOutput
from models.omni_attention import OmniMask
from models.vocabulary import IGNORE_ID
from training.packing import Packing

# B rows, L positions, S supervised positions, C positions of one chunk, H hidden size, V vocabulary
MAX_LOGITS = 2**24  # of one chunk: 64 MiB in fp32, whatever the vocabulary and the batch


def in_place(labels: torch.Tensor, first: int) -> torch.Tensor:
    """(B, L) targets of rows whose image tokens are predicted at their own position, from position `first` on.

    Faithful: t2i is unshifted, so <soi> and <eoi> are predicted from themselves (pinned by tests/parity).
    """
    targets = labels.clone()
    targets[:, :first] = IGNORE_ID
    return targets


def next_token(labels: torch.Tensor) -> torch.Tensor:
    """(B, L) targets of rows of text: each position predicts the label of the next one."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_ID)


def document_targets(labels: torch.Tensor, image_offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) targets of documents: of image codes, in place, and of texts and decisions, shifted.

    Args:
        image_offset: id of the first image code.
    """
    is_code = labels >= image_offset
    text = next_token(labels.masked_fill(is_code, IGNORE_ID))
    return labels.masked_fill(~is_code, IGNORE_ID), text


@dataclass(frozen=True)
class Objective:
    """What one batch is trained on: host-side metadata, made before the copy to the device, and the losses from it.

    Everything whose size depends on the data (supervised positions, packed rows) is known here beforehand, so that the
    step never waits for a GPU to tell it.

    Args:
        index: (S,) int64, row·L + position, of the hidden states that predict a target, in the order of the rows.
        targets: (S,) int64, the token to predict there.
        counts: loss → its positions, in the order of `index`; they add up to S. Each flow has a loss of its name, and
            documents have one for their texts, too.
        num_t2i: rows of t2i, the first ones of the batch.
        packing: how samples share rows; None: each has a row of its own.
        position_ids: (B, L) int64 for the rotary embedding; None: 0, 1, … in each row. Packed rows bring their own.
        coefficients: loss → its weight in one `loss`, the only output with a graph. Without them each loss has its own
            graph and its own copy of the head's gradient.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        statistics: whether `ShowoOutput.statistics` is wanted.
    """

    index: torch.Tensor
    targets: torch.Tensor
    counts: dict[str, int]
    num_t2i: int = 0
    packing: Packing | None = None
    position_ids: torch.Tensor | None = None
    coefficients: dict[str, float] | None = None
    label_smoothing: float = 0.0
    statistics: bool = False

    @classmethod
    def from_targets(cls, targets: dict[str, tuple[int, torch.Tensor]], **settings) -> "Objective":
        """The objective of a batch; targets on a GPU are waited for.

        Args:
            targets: loss → (its first row, (b, L) int64 of some rows: at the position that predicts it the target, −100
                (the ignore index) elsewhere).
            settings: the other fields.
        """
        indices, found = [], []
        for first, rows in targets.values():
            places = (rows.flatten() != IGNORE_ID).nonzero()[:, 0]
            indices.append(places + first * rows.shape[1])
            found.append(rows.flatten()[places])
        counts = dict(zip(targets, map(len, found), strict=True))
        return cls(torch.cat(indices), torch.cat(found), counts, **settings)

    @classmethod
    def from_labels(
        cls, labels: torch.Tensor, rows: tuple[int, int, int], max_seq_length: int, **settings
    ) -> "Objective":
        """The published objective of rows in the order t2i, lm, mmu.

        Args:
            labels: (B, L) int64, −100 where nothing is supervised.
            rows: of t2i, lm and mmu.
            max_seq_length: M; t2i is supervised from position M + 1 (``<soi>``) on.
            settings: of `from_targets`.

        Raises:
            ValueError: the rows do not add up to B, or t2i rows end before that position.
        """
        if sum(rows) != len(labels):
            raise ValueError(f"batch_size_t2i, _lm, _mmu are {tuple(rows)}, but there are {len(labels)} rows")
        if rows[0] and not 0 <= max_seq_length < labels.shape[1] - 1:
            raise ValueError(f"max_seq_length is {max_seq_length}, but the rows have {labels.shape[1]} positions")
        t2i, lm, mmu = labels.split(rows)
        targets = {
            "t2i": (0, in_place(t2i, max_seq_length + 1)),
            "lm": (rows[0], next_token(lm)),
            "mmu": (rows[0] + rows[1], next_token(mmu)),
        }
        return cls.from_targets(targets, num_t2i=rows[0], **settings)

    def to(self, device) -> "Objective":
        packing = self.packing.to(device) if self.packing is not None else None
        names = [name for name in ("index", "targets", "position_ids") if getattr(self, name) is not None]
        return replace(self, packing=packing, **{name: send(getattr(self, name), device) for name in names})

    def __call__(
        self,
        model: Showo,
        input_ids: torch.Tensor,
        attention_mask: OmniMask | torch.Tensor,
        image_features: torch.Tensor | None = None,
    ) -> ShowoOutput:
        """The losses of a batch; called by `Showo.forward` with its own arguments, see there.

        The image features must have passed `check_image_features`, which on a GPU would have to wait for the ids.
        """
        embeds = model.embed(input_ids, image_features, check_features=False)  # (B, L, H)
        arguments = {"attention_mask": attention_mask, "position_ids": self.position_ids}
        if self.packing is not None:  # fewer, fuller rows; the others are not kept
            embeds = self.packing.pack(embeds)
            arguments = self.packing.decoder_arguments(model.showo.config._attn_implementation)
        hidden = model.hidden_states(inputs_embeds=embeds, **arguments)
        return self._losses(model, hidden, input_ids.shape[1])

    def predicting(self, hidden: torch.Tensor) -> torch.Tensor:
        """(S, H): those of the hidden states (of all rows, as they ran) that predict a target."""
        at = self.index if self.packing is None else self.packing.target_index[self.index]
        return hidden.flatten(0, 1)[at]

    @torch.compiler.disable  # sizes that change from step to step would compile it anew each time
    def _losses(self, model: Showo, hidden: torch.Tensor, row_length: int) -> ShowoOutput:
        """Losses and statistics; an absent flow contributes 0.

        Args:
            hidden: final hidden states of all rows, as they ran.
            row_length: L.
        """
        hidden = self.predicting(hidden)
        counts, coefficients = tuple(self.counts.values()), self.coefficients or dict.fromkeys(self.counts, 1.0)
        whole = hidden, self.targets, self.position_weights([coefficients[name] for name in self.counts])
        # One part for one weighted loss, else a part and a graph for each.
        parts = [whole] if self.coefficients else zip(*(tensor.split(counts) for tensor in whole), strict=True)
        head, settings = model.get_output_embeddings(), (self.label_smoothing, self.statistics)
        totals, losses, predicted = [], [], []
        for part in parts:
            if len(part[0]):
                total, *of_positions = linear_cross_entropy(head, *part, *settings)
                losses.append(of_positions[0])
                predicted.append(of_positions[1])
            else:  # a zero with a graph: processes of a distributed run must all have gradients to exchange
                total = (hidden * 0.0).sum()
            totals.append(total)
        losses = torch.cat(losses or [hidden.new_empty(0)])  # (S,)
        means = [part.mean() if len(part) else part.sum() for part in losses.split(counts)]
        return ShowoOutput(
            loss=totals[0] if self.coefficients else None,
            losses=dict(zip(self.counts, means if self.coefficients else totals, strict=True)),
            statistics=self._statistics(losses, predicted, row_length, model) if self.statistics else None,
        )

    def position_weights(self, coefficients: Sequence[float]) -> torch.Tensor:
        """(S,) float32: the weighted sum over all positions is the sum of each loss's mean times its coefficient."""
        shares = zip(coefficients, self.counts.values(), strict=True)
        return torch.cat([torch.full((n,), c / max(n, 1), device=self.index.device) for c, n in shares])

    def _statistics(self, losses, predicted, row_length: int, model: Showo) -> dict[str, torch.Tensor]:
        """Counts for the accuracy of each loss that has supervised positions, and the mean loss of each t2i row.

        ``correct_{loss}`` and ``supervised_{loss}``: positions whose likeliest token is the target, and all of them; of
        t2i only image codes count, since ``<soi>`` and ``<eoi>`` are given away. ``row_loss_t2i`` (B_t2i,).
        """
        found = {}
        if len(losses):
            correct, is_code = torch.cat(predicted) == self.targets, self.targets >= model.vocabulary.image_offset
            counts = tuple(self.counts.values())
            parts = zip(self.counts, *(part.split(counts) for part in (correct, is_code)), strict=True)
            for name, hits, codes in parts:
                if len(hits):
                    considered = codes if name == "t2i" else torch.ones_like(codes)
                    found[f"correct_{name}"], found[f"supervised_{name}"] = (hits & considered).sum(), considered.sum()
        if self.num_t2i:
            assert next(iter(self.counts)) == "t2i", "its positions are the first"
            of_t2i = slice(self.counts["t2i"])
            found["row_loss_t2i"] = _group_means(losses[of_t2i], self.index[of_t2i] // row_length, self.num_t2i)
        return found


def _group_means(values: torch.Tensor, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(num_groups,): mean of the values (S,) of each group, 0 where it has none."""
    sums = values.new_zeros(num_groups).index_add_(0, groups, values)
    return sums / values.new_zeros(num_groups).index_add_(0, groups, torch.ones_like(values)).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class LogProbObjective(Objective):
    """A loss that is any function of the log-probabilities of the targets: preference pairs, policy gradients.

    Args:
        function: log-probabilities (S,) float32, in the order of `index` → the output, of which `loss` has a graph
            where gradients are wanted.
        codes_only: targets are image codes, and probabilities are over these, as they are sampled.
    """

    function: Callable[[torch.Tensor], ShowoOutput]
    codes_only: bool = False

    @classmethod
    def of(cls, objective: Objective, function: Callable, codes_only: bool = False):
        """The same targets under another loss."""
        given = {field.name: getattr(objective, field.name) for field in fields(Objective)}
        return cls(**given, function=function, codes_only=codes_only)

    @torch.compiler.disable
    def _losses(self, model: Showo, hidden: torch.Tensor, row_length: int) -> ShowoOutput:
        """The function's output. Log-probabilities are computed twice: for their values, then for their gradients.

        The gradient of the loss is that of a cross-entropy whose weights are the loss's derivatives by the
        log-probabilities; so here, too, no logits are kept.
        """
        hidden, targets, rows = self.predicting(hidden), self.targets, slice(None)
        if self.codes_only:
            first, count = model.vocabulary.image_offset, model.vocabulary.codebook_size
            targets, rows = targets - first, slice(first, first + count)
        head, nothing = model.get_output_embeddings(), hidden.new_zeros(len(hidden), dtype=torch.float32)
        with torch.no_grad():
            log_probs = -linear_cross_entropy(head, hidden, targets, nothing, rows=rows)[1]
        if not torch.is_grad_enabled():
            return self.function(log_probs)
        log_probs.requires_grad_()
        out = self.function(log_probs)
        (slopes,) = torch.autograd.grad(out.loss, log_probs)
        total = linear_cross_entropy(head, hidden, targets, -slopes, rows=rows)[0]
        found = replace(out, loss=out.loss.detach() + total - total.detach())
        found.losses = {name: value.detach() for name, value in out.losses.items()}
        return found


@torch.no_grad()
def log_probs_of(model: Showo, objective: Objective, codes_only: bool = False, **inputs) -> torch.Tensor:
    """(S,) float32: what a model, such as a frozen reference, gives to the targets; `inputs` of its `forward`."""
    found = LogProbObjective.of(objective, lambda log_probs: ShowoOutput(statistics={"of": log_probs}), codes_only)
    return model(**inputs, labels=found).statistics["of"]


# ---- the vocabulary head and its cross-entropy in chunks ----


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ weight·cross-entropy of a linear layer's outputs.

    The sum is a scalar, so its gradient is known but for one factor: the forward pass makes it chunk by chunk, and the
    backward pass multiplies. Hence no logits are kept, and none are computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, label_smoothing, predict, dtype):
        needs_grad = ctx.needs_input_grad[:3]
        grads = [
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((hidden, weight, bias), needs_grad, strict=True)
        ]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        predicted = torch.empty_like(targets) if predict else None
        inputs, head, offset = hidden.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None
        for chunk in _chunks(len(hidden), len(weight)):
            logits = F.linear(inputs[chunk], head, offset).float()  # (C, V)
            if predict:
                predicted[chunk] = logits.argmax(-1)
            losses[chunk] = _softmax_(logits, targets[chunk], label_smoothing)
            if any(needs_grad):
                _cross_entropy_grad_(logits, targets[chunk], weights[chunk], label_smoothing)
                _add_grads(grads, logits.to(dtype), inputs[chunk], head, chunk)
        tensors = zip(grads, (hidden, weight, bias), strict=True)
        ctx.grads = [grad if grad is None else grad.to(tensor.dtype) for grad, tensor in tensors]
        ctx.mark_non_differentiable(losses, *([predicted] if predict else []))
        return torch.dot(losses, weights), losses, predicted

    @staticmethod
    def backward(ctx, grad_output, *_):
        if ctx.grads is None:
            raise RuntimeError("the gradients of the vocabulary head's loss can be asked for once only")
        grads, ctx.grads = ctx.grads, None
        return *(grad if grad is None else grad.mul_(grad_output) for grad in grads), *[None] * 5


def _chunks(num_positions: int, vocabulary: int) -> list[slice]:
    size = max(1, MAX_LOGITS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_positions, size)]


def _softmax_(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy (C,) of logits (C, V), which become probabilities in place."""
    logits -= logits.amax(-1, keepdim=True)
    picked = logits.gather(1, targets[:, None])[:, 0]
    if label_smoothing:
        picked = (1 - label_smoothing) * picked + label_smoothing * logits.mean(-1)
    total = logits.exp_().sum(-1)
    logits /= total[:, None]
    return total.log() - picked


def _cross_entropy_grad_(probabilities, targets, weights, label_smoothing: float) -> None:
    """Turns probabilities (C, V) in place into the gradient of the logits, weight·(probability − target)."""
    if label_smoothing:
        probabilities -= label_smoothing / probabilities.shape[1]
    probabilities *= weights[:, None]
    probabilities.scatter_add_(1, targets[:, None], (label_smoothing - 1) * weights[:, None])


def _add_grads(grads, grad_logits, inputs, head, chunk: slice) -> None:
    """Adds one chunk's share: to its own rows of the hidden states' gradient, to all of the weight's and the bias's."""
    hidden_grad, weight_grad, bias_grad = grads
    if hidden_grad is not None:
        hidden_grad[chunk] = grad_logits @ head
    if weight_grad is not None and weight_grad.dtype == grad_logits.dtype:
        weight_grad.addmm_(grad_logits.T, inputs)
    elif weight_grad is not None:
        weight_grad += grad_logits.T @ inputs
    if bias_grad is not None:
        bias_grad += grad_logits.sum(0, dtype=torch.float32)


@torch.compiler.disable  # a loop over a number of chunks that changes from step to step
def linear_cross_entropy(
    head: nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    label_smoothing: float = 0.0,
    predict: bool = False,
    rows: slice = slice(None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Σ weight·cross-entropy over the vocabulary, each position's cross-entropy and its likeliest token.

    Under autocast the products run in its precision, softmax and sums in fp32.

    Args:
        head: H → V, with or without bias.
        hidden: (S, H). targets: (S,) int64. weights: (S,) float32.
        predict: whether the likeliest tokens are wanted.
        rows: of the head, to which the vocabulary is restricted; targets count from the first. Default: all.

    Returns:
        A float32 scalar, the only one with a graph, for one backward pass; (S,) float32; (S,) int64 or None.

    Raises:
        ValueError: the head is not an `nn.Linear`. Only its weight and bias count; hooks of the head are not run.
    """
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the loss needs a vocabulary head that is an nn.Linear, got {type(head).__name__}")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    with torch.autocast(kind, enabled=False):
        weight, bias = head.weight, head.bias
        if rows != slice(None):
            weight, bias = weight[rows], None if bias is None else bias[rows]
        arguments = hidden, weight, bias, targets, weights, label_smoothing, predict, dtype
        return _LinearCrossEntropy.apply(*arguments)
