"""The processes of an evaluation as `accelerate launch` or `torchrun` starts them; one process needs neither.

They share nothing but the end of each task: answers travel through files, so gloo serves on GPUs as well, and a process
may wait for hours while others still answer.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from common.launch import launched_processes

PATIENCE = timedelta(days=7)  # for the slowest process


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


@contextmanager
def joined_processes(config) -> Iterator[Processes]:
    """The processes that were launched; gives each its own GPU.

    Raises:
        UserError: several were launched, but each runs alone.
    """
    count = launched_processes()
    if count == 1:
        yield Processes()
        return
    if config.device in (None, "cuda") and torch.cuda.is_available():
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()
