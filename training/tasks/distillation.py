"""Few steps: a student that takes many steps of its teacher at once (Show-o-Turbo, arXiv 2502.05415).

The frozen teacher, the model that the run begins with, samples an image with guidance in T steps. These are cut into
segments. From a point within a segment the student, without guidance, learns the codes that the teacher has at the
segment's end, where they are still unknown at the point. In the course of the run the segments become fewer and longer.
"""

import torch

from models import Showo
from models.generation.trajectory import Trajectory
from models.vocabulary import IGNORE_ID
from training.alignment_settings import DistillationConfig
from training.batches import FlowKind, OmniBatch
from training.data.prompts import PromptReader
from training.metrics import Sums
from training.reference import Reference
from training.samples import sample_codes
from training.tasks.showo import ShowoTask

# B prompts, N image positions, T steps of the teacher, K points of each trajectory


class DistillationTask(ShowoTask):
    """Consistency along the trajectories of a teacher."""

    settings = DistillationConfig
    flows = {"prompts": FlowKind(PromptReader, None, None, ("distillation",))}

    def load(self) -> None:
        super().load()
        self.teacher = Reference(self.config, self.device)

    def prepare(self, model: Showo) -> None:
        super().prepare(model)
        self.builder.coefficients = {"distillation": 1.0}

    def sample(self, texts: list[str]) -> torch.Tensor:
        """(T + 1, B, N) int64: the teacher's codes before each step and after the last, with mask tokens."""
        settings, trajectory = self.config.distillation, Trajectory()
        # from torch's global random numbers, which a checkpoint holds
        with self.precision(), self.teacher(self.model) as teacher:
            sample_codes(
                teacher,
                self.builder,
                texts,
                guidance_scale=settings.guidance_scale,
                timesteps=settings.timesteps,
                temperature=settings.temperature,
                trajectory=trajectory,
            )
        return trajectory.states()

    @property
    def num_segments(self) -> int:
        """At this step of the run, which has as many stages of one length as there are numbers."""
        segments, steps = self.config.distillation.segments, self.config.training.max_train_steps
        return segments[min(self.step * len(segments) // max(steps, 1), len(segments) - 1)]

    def make_batch(self, samples: dict[str, list], num_segments: int | None = None) -> OmniBatch:
        settings, prompts = self.config.distillation, samples["prompts"]
        texts = [sample["text"] for sample in prompts]
        states = self.sample(texts).cpu()
        points = torch.randperm(settings.timesteps)[: settings.points or settings.timesteps].tolist()
        num_segments = num_segments or self.num_segments
        ends = [segment_end(point, settings.timesteps, num_segments) for point in points]
        mask_id, offset = self.builder.noise.mask_token_id, self.builder.noise.image_offset
        known, reached = states[points].flatten(0, 1), states[ends].flatten(0, 1)  # (K·B, N), point by point
        image_ids = torch.where(known == mask_id, mask_id, known + offset)
        labels = segment_targets(known, reached, mask_id, offset)
        rows = self.builder.code_rows(texts * len(points), image_ids, labels)
        keys = [f"prompts: {sample['key']}" for sample in prompts]
        return self.builder.batch(rows, {"distillation": (0, rows.labels)}, {"prompts": len(labels)}, keys=keys)

    def eval_sums(self, forward, flow: str, samples: list) -> Sums:
        """With the segments of the end of the run, so that figures of one run can be compared."""
        out = forward(**self.make_batch({flow: samples}, self.config.distillation.segments[-1]).forward_arguments())
        counts = (out.statistics[f"{what}_distillation"].float() for what in ("correct", "supervised"))
        loss = out.losses["distillation"].float()
        return {"distillation": torch.stack([loss, torch.ones_like(loss), *counts])}


def segment_end(point: int, timesteps: int, num_segments: int) -> int:
    """The end of the segment that a point lies in: T steps are cut into parts that differ by at most one step."""
    segment = ((point + 1) * num_segments - 1) // timesteps
    return (segment + 1) * timesteps // num_segments


def segment_targets(known: torch.Tensor, reached: torch.Tensor, mask_id: int, offset: int) -> torch.Tensor:
    """(R, N) labels: ids of the codes reached where they are unknown at the point, −100 elsewhere.

    Args:
        known, reached: (R, N) int64 codes at the point and at the end of its segment, `mask_id` where unknown.
    """
    is_target = (known == mask_id) & (reached != mask_id)
    return torch.where(is_target, reached + offset, IGNORE_ID)


TASK = DistillationTask
