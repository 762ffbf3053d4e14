"""Sources of raw samples: endless streams, cut into chunks that can each be read independently.

Chunk c of stream s depends only on the run's seed, s and c. A run therefore resumes by reading from the beginning of
its current chunk; nothing before that is read again.
"""

import math
import random
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import numpy as np

CHUNK = 20_000  # raw samples in a chunk of an endless reader

Reader = Callable[[int], Iterator[Any]]  # seed → endless raw samples


def seed_of(*parts) -> int:
    """A 32-bit seed from names and numbers, the same in every process and Python version."""
    return zlib.crc32(repr(parts).encode())


class Source(Protocol):
    """Raw samples, split into `num_streams` streams: one for each loader worker of each process.

    `samples`: length of one epoch over all streams; None if unknown.
    """

    samples: int | None

    def chunk(self, seed: int | str, stream: int, num_streams: int, index: int) -> Iterator[Any]:
        """The raw samples of chunk `index` of a stream; finite, may be empty."""


class Units(Protocol):
    """A finite data set in units that are read one at a time: files, row groups, single samples.

    `samples`: total number over all units; None if unknown.
    """

    samples: int | None

    def __len__(self) -> int: ...

    def read(self, index: int, rng: random.Random) -> Iterator[Any]:
        """The raw samples of one unit, in an order determined by `rng`."""


class Resampled:
    """Samples with replacement; each chunk of each stream has its own seed.

    Args:
        read: makes an endless iterator of raw samples from a seed.
        samples: length of an epoch; a chunk is at most a stream's share of it.
    """

    def __init__(self, read: Reader, samples: int | None = None):
        self.read, self.samples = read, samples

    def chunk(self, seed: int | str, stream: int, num_streams: int, index: int) -> Iterator[Any]:
        length = CHUNK if self.samples is None else min(CHUNK, math.ceil(self.samples / num_streams))
        return islice(self.read(seed_of(seed, stream, "round", index)), length)


class Epochs:
    """Every epoch visits each unit once over all streams: one permutation, dealt out to the streams in turn.

    A chunk of a stream is piece number ``stream + num_streams * index`` of the endless sequence of permutations. A
    piece is one unit or, if there are fewer units than streams, every k-th sample of one.

    Args:
        units: the data set.
        samples: length of an epoch that ends before all data was seen; rounded up to whole units.
    """

    def __init__(self, units: Units, samples: int | None = None):
        self.units = units
        self.samples = samples if units.samples is None else min(samples or units.samples, units.samples)

    def chunk(self, seed: int | str, stream: int, num_streams: int, index: int) -> Iterator[Any]:
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
    """Shuffles a stream through a buffer of `buffer_size` samples."""
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
