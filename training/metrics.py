"""What a run measures between two log lines: a task's sums, and the times of the steps (spec §15)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import psutil
import torch

BUCKETS = 5  # of the mask ratio: 0.0-0.2, … 0.8-1.0
Sums = Mapping[str, torch.Tensor | int]  # additive: over batches, steps and processes


@dataclass
class StepMetrics:
    """Sums since the last log line. They stay on the device, so that only log lines sync with it, not every step."""

    sums: dict[str, torch.Tensor | int] = field(default_factory=dict)
    steps: int = 0
    data_time: float = 0.0
    batch_time: float = 0.0

    def add(self, sums: Sums) -> None:
        """The sums of one batch; the same names on every process."""
        for name, value in sums.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            self.sums[name] = self.sums.get(name, 0) + value

    def add_step(self, data_time: float, batch_time: float) -> None:
        """Times in seconds: of waiting for data, and of the whole step."""
        self.steps += 1
        self.data_time += data_time
        self.batch_time += batch_time

    def state_dict(self) -> dict:
        """The sums as JSON values; floats are exact."""
        values = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in self.sums.items()}
        tensors = [name for name, value in self.sums.items() if isinstance(value, torch.Tensor)]
        return asdict(self) | {"sums": values, "tensors": tensors}

    def load_state_dict(self, state: dict, device) -> None:
        """Continues the sums of `state` on a device; `ValueError` or `TypeError` if it is none."""
        times = [state[key] for key in ("steps", "data_time", "batch_time")]
        if not all(0 <= value < math.inf for value in times):
            raise ValueError(f"steps and times of the log are {times}")
        self.steps, self.data_time, self.batch_time = times
        tensors = set(state["tensors"])
        self.sums = {k: torch.tensor(v, device=device) if k in tensors else v + 0 for k, v in state["sums"].items()}

    def times(self, device) -> dict[str, float]:
        """Seconds per step, speed and memory of this process. The sums ``samples`` and ``tokens`` give the speed."""
        counted = [name for name in ("samples", "tokens") if name in self.sums]
        speed = {f"{name}/sec/gpu": self.sums[name] / self.batch_time for name in counted}
        steps = {"data_time": self.data_time / self.steps, "batch_time": self.batch_time / self.steps}
        return steps | speed | {"memory_gib": memory_in_use(device) / 2**30}


def total(sums: Sums, over_processes: Callable[[torch.Tensor], torch.Tensor], device) -> dict[str, torch.Tensor]:
    """The sums of all processes, float32 on the host, exchanged as one tensor by `over_processes`, which all call."""
    tensors = {name: torch.as_tensor(value).to(device, torch.float32) for name, value in sums.items()}
    flat = over_processes(torch.cat([tensor.flatten() for tensor in tensors.values()])).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def by_mask_ratio(mask_prob: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """(2, BUCKETS): the summed losses (B,) and the number of t2i rows by mask ratio (B,)."""
    bucket = (mask_prob.to(losses.device) * BUCKETS).long().clamp(max=BUCKETS - 1)  # (B,)
    sums = torch.zeros(2, BUCKETS, device=losses.device)
    sums[0].index_add_(0, bucket, losses.float())
    sums[1].index_add_(0, bucket, torch.ones_like(losses, dtype=torch.float))
    return sums


def memory_in_use(device) -> int:
    """Bytes: peak allocation on a GPU, resident memory of the process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
