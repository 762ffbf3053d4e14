"""What differs between the two understanding branches: how an mmu row is built and what is trainable."""

import torch

from models.prompting import Rows
from training.data.flows import collate_images


class VqUnderstanding:
    """Understanding from image codes (`training/train.py`).

    Args:
        max_mask_ratio: each mmu picture shows all but a random share, up to this, of its tokens: against memorising
            small data sets. 0 as published.
    """

    def __init__(self, max_mask_ratio: float = 0.0):
        self.max_mask_ratio = max_mask_ratio

    def rows(self, items: list[dict], builder) -> tuple[Rows, None]:
        """Rows ``<mmu> <soi>`` codes ``<eoi>`` text of one batch, and no image features."""
        pixels, texts = collate_images(items)
        image_ids = builder.encode(pixels)  # (B, N)
        if self.max_mask_ratio:
            ratio = torch.rand(len(items), 1) * self.max_mask_ratio
            hidden = (torch.rand(image_ids.shape) < ratio).to(image_ids.device)
            image_ids = image_ids.masked_fill(hidden, builder.noise.mask_token_id)
        return builder.prompting((image_ids, texts), "mmu"), None
