"""The number of launched processes, from the environment that `accelerate launch` and `torchrun` set."""

import os

from common.errors import UserError


def launched_processes() -> int:
    """The number of processes of this run, 1 without a launcher.

    Raises:
        UserError: the launcher started several processes that do not know of each other.
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:  # accelerate's MULTI_CPU without MPI does so
        raise UserError(
            "several processes were launched, but each runs alone; start from accelerate_configs/2_cpu_ddp.yaml"
        )
    return int(os.environ.get("WORLD_SIZE", 1))
