"""Metrics of training steps, summed between two log lines (spec §15)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import psutil
import torch

from models.modeling_showo import ShowoOutput
from training.batches import OmniBatch
from training.loss import TASKS

BUCKETS = 5  # of the mask ratio: 0.0-0.2, … 0.8-1.0


@dataclass
class StepMetrics:
    """Sums since the last log line. They stay on the device, so that only log lines sync with it, not every step."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: int = 0
    tokens: int = 0  # positions that ran
    used: int = 0  # of these, not padding
    unpacked: int = 0  # positions of the rows before they were packed
    steps: int = 0
    samples: int = 0
    data_time: float = 0.0
    batch_time: float = 0.0

    def add_batch(self, batch: OmniBatch, out: ShowoOutput) -> None:
        self.batches += 1
        self.unpacked += batch.input_ids.numel()
        self.tokens += batch.num_positions
        self.used += batch.num_used
        nothing = torch.zeros((), device=batch.input_ids.device)
        for task in TASKS:
            if batch.counts[task]:  # the same names on every process, also if one has nothing to supervise
                self._add(f"step_loss_{task}", getattr(out, f"loss_{task}"))
                self._add(f"correct_{task}", out.statistics.get(f"correct_{task}", nothing))
                self._add(f"supervised_{task}", out.statistics.get(f"supervised_{task}", nothing))
        if batch.mask_prob is not None:
            self._add("avg_masking_rate", batch.mask_prob.mean())
            self._add_buckets(batch.mask_prob, out.statistics["row_loss_t2i"])
        self.samples += sum(batch.counts.values())

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.detach()

    def _add_buckets(self, mask_prob: torch.Tensor, losses: torch.Tensor) -> None:
        bucket = (mask_prob.to(losses.device) * BUCKETS).long().clamp(max=BUCKETS - 1)  # (B,)
        rows = torch.zeros(2, BUCKETS, device=losses.device)
        rows[0].index_add_(0, bucket, losses.float())
        rows[1].index_add_(0, bucket, torch.ones_like(losses, dtype=torch.float))
        self._add("buckets", rows)

    def add_step(self, data_time: float, batch_time: float) -> None:
        self.steps += 1
        self.data_time += data_time
        self.batch_time += batch_time

    def state_dict(self) -> dict:
        """The sums as JSON values; floats are exact."""
        return asdict(self) | {"sums": {name: total.tolist() for name, total in self.sums.items()}}

    def load_state_dict(self, state: dict, device) -> None:
        """Continues the sums of `state` on a device."""
        for name, value in state.items():
            setattr(self, name, value)
        self.sums = {name: torch.tensor(total, device=device) for name, total in state["sums"].items()}

    def means(self, over_processes: Callable[[torch.Tensor], torch.Tensor], device) -> dict[str, float]:
        """Losses per batch and ratios over all processes; times of this process in seconds per step.

        Args:
            over_processes: sums a tensor over all processes.
        """
        counted = {name: torch.tensor(getattr(self, name)) for name in ("batches", "tokens", "used", "unpacked")}
        flat = {name: total.to(device, torch.float32).flatten() for name, total in (self.sums | counted).items()}
        summed = over_processes(torch.cat(list(flat.values()))).cpu().split([len(v) for v in flat.values()])
        sums = dict(zip(flat, summed, strict=True))
        batches = sums["batches"].item()
        values = {k: v.item() / batches for k, v in sums.items() if k.startswith(("step_loss", "avg_"))}
        for task in TASKS:
            if f"supervised_{task}" in sums:
                supervised = max(1.0, sums[f"supervised_{task}"].item())
                values[f"accuracy/{task}"] = sums[f"correct_{task}"].item() / supervised
        for index, (loss, rows) in enumerate(sums["buckets"].view(2, BUCKETS).T.tolist() if "buckets" in sums else ()):
            if rows:
                values[f"loss_t2i_by_mask_ratio/{index / BUCKETS:.1f}-{(index + 1) / BUCKETS:.1f}"] = loss / rows
        if sums["tokens"] != sums["unpacked"]:
            values["padding_share_unpacked"] = 1 - sums["used"].item() / sums["unpacked"].item()
        return values | {
            "padding_share": 1 - sums["used"].item() / sums["tokens"].item(),
            "data_time": self.data_time / self.steps,
            "batch_time": self.batch_time / self.steps,
            "samples/sec/gpu": self.samples / self.batch_time,
            "tokens/sec/gpu": self.tokens / self.batch_time,
            "memory_gib": memory_in_use(device) / 2**30,
        }


def memory_in_use(device) -> int:
    """Bytes: peak allocation on a GPU, resident memory of the process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
