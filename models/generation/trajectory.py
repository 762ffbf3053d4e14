"""A recorder of image sampling: what each MaskGIT step knew, sampled and kept, for training on it.

trajectory = Trajectory()
codes = model.t2i_generate(input_ids, trajectory=trajectory)
assert torch.equal(trajectory.replay(), codes)

Distillation learns from the trajectories of a teacher, policy gradients from those of the model itself
(docs/alignment.md).
"""

from dataclasses import dataclass

import torch

# B images, N image positions, U of them with logits, C codes


@dataclass(frozen=True)
class TrajectoryStep:
    """One step.

    Args:
        codes: (B, N) int64, what it began with: codes, the mask token where unknown.
        sampled: (B, N) int64 codes, known ones and those sampled for all unknown positions.
        remaining: (B, N) bool, positions that are unknown again after the step.
        log_probs: (B, N) float32, log-probability of the sampled codes under the logits that they were sampled from,
            which are guided if there is guidance; 0 at known positions.
        temperature: weight of the Gumbel noise on the confidence.
    """

    codes: torch.Tensor
    sampled: torch.Tensor
    remaining: torch.Tensor
    log_probs: torch.Tensor
    temperature: float
    mask_id: int

    @property
    def unknown(self) -> torch.Tensor:
        """(B, N) bool: the positions that it sampled."""
        return self.codes == self.mask_id

    @property
    def kept(self) -> torch.Tensor:
        """(B, N) bool: the positions that became known in it."""
        return self.unknown & ~self.remaining

    @property
    def after(self) -> torch.Tensor:
        """(B, N) int64: the codes after it, the mask token where unknown."""
        return torch.where(self.remaining, self.mask_id, self.sampled)


class Trajectory:
    """The steps of one call of `t2i_generate`, in order."""

    def __init__(self):
        self.steps: list[TrajectoryStep] = []

    def record(
        self,
        codes: torch.Tensor,
        sampled: torch.Tensor,
        remaining: torch.Tensor,
        logits: torch.Tensor,
        positions: torch.Tensor,
        temperature: float,
        mask_id: int,
    ) -> None:
        """Adds a step.

        Args:
            logits: (B, U, C), of `positions` (B, U) int64.
            codes, sampled, remaining, temperature, mask_id: of `TrajectoryStep`.
        """
        drawn = sampled.gather(1, positions)[..., None]
        chosen = logits.gather(-1, drawn)[..., 0].float() - logits.float().logsumexp(-1)  # (B, U)
        log_probs = chosen.new_zeros(codes.shape).scatter(1, positions, chosen)
        log_probs = log_probs.masked_fill(codes != mask_id, 0)
        self.steps.append(TrajectoryStep(codes, sampled, remaining, log_probs, temperature, mask_id))

    def replay(self) -> torch.Tensor:
        """(B, N) int64: the codes that the record leads to, position by position as they became known."""
        codes = self.steps[0].codes
        for step in self.steps:
            assert torch.equal(codes, step.codes), "a step begins where the one before it ended"
            codes = torch.where(step.kept, step.sampled, codes).masked_fill(step.remaining, step.mask_id)
        return codes

    def states(self) -> torch.Tensor:
        """(T + 1, B, N) int64: the codes before each of the T steps, and after the last."""
        return torch.stack([*(step.codes for step in self.steps), self.steps[-1].after])
