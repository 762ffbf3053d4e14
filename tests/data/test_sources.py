"""Chunks of streams: endless ones with random numbers of their own, epochs that share out a data set."""

import random
from collections import Counter
from itertools import count

import pytest

from training.data import sources
from training.data.sources import Epochs, Resampled, mixed, seed_of


class Parts:
    """Parts of given sizes, whose samples are named (part, number)."""

    def __init__(self, *sizes: int, known: bool = True):
        self.sizes, self.samples = sizes, sum(sizes) if known else None

    def __len__(self):
        return len(self.sizes)

    def read(self, index, rng):
        samples = [(index, number) for number in range(self.sizes[index])]
        rng.shuffle(samples)
        yield from samples


def stream(source, stream_number: int, num_streams: int, chunks: int, seed=1) -> list[list]:
    return [list(source.chunk(seed, stream_number, num_streams, index)) for index in range(chunks)]


def flat(lists: list[list]) -> list:
    return [sample for samples in lists for sample in samples]


@pytest.mark.parametrize(
    ("sizes", "num_streams", "chunks", "epochs"),
    [
        *(([1] * 30, num_streams, 30 // num_streams, 1) for num_streams in (1, 2, 3, 5)),
        ((4, 1, 7, 3, 2, 5), 2, 3, 1),  # parts are read whole by one stream if there are enough
        ((11, 6), 5, 6, 5),  # 2 parts in 3 slices: five epochs are 30 pieces
    ],
)
def test_an_epoch_visits_each_sample_once_over_all_streams(sizes, num_streams, chunks, epochs):
    shares = [stream(Epochs(Parts(*sizes)), number, num_streams, chunks) for number in range(num_streams)]
    assert Counter(flat(flat(shares))) == {(p, n): epochs for p, size in enumerate(sizes) for n in range(size)}
    assert all(len({part for part, _ in chunk}) == 1 for share in shares for chunk in share)


def test_orders_differ_by_epoch_and_seed_and_repeat_by_seed():
    source = Epochs(Parts(*[1] * 40))
    first, again, other = (flat(stream(source, 0, 1, 80, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[:40] != first[40:] and sorted(first[:40]) == sorted(first[40:]) != first[:40]


def test_a_shorter_epoch_takes_other_samples_each_time():
    source = Epochs(Parts(*[1] * 100), samples=10)
    drawn = flat(stream(source, 0, 1, 300))
    epochs = [set(drawn[start : start + 10]) for start in range(0, 300, 10)]
    assert source.samples == 10 and all(len(epoch) == 10 for epoch in epochs) and len(set.union(*epochs)) > 80
    assert Epochs(Parts(5, 5), samples=1000).samples == 10, "an epoch is never longer than the data"
    unknown = Epochs(Parts(2, 3, known=False))
    assert unknown.samples is None and len(flat(stream(unknown, 0, 1, 2))) == 5


def test_endless_chunks_have_seeds_of_their_own(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 7)

    def read(seed):
        return ((seed, number) for number in count())

    chunks = stream(Resampled(read), 3, 8, 3)
    assert [len(samples) for samples in chunks] == [7, 7, 7] and len({samples[0][0] for samples in chunks}) == 3
    assert not set(flat(chunks)) & set(flat(stream(Resampled(read), 4, 8, 3)))
    assert [len(samples) for samples in stream(Resampled(read, samples=20), 0, 8, 2)] == [3, 3], "a share of the epoch"
    assert seed_of(1, "t2i", 0) == 1215245237 != seed_of(1, "t2i", 1), "the same on every machine"


def test_mixing_keeps_every_sample_and_bounds_how_many_wait():
    samples, taken = list(range(100)), []
    shuffled = mixed((taken.append(n) or n for n in samples), 10, random.Random(0))
    first = next(shuffled)
    assert len(taken) == 11 and first in taken
    result = [first, *shuffled]
    assert sorted(result) == samples != result
    assert list(mixed(iter(samples), 10, random.Random(0))) == result
    assert list(mixed(iter(samples), 0, random.Random(0))) == samples
