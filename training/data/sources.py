"""Where raw samples come from: endless streams, cut into rounds that can each be read on their own.

Round r of stream s is a function of the run's seed, s and r alone. So a run continues at any place by reading from the
beginning of the round it stood in; nothing before that is read again.
"""

import math
import random
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import numpy as np

ROUND = 20_000  # raw samples between two starts of an endless reader

Reader = Callable[[int], Iterator[Any]]  # seed → endless raw samples


def seed_of(*parts) -> int:
    """A seed of 32 bits for each tuple of names and numbers, the same in every process and Python."""
    return zlib.crc32(repr(parts).encode())


class Source(Protocol):
    """Raw samples as `num_streams` streams, all (process, worker) pairs of a run together.

    `samples`: length of one epoch over all streams; None where it is not known.
    """

    samples: int | None

    def round(self, seed: int | str, stream: int, num_streams: int, index: int) -> Iterator[Any]:
        """The raw samples of one stretch of a stream; finite, perhaps empty."""


class Units(Protocol):
    """A finite data set in parts that are read one by one: files, row groups, single samples.

    `samples`: how many all parts hold together; None where that is not known.
    """

    samples: int | None

    def __len__(self) -> int: ...

    def read(self, index: int, rng: random.Random) -> Iterator[Any]:
        """The raw samples of one part, in an order of `rng`."""


class Resampled:
    """Every round draws with replacement, each stream with random numbers of its own.

    Args:
        read: makes an endless iterator of raw samples from a seed.
        samples: what one epoch counts; a new round begins with it.
    """

    def __init__(self, read: Reader, samples: int | None = None):
        self.read, self.samples = read, samples

    def round(self, seed: int | str, stream: int, num_streams: int, index: int) -> Iterator[Any]:
        length = ROUND if self.samples is None else min(ROUND, math.ceil(self.samples / num_streams))
        return islice(self.read(seed_of(seed, stream, "round", index)), length)


class Epochs:
    """Every epoch visits each part once over all streams: a common permutation, dealt out in turn.

    Piece number ``stream + num_streams * round`` of the endless sequence of permutations belongs to a stream's round.
    A piece is one part; where there are fewer parts than streams, it is every k-th sample of one.

    Args:
        units: the data set.
        samples: length of an epoch, if it is to end before all was seen; counted in whole parts, rounded up.
    """

    def __init__(self, units: Units, samples: int | None = None):
        self.units = units
        self.samples = samples if units.samples is None else min(samples or units.samples, units.samples)

    def round(self, seed: int | str, stream: int, num_streams: int, index: int) -> Iterator[Any]:
        slices = math.ceil(num_streams / len(self.units))
        pieces = len(self.units) * slices
        epoch, place = divmod(stream + num_streams * index, self._pieces_per_epoch(pieces))
        unit, part = divmod(int(_permutation(seed_of(seed, "epoch", epoch), pieces)[place]), slices)
        order = random.Random(seed_of(seed, "epoch", epoch, "unit", unit))
        return islice(self.units.read(unit, order), part, None, slices)

    def _pieces_per_epoch(self, pieces: int) -> int:
        if not self.units.samples:
            return pieces
        return max(1, math.ceil(pieces * self.samples / self.units.samples))


@lru_cache(maxsize=6)  # two epochs of three flows
def _permutation(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(length)


def mixed(samples: Iterator, buffer_size: int, rng: random.Random) -> Iterator:
    """Each sample waits in a buffer for a random time; what is left at the end comes in random order."""
    buffer = []
    for sample in samples:
        if len(buffer) < buffer_size:
            buffer.append(sample)
            continue
        if buffer:
            index = rng.randrange(len(buffer))
            buffer[index], sample = sample, buffer[index]
        yield sample
    rng.shuffle(buffer)
    yield from buffer
