"""Losses on held-out data during training (`experiment.eval_every`, `training.eval_mask_ratios`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from training.batches import BatchBuilder
from training.data.flows import build_flows


@contextmanager
def own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """A context with its own random seed; the run's random state is restored afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


class HeldOut:
    """The losses of every flow that has held-out data (`dataset.params.eval_*_shards_path_or_url`).

    Every evaluation reads the same first `experiment.eval_batches` batches of each flow and masks the same tokens.

    Args:
        config: a `TrainingConfig`.
        builder: of the run.
        flow_arguments: of `build_flows`: process, num_processes, tokenizer, image_processor, text_length.
    """

    def __init__(self, config, builder: BatchBuilder, **flow_arguments):
        self.config, self.builder = config, builder
        self.flows = build_flows(config, split="eval", **flow_arguments)

    def __call__(self, forward: Callable, over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Means over batches and processes: ``eval_loss_{flow}``, ``eval_accuracy/{flow}``, and for each of
        `training.eval_mask_ratios` ``eval_loss_t2i/mask_{ratio}``.

        Args:
            forward: the model, called as in training.
            over_processes: sums a tensor over all processes, all of which must call this.
        """
        device, values = self.builder.device, {}
        for name, flow in self.flows.items():
            flow.rewind()
            ratios = (self.config.training.eval_mask_ratios if name == "t2i" else None) or [None]
            builders = {ratio: self.builder.for_evaluation(ratio) for ratio in ratios}
            sums = torch.zeros(len(ratios), 4, device=device)  # loss, batches, right tokens, all tokens
            with own_random_numbers(self.config.training.seed or 0, device):
                for _ in range(self.config.experiment.eval_batches):
                    samples = {name: next(flow)}
                    for row, builder in zip(sums, builders.values(), strict=True):
                        row += self._measure(forward, builder, samples, name)
            for ratio, (loss, batches, right, tokens) in zip(ratios, over_processes(sums).tolist(), strict=True):
                suffix = "" if ratio is None else f"/mask_{ratio:.2f}"
                values[f"eval_loss_{name}{suffix}"] = loss / batches
                values[f"eval_accuracy/{name}{suffix.replace('/', '_')}"] = right / max(1.0, tokens)
        return values

    @torch.no_grad()
    def _measure(self, forward, builder: BatchBuilder, samples: dict[str, list], name: str) -> torch.Tensor:
        batch = builder(samples)
        out = forward(**batch.forward_arguments())
        nothing = torch.zeros((), device=builder.device)
        counted = [out.statistics.get(f"{what}_{name}", nothing) for what in ("correct", "supervised")]
        loss = getattr(out, f"loss_{name}")
        return torch.stack([loss.float(), torch.ones_like(loss), *(c.float() for c in counted)])
