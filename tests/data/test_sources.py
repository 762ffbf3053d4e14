"""Rounds of streams: endless ones with random numbers of their own, epochs that share out a data set."""

import random
from collections import Counter
from itertools import count, islice

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


def stream(source, stream_number: int, num_streams: int, rounds: int, seed=1) -> list[list]:
    return [list(source.chunk(seed, stream_number, num_streams, index)) for index in range(rounds)]


def flat(rounds: list[list]) -> list:
    return [sample for samples in rounds for sample in samples]


# ---- epochs ----


@pytest.mark.parametrize("num_streams", [1, 2, 3, 5])
def test_an_epoch_visits_each_sample_once_over_all_streams(num_streams):
    source = Epochs(Parts(*[1] * 30))
    rounds = 30 // num_streams
    shares = [flat(stream(source, s, num_streams, rounds)) for s in range(num_streams)]
    assert sorted(flat(shares)) == [(part, 0) for part in range(30)]
    assert all(len(share) == rounds for share in shares)


def test_parts_are_read_whole_by_one_stream_if_there_are_enough():
    source = Epochs(Parts(4, 1, 7, 3, 2, 5))
    shares = [stream(source, s, 2, 3) for s in range(2)]
    assert sorted(flat(flat(shares))) == sorted(
        (p, n) for p, size in enumerate((4, 1, 7, 3, 2, 5)) for n in range(size)
    )
    assert all(len({part for part, _ in samples}) == 1 for share in shares for samples in share)


def test_fewer_parts_than_streams_are_split_between_them():
    source = Epochs(Parts(11, 6))
    shares = [flat(stream(source, s, 5, 6)) for s in range(5)]  # 2 parts in 3 slices: five epochs are 30 pieces
    assert Counter(flat(shares)) == {(part, n): 5 for part, size in enumerate((11, 6)) for n in range(size)}


def test_orders_differ_by_epoch_and_seed_and_repeat_by_seed():
    source = Epochs(Parts(*[1] * 40))
    epochs = [flat(stream(source, 0, 1, 80, seed)) for seed in (1, 1, 2)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert epochs[0][:40] != epochs[0][40:] and sorted(epochs[0][:40]) == sorted(epochs[0][40:])
    assert epochs[0][:40] != sorted(epochs[0][:40])


def test_a_shorter_epoch_takes_other_samples_each_time():
    source = Epochs(Parts(*[1] * 100), samples=10)
    assert source.samples == 10
    epochs = [set(flat(stream(source, 0, 1, 300)[start : start + 10])) for start in range(0, 300, 10)]
    assert all(len(epoch) == 10 for epoch in epochs)
    assert len(set.union(*epochs)) > 80
    assert Epochs(Parts(5, 5), samples=1000).samples == 10, "an epoch is never longer than the data"


def test_an_epoch_of_unknown_length_is_all_there_is():
    source = Epochs(Parts(2, 3, known=False), samples=None)
    assert source.samples is None
    assert len(flat(stream(source, 0, 1, 2))) == 5


# ---- endless ----


def test_endless_rounds_begin_anew_with_other_random_numbers(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 7)

    def read(seed):
        return ((seed, number) for number in count())

    rounds = stream(Resampled(read), 3, 8, 3)
    assert [len(samples) for samples in rounds] == [7, 7, 7]
    assert len({samples[0][0] for samples in rounds}) == 3
    assert not set(flat(rounds)) & set(flat(stream(Resampled(read), 4, 8, 3)))
    assert [len(samples) for samples in stream(Resampled(read, samples=20), 0, 8, 2)] == [3, 3], "a share of the epoch"


def test_seeds_are_the_same_everywhere():
    assert seed_of(1, "t2i", 0) == 1215245237
    assert seed_of(1, "t2i", 0) != seed_of(1, "t2i", 1)


# ---- mixing ----


def test_mixing_keeps_every_sample_and_bounds_how_many_wait():
    samples = list(range(100))
    taken = []
    source = (taken.append(n) or n for n in samples)
    shuffled = mixed(source, 10, random.Random(0))
    first = next(shuffled)
    assert len(taken) == 11 and first in taken
    assert sorted([first, *shuffled]) == samples
    assert list(mixed(iter(samples), 10, random.Random(0))) != samples
    assert list(mixed(iter(samples), 0, random.Random(0))) == samples
    assert list(islice(mixed(iter(samples), 10, random.Random(1)), 5)) == list(
        islice(mixed(iter(samples), 10, random.Random(1)), 5)
    )
