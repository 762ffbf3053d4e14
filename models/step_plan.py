"""What a training step must know of its rows on the host, so that nothing in it waits for a GPU."""

from dataclasses import dataclass, replace

import torch

from models.head_loss import Supervised
from models.omni_attention import OmniMask
from models.packing import Packing


@dataclass(frozen=True)
class StepPlan:
    """supervised: which positions the losses look at. packing: how the rows share longer ones; None: they do not."""

    supervised: Supervised
    packing: Packing | None = None

    @property
    def num_run(self) -> int | None:
        """Positions of the packed rows, filler included."""
        return self.packing and self.packing.index.numel()

    @classmethod
    def of(
        cls,
        labels: torch.Tensor,
        mask: OmniMask,
        is_used: torch.Tensor,
        rows: tuple[int, int, int],
        max_seq_length: int,
        longest: int | None = None,
    ) -> "StepPlan":
        """The plan of rows on the CPU.

        Args:
            labels, mask, rows, max_seq_length: as `Showo.forward` takes them; `rows` of t2i, lm and mmu.
            is_used: (B, L) bool, what is no padding.
            longest: most positions of a packed row; None: rows stay as they are.
        """
        packing = Packing.of(is_used, mask, longest) if longest else None
        return cls(Supervised.of(labels, rows, max_seq_length), packing)

    def to(self, device) -> "StepPlan":
        packing = self.packing.to(device) if self.packing is not None else None
        return replace(self, supervised=self.supervised.to(device), packing=packing)
