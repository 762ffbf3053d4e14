"""Endless streams of batches whose order is a function of (seed, step, process, worker), so a run can continue.

Every loader worker reads one stream of a `Source`. A stream is cut into rounds; to continue at sample n of round r, the
n samples before it are skipped, and none of them is decoded.
"""

import atexit
import math
import os
import random
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common.errors import UserError
from training.data.batching import Batch, pack, pin, unpack
from training.data.skipping import Skipped, SkipSample, Tally
from training.data.sources import Source, seed_of

ENOUGH_SEEN = 200  # raw samples from which the share of bad ones can be judged
GIVE_UP = 10_000  # raw samples, or empty rounds, without a single batch

Transform = Callable[[Any, random.Random], Any]  # raw sample, its own random numbers → item; raises SkipSample


@dataclass
class StreamState:
    """How far a flow has been read.

    Args:
        batches: handed out.
        positions, rounds: of each worker's stream: the round it stands in, and raw samples used of that round.
        seen, skipped, largest: raw samples used so far in all rounds, those of them that could not be used, by kind,
            and the most that were lost at once.
        owed: of each worker's stream: samples lost with files that are not among the skipped ones yet, by kind.
    """

    batches: int = 0
    positions: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    largest: int = 1
    owed: list[dict[str, int]] = field(default_factory=list)


@dataclass
class _Delivery:
    """What a worker hands over: a batch, where its stream stands after it, and what was skipped on the way."""

    packed: Any = None
    stream: int = 0
    round: int = 0
    position: int = 0
    tally: Tally = field(default_factory=Tally)
    owed: dict[str, int] = field(default_factory=dict)
    problem: str = ""  # in place of a batch: why there is none

    def pin_memory(self) -> "_Delivery":
        """Called by the loader's pinning thread."""
        self.packed = pin(self.packed)
        return self


class _Batches(IterableDataset):
    def __init__(self, flow: "Flow", state: StreamState):
        self.source, self.transform, self.batch_size = flow.source, flow.transform, flow.batch_size
        self.seed, self.process, self.num_processes = flow.seed, flow.process, flow.num_processes
        allowed = flow.max_skipped_fraction
        self.patience = ENOUGH_SEEN if allowed < 1 else GIVE_UP
        self.collected = math.ceil(1 / (1 - allowed)) if allowed < 1 else 1  # a sample; enough to pass what is allowed
        self.state = state

    def __iter__(self) -> Iterator[_Delivery]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # A loader takes batches from its workers in turn, starting with worker 0; batch b belongs to stream
        # b % num_workers, so after a restart the workers are renumbered.
        stream = (worker + self.state.batches) % num_workers
        try:
            yield from self._deliveries(stream, num_workers)
        except UserError as error:  # as a value: the loader would wrap an exception in its own traceback
            yield _Delivery(problem=str(error))

    def _deliveries(self, stream: int, num_workers: int) -> Iterator[_Delivery]:
        items, tally, tried, limit = [], Tally(), 0, self.patience
        owed = Counter(self.state.owed[stream] if self.state.owed else {})
        for raw, index, position, seed in self._raw_samples(stream, num_workers):
            tally.seen, tried = tally.seen + 1, tried + 1
            try:
                if isinstance(raw, Skipped):
                    tally.lose(raw, owed)
                else:
                    items.append(self.transform(raw, random.Random(seed)))
                    limit = max(GIVE_UP, 100 * self.batch_size)
            except SkipSample as skipped:
                tally.skip(skipped.kind, skipped.detail)
            tally.collect(owed, self.collected)
            if len(items) == self.batch_size:
                yield _Delivery(pack(items), stream, index, position + 1, tally, dict(owed))
                items, tally, tried = [], Tally(), 0
            elif tried >= limit:
                yield _Delivery(tally=tally, problem="hardly any sample can be used")
                return

    def _raw_samples(self, stream: int, num_workers: int) -> Iterator[tuple[Any, int, int, int]]:
        """(raw sample, its round, its place in the round, seed of its random numbers), endless."""
        of_all = self.process * num_workers + stream
        index, position = self.state.rounds[stream], self.state.positions[stream]
        empty = 0
        while empty < GIVE_UP:
            samples = self.source.round(self.seed, of_all, self.num_processes * num_workers, index)
            empty += 1
            for raw in islice(samples, position, None):
                yield raw, index, position, seed_of(self.seed, of_all, index, position)
                position, empty = position + 1, 0
            index, position = index + 1, 0
        raise UserError("there is not a single sample in the data")


class Flow:
    """One data flow of a run: an endless iterator of lists of items that knows where it stands.

    `skipped` (kind → number) and `seen` count raw samples of this process, those of an earlier part of the run
    included.

    Args:
        source: raw (undecoded) samples.
        transform: decodes one raw sample with random numbers of its own, or raises `SkipSample`.
        batch_size: items per batch.
        seed: of the run and of this flow.
        process, num_processes: which share of the data is this process's.
        num_workers: as in torch's DataLoader; the order of the data depends on it.
        name: for messages.
        max_skipped_fraction: of the raw samples; more is an error.
        pin_memory: the batches' tensors lie in page-locked memory, if there is a GPU.
        persistent_workers: False ends the workers after each epoch and starts new ones.

    Raises:
        UserError (from `next`): too many samples cannot be used, or none.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        *,
        seed: int | str,
        process: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        name: str = "data",
        max_skipped_fraction: float = 0.1,
        pin_memory: bool = False,
        persistent_workers: bool = True,
    ):
        self.source, self.transform, self.batch_size, self.seed = source, transform, batch_size, seed
        self.process, self.num_processes, self.num_workers = process, num_processes, num_workers
        self.name, self.max_skipped_fraction = name, max_skipped_fraction
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.persistent_workers = persistent_workers
        self.rewind()

    def rewind(self) -> None:
        """Back to the first batch, as a new run would see it."""
        streams = max(1, self.num_workers)
        self.load_state_dict(StreamState(positions=[0] * streams, rounds=[0] * streams))

    @property
    def skipped(self) -> Counter:
        return self.tally.skipped

    @property
    def seen(self) -> int:
        return self.tally.seen

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of this process in one epoch of the source; None where it has no end."""
        samples = self.source.samples
        return samples and math.ceil(samples / (self.batch_size * self.num_processes))

    def __iter__(self) -> "Flow":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._loader())
            _reading.add(self)
        delivery: _Delivery = next(self._iterator)
        self.tally.add(delivery.tally)
        if problem := self._problem(delivery):
            self.close()
            raise UserError(f"{self.name}: {problem}")
        self.batches += 1
        self.rounds[delivery.stream], self.positions[delivery.stream] = delivery.round, delivery.position
        self.owed[delivery.stream] = delivery.owed
        if not self.persistent_workers and self.num_workers and self._at_epoch_end():
            self.close()
        return unpack(delivery.packed)

    def _loader(self) -> DataLoader:
        # Its own generator: else each new loader draws from the global one, and a continued run from others.
        return DataLoader(
            _Batches(self, self.state_dict()),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            worker_init_fn=_begin_worker,
            generator=torch.Generator().manual_seed(0),
        )

    def _problem(self, delivery: _Delivery) -> str:
        """Why the run must end here, if it must."""
        if delivery.problem:
            counted = f"; skipped were {self.tally.describe()}" if self.skipped else ""
            return f"{delivery.problem}{counted}; mend the data or its path"
        epoch = math.ceil((self.source.samples or ENOUGH_SEEN) / self.num_processes)
        if not self.tally.exceeds(self.max_skipped_fraction, min(ENOUGH_SEEN, epoch)):
            return ""
        return (
            f"skipped {self.tally.describe()}; that is more than dataset.params.max_skipped_fraction "
            f"{self.max_skipped_fraction}; mend the data, or raise the fraction"
        )

    def _at_epoch_end(self) -> bool:
        return bool(self.batches_per_epoch) and self.batches % self.batches_per_epoch == 0

    def close(self) -> None:
        """Ends the loader's workers at once, not when Python gets round to it; reading on begins where it stands."""
        self._iterator = None

    def state_dict(self) -> StreamState:
        places = list(self.positions), list(self.rounds)
        owed = [dict(of_stream) for of_stream in self.owed] if any(self.owed) else []
        return StreamState(self.batches, *places, self.seen, dict(self.skipped), self.tally.largest, owed)

    def load_state_dict(self, state: StreamState) -> None:
        """Continues after the batches that `state` counts.

        Raises:
            UserError: the state was made with another number of workers.
        """
        if len(state.positions) != max(1, self.num_workers):
            raise UserError(
                f"the checkpoint was made with {len(state.positions)} loader workers, dataset.params.num_workers is "
                f"{self.num_workers}; use {len(state.positions)} to continue with the same data"
            )
        self.batches, self.positions = state.batches, list(state.positions)
        self.rounds = list(state.rounds) or [0] * len(self.positions)
        self.owed = [dict(owed) for owed in state.owed] or [{} for _ in self.positions]
        self.tally = Tally(state.seen, Counter(state.skipped), state.largest)
        self._iterator = None


def _as_it_is(delivery: _Delivery) -> _Delivery:
    return delivery


def _begin_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per worker already; else it warns of the fork
    # Schedulers signal all processes of a job. The run finishes its step and saves; it needs its workers for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _pass_over_once)


def _pass_over_once(number: int, _) -> None:
    signal.signal(number, signal.SIG_DFL)  # the loader sends another one to a worker that does not end by itself


_reading: "weakref.WeakSet[Flow]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends the workers of a run that fails, before multiprocessing waits for them."""
    for flow in list(_reading):
        flow.close()
