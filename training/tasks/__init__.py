"""Things that can be trained, one a module: `task: showo` in a configuration trains `training/tasks/showo.py`.

A module defines a subclass of `Task` under the name `TASK`. The trainer (`training/trainer.py`) does everything that is
the same for all: the loop, processes, optimiser, moving average, checkpoints, data positions, signals and logs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn

from common.errors import UserError
from training.data.flows import FlowReader, Reading
from training.metrics import Sums


@dataclass
class Outcome:
    """What one batch gives.

    Args:
        loss: scalar with a graph.
        losses: the parts of it by name, without weights; they must be finite.
        sums: for the log, additive over batches and processes, the same names on every process. ``samples`` and
            ``tokens`` give the speed.
    """

    loss: torch.Tensor
    losses: dict[str, torch.Tensor]
    sums: Sums = field(default_factory=dict)


Panel = tuple[str, list[Image.Image], list[str]]  # wandb panel, images and their captions


class Task(ABC):
    """One thing that is trained, and all that is particular to it.

    The trainer calls the methods in this order: the constructor, `readers`, `reading`, `load`, `make_model`,
    `choose_trainable`, `prepare`, `extend_optimizer`; then for every step `make_batch` and `outcome`, at some steps
    `summary`, `eval_sums`, `eval_figures` and `panels`.

    Args:
        config: of the type `settings`, complete and checked.

    Raises:
        UserError: something that the configuration names is missing or does not match; as early as it can be known.
    """

    settings: ClassVar[type]  # a dataclass, `common.schema.RunConfig` with the task's own sections
    step: int = 0  # optimiser steps that the run has taken, which the trainer sets

    def __init__(self, config):
        self.config = config
        self.device = torch.device("cpu")  # the trainer sets the process's

    @abstractmethod
    def readers(self, split: str) -> list[FlowReader]:
        """The flows that the run reads of a split, ``train`` or ``eval``, in the order of a batch."""

    def reading(self, process: int, num_processes: int) -> Reading:
        """How this process reads its flows."""
        return Reading(process, num_processes)

    def load(self) -> None:  # noqa: B027
        """Loads frozen models to `self.device`, before any random number of the run is drawn."""

    @abstractmethod
    def make_model(self, start: Path | None) -> nn.Module:
        """The model to train, with `save_pretrained`; of the weights in `start`, if that is given."""

    def choose_trainable(self, model: nn.Module) -> dict[str, int]:
        """Freezes what is not trained. Returns parameter → number of its first rows that must not change."""
        return {}

    def extend_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:  # noqa: B027
        """Called with the new optimiser of the model, before both are wrapped."""

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Called with the model on its device, before it is wrapped."""

    @abstractmethod
    def make_batch(self, samples: dict[str, list]) -> Any:
        """Flow → samples of one step, as a batch on the device. It has `keys`, the names of its samples."""

    @abstractmethod
    def outcome(self, forward, batch: Any) -> Outcome:
        """The losses of a batch.

        Args:
            forward: the model as it is trained (wrapped, perhaps compiled); call it once.
        """

    @abstractmethod
    def summary(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """The log line from the sums of all batches since the last one, over all processes (``batches`` is added)."""

    def eval_sums(self, forward, flow: str, samples: list) -> Sums:
        """The sums of one held-out batch of a flow."""
        return {}

    def eval_figures(self, flow: str, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """The log values from the sums of a flow's held-out batches, over all processes."""
        return {}

    def panels(self, model: nn.Module, batch: Any) -> list[Panel]:
        """Sample images of the model, made by the main process. `batch` is the last one."""
        return []


def find_task(name: str) -> type[Task]:
    """The task of a name; `UserError` if there is no such module."""
    found = sorted(module.name for module in iter_modules(__path__))
    if name not in found:
        raise UserError(f"task is {name!r}; allowed: {', '.join(found)} (the modules in training/tasks)")
    return import_module(f"training.tasks.{name}").TASK
