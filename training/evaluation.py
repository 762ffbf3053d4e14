"""Figures on held-out data during training (`experiment.eval_every`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from training.data.streams import Flow
from training.metrics import StepMetrics, total
from training.tasks import Task


@contextmanager
def own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """A context with its own random seed; the run's random state is restored afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def evaluate(
    task: Task, flows: dict[str, Flow], forward: Callable, over_processes: Callable, num_batches: int, seed: int
) -> dict[str, float]:
    """The figures of every flow with held-out data; the same batches and random numbers at every evaluation.

    Args:
        forward: the model, called as in training.
        over_processes: sums a tensor over all processes, all of which must call this.
        num_batches: first batches that are read of each flow.
    """
    values = {}
    for name, flow in flows.items():
        flow.rewind()
        metrics = StepMetrics()
        with own_random_numbers(seed, task.device):
            for _ in range(num_batches):
                metrics.add(task.eval_sums(forward, name, next(flow)))
        if metrics.sums:
            values |= task.eval_figures(name, total(metrics.sums, over_processes, task.device))
    return values
