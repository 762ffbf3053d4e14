"""Samples of the three flows → one training batch (spec §2, §5), rows in the order t2i, lm, mmu."""

from copy import copy
from dataclasses import dataclass, field, replace

import torch

from models import OmniMask, UniversalPrompting
from models.devices import send
from models.modeling_showo import check_image_features
from training.data.batching import stack
from training.loss import TASKS, Objective
from training.masking import MaskingNoise
from training.packing import Packing


@dataclass
class OmniBatch:
    """One training batch on the device of the model.

    Args:
        input_ids, labels: (B, L) int64.
        counts: rows per task.
        objective: labels, weights and packing for the loss.
        num_used: number of positions that are not padding.
        mask_prob: (B_t2i,) float32.
        texts, codes, pixels: of the t2i rows, for the sample images: codes (B_t2i, N) int64, pixels
            (B_t2i, 3, res, res), None if shards hold codes.
        keys: names of the samples, for error messages.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: OmniMask
    counts: dict[str, int]
    objective: Objective
    num_used: int
    mask_prob: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    texts: list[str] = field(default_factory=list)
    codes: torch.Tensor | None = None
    pixels: torch.Tensor | None = None
    keys: list[str] = field(default_factory=list)

    def forward_arguments(self) -> dict:
        """Keyword arguments of `Showo.forward` for losses and statistics."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "labels": self.objective,
            "image_features": self.image_features,
        }

    @property
    def num_positions(self) -> int:
        """Positions that run through the layers: those of the packed rows if samples are packed."""
        packing = self.objective.packing
        return self.input_ids.numel() if packing is None else packing.num_positions


class BatchBuilder:
    """Tokenises, masks and concatenates the samples of the three flows.

    Args:
        prompting: builds rows.
        vq_model: pixels → codes.
        noise: the t2i masking rule.
        understanding: builds the mmu rows of its branch (see `training/understanding.py`).
        row_length: L of all rows.
        packing_length: length limit of packed rows (sample packing); None: one sample per row.
        bf16: whether the image tokenizer encodes under bf16 autocast, which changes some codes.
        coefficients, label_smoothing: of the `Objective`.
    """

    def __init__(
        self,
        prompting: UniversalPrompting,
        vq_model,
        noise: MaskingNoise,
        understanding,
        row_length: int,
        device,
        *,
        packing_length: int | None = None,
        bf16: bool = False,
        coefficients: tuple[float, float, float] | None = None,
        label_smoothing: float = 0.0,
    ):
        self.prompting, self.vq_model, self.noise = prompting, vq_model, noise
        self.understanding, self.row_length, self.device = understanding, row_length, device
        self.packing_length, self.bf16 = packing_length, bf16
        self.coefficients, self.label_smoothing = coefficients, label_smoothing

    def for_evaluation(self, mask_ratio: float | None = None) -> "BatchBuilder":
        """A copy for evaluation: each task's plain loss, without augmentation and text dropout.

        Args:
            mask_ratio: of all t2i images; None: random, as in training.
        """
        builder = copy(self)
        builder.coefficients, builder.label_smoothing = None, 0.0
        builder.prompting = copy(self.prompting)
        builder.prompting.cond_dropout_prob = 0.0
        builder.understanding = self.understanding.for_evaluation()
        builder.noise = replace(self.noise, mask_ratio=mask_ratio)
        return builder

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

    def __call__(self, samples: dict[str, list]) -> OmniBatch:
        """Builds the batch of `samples`: flow → list of samples. Absent flows have no rows."""
        rows, extra = [], {}
        counts = {task: len(samples.get(task, ())) for task in TASKS}
        if counts["t2i"]:
            texts, ids = [sample["text"] for sample in samples["t2i"]], self.image_ids(samples["t2i"])
            masked = self.noise(ids)
            rows.append(self.prompting((texts, masked.input_ids, masked.labels), "t2i"))
            extra |= {
                "mask_prob": masked.mask_prob,
                "texts": texts,
                "codes": send(ids - self.noise.image_offset, self.device),
            }
            if all("image" in sample for sample in samples["t2i"]):
                extra["pixels"] = stack(samples["t2i"], "image")
        if counts["lm"]:
            rows.append(self.prompting((samples["lm"], self.row_length), "lm"))
        if counts["mmu"]:
            built, features = self.understanding.rows(samples["mmu"], self)
            rows.append(built)
            extra["image_features"] = features
        # Everything up to the copy below is on the host: data-dependent sizes would otherwise cause a GPU sync.
        input_ids, labels = (torch.cat([getattr(r, name) for r in rows]) for name in ("input_ids", "labels"))
        mask = OmniMask.cat([r.attention_mask for r in rows])
        check_image_features(input_ids, extra.get("image_features"))
        is_used = input_ids != self.prompting.vocabulary.pad_id
        objective = Objective.from_labels(
            labels,
            tuple(counts.values()),
            self.prompting.max_text_len,
            packing=Packing.from_mask(is_used, mask, self.packing_length) if self.packing_length else None,
            coefficients=self.coefficients,
            label_smoothing=self.label_smoothing,
            statistics=True,
        )
        device = self.device
        return OmniBatch(
            send(input_ids, device),
            send(labels, device),
            mask.to(device),
            counts,
            objective.to(device),
            num_used=int(is_used.sum()),
            keys=[f"{task}: {_key(sample)}" for task in TASKS for sample in samples.get(task, ())],
            **extra,
        )


def _key(sample: dict | str) -> str:
    """The name of a sample in error messages."""
    if isinstance(sample, str):
        return repr(sample[:40])
    return sample.get("key") or repr(sample.get("text", "")[:40])
