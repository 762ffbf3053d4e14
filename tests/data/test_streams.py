"""The order of data is a function of seed, process, worker and position; a stream continues where it was left."""

import multiprocessing
import random
from itertools import islice

import pytest
import torch

from common.errors import UserError
from training.data import streams
from training.data.streams import Flow, StreamState


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(streams, "ROUND", 10)


def read(seed: int):
    """Endless numbers that tell where they come from."""
    rng = random.Random(seed)
    while True:
        yield rng.randrange(10**9)


def transform(raw: int, rng: random.Random):
    """A third of the samples is unreadable."""
    return None if raw % 3 == 0 else (raw, rng.random())


def make_flow(num_workers: int = 0, *, seed: int = 1, process: int = 0, batch_size: int = 3, using=transform) -> Flow:
    return Flow(read, using, batch_size, seed=seed, process=process, num_workers=num_workers)


def take(flow: Flow, count: int) -> list[list]:
    return list(islice(flow, count))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_seed_gives_the_same_batches(num_workers):
    first, second = take(make_flow(num_workers), 8), take(make_flow(num_workers), 8)
    assert first == second
    assert all(len(batch) == 3 for batch in first)
    raws = [raw for batch in first for raw, _ in batch]
    assert len(set(raws)) == len(raws), "workers must not read the same samples"


def test_other_seeds_and_processes_see_other_data():
    batches = [take(make_flow(seed=s, process=p), 8) for s, p in [(1, 0), (2, 0), (1, 1)]]
    samples = [{raw for batch in taken for raw, _ in batch} for taken in batches]
    assert not samples[0] & samples[1] and not samples[0] & samples[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_continuing_equals_an_uninterrupted_stream_across_rounds(num_workers):
    whole = take(make_flow(num_workers), 14)
    flow = make_flow(num_workers)
    seen = 0
    for stop in (1, 4, 9, 14):  # 14 batches of 3 readable samples are more than four rounds of 10
        following = make_flow(num_workers)
        following.load_state_dict(flow.state_dict())
        assert take(following, stop - seen) == whole[seen:stop]
        flow, seen = following, stop
    assert sum(flow.state.positions) > 40
    assert flow.state.batches == 14


def test_unreadable_samples_are_passed_over_and_counted_in_the_position():
    flow = make_flow()
    readable = [raw for batch in take(flow, 10) for raw, _ in batch]
    (position,) = flow.state.positions
    raws = []
    for index in range(10):
        reader = read(streams._Batches(read, transform, 3, 1, 0, StreamState())._seed(0, "round", index))
        raws += islice(reader, 10)
    assert readable == [raw for raw in raws[:position] if raw % 3]
    assert len(readable) < position


def test_passed_over_samples_are_not_decoded_again():
    decoded = []

    def counting(raw, rng):
        decoded.append(raw)
        return raw

    flow = make_flow(using=counting)
    take(flow, 6)
    state, before = flow.state_dict(), len(decoded)
    assert before == 18
    following = make_flow(using=counting)
    following.load_state_dict(state)
    take(following, 1)
    assert len(decoded) == before + 3


def test_the_state_is_a_snapshot():
    flow = make_flow()
    state = flow.state_dict()
    take(flow, 2)
    assert state == StreamState(0, [0])
    flow.load_state_dict(state)
    assert take(flow, 2) == take(make_flow(), 2)


def test_reading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    take(make_flow(), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_closing_ends_the_workers_and_loses_nothing():
    flow = make_flow(num_workers=2)
    seen = take(flow, 5)
    assert len(multiprocessing.active_children()) == 2
    flow.close()
    assert multiprocessing.active_children() == []
    assert seen + take(flow, 3) == take(make_flow(num_workers=2), 8)


def test_another_number_of_workers_is_refused_by_name():
    flow = make_flow(num_workers=0)
    with pytest.raises(UserError, match=r"made with 2 loader workers, dataset\.params\.num_workers is 0; use 2"):
        flow.load_state_dict(StreamState(4, [12, 12]))
    assert flow.state == StreamState(0, [0]), "a refused state changes nothing"
