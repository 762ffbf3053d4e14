"""The order of data is a function of seed, step, process and worker; a stream continues where it was left."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
import torch

from common.errors import UserError
from tests.data.test_sources import Parts
from training.data import sources, streams
from training.data.sources import Epochs, Resampled, SkipCounters, Skipped, SkipSample
from training.data.streams import Flow, StreamState


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 10)


def read(seed: int):
    """Endless numbers that tell where they come from."""
    rng = random.Random(seed)
    while True:
        yield rng.randrange(10**9)


def transform(raw: int, rng: random.Random):
    """A third of the samples is unreadable."""
    if raw % 3 == 0:
        raise SkipSample("unreadable", f"number {raw}")
    return raw, rng.random()


def as_it_is(raw, rng):
    return raw


def make_flow(num_workers: int = 0, *, using=transform, source=None, batch_size: int = 3, **settings) -> Flow:
    settings = {"seed": 1, "max_skipped_fraction": 0.9, "name": "numbers"} | settings
    return Flow(source or Resampled(read), using, batch_size, num_workers=num_workers, **settings)


def take(flow: Flow, count: int) -> list[list]:
    return list(islice(flow, count))


def raws(batches: list[list]) -> list:
    return [raw for batch in batches for raw, *_ in batch]


# ---- order ----


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_seed_gives_the_same_batches(num_workers):
    first, second = take(make_flow(num_workers), 8), take(make_flow(num_workers), 8)
    assert first == second
    assert all(len(batch) == 3 for batch in first)
    assert len(set(raws(first))) == 24, "workers must not read the same samples"


def test_other_seeds_and_processes_see_other_data():
    of_process = {"num_processes": 2}
    batches = [take(make_flow(seed=s, process=p, **of_process), 8) for s, p in [(1, 0), (2, 0), (1, 1)]]
    samples = [set(raws(taken)) for taken in batches]
    assert not samples[0] & samples[1] and not samples[0] & samples[2]


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (1, 3), (2, 2)])
def test_an_epoch_is_shared_out_over_processes_and_workers(num_processes, num_workers):
    seen = Counter()
    for process in range(num_processes):
        flow = make_flow(
            num_workers,
            using=as_it_is,
            source=Epochs(Parts(*[1] * 24)),
            batch_size=2,
            process=process,
            num_processes=num_processes,
        )
        seen.update(sample for batch in take(flow, 12 // num_processes) for sample in batch)
    assert seen == {(part, 0): 1 for part in range(24)}


# ---- continuing ----


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", [Resampled(read), Epochs(Parts(*[4] * 9))], ids=["endless", "finite"])
def test_continuing_equals_an_uninterrupted_stream_across_rounds(num_workers, source):
    using = transform if isinstance(source, Resampled) else as_it_is
    whole = take(make_flow(num_workers, source=source, using=using), 14)
    flow = make_flow(num_workers, source=source, using=using)
    seen = 0
    for stop in (1, 4, 9, 14):
        following = make_flow(num_workers, source=source, using=using)
        following.load_state_dict(StreamState(**json.loads(json.dumps(dataclasses.asdict(flow.state_dict())))))
        assert take(following, stop - seen) == whole[seen:stop]
        assert following.state_dict().batches == stop
        flow, seen = following, stop
    assert max(flow.state_dict().chunks) > 1


def test_unreadable_samples_are_passed_over_and_counted():
    flow = make_flow()
    readable = raws(take(flow, 10))
    state = flow.state_dict()
    used = [raw for index in range(10) for raw in Resampled(read).chunk(1, 0, 1, index)][: state.seen]
    assert readable == [raw for raw in used if raw % 3]
    assert flow.seen == state.seen == 10 * state.chunks[0] + state.positions[0]
    assert flow.skipped == state.skipped == {"unreadable": state.seen - 30}
    assert state.skipped["unreadable"] > 0


def test_counts_survive_a_restart_and_count_nothing_twice():
    whole = make_flow(2)
    take(whole, 12)
    first = make_flow(2)
    take(first, 5)
    second = make_flow(2)
    second.load_state_dict(first.state_dict())
    assert second.skipped == first.skipped and second.seen == first.seen
    take(second, 7)
    assert second.skipped == whole.skipped and second.seen == whole.seen


def test_passed_over_samples_are_not_decoded_again():
    decoded = []

    def counting(raw, rng):
        decoded.append(raw)
        return raw, None

    flow = make_flow(using=counting)
    take(flow, 6)
    state, before = flow.state_dict(), len(decoded)
    assert before == 18
    following = make_flow(using=counting)
    following.load_state_dict(state)
    take(following, 1)
    assert len(decoded) == before + 3


def test_the_state_is_a_snapshot_and_rewinding_goes_to_the_beginning():
    flow = make_flow()
    state = flow.state_dict()
    first = take(flow, 2)
    assert state == StreamState(0, [0], [0])
    flow.load_state_dict(state)
    assert take(flow, 2) == first
    flow.rewind()
    assert take(flow, 2) == first and flow.state_dict().batches == 2


def test_reading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    take(make_flow(), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


# ---- workers ----


def test_closing_ends_the_workers_and_loses_nothing():
    flow = make_flow(num_workers=2)
    seen = take(flow, 5)
    assert len(multiprocessing.active_children()) == 2
    flow.close()
    assert multiprocessing.active_children() == []
    assert seen + take(flow, 3) == take(make_flow(num_workers=2), 8)


def test_workers_that_do_not_persist_end_with_the_epoch():
    def flow(persistent):
        source = Resampled(read, samples=12)
        return make_flow(2, source=source, persistent_workers=persistent)

    with_end = flow(persistent=False)
    assert with_end.batches_per_epoch == 4
    batches, workers = [], []
    for _ in range(9):
        batches.append(next(with_end))
        workers.append(len(multiprocessing.active_children()))
    assert workers == [2, 2, 2, 0, 2, 2, 2, 0, 2]
    with_end.close()
    assert batches == take(flow(persistent=True), 9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_whole_job_leaves_the_workers_their_work(number):
    flow = make_flow(num_workers=2)
    seen = take(flow, 2)
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, number)
    seen += take(flow, 30)
    assert seen == take(make_flow(num_workers=2), 32)
    flow.close()
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["raise RuntimeError", "flow.skipped", "sys.exit(3)"])
def test_a_run_that_ends_takes_its_workers_along(ending, repository):
    script = f"""
import sys
from tests.data.test_streams import make_flow
flow = make_flow(num_workers=2)
next(flow)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=100)
    assert done.returncode == {"raise RuntimeError": 1, "flow.skipped": 0, "sys.exit(3)": 3}[ending], done.stderr
    assert done.stderr.count("Traceback") == (ending == "raise RuntimeError")


def test_another_number_of_workers_is_refused_by_name():
    flow = make_flow(num_workers=0)
    with pytest.raises(UserError, match=r"made with 2 loader workers, dataset\.params\.num_workers is 0; use 2"):
        flow.load_state_dict(StreamState(4, [12, 12]))
    assert flow.state_dict() == StreamState(0, [0], [0]), "a refused state changes nothing"


# ---- bad data ----


def mostly_good(raw: int, rng: random.Random):
    if raw % 20 == 0:
        raise SkipSample("unreadable", f"number {raw}")
    return raw, None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_samples_end_the_run_and_say_which(num_workers):
    flow = make_flow(num_workers, max_skipped_fraction=0.1)
    with pytest.raises(UserError) as error:
        take(flow, 200)
    assert 200 <= flow.seen < 240
    message = str(error.value)
    assert message.startswith(f"numbers: skipped {flow.skipped['unreadable']} of {flow.seen} samples (")
    assert "unreadable (such as number " in message
    assert "dataset.params.max_skipped_fraction 0.1" in message and "fix the data" in message


def test_a_few_bad_samples_do_not():
    flow = make_flow(max_skipped_fraction=0.1, using=mostly_good)
    assert len(take(flow, 300)) == 300
    assert 0 < flow.skipped["unreadable"] < 0.1 * flow.seen


def test_a_small_data_set_is_judged_after_one_epoch():
    def last_two_are_bad(raw, rng):
        if raw[0] >= 10:
            raise SkipSample("malformed", str(raw))
        return raw

    flow = make_flow(source=Epochs(Parts(*[1] * 12)), using=last_two_are_bad, batch_size=2, max_skipped_fraction=0.1)
    with pytest.raises(UserError, match=r"skipped \d of 1\d samples"):
        take(flow, 20)
    assert 12 <= flow.seen <= 16


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("allowed", [0.1, 1.0])
def test_nothing_usable_ends_the_run_in_place_of_an_endless_search(num_workers, allowed, monkeypatch):
    monkeypatch.setattr(streams, "GIVE_UP", 400)

    def never(raw, rng):
        raise SkipSample("empty_text", "all of them")

    flow = make_flow(num_workers, using=never, max_skipped_fraction=allowed)
    with pytest.raises(UserError, match="numbers: hardly any sample can be used; skipped .* empty_text") as error:
        next(flow)
    assert flow.seen == (200 if allowed < 1 else 400)
    assert "Traceback" not in str(error.value)


def test_a_stretch_without_any_usable_sample_ends_the_run_later_on(monkeypatch):
    monkeypatch.setattr(streams, "GIVE_UP", 300)

    def first_ten(raw, rng):
        if raw[0] >= 10:
            raise SkipSample("empty_text", "")
        return raw

    class InOrder(Epochs):
        def chunk(self, seed, stream, num_streams, index):
            yield (index, 0)

    flow = make_flow(source=InOrder(Parts(*[1] * 10**6)), using=first_ten, max_skipped_fraction=1.0)
    assert len(take(flow, 3)) == 3
    with pytest.raises(UserError, match="hardly any sample"):
        next(flow)


def test_what_a_reader_skips_is_counted_too():
    def with_a_hole(seed):
        for number in read(seed):
            yield number
            yield Skipped("missing_file", "a.tar")

    flow = make_flow(source=Resampled(with_a_hole), using=as_pairs)
    take(flow, 4)
    assert flow.skipped == {"missing_file": 11} and flow.seen == 23


def with_shards(bad: set[int], size: int = 50, count: int = 40):
    """Endless reader of shards of `size` samples, drawn with replacement; of the `bad` ones nothing can be read."""

    def read(seed: int):
        rng = random.Random(seed)
        while True:
            if (shard := rng.randrange(count)) in bad:
                yield Skipped("missing_file", f"{shard}.tar", size)
            else:
                yield from ((shard, number) for number in range(size))

    return Resampled(read, 10**6)


@pytest.mark.slow
def test_lost_shards_count_as_the_samples_lost_with_them(monkeypatch):
    """A fifth of the shards is gone: 0.4 % of what a reader yields, but a fifth of the data."""
    monkeypatch.setattr(sources, "CHUNK", 10**6)
    flow = make_flow(source=with_shards(set(range(8))), using=as_pairs, batch_size=10, max_skipped_fraction=0.15)
    with pytest.raises(UserError, match=r"missing_file \(such as \d+\.tar\)"):
        take(flow, 2000)
    assert flow.skipped["missing_file"] > 0.15 * flow.seen
    allowed = make_flow(source=with_shards(set(range(8))), using=as_pairs, batch_size=10, max_skipped_fraction=0.4)
    take(allowed, 2000)
    assert allowed.counters.share == pytest.approx(0.2, abs=0.05)


def test_one_lost_shard_of_many_ends_no_run_however_early_it_is_read(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 10**6)

    def bad_first(seed: int):
        yield Skipped("truncated_shard", "0.tar", 10_000)
        yield from ((1, number) for number in range(10**6))

    flow = make_flow(source=Resampled(bad_first, 10**6), using=as_pairs, max_skipped_fraction=0.1)
    take(flow, 100)
    state = flow.state_dict()
    assert state.largest == 10_000 and state.skipped["truncated_shard"] + state.deferred[0]["truncated_shard"] == 10_000
    continued = make_flow(source=Resampled(bad_first, 10**6), using=as_pairs, max_skipped_fraction=0.1)
    continued.load_state_dict(StreamState(**json.loads(json.dumps(dataclasses.asdict(state)))))
    take(flow, 3000), take(continued, 3000)
    assert continued.state_dict() == flow.state_dict(), "nor after a restart"
    assert flow.skipped == {"truncated_shard": 10_000} and not flow.state_dict().deferred


def test_files_lost_at_the_start_of_many_workers_do_not_outweigh_what_is_still_being_read():
    """Two of 32 first shards are gone, 1 % of all: noted at once they would be nearly all that was seen."""
    counters, deferred = SkipCounters(), [Counter() for _ in range(32)]
    for step in range(300):
        for worker in range(32):
            counters.seen += 1
            if step == 0 and worker < 2:
                counters.skip_file(Skipped("missing_file", "gone.tar", 10_000), deferred[worker])
            counters.add_deferred(deferred[worker], 2)
            assert not counters.exceeds(0.15, 200)
    assert counters.skipped == {"missing_file": 2 * 601}


@pytest.mark.parametrize(("fraction", "lost"), [(0.0, 1), (0.1, 25), (0.1, 5000)])
def test_samples_that_are_skipped_one_by_one_are_judged_as_they_come(fraction, lost):
    counters = SkipCounters(seen=100)
    for _ in range(lost):
        counters.seen += 1
        counters.skip("empty_text", "a")
    assert counters.exceeds(fraction, 100)
    assert not counters.exceeds(fraction, 10**6) and not counters.exceeds(1.0, 100)


def test_a_single_shard_that_is_mostly_lost_ends_the_run_when_it_is_read_again(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 10**6)

    def one_shard(seed: int):
        while True:
            yield from ((0, number) for number in range(30))
            yield Skipped("truncated_shard", "0.tar", 970)

    flow = make_flow(source=Resampled(one_shard, 10**6), using=as_pairs, max_skipped_fraction=0.1)
    with pytest.raises(UserError, match=r"truncated_shard \(such as 0.tar\)"):
        take(flow, 400)
    assert flow.batches > 100


def as_pairs(raw, rng):
    return raw, None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_without_a_sample_are_an_error(num_workers, monkeypatch):
    monkeypatch.setattr(streams, "GIVE_UP", 50)
    with pytest.raises(UserError, match="numbers: there is not a single sample"):
        next(make_flow(num_workers, source=Epochs(Parts(0, 0, known=False))))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_users_mistake_found_by_a_worker_is_one_line(num_workers):
    def refuse(raw, rng):
        raise UserError("this cannot be mirrored")

    with pytest.raises(UserError) as error:
        next(make_flow(num_workers, using=refuse))
    assert str(error.value) == "numbers: this cannot be mirrored; fix the data or its path"


def test_a_checkpoint_with_the_former_names_still_loads():
    former = {"batches": 2, "positions": [3], "rounds": [1], "owed": [{"missing_file": 4}]}
    state = StreamState.from_dict(former)
    assert state.chunks == [1] and state.deferred == [{"missing_file": 4}]
    assert StreamState.from_dict(dataclasses.asdict(state)) == state
