"""The launcher of a run and the processes that it started, and the CPU threads of each."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from common.errors import UserError

LAUNCHERS = ("accelerate", "torchrun", "torch.distributed", "deepspeed")  # programs, and modules after `python -m`


def launched_processes() -> int:
    """The number of processes of this run, 1 without a launcher; `UserError` if the launcher started several processes
    that do not know of each other."""
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:  # accelerate's MULTI_CPU without MPI does so
        raise UserError(
            "several processes were launched, but each runs alone; start from accelerate_configs/2_cpu_ddp.yaml"
        )
    return int(os.environ.get("WORLD_SIZE", 1))


def find_launcher() -> psutil.Process | None:
    """The launcher that started this process, if any."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent and any(Path(word).name.startswith(LAUNCHERS) for word in parent.cmdline()[:4]):
            return parent
    return None


def use_physical_cores() -> None:
    """Gives torch one thread for each physical core of this process, and says so; what the user has set is kept.

    Two threads on the two hyper-threads of one core were 4 to 6 times slower than one. The cores are those that the
    process may run on, at most the container's CPU quota, shared among the processes of this machine. Launchers set
    OMP_NUM_THREADS by themselves, so that the user's is looked up in their environment.
    """
    if not hasattr(os, "sched_getaffinity") or _threads_are_given():
        return
    cores, processes = available_cores(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = max(1, cores // processes)
    torch.set_num_threads(threads)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        of = f"{cores} physical cores" + (f" for {processes} processes" if processes > 1 else "")
        print(f"CPU: {threads} threads ({of}); OMP_NUM_THREADS sets another number")


def _threads_are_given() -> bool:
    environment: Iterable[str] = os.environ
    with suppress(psutil.Error):
        if launcher := find_launcher():
            environment = [*launcher.environ(), *(word.partition("=")[0] for word in launcher.cmdline())]
    return any(name in environment for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "--num_cpu_threads_per_process"))


def available_cores(cpus: Iterable[int], root: Path = Path("/")) -> int:
    """The physical cores of these logical CPUs, at most the CPU quota of the container; at least 1.

    Args:
        cpus: their numbers, as in `os.sched_getaffinity`.
        root: of the file system with `proc` and `sys`; where these say nothing, each CPU counts as a core.
    """
    cores = set()
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(siblings.read_text() if siblings.is_file() else cpu)
    return max(1, int(min([len(cores), *_cpu_quotas(root)])))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPU limits, in CPUs, of this process's control group (version 1 or 2) and of those above it."""
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with suppress(OSError, ValueError):  # not limited: no file, "max", or -1
                    yield _quota(folder, version=1 if controllers else 2)


def _quota(folder: Path, version: int) -> float:
    if version == 2:
        quota, period = map(int, (folder / "cpu.max").read_text().split())
    else:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    if quota <= 0:
        raise ValueError("not limited")
    return quota / period
