"""Masks image tokens of a training step and makes their labels (spec §6)."""

import math
from dataclasses import dataclass

import torch

from common.errors import UserError
from models.generation.sampling import Schedule, get_mask_schedule
from models.vocabulary import IGNORE_ID, Vocabulary

# B images, N = w * w tokens each


def schedule_of(config) -> Schedule:
    """The mask schedule that a `TrainingConfig` names; `UserError` if there is none, or its parameters do not fit."""
    from common.config import mask_schedule_of  # needs OmegaConf, which a step does without (`make gpu-check`)

    name, params = mask_schedule_of(config)
    try:
        return get_mask_schedule(name, **params)
    except (ValueError, TypeError) as error:
        raise UserError(f"mask_schedule.schedule or training.mask_schedule: {error}") from None


@dataclass
class MaskedImages:
    """input_ids and labels (B, N) int64; mask_prob (B,) float32, the scheduled probability of each image."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    mask_prob: torch.Tensor


@dataclass
class MaskingNoise:
    """The masking rule of a run.

    Args:
        schedule: probability as a function of t in [0, 1].
        mask_token_id, image_offset, codebook_size: from the vocabulary.
        min_masking_rate: lower bound of the probability.
        contiguous_region_prob: probability that a batch masks one rectangle per image instead of scattered tokens.
        noise_type: ``mask`` replaces tokens by the mask token, ``random_replace`` by random codes.
        predict_all_tokens: supervise all positions, not only the masked ones (always on for random_replace).
        mask_ratio: a fixed probability (for evaluation) instead of a random one.
    """

    schedule: Schedule
    mask_token_id: int
    image_offset: int
    codebook_size: int
    min_masking_rate: float = 0.0
    contiguous_region_prob: float | None = None
    noise_type: str = "mask"
    predict_all_tokens: bool = False
    mask_ratio: float | None = None

    @classmethod
    def of(cls, config, vocabulary: Vocabulary) -> "MaskingNoise":
        """The rule that a `TrainingConfig` names."""
        training = config.training
        return cls(
            schedule_of(config),
            vocabulary.mask_token_id,
            vocabulary.image_offset,
            vocabulary.codebook_size,
            min_masking_rate=training.min_masking_rate,
            contiguous_region_prob=training.mask_contiguous_region_prob,
            noise_type=training.noise_type,
            predict_all_tokens=training.predict_all_tokens,
        )

    def __call__(self, image_ids: torch.Tensor) -> MaskedImages:
        """Masks part of each image.

        Random numbers come from torch's global generator in the published order: t (B), positions (B, N).

        Args:
            image_ids: (B, N) int64, with the vocabulary's image offset.
        """
        batch_size, num_tokens = image_ids.shape
        if self.mask_ratio is None:
            mask_prob = self.schedule(torch.rand(batch_size)).clamp(min=self.min_masking_rate)
        else:
            mask_prob = torch.full((batch_size,), float(self.mask_ratio))
        num_masked = (num_tokens * mask_prob).round().clamp(min=1)  # torch rounds half to even
        hidden = self._positions(num_masked, num_tokens).to(image_ids.device)  # (B, N)
        noise = torch.full_like(image_ids, self.mask_token_id)
        if self.noise_type == "random_replace":
            noise = self.image_offset + torch.randint_like(image_ids, self.codebook_size)
        labels_everywhere = self.predict_all_tokens or self.noise_type == "random_replace"
        labels = image_ids if labels_everywhere else torch.where(hidden, image_ids, IGNORE_ID)
        return MaskedImages(torch.where(hidden, noise, image_ids), labels, mask_prob)

    def _positions(self, num_masked: torch.Tensor, num_tokens: int) -> torch.Tensor:
        contiguous = self.contiguous_region_prob is not None and torch.rand(1).item() < self.contiguous_region_prob
        if contiguous:
            width = math.isqrt(num_tokens)
            return torch.stack([_rectangle(int(n), width) for n in num_masked])
        return torch.rand(len(num_masked), num_tokens).argsort(dim=-1) < num_masked[:, None]


def _rectangle(num_masked: int, width: int) -> torch.Tensor:
    """(w * w,) bool: a rectangle of about `num_masked` tokens at a random position in the w × w grid."""
    lowest, highest = math.ceil(num_masked / width), min(width, num_masked)
    height = int(torch.randint(lowest, highest + 1, (1,)))
    columns = min(math.ceil(num_masked / height), width)
    top = int(torch.randint(0, width - height + 1, (1,)))
    left = int(torch.randint(0, width - columns + 1, (1,)))
    grid = torch.zeros(width, width, dtype=torch.bool)
    grid[top : top + height, left : left + columns] = True
    return grid.flatten()
