"""Policy gradients with any reward: unmasking as a sequence of decisions (Mask-GRPO, arXiv 2510.13418).

    for each prompt:  sample a group of images → score them → advantage of each within its group
    loss = −mean of min(r·A, clip(r)·A) over images and steps,  r = Π p(kept codes) / Π p_sampled(kept codes)

where a step's kept codes are those that became known in it. Groups whose scores hardly differ are dropped, and
gradients are taken at a part of the steps. Every sampled group is learned from once, so r is 1 but for rounding.
"""

from functools import partial

import torch
from torch.distributed.tensor import DTensor

from common.errors import UserError
from models.generation.trajectory import Trajectory
from models.images import to_pil
from models.modeling_showo import ShowoOutput
from models.vocabulary import IGNORE_ID
from training.alignment_settings import PolicyConfig
from training.batches import FlowKind, OmniBatch
from training.data.prompts import PromptReader
from training.loss import LogProbObjective, log_probs_of
from training.metrics import Sums
from training.reference import Reference
from training.rewards import open_reward
from training.samples import sample_codes
from training.tasks import Outcome
from training.tasks.showo import ShowoTask

# P prompts, G images each, B = P·G; T steps, K of them with gradients; R = K·B rows; S kept codes of all rows


class PolicyTask(ShowoTask):
    """GRPO on the images that the model samples of prompts."""

    settings = PolicyConfig
    flows = {"prompts": FlowKind(PromptReader, None, None, ("policy",))}

    def __init__(self, config):
        super().__init__(config)
        settings = config.policy
        self.reward = open_reward("policy.reward", settings.reward, settings.reward_timeout, settings.reward_retries)

    def load(self) -> None:
        super().load()
        self.reference = Reference(self.config, self.device) if self.config.policy.kl else None

    def sample(self, texts: list[str]) -> tuple[torch.Tensor, Trajectory]:
        """(codes (B, N), how they were sampled) of B prompts, without guidance, as the model is now."""
        if any(isinstance(parameter, DTensor) or not parameter.numel() for parameter in self.model.parameters()):
            raise UserError(
                "task=policy samples from the weights that it trains, which FSDP and ZeRO-3 cut into shards; launch it "
                "with DDP or ZeRO-2"
            )
        trajectory = Trajectory()
        with self.precision():  # from torch's global random numbers, which a checkpoint holds
            steps = self.config.policy.timesteps
            codes = sample_codes(self.model, self.builder, texts, timesteps=steps, trajectory=trajectory)
        return codes, trajectory

    def scores(self, samples: list[dict], codes: torch.Tensor) -> torch.Tensor:
        """(B,) float32 rewards of the images of codes (B, N), one for each sample."""
        images = to_pil(self.builder.vq_model.decode_code(codes).float())
        texts, records = ([sample[key] for sample in samples] for key in ("text", "record"))
        return torch.tensor(self.reward(texts, images, records))

    def make_batch(self, samples: dict[str, list]) -> OmniBatch:
        settings, prompts = self.config.policy, samples["prompts"]
        repeated = [sample for sample in prompts for _ in range(settings.group_size)]
        texts = [sample["text"] for sample in repeated]
        codes, trajectory = self.sample(texts)
        scores = self.scores(repeated, codes).view(len(prompts), -1)  # (P, G)
        advantages, is_kept = group_advantages(scores, settings.min_std)
        chosen = is_kept if is_kept.any() else torch.arange(len(is_kept)) == 0  # processes all take a step
        chosen = chosen.repeat_interleave(settings.group_size).nonzero()[:, 0]  # images to learn from
        steps = torch.randperm(settings.timesteps)[: settings.steps or settings.timesteps].tolist()
        batch, old = self.rows([texts[image] for image in chosen], trajectory, steps, chosen)
        reference = None
        if self.reference is not None:
            with self.precision(), self.reference(self.model) as model:
                reference = log_probs_of(model, batch.objective, codes_only=True, **batch.inputs())
        function = partial(
            policy_loss,
            old=old,
            rows=batch.target_rows,
            advantages=advantages.flatten()[chosen].repeat(len(steps)).to(self.device),
            count=len(repeated) * len(steps),
            clip=(settings.clip_low, settings.clip_high),
            kl=settings.kl,
            reference=reference,
        )
        batch.objective = LogProbObjective.of(batch.objective, function, codes_only=True)
        batch.keys = [f"prompts: {sample['key']}" for sample in prompts]
        batch.sums = {"reward": scores.sum(), "images": scores.numel()}
        batch.sums |= {"reward_std": scores.std(1).sum(), "dropped": (~is_kept).sum(), "groups": len(scores)}
        return batch

    def rows(
        self, texts: list[str], trajectory: Trajectory, steps: list[int], images: torch.Tensor
    ) -> tuple[OmniBatch, torch.Tensor]:
        """A row for each of the steps and images, step by step, whose targets are the codes that were kept.

        Returns:
            the batch, and (S,) the log-probabilities of the targets when they were sampled.
        """
        noise, images = self.builder.noise, images.to(self.device)
        ids, targets, old = [], [], []
        for step in (trajectory.steps[number] for number in steps):
            known = torch.where(step.unknown, noise.mask_token_id, step.codes + noise.image_offset)
            ids.append(known[images])
            targets.append(torch.where(step.kept, step.sampled + noise.image_offset, IGNORE_ID)[images])
            old.append(step.log_probs[images][step.kept[images]])
        rows = self.builder.code_rows(texts * len(steps), torch.cat(ids).cpu(), torch.cat(targets).cpu())
        batch = self.builder.batch(rows, {"policy": (0, rows.labels)}, {"prompts": len(rows.labels)})
        return batch, torch.cat(old)

    def outcome(self, forward, batch: OmniBatch) -> Outcome:
        out = forward(**batch.forward_arguments())
        sums = {"samples": sum(batch.rows.values()), "tokens": batch.num_positions}
        return Outcome(out.loss, out.losses, sums | batch.sums | out.statistics)

    def summary(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        found = {name: value.item() for name, value in sums.items()}
        values = {"step_loss_policy": found["loss_policy"] / found["batches"]}
        values |= {"reward": found["reward"] / found["images"], "reward_std": found["reward_std"] / found["groups"]}
        values |= {"groups_dropped": found["dropped"] / found["groups"], "clipped": found["clipped"] / found["ratios"]}
        return values | ({"kl": found["kl"] / found["batches"]} if self.reference is not None else {})

    def eval_sums(self, forward, flow: str, samples: list) -> Sums:
        """The reward of one image of each held-out prompt."""
        codes, _ = self.sample([sample["text"] for sample in samples])
        return {"reward": self.scores(samples, codes).sum(), "images": len(samples)}

    def eval_figures(self, flow: str, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"eval_reward": (sums["reward"] / sums["images"]).item()}


def group_advantages(scores: torch.Tensor, min_std: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (P, G) → advantages (P, G), of mean 0 and deviation 1 within each group, and which groups (P,) are kept.

    A group whose standard deviation is at most `min_std` teaches nothing and has advantages of 0.
    """
    std = scores.std(1, keepdim=True)
    is_kept = (std > min_std)[:, 0]
    advantages = (scores - scores.mean(1, keepdim=True)) / std.clamp(min=1e-6)
    return advantages.masked_fill(~is_kept[:, None], 0), is_kept


def policy_loss(
    log_probs: torch.Tensor,
    *,
    old: torch.Tensor,
    rows: torch.Tensor,
    advantages: torch.Tensor,
    count: int,
    clip: tuple[float, float],
    kl: float = 0.0,
    reference: torch.Tensor | None = None,
) -> ShowoOutput:
    """The clipped objective of all rows, and the distance to a reference.

    Args:
        log_probs, old, reference: (S,) float32 of the kept codes: now, when they were sampled, of the reference.
        rows: (S,) int64, the row of each.
        advantages: (R,) float32.
        count: of rows to divide by, with those of groups that were dropped.
        clip: least and greatest ratio.
        kl: weight of the mean of exp(d) − d − 1 over kept codes, where d is the reference's log-probability minus ours:
            an estimate of the KL divergence that is never negative.
    """
    ratio = log_probs.new_zeros(len(advantages)).index_add(0, rows, log_probs - old).exp()  # (R,)
    clipped = ratio.clamp(*clip)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum() / count
    statistics = {"clipped": (ratio != clipped).sum(), "ratios": torch.full_like(loss, len(ratio))}
    if reference is not None:
        difference = reference - log_probs
        distance = (difference.exp() - difference - 1).mean()
        loss = loss + kl * distance
        statistics["kl"] = distance
    statistics = {name: value.detach().float() for name, value in statistics.items()}
    return ShowoOutput(loss=loss, losses={"policy": loss}, statistics=statistics | {"loss_policy": loss.detach()})


TASK = PolicyTask
