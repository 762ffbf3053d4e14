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
from training.data.sources import CUT, Epochs, Resampled, SkipCounters, Skipped
from training.data.streams import Batch, Flow, StreamState, pack, stack, unpack


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
        raise Skipped("unreadable", f"number {raw}")
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
def test_batches_depend_on_seed_process_and_worker_alone(num_workers):
    def taken(**settings) -> list[list]:
        return take(make_flow(num_workers, num_processes=2, **settings), 8)

    first = taken()
    assert first == taken() and all(len(batch) == 3 for batch in first)
    assert len(set(raws(first))) == 24, "workers must not read the same samples"
    for other in ({"seed": 2}, {"process": 1}):
        assert not set(raws(first)) & set(raws(taken(**other)))


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (1, 3), (2, 2)])
def test_an_epoch_is_shared_out_over_processes_and_workers(num_processes, num_workers):
    settings = {"using": as_it_is, "source": Epochs(Parts(*[1] * 24)), "batch_size": 2, "num_processes": num_processes}
    seen = Counter()
    for process in range(num_processes):
        for batch in take(make_flow(num_workers, process=process, **settings), 12 // num_processes):
            seen.update(batch)
    assert seen == {(part, 0): 1 for part in range(24)}


# ---- continuing ----


def continued(state: StreamState, *given, **settings) -> Flow:
    """A new flow that goes on from a state which was written to a file."""
    flow = make_flow(*given, **settings)
    flow.load_state_dict(StreamState(**json.loads(json.dumps(dataclasses.asdict(state)))))
    return flow


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", [Resampled(read), Epochs(Parts(*[4] * 9))], ids=["endless", "finite"])
def test_continuing_equals_an_uninterrupted_stream_across_chunks(num_workers, source):
    settings = {"source": source, "using": transform if isinstance(source, Resampled) else as_it_is}
    whole, flow, seen = make_flow(num_workers, **settings), make_flow(num_workers, **settings), 0
    batches = take(whole, 14)
    for stop in (1, 4, 9, 14):
        following = continued(flow.state_dict(), num_workers, **settings)
        assert following.skipped == flow.skipped and following.seen == flow.seen
        assert take(following, stop - seen) == batches[seen:stop]
        assert following.state_dict().batches == stop
        flow, seen = following, stop
    assert max(flow.state_dict().chunks) > 1
    assert flow.skipped == whole.skipped and flow.seen == whole.seen, "nothing is counted twice"


def test_unreadable_samples_are_skipped_and_counted():
    flow = make_flow()
    readable = raws(take(flow, 10))
    state = flow.state_dict()
    used = [raw for index in range(10) for raw in Resampled(read).chunk(1, 0, 1, index)][: state.seen]
    assert readable == [raw for raw in used if raw % 3]
    assert flow.seen == state.seen == 10 * state.chunks[0] + state.positions[0] > 30
    assert flow.skipped == state.skipped == {"unreadable": state.seen - 30}


def test_earlier_samples_are_not_decoded_again():
    decoded = []

    def counting(raw, rng):
        decoded.append(raw)
        return raw, None

    flow = make_flow(using=counting)
    take(flow, 6)
    assert len(decoded) == 18
    take(continued(flow.state_dict(), using=counting), 1)
    assert len(decoded) == 18 + 3


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
    before = torch.get_rng_state(), random.getstate()
    take(make_flow(), 3)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


# ---- workers ----


def test_closing_ends_the_workers_and_loses_nothing():
    flow = make_flow(num_workers=2)
    seen = take(flow, 5)
    assert len(multiprocessing.active_children()) == 2
    flow.close()
    assert multiprocessing.active_children() == []
    assert seen + take(flow, 3) == take(make_flow(num_workers=2), 8)


def test_workers_that_do_not_persist_end_with_the_epoch():
    with_end, without = (
        make_flow(2, source=Resampled(read, samples=12), persistent_workers=persistent) for persistent in (False, True)
    )
    assert with_end.batches_per_epoch == 4
    batches, workers = [], []
    for _ in range(9):
        batches.append(next(with_end))
        workers.append(len(multiprocessing.active_children()))
    assert workers == [2, 2, 2, 0, 2, 2, 2, 0, 2]
    with_end.close()
    assert batches == take(without, 9)


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
@pytest.mark.parametrize(("ending", "code"), [("raise RuntimeError", 1), ("flow.skipped", 0), ("exit(3)", 3)])
def test_a_run_that_ends_takes_its_workers_along(ending, code, repository):
    script = f"from tests.data.test_streams import make_flow\nflow = make_flow(num_workers=2)\nnext(flow)\n{ending}"
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("Traceback") == (code == 1)


def test_another_number_of_workers_is_refused_by_name():
    flow = make_flow(num_workers=0)
    with pytest.raises(UserError, match=r"made with 2 loader workers, dataset\.params\.num_workers is 0; use 2"):
        flow.load_state_dict(StreamState(4, [12, 12]))
    assert flow.state_dict() == StreamState(0, [0], [0]), "a refused state changes nothing"


# ---- bad data ----


def refusing(kind: str, bad):
    """A transform that skips what is bad, and says which."""

    def using(raw, rng):
        if bad(raw):
            raise Skipped(kind, f"number {raw}")
        return raw

    return using


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
    flow = make_flow(max_skipped_fraction=0.1, using=refusing("unreadable", lambda raw: raw % 20 == 0))
    assert len(take(flow, 300)) == 300
    assert 0 < flow.skipped["unreadable"] < 0.1 * flow.seen


def test_a_small_data_set_is_judged_after_one_epoch():
    settings = {"source": Epochs(Parts(*[1] * 12)), "using": refusing("malformed", lambda raw: raw[0] >= 10)}
    flow = make_flow(batch_size=2, max_skipped_fraction=0.1, **settings)
    with pytest.raises(UserError, match=r"skipped \d of 1\d samples"):
        take(flow, 20)
    assert 12 <= flow.seen <= 16


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("allowed", "seen"), [(0.1, 200), (1.0, 400)])
def test_nothing_usable_ends_the_run_in_place_of_an_endless_search(num_workers, allowed, seen, monkeypatch):
    monkeypatch.setattr(streams, "GIVE_UP", 400)
    flow = make_flow(num_workers, using=refusing("empty_text", lambda raw: True), max_skipped_fraction=allowed)
    with pytest.raises(UserError, match="numbers: hardly any sample can be used; skipped .* empty_text") as error:
        next(flow)
    assert flow.seen == seen and "Traceback" not in str(error.value)


def test_a_stretch_without_any_usable_sample_ends_the_run_later_on(monkeypatch):
    monkeypatch.setattr(streams, "GIVE_UP", 300)
    settings = {"source": Resampled(lambda seed: iter(range(10**6)), 10**6), "max_skipped_fraction": 1.0}
    monkeypatch.setattr(sources, "CHUNK", 10**6)
    flow = make_flow(using=refusing("empty_text", lambda raw: raw >= 10), **settings)
    assert len(take(flow, 3)) == 3
    with pytest.raises(UserError, match="hardly any sample"):
        next(flow)


def test_what_a_reader_skips_is_counted_too():
    def with_holes(seed):
        for number in read(seed):
            yield number
            yield Skipped("missing_file", "a.tar")

    flow = make_flow(source=Resampled(with_holes), using=as_it_is)
    take(flow, 4)
    assert flow.skipped == {"missing_file": 11} and flow.seen == 23


@pytest.fixture
def flow_over(monkeypatch):
    """Flows over one long chunk of a reader."""
    monkeypatch.setattr(sources, "CHUNK", 10**6)
    return lambda reader, allowed=0.1: make_flow(
        source=Resampled(reader, 10**6), using=as_it_is, batch_size=10, max_skipped_fraction=allowed
    )


@pytest.mark.slow
def test_lost_shards_count_as_the_samples_lost_with_them(flow_over):
    """A fifth of the shards is gone: 0.4 % of what a reader yields, but a fifth of the data."""

    def shards(seed: int):
        rng = random.Random(seed)
        while True:
            shard = rng.randrange(40)
            yield from [Skipped("missing_file", f"{shard}.tar", 50)] if shard < 8 else [shard] * 50

    flow = flow_over(shards, 0.15)
    with pytest.raises(UserError, match=r"missing_file \(such as \d+\.tar\)"):
        take(flow, 2000)
    assert flow.skipped["missing_file"] > 0.15 * flow.seen
    allowed = flow_over(shards, 0.4)
    take(allowed, 2000)
    assert allowed.counters.skipped.total() / allowed.seen == pytest.approx(0.2, abs=0.05)


def test_one_lost_shard_of_many_ends_no_run_however_early_it_is_read(flow_over):
    def bad_first(seed: int):
        yield Skipped("truncated_shard", "0.tar", 10_000)
        yield from range(10**6)

    flow, after_restart = flow_over(bad_first), flow_over(bad_first)
    take(flow, 30)
    state = flow.state_dict()
    assert state.largest == 10_000 and state.skipped["truncated_shard"] + state.deferred[0]["truncated_shard"] == 10_000
    after_restart.load_state_dict(StreamState(**json.loads(json.dumps(dataclasses.asdict(state)))))
    take(flow, 900), take(after_restart, 900)
    assert after_restart.state_dict() == flow.state_dict()
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
    counters = SkipCounters(seen=100 + lost)
    for _ in range(lost):
        counters.skip("empty_text", "a")
    assert counters.exceeds(fraction, 100)
    assert not counters.exceeds(fraction, 10**6) and not counters.exceeds(1.0, 100)


def test_a_single_shard_that_is_mostly_lost_ends_the_run_when_it_is_read_again(flow_over):
    def one_shard(seed: int):
        while True:
            yield from [*range(30), Skipped("truncated_shard", "0.tar", 970)]

    flow = flow_over(one_shard)
    with pytest.raises(UserError, match=r"truncated_shard \(such as 0.tar\)"):
        take(flow, 120)
    assert flow.batches > 30


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


# ---- batches between processes ----


def items() -> list[dict]:
    return [
        {"image": torch.full((3, 4, 4), float(n)), "input_ids": torch.arange(n + 1), "text": f"text {n}"}
        for n in range(3)
    ]


MIXED = [{"image": torch.zeros(3, 4, 4), "text": "a"}, {"codes": torch.zeros(16), "text": "b"}]


@pytest.mark.parametrize("given", [items(), ["a", "b"], MIXED])
def test_items_come_out_of_a_worker_as_they_went_in(given):
    assert repr(unpack(pack(given))) == repr(given), "which shows small tensors whole"


def test_there_is_one_tensor_for_each_key_not_for_each_item():
    packed = pack(items())
    batch = unpack(packed)
    assert sum(isinstance(column, torch.Tensor) for column in packed.values()) == 1
    assert batch.stacked["image"].shape == (3, 3, 4, 4)
    assert batch[1]["image"].data_ptr() == batch.stacked["image"][1].data_ptr(), "rows of it, not copies"
    assert "input_ids" not in batch.stacked, "they differ in length"
    pixels = stack(batch, "image")
    assert pixels is batch.stacked["image"]
    assert torch.equal(stack(batch[:2], "image"), pixels[:2]), "a part of a batch is a plain list"
    assert torch.equal(stack(items(), "image"), pixels)
    assert Batch(["a"]).stacked == {}


def test_what_is_noted_of_used_samples_is_counted_and_told_once(caplog):
    def noting(raw, rng):
        return {"key": f"number {raw}", "text": "a long text"} | ({"notes": (CUT,)} if raw % 2 else {})

    flow = make_flow(using=noting, batch_size=4)
    batches = take(flow, 5)
    odd = sum(int(item["key"].split()[1]) % 2 for batch in batches for item in batch)
    assert flow.counters.noted == {CUT: odd} and not flow.skipped and "notes" not in batches[0][0]
    assert len(caplog.records) == 1 and "numbers: texts are longer than a row" in caplog.text
    assert "a long text" in caplog.text
    again = continued(flow.state_dict(), using=noting, batch_size=4)
    assert again.counters.noted == {CUT: odd}
    take(again, 1)
    assert len(caplog.records) == 1


def test_many_workers_are_the_users_choice(recwarn):
    flow = make_flow(
        num_workers=3
    )  # more than any machine of two cores; with two warnings, of a loader and of its start
    next(flow)
    flow.close()
    assert not recwarn.list
