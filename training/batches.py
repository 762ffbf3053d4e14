"""Samples of the flows → one training batch (spec §2, §5), rows in the order in which the flows are registered."""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from common.errors import UserError
from models import OmniMask, UniversalPrompting
from models.devices import send
from models.modeling_showo import check_image_features
from models.prompting import Rows
from models.vocabulary import IGNORE_ID, Vocabulary
from training.data.flows import FlowReader, LanguageReader, MixedReader, MmuReader, T2IReader
from training.data.streams import stack
from training.loss import Objective, document_targets, in_place, next_token
from training.masking import MaskingNoise
from training.packing import Packing, packing_length


@dataclass
class OmniBatch:
    """One training batch on the device of the model.

    Args:
        input_ids, labels: (B, L) int64, padded on the right to the longest document, if there is any.
        rows: flow → its rows, in order; 0 for a flow that is absent.
        objective: targets, weights and packing for the loss.
        num_used: number of positions that are not padding.
        mask_prob: (B_t2i,) float32.
        texts, codes, pixels: of the t2i rows, for the sample images: codes (B_t2i, N) int64, pixels
            (B_t2i, 3, res, res), None if shards hold codes.
        keys: names of the samples, for error messages.
        sums: further ones for the log.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: OmniMask
    rows: dict[str, int]
    objective: Objective
    num_used: int
    mask_prob: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    texts: list[str] = field(default_factory=list)
    codes: torch.Tensor | None = None
    pixels: torch.Tensor | None = None
    keys: list[str] = field(default_factory=list)
    sums: dict[str, torch.Tensor | int] = field(default_factory=dict)

    def inputs(self) -> dict:
        """Keyword arguments of `Showo.forward` without an objective."""
        masked = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return masked | {"image_features": self.image_features}

    def forward_arguments(self) -> dict:
        """Keyword arguments of `Showo.forward` for losses and statistics."""
        return self.inputs() | {"labels": self.objective}

    @property
    def target_rows(self) -> torch.Tensor:
        """(S,) int64: the row of each target of the objective."""
        return self.objective.index // self.input_ids.shape[1]

    @property
    def num_positions(self) -> int:
        """Positions that run through the layers: those of the packed rows if samples are packed."""
        packing = self.objective.packing
        return self.input_ids.numel() if packing is None else packing.num_positions


@dataclass
class BatchBuilder:
    """Tokenises, masks and concatenates the samples of the flows.

    Args:
        prompting: builds rows.
        vq_model: pixels → codes.
        noise: the t2i masking rule.
        understanding: builds the mmu rows of its branch (see `training/understanding.py`).
        row_length: L of all rows but documents.
        device: of the model.
        packing_length: length limit of packed rows (sample packing); None: one sample per row.
        bf16: whether the image tokenizer encodes under bf16 autocast, which changes some codes.
        coefficients: loss → its weight in the sum of all; None: there is no sum.
        label_smoothing: of the `Objective`.
        flows: the table of the task's flows; default: `FLOWS`.
    """

    prompting: UniversalPrompting
    vq_model: Any
    noise: MaskingNoise
    understanding: Any
    row_length: int
    device: torch.device | str
    packing_length: int | None = None
    bf16: bool = False
    coefficients: dict[str, float] | None = None
    label_smoothing: float = 0.0
    flows: "dict[str, FlowKind]" = field(default_factory=lambda: FLOWS)

    @classmethod
    def of(
        cls, config, vocabulary: Vocabulary, prompting: UniversalPrompting, vq_model, understanding, device, flows=None
    ):
        """The builder of a run; `vocabulary` of its model, `flows` of its task."""
        training, flows = config.training, FLOWS if flows is None else flows
        row_length = longest = config.model.showo.num_vq_tokens + 3 + prompting.max_text_len
        if training.batch_size_mixed:
            longest = max(row_length, MixedReader(config, "mixed").max_length)
        return cls(
            prompting,
            vq_model,
            MaskingNoise.of(config, vocabulary),
            understanding,
            row_length,
            device,
            packing_length=packing_length(config.dataset, longest),
            bf16=training.vq_dtype == "bf16",
            coefficients={name: training[f"{name}_coeff"] for name in flows if f"{name}_coeff" in training}
            | {"mixed_text": training.mixed_coeff * config.mixed.text_weight},
            label_smoothing=training.label_smoothing,
            flows=flows,
        )

    def for_evaluation(self, mask_ratio: float | None = None) -> "BatchBuilder":
        """A copy for evaluation: each flow's plain loss, without augmentation and text dropout.

        Args:
            mask_ratio: of all t2i images; None: random, as in training.
        """
        prompting = copy(self.prompting)
        prompting.cond_dropout_prob = 0.0
        return replace(
            self,
            coefficients=None,
            label_smoothing=0.0,
            prompting=prompting,
            understanding=self.understanding.for_evaluation(),
            noise=replace(self.noise, mask_ratio=mask_ratio),
        )

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, N) int64 image ids, with the vocabulary's image offset."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            codes = self.vq_model.get_code(send(pixels, self.device))
        return codes.cpu() + self.noise.image_offset

    def image_ids(self, samples: list[dict]) -> torch.Tensor:
        """(B, N) image ids, on the host, of samples with pixels (which waits for the tokenizer) or codes."""
        if all("image" in sample for sample in samples):
            return self.encode(stack(samples, "image"))
        if all("codes" in sample for sample in samples):
            return stack(samples, "codes") + self.noise.image_offset
        return torch.cat([self.image_ids([sample]) for sample in samples])  # only some of the shards are encoded

    def code_rows(self, texts: list[str], image_ids: torch.Tensor, labels: torch.Tensor) -> Rows:
        """Rows of text to image, none without its text, of image ids (B, N) with labels (B, N), −100 elsewhere."""
        rows = self.prompting((texts, image_ids), "t2i_gen")
        rows.labels = torch.full_like(rows.input_ids, IGNORE_ID)
        rows.labels[:, -image_ids.shape[1] - 1 : -1] = labels
        return rows

    def __call__(self, samples: dict[str, list]) -> OmniBatch:
        """Builds the batch of `samples`: flow → list of samples. Absent flows have no rows."""
        built, extra, features = {}, {}, []
        for name in (name for name in self.flows if samples.get(name)):
            built[name], more = self.flows[name].rows(samples[name], self)
            features.append(more.pop("image_features", None))
            assert not extra.keys() & more.keys(), "two flows give the same field of OmniBatch"
            extra |= more
        features = [one for one in features if one is not None]  # spliced in the order of the rows
        if features:
            extra["image_features"] = torch.cat(features)
        rows = joined(list(built.values()), self.prompting.vocabulary.pad_id)
        num_rows = {name: len(built[name].input_ids) if name in built else 0 for name in self.flows}
        first, targets = 0, {}
        for name, count in num_rows.items():  # the same losses on every process, also if a flow is absent
            found = self.flows[name].targets(rows.labels[first : first + count], self)
            targets |= {loss: (first, one) for loss, one in zip(self.flows[name].losses, found, strict=True)}
            first += count
        keys = [f"{name}: {key}" for name in num_rows for key in sample_keys(samples.get(name, ()))]
        return self.batch(rows, targets, num_rows, keys=keys, **extra)

    def batch(
        self, rows: Rows, targets: dict[str, tuple[int, torch.Tensor]], num_rows: dict[str, int], **extra
    ) -> OmniBatch:
        """The batch of rows that are complete, on the device.

        Args:
            targets: of `Objective.from_targets`.
            num_rows: flow → its rows, in order.
            extra: further fields of `OmniBatch`.
        """
        # Everything up to the copy below is on the host: data-dependent sizes would otherwise cause a GPU sync.
        input_ids, mask, position_ids = rows.input_ids, rows.attention_mask, rows.position_ids
        check_image_features(input_ids, extra.get("image_features"))
        is_used = input_ids != self.prompting.vocabulary.pad_id
        packs, room = self.packing_length is not None, self.packing_length
        objective = Objective.from_targets(
            targets,
            num_t2i=num_rows.get("t2i", 0),
            packing=Packing.from_mask(is_used, mask, room, position_ids) if packs else None,
            position_ids=None if packs else position_ids,
            coefficients=self.coefficients,
            label_smoothing=self.label_smoothing,
            statistics=True,
        )
        device = self.device
        return OmniBatch(
            send(input_ids, device),
            send(rows.labels, device),
            mask.to(device),
            num_rows,
            objective.to(device),
            num_used=int(is_used.sum()),
            **extra,
        )


def joined(parts: list[Rows], pad_id: int) -> Rows:
    """One batch of the rows of all flows, padded on the right to the longest."""
    length = max(part.input_ids.shape[1] for part in parts)
    ids, labels, positions, masks = [], [], [], []
    for part in parts:
        missing = (0, length - part.input_ids.shape[1])
        ids.append(F.pad(part.input_ids, missing, value=pad_id))
        labels.append(F.pad(part.labels, missing, value=IGNORE_ID))
        counted = torch.arange(length).expand(len(part.input_ids), -1)
        positions.append(counted if part.position_ids is None else F.pad(part.position_ids, missing))
        masks.append(part.attention_mask.extend(missing[1]))
    position_ids = None if all(part.position_ids is None for part in parts) else torch.cat(positions)
    return Rows(torch.cat(ids), torch.cat(labels), OmniMask.cat(masks), position_ids)


def sample_keys(samples: Iterable[dict | str]) -> list[str]:
    """The names of samples in error messages."""
    texts = (repr((sample if isinstance(sample, str) else sample.get("text", ""))[:40]) for sample in samples)
    return [(isinstance(s, dict) and s.get("key")) or text for s, text in zip(samples, texts, strict=True)]


# ---- how each flow's samples become rows ----


def t2i_rows(samples: list[dict], builder: BatchBuilder) -> tuple[Rows, dict]:
    """Rows ``<t2i>`` text ``<soi>`` masked codes ``<eoi>``."""
    texts, ids = [sample["text"] for sample in samples], builder.image_ids(samples)
    masked = builder.noise(ids)
    codes = send(ids - builder.noise.image_offset, builder.device)
    extra = {"mask_prob": masked.mask_prob, "texts": texts, "codes": codes}
    if all("image" in sample for sample in samples):
        extra["pixels"] = stack(samples, "image")
    return builder.prompting((texts, masked.input_ids, masked.labels), "t2i"), extra


def lm_rows(samples: list[str], builder: BatchBuilder) -> tuple[Rows, dict]:
    """Rows of plain text."""
    return builder.prompting((samples, builder.row_length), "lm"), {}


def mmu_rows(samples: list[dict], builder: BatchBuilder) -> tuple[Rows, dict]:
    """Rows with an image and a text about it, in the form of the run's branch."""
    rows, features = builder.understanding.rows(samples, builder)
    return rows, {"image_features": features}


def mixed_rows(samples: list[dict], builder: BatchBuilder) -> tuple[Rows, dict]:
    """Rows of documents."""
    images = [segment for sample in samples for segment in sample["segments"] if "text" not in segment]
    ids = iter(builder.image_ids(images) if images else ())
    documents = [
        [segment if "text" in segment else segment | {"image_ids": next(ids)} for segment in sample["segments"]]
        for sample in samples
    ]
    return builder.prompting((documents, builder.noise), "mixed"), {}


MakeRows = Callable[[list, BatchBuilder], tuple[Rows, dict]]  # and fields of `OmniBatch`
# Labels (B, L) → targets (B, L) of each loss, at the positions that predict them
ToTargets = Callable[[torch.Tensor, BatchBuilder], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class FlowKind:
    """A flow of Show-o. Its weight is `training.{name}_coeff`, its share of a batch `training.batch_size_{name}`.

    Args:
        reader: what it reads.
        rows: its samples → rows; None where the task itself makes them.
        targets: the labels of its rows → what is predicted where, for each of `losses`; None as well.
        losses: their names.
    """

    reader: type[FlowReader]
    rows: MakeRows | None
    targets: ToTargets | None
    losses: tuple[str, ...]


# Rows of a batch are in the order of this table; t2i comes first, as sample images are made of a batch's first rows.
FLOWS: dict[str, FlowKind] = {
    "t2i": FlowKind(T2IReader, t2i_rows, lambda labels, b: (in_place(labels, b.prompting.max_text_len + 1),), ("t2i",)),
    "lm": FlowKind(LanguageReader, lm_rows, lambda labels, b: (next_token(labels),), ("lm",)),
    "mmu": FlowKind(MmuReader, mmu_rows, lambda labels, b: (next_token(labels),), ("mmu",)),
    "mixed": FlowKind(
        MixedReader,
        mixed_rows,
        lambda labels, b: document_targets(labels, b.noise.image_offset),
        ("mixed", "mixed_text"),
    ),
}


def flow_readers(config, split: str, flows: dict[str, FlowKind] | None = None) -> list[FlowReader]:
    """The flows that a run reads of a split, of the table `flows`; `UserError` if there is none to train on."""
    flows = FLOWS if flows is None else flows
    readers = [kind.reader(config, name, split) for name, kind in flows.items()]
    on = [reader for reader in readers if reader.is_on]
    if split == "train" and not on:
        sizes = ", ".join(f"batch_size_{name}" for name in flows)
        raise UserError(f"training.{sizes} are all 0; nothing to train on")
    return on
