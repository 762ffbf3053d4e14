"""One process of a run of several, for tests: `training/train.py` after two adjustments that only tests need.

- ``TEST_FSDP2=1``: accelerate does not reach FSDP2 on CPUs as shipped; this makes it.
- ``TEST_BATCHES=file``: all processes together take the batches of that file in turn, so that a run of one process and
  a run of two learn from the same global batches. Where questions are drawn, there is but one, and
  images are sampled from the same random numbers whoever samples them.
- ``TEST_NAN=process:call``: the mmu loss of that process is NaN at that call of the model.
"""

import os
import sys
import zlib
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from common.errors import run_cli
from tests.training.tiny import poison
from training.train import make_task
from training.trainer import Trainer


class Dealt:
    """A flow's batches number `start`, `start` + `every`, … of a list."""

    def __init__(self, flow, batches: list, start: int, every: int):
        self.flow, self.batches, self.next, self.every = flow, batches, start, every

    def __next__(self) -> list:
        batch = self.batches[self.next]
        self.next += self.every
        return batch

    def __getattr__(self, name: str):
        return getattr(self.flow, name)


def seeded(sample):
    """Sampling whose random numbers depend on the prompts alone."""

    def run(texts: list[str]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(repr(texts).encode()))
            return sample(texts)

    return run


def main(argv: list[str]) -> None:
    if os.environ.get("TEST_FSDP2"):
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Trainer(make_task(argv))
    if file := os.environ.get("TEST_BATCHES"):
        batches, accelerator = torch.load(file, weights_only=True), trainer.accelerator
        dealt = {"start": accelerator.process_index, "every": accelerator.num_processes}
        trainer.flows = {name: Dealt(flow, batches[name], **dealt) for name, flow in trainer.flows.items()}
        if hasattr(trainer.task, "questions"):
            trainer.task.questions = trainer.task.questions[:1]
        if hasattr(trainer.task, "sample"):
            trainer.task.sample = seeded(trainer.task.sample)
    if place := os.environ.get("TEST_NAN"):
        process, call = map(int, place.split(":"))
        if trainer.accelerator.process_index == process:
            poison(trainer, {call})
    trainer.train()


if __name__ == "__main__":
    run_cli(main)
