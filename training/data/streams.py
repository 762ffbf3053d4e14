"""Endless streams of batches whose order is a function of (seed, process, worker, position), so a run can continue.

A stream is cut into rounds of `ROUND` raw samples. Each round starts the reader anew with its own seed; to continue at
raw sample n, only n % ROUND samples are passed over, and none of them is decoded.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common.errors import UserError

ROUND = 20_000

Reader = Callable[[int], Iterator[Any]]  # seed → endless raw samples
Transform = Callable[[Any, random.Random], Any]  # raw sample, its own random numbers → item, or None to pass it over


@dataclass
class StreamState:
    """How far a flow has been read: batches handed out, and raw samples used by each worker's stream."""

    batches: int = 0
    positions: list[int] = field(default_factory=list)


class _Batches(IterableDataset):
    def __init__(
        self, read: Reader, transform: Transform, batch_size: int, seed: int | str, process: int, state: StreamState
    ):
        self.read, self.transform, self.batch_size = read, transform, batch_size
        self.seed, self.process, self.state = seed, process, state

    def __iter__(self) -> Iterator[tuple[list, int, int]]:
        """(items, stream, raw samples used so far by that stream)."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # A loader takes batches from its workers in turn, starting with worker 0; batch b belongs to stream
        # b % num_workers, so after a restart the workers are renumbered.
        stream = (worker + self.state.batches) % num_workers
        position = self.state.positions[stream] if self.state.positions else 0
        items = []
        for raw in self._raw_samples(stream, position):
            item = self.transform(raw, random.Random(self._seed(stream, position)))
            position += 1
            if item is not None:
                items.append(item)
            if len(items) == self.batch_size:
                yield items, stream, position
                items = []

    def _raw_samples(self, stream: int, position: int) -> Iterator[Any]:
        index, skip = divmod(position, ROUND)
        while True:
            yield from islice(self.read(self._seed(stream, "round", index)), skip, ROUND)
            index, skip = index + 1, 0

    def _seed(self, *parts) -> int:
        return zlib.crc32(repr((self.seed, self.process, *parts)).encode())


class Flow:
    """One data flow of a run: an endless iterator of lists of items that knows where it stands.

    Args:
        read: makes an endless iterator of raw (undecoded) samples from a seed.
        transform: decodes one raw sample with random numbers of its own.
        batch_size: items per batch.
        seed, process: of the run and of this process.
        num_workers: as in torch's DataLoader; the order of the data depends on it.
    """

    def __init__(
        self,
        read: Reader,
        transform: Transform,
        batch_size: int,
        *,
        seed: int | str,
        process: int = 0,
        num_workers: int = 0,
    ):
        self._make = lambda state: _Batches(read, transform, batch_size, seed, process, state)
        self.num_workers = num_workers
        self.state = StreamState(positions=[0] * max(1, num_workers))
        self._iterator = None

    def __iter__(self) -> "Flow":
        return self

    def __next__(self) -> list:
        if self._iterator is None:
            # Its own generator: else each new loader draws from the global one, and a continued run from others.
            generator = torch.Generator().manual_seed(0)
            dataset = self._make(self.state_dict())
            self._iterator = iter(
                DataLoader(dataset, batch_size=None, num_workers=self.num_workers, generator=generator)
            )
        items, stream, position = next(self._iterator)
        self.state.batches += 1
        self.state.positions[stream] = position
        return items

    def close(self) -> None:
        """Ends the loader's workers at once, not when Python gets round to it; reading on begins where it stands."""
        self._iterator = None

    def state_dict(self) -> StreamState:
        return StreamState(self.state.batches, list(self.state.positions))

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
        self.state, self._iterator = StreamState(state.batches, list(state.positions)), None
