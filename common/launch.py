"""How many processes were launched, as `accelerate launch` and `torchrun` say it in the environment."""

import os

from common.errors import UserError


def launched_processes() -> int:
    """The number of processes that belong together, 1 without a launcher.

    Raises:
        UserError: several were asked for, but each runs alone.
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:  # accelerate's MULTI_CPU without MPI
        raise UserError(
            "several processes were asked for, but each runs alone; use accelerate_configs/2_cpu_ddp.yaml as an example"
        )
    return int(os.environ.get("WORLD_SIZE", 1))
