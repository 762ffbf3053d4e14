"""Preference pairs by DPO, on images and on answers (Pair-DPO, HermesFlow, arXiv 2502.12148).

    loss = −log σ(β·((chosen − reference's chosen) − (rejected − reference's rejected)))

of log-probabilities: of an image the sum over its masked codes, with the same mask for both images of a pair; of an
answer the sum over its tokens. `tools/make_pairs.py` makes pairs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from common.errors import UserError
from common.files import parse_json
from models import Showo
from models.images import normalized
from models.modeling_showo import ShowoOutput
from models.prompting import Rows
from models.vocabulary import IGNORE_ID
from training.alignment_settings import PreferenceConfig
from training.batches import BatchBuilder, FlowKind, OmniBatch
from training.data.flows import JSON, Reading, ShowoImageReader, encoder_of
from training.data.image_text import ImageTransform
from training.data.json_records import JsonRecords, RecordUnits
from training.data.sources import BAD_CONVERSATION, MALFORMED_ITEM, Skipped, Units, checked_text
from training.data.streams import Transform, stack
from training.loss import LogProbObjective, log_probs_of, next_token
from training.metrics import Sums
from training.reference import Reference
from training.tasks import Outcome
from training.tasks.showo import ShowoTask

# P pairs, which are 2P rows: all chosen ones, then the rejected ones; S supervised positions
KINDS = {"image_pairs": "image", "answer_pairs": "answer"}  # flow → `kind` of its records


class PairReader(ShowoImageReader):
    """The records of one kind of a file of pairs (docs/alignment.md)."""

    formats = JSON

    @property
    def setting(self) -> str:
        return f"{self.split}_pairs"

    def _root_key(self) -> str:
        return ""

    @property
    def max_samples(self) -> None:
        return None

    def units(self, paths: list[str]) -> Units:
        kind = KINDS[self.name]
        files = [JsonRecords(path, keep=lambda record: _kind_of(record) in (kind, None)) for path in paths]
        if not sum(map(len, files)):
            raise UserError(
                f"dataset.params.{self.setting}: {', '.join(paths)} hold(s) no pair whose kind is {kind!r}; make some, "
                f"or give training.batch_size_{self.name}=0"
            )
        return RecordUnits(files)

    def transform(self, reading: Reading) -> Transform:
        if self.name == "image_pairs":
            return ImagePair(self.images(reading))
        images, encode = self.images(reading, processor=reading.image_processor), encoder_of(self.config, reading)
        return AnswerPair(images, encode, reading.tokenizer, reading.text_length)


def _kind_of(record: Any) -> Any:
    """What a record says of itself; None for what is no record, which is skipped and counted later."""
    return record.get("kind") if isinstance(record, dict) else None


def _members(raw: dict, *names: str) -> dict[str, str]:
    """The texts of a record; `Skipped` if one is missing."""
    key = raw["__key__"]
    try:
        record = parse_json(raw["json"], key, dict)
    except UserError as error:
        raise Skipped(MALFORMED_ITEM, str(error)) from None
    if missing := [name for name in names if name not in record]:
        raise Skipped(MALFORMED_ITEM, f"{key}: a pair of this kind needs {', '.join(names)}, lacks {missing}")
    return {name: checked_text(record[name], f"{key}: {name}") for name in names}


@dataclass(frozen=True)
class ImagePair:
    """Record → ``{"image", "rejected"}``, (R, R, 3) uint8 each, ``"text"`` and ``"key"``."""

    images: ImageTransform

    def __call__(self, raw: dict, rng: random.Random) -> dict:
        said = _members(raw, "caption", "chosen", "rejected")
        found = [self.images.of(raw | {"image": said[name]}, rng)["image"] for name in ("chosen", "rejected")]
        return {"image": found[0], "rejected": found[1], "text": said["caption"], "key": raw["__key__"]}


@dataclass(frozen=True)
class AnswerPair:
    """Record → its image, ``"input_ids"`` and ``"labels"`` of the chosen answer, and of the ``"rejected_…"`` one.

    Args:
        images, encode, tokenizer, text_length: see `training.data.llava.LlavaSample`.
    """

    images: ImageTransform
    encode: Callable
    tokenizer: Any
    text_length: int

    def __call__(self, raw: dict, rng: random.Random) -> dict:
        said = _members(raw, "image", "question", "chosen", "rejected")
        sample = self.images.of(raw | {"image": said["image"]}, rng) | {"key": raw["__key__"]}
        for prefix, answer in (("", said["chosen"]), ("rejected_", said["rejected"])):
            turns = [{"from": "human", "value": said["question"]}, {"from": "gpt", "value": answer}]
            try:
                encoded = self.encode(turns, self.tokenizer)
            except ValueError as error:
                raise Skipped(BAD_CONVERSATION, f"{raw['__key__']}: {error}") from None
            if (encoded["labels"][: self.text_length] == IGNORE_ID).all():
                raise Skipped(BAD_CONVERSATION, f"{raw['__key__']}: no answer within {self.text_length} tokens")
            sample |= {prefix + name: tensor for name, tensor in encoded.items()}
        return sample


def image_rows(samples: list[dict], builder: BatchBuilder) -> tuple[Rows, dict]:
    """Rows of text to image of both images of each pair, masked at the same places; no text is left out."""
    images = stack(samples, "image"), normalized(stack(samples, "rejected"))
    chosen, rejected = map(builder.encode, images)  # (P, N)
    hidden = (builder.noise(chosen).input_ids == builder.noise.mask_token_id).repeat(2, 1)
    ids = torch.cat([chosen, rejected])
    texts = [sample["text"] for sample in samples] * 2
    rows = builder.prompting((texts, ids.masked_fill(hidden, builder.noise.mask_token_id)), "t2i_gen")
    rows.labels = torch.full_like(rows.input_ids, IGNORE_ID)
    rows.labels[:, -ids.shape[1] - 1 : -1] = ids.masked_fill(~hidden, IGNORE_ID)
    return rows, {}


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

    def prepare(self, model: Showo) -> None:
        super().prepare(model)
        self.model = model

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
