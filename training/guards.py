"""What protects a run: its output folder, its lock, its signals, and losses that are no numbers."""

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from common.errors import UserError


def check_writable(folder: Path) -> None:
    """Tries to write in the folder, or where it is to be made; leaves nothing behind.

    Raises:
        UserError: nothing can be written there.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"experiment.output_dir {folder} cannot be written to ({error.strerror or error}); give another folder"
        ) from None


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process however that ends.

    Raises:
        UserError: another run holds it.
    """
    lock = FileLock(folder / ".lock")
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


class StopSignals:
    """SIGTERM and SIGUSR1 (pre-emption) ask for an end after the step; a context manager.

    Attributes:
        requested: whether this process was asked.
    """

    numbers = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._request) for number in self.numbers}
        return self

    def _request(self, *_) -> None:
        self.requested = True

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class FiniteLosses:
    """Batches whose loss is NaN or Inf are dropped, named, and counted; too many end the run.

    Args:
        agree: whether any process says so (`Agreement.any`).
        limit: how many may be dropped in a run; None looks at no loss, so nothing waits for the GPU.
        report: called with a line for each.
    """

    def __init__(self, agree, limit: int | None, report):
        self.agree, self.limit, self.report = agree, limit, report
        self.dropped = 0

    def accept(self, losses: dict[str, torch.Tensor], keys: list[str], step: int) -> bool:
        """Whether the batch may be learnt from.

        Raises:
            UserError: the limit is passed.
        """
        if self.limit is None:
            return True
        finite = torch.stack(list(losses.values())).isfinite().tolist()  # one wait for the GPU, not one a task
        bad = [name for name, is_finite in zip(losses, finite, strict=True) if not is_finite]
        if not self.agree(bool(bad)):
            return True
        self.dropped += 1
        here = f"loss of {', '.join(bad)} is not finite; samples: {', '.join(keys)}" if bad else "on another process"
        self.report(f"step {step}: batch dropped, {here}")
        if self.dropped > self.limit:
            raise UserError(
                f"{self.dropped} batches had a NaN or infinite loss, more than training.max_nonfinite_batches="
                f"{self.limit}; lower the learning rate, set training.max_grad_norm, or look at the samples named above"
            )
        return False
