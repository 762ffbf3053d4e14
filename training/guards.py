"""Safeguards of a run: output folder, lock, signals, and non-finite losses and gradients."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from common import results
from common.errors import UserError
from common.files import Owned
from common.launch import find_launcher
from training.checkpointing import COURSE, FINAL_MODEL

LOCK = ".lock"  # in the output folder
SIGNS_OF_A_RUN = (COURSE, "checkpoint-0", "checkpoint-*/metadata.json")
WRITTEN = ("config.yaml", "metrics.jsonl", *FINAL_MODEL, "images/*.png")
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def check_output_dir(folder: Path) -> None:
    """Checks that a run may write into the folder, which need not exist yet.

    A folder is a run's if one has begun there, or if it holds checkpoints of ours or of the published code. In any
    other folder, whatever has the name of something that a run writes is somebody else's.

    Raises:
        UserError: nothing can be written there, or somebody else's files would be replaced.
    """
    results.check_output_dir(folder, "experiment.output_dir")
    owned = Owned(folder)
    if not owned.is_ours("config.yaml") and not any(True for pattern in SIGNS_OF_A_RUN for _ in folder.glob(pattern)):
        found = sorted(str(file.relative_to(folder)) for pattern in WRITTEN for file in folder.glob(pattern))
        owned.claim(found, f"experiment.output_dir={folder}")


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the operating system releases however the process ends; `UserError` if another run
    holds it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is writing to {folder}; wait for it, stop it, or give another experiment.output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def follow_launcher() -> None:
    """Has Linux send this process SIGTERM when its launcher ends.

    `accelerate launch` with one process does not forward signals: it would end and leave the training running.
    Without a launcher nothing changes, so that a run outlives the shell that started it.
    """
    with suppress(OSError, AttributeError):  # not Linux
        if launcher := find_launcher():
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if not launcher.is_running():
                os.kill(os.getpid(), signal.SIGTERM)


class StopSignals:
    """Turns SIGTERM, SIGUSR1 (pre-emption), Ctrl-C and the end of the launcher into a request to stop after the step.

    A second Ctrl-C ends the process at once, with exit code 130; it loses what a kill would lose. A context manager.

    What reaches a process depends on how it was launched:

    - `python3 training/train.py`: the terminal's SIGINT, once for each Ctrl-C.
    - `accelerate launch` with one process: the same, but the launcher ends at the first one. The training then saves
      in the background, and no second one reaches it.
    - with several processes: torch's launcher passes the first Ctrl-C on as SIGINT and a second one as SIGTERM. It
      kills what still runs 30 seconds after either. Older versions leave the processes in the terminal's group, so
      that each Ctrl-C arrives twice; two within `ONE_CTRL_C` seconds count as one.

    Args:
        remains: returns the part of the messages that names the last good checkpoint.
        quiet: whether another process prints the messages.

    Attributes:
        requested: whether this process was asked to stop.
        interrupted: when the first Ctrl-C arrived (`time.monotonic`).
    """

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    ONE_CTRL_C = 1.0

    def __init__(self, remains: Callable[[], str], quiet: bool = False):
        self.remains, self.quiet = remains, quiet
        self.requested, self.interrupted = False, None

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._request) for number in self.numbers}
        follow_launcher()
        return self

    def _request(self, number: int, _) -> None:
        self.requested, now = True, time.monotonic()
        if self.interrupted is None:
            if number == signal.SIGINT:
                self.interrupted = now
                self._say(f"interrupted: finishing this step and saving; Ctrl-C again leaves at once, {self.remains()}")
        elif now - self.interrupted > self.ONE_CTRL_C and (
            number == signal.SIGINT or (number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ)
        ):
            self._say(f"interrupted; {self.remains()}")
            os._exit(130)  # without cleaning up, which could wait for other processes

    def _say(self, message: str) -> None:
        if not self.quiet:
            os.write(2, f"\n{message}\n".encode())  # `print` could be interrupted in itself

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def exit_if_interrupted(self) -> None:
        """To be called when all has been saved: ends the process with code 130 if Ctrl-C was pressed."""
        if self.interrupted is not None:
            raise SystemExit(130) if self.quiet else KeyboardInterrupt(self.remains())


class FiniteLosses:
    """Drops, reports and counts batches with a NaN or infinite loss or gradient; too many end the run.

    Args:
        agree: whether a condition holds on any process (`ProcessGroup.any`).
        limit: how many may be dropped in a run; None: losses are not checked, which avoids a GPU sync.
        report: called with one line for each dropped batch.
    """

    def __init__(self, agree, limit: int | None, report):
        self.agree, self.limit, self.report = agree, limit, report
        self.dropped = 0

    def accept(self, losses: dict[str, torch.Tensor], keys: list[str], step: int) -> bool:
        """Whether the batch may be used; `UserError` if the limit is exceeded."""
        if self.limit is None:
            return True
        finite = torch.stack(list(losses.values())).isfinite().tolist()  # one GPU sync, not one per task
        bad = [name for name, is_finite in zip(losses, finite, strict=True) if not is_finite]
        if not self.agree(bool(bad)):
            return True
        here = f"loss of {', '.join(bad)} is not finite; samples: {', '.join(keys)}" if bad else "on another process"
        self._drop(f"step {step}: batch dropped, {here}")
        return False

    def accept_gradients(self, norm: torch.Tensor, keys: list[str], step: int) -> bool:
        """Whether gradients of this norm, which is the same on all processes, may be used; `UserError` if the limit is
        exceeded."""
        if self.limit is None or norm.isfinite():
            return True
        self._drop(f"step {step}: gradients dropped, their norm is not finite; samples: {', '.join(keys)}")
        return False

    def _drop(self, report: str) -> None:
        self.dropped += 1
        self.report(report)
        if self.dropped > self.limit:
            raise UserError(
                f"{self.dropped} batches had a NaN or infinite loss or gradient, more than "
                f"training.max_nonfinite_batches={self.limit}; lower the learning rate, set training.max_grad_norm, or "
                "look at the samples named above"
            )
