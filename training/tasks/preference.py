"""Preference pairs by DPO, on images and on answers (Pair-DPO, HermesFlow, arXiv 2502.12148).

    loss = −log σ(β·((chosen − reference's chosen) − (rejected − reference's rejected)))

of log-probabilities: of an image the sum over its masked codes, with the same mask for both images of a pair; of an
answer the sum over its tokens. `tools/make_pairs.py` makes pairs.
"""

from functools import partial

import torch
import torch.nn.functional as F

from models.images import normalized
from models.modeling_showo import ShowoOutput
from models.prompting import Rows
from models.vocabulary import IGNORE_ID
from training.alignment_settings import PreferenceConfig
from training.batches import BatchBuilder, FlowKind, OmniBatch
from training.data.pairs import PairReader
from training.data.streams import stack
from training.loss import LogProbObjective, log_probs_of, next_token
from training.metrics import Sums
from training.reference import Reference
from training.tasks import Outcome
from training.tasks.showo import ShowoTask

# P pairs, which are 2P rows: all chosen ones, then the rejected ones; S supervised positions


def image_rows(samples: list[dict], builder: BatchBuilder) -> tuple[Rows, dict]:
    """Rows of text to image of both images of each pair, masked at the same places; no text is left out."""
    images = stack(samples, "image"), normalized(stack(samples, "rejected"))
    chosen, rejected = map(builder.encode, images)  # (P, N)
    hidden = (builder.noise(chosen).input_ids == builder.noise.mask_token_id).repeat(2, 1)
    ids = torch.cat([chosen, rejected])
    texts = [sample["text"] for sample in samples] * 2
    masked, labels = ids.masked_fill(hidden, builder.noise.mask_token_id), ids.masked_fill(~hidden, IGNORE_ID)
    return builder.code_rows(texts, masked, labels), {}


def answer_rows(samples: list[dict], builder: BatchBuilder) -> tuple[Rows, dict]:
    """Rows of the image, the question and both answers of each pair."""
    rejected = [
        sample | {"input_ids": sample["rejected_input_ids"], "labels": sample["rejected_labels"]} for sample in samples
    ]
    rows, features = builder.understanding.for_evaluation().rows([*samples, *rejected], builder)
    return rows, {"image_features": features}


class PreferenceTask(ShowoTask):
    """DPO against the model that the run begins with."""

    settings = PreferenceConfig
    flows = {
        "image_pairs": FlowKind(PairReader, image_rows, lambda labels, _: (labels,), ("image_pairs",)),
        "answer_pairs": FlowKind(PairReader, answer_rows, lambda labels, _: (next_token(labels),), ("answer_pairs",)),
    }

    def __init__(self, config):
        super().__init__(config)
        answers = config.training.batch_size_answer_pairs > 0
        self.understanding.has_rows = self.understanding.has_conversations = answers

    def load(self) -> None:
        super().load()
        self.reference = Reference(self.config, self.device)

    def make_batch(self, samples: dict[str, list], builder: BatchBuilder | None = None) -> OmniBatch:
        batch = (builder or self.builder)(samples)
        with self.precision(), self.reference(self.model) as model:
            reference = log_probs_of(model, batch.objective, **batch.inputs())
        function = partial(
            preference_loss,
            rows=batch.target_rows,
            reference=row_sums(reference, batch.target_rows, batch.rows),
            counts=batch.rows,
            beta=self.config.preference.beta,
            coefficients={name: self.config.training[f"{name}_coeff"] for name in self.flows},
        )
        batch.objective = LogProbObjective.of(batch.objective, function)
        return batch

    def outcome(self, forward, batch: OmniBatch) -> Outcome:
        out = forward(**batch.forward_arguments())
        sums = {"samples": sum(batch.rows.values()), "tokens": batch.num_positions}
        return Outcome(out.loss, out.losses, sums | out.statistics)

    def summary(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        return self.figures(sums, "step_loss_{}", "")

    def eval_sums(self, forward, flow: str, samples: list) -> Sums:
        batch = self.make_batch({flow: samples}, self.builder.for_evaluation())
        return forward(**batch.forward_arguments()).statistics

    def eval_figures(self, flow: str, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        return self.figures(sums, "eval_loss_{}", "eval_")

    def figures(self, sums: dict[str, torch.Tensor], loss: str, prefix: str) -> dict[str, float]:
        """Loss, share of pairs whose chosen one has gained on the other, and by how much, of each flow."""
        values = {}
        for name in self.flows:
            if f"pairs_{name}" in sums:
                pairs = sums[f"pairs_{name}"].item()
                values[loss.format(name)] = sums[f"loss_{name}"].item() / pairs
                values[f"{prefix}accuracy/{name}"] = sums[f"gained_{name}"].item() / pairs
                values[f"{prefix}margin/{name}"] = sums[f"margin_{name}"].item() / pairs
        return values


def row_sums(log_probs: torch.Tensor, rows: torch.Tensor, counts: dict[str, int]) -> torch.Tensor:
    """(R,): the sum of the log-probabilities (S,) of each row; `rows` (S,) int64 says which they are of."""
    return log_probs.new_zeros(sum(counts.values())).index_add(0, rows, log_probs)


def preference_loss(
    log_probs: torch.Tensor,
    *,
    rows: torch.Tensor,
    reference: torch.Tensor,
    counts: dict[str, int],
    beta: float,
    coefficients: dict[str, float],
) -> ShowoOutput:
    """DPO of the pairs of each flow.

    Args:
        log_probs: (S,) float32.
        rows: (S,) int64, the row of each.
        reference: (R,) float32, what the reference gives to each row.
        counts: flow → its 2P rows, in order.
        coefficients: flow → weight of its loss.
    """
    gains = (row_sums(log_probs, rows, counts) - reference).split(list(counts.values()))
    total, losses, statistics = log_probs.sum() * 0, {}, {}
    for (name, count), gain in zip(counts.items(), gains, strict=True):
        if count:
            chosen, rejected = gain.chunk(2)
            margin = beta * (chosen - rejected)  # (P,)
            each = -F.logsigmoid(margin)
            losses[name] = each.mean()
            total = total + coefficients[name] * losses[name]
            found = {"loss": each.sum(), "gained": (margin > 0).sum(), "margin": margin.sum()}
            found["pairs"] = torch.full_like(each[0], len(each))
            statistics |= {f"{key}_{name}": value.detach().float() for key, value in found.items()}
    return ShowoOutput(loss=total, losses=losses, statistics=statistics)


TASK = PreferenceTask
