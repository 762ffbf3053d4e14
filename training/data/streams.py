"""Endless streams of batches whose order is a function of (seed, step, process, worker), so a run can continue.

Every loader worker reads one stream of a `Source`. A stream is cut into chunks; to resume at sample n of chunk c, the n
samples before it are skipped without being decoded.
"""

import atexit
import logging
import math
import os
import random
import signal
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common.errors import UserError
from models.images import normalized
from training.data.sources import GIVE_UP, NOTES, SkipCounters, Skipped, Source, seed_of

logger = logging.getLogger(__name__)

SEGMENTS = "segments"  # of a document
SEGMENT_COLUMNS = {"image": "segments/image", "codes": "segments/codes"}  # tensors of a segment → a batch's of all
ENOUGH_SEEN = 200  # raw samples after which the share of skipped ones is judged

Transform = Callable[[Any, random.Random], Any]  # (raw sample, its own generator) → sample; raises Skipped


@dataclass
class StreamState:
    """How far a flow has been read.

    Args:
        batches: number of batches returned.
        positions, chunks: for each worker's stream, the number of raw samples read of its current chunk, and the index
            of that chunk.
        seen, skipped, largest, noted: the `SkipCounters` of this process so far.
        deferred: for each worker's stream, samples of lost files that are not counted as skipped yet, by kind.
    """

    batches: int = 0
    positions: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    largest: int = 1
    deferred: list[dict[str, int]] = field(default_factory=list)
    noted: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: dict) -> "StreamState":
        """The state in a checkpoint; older ones say ``rounds`` for `chunks` and ``owed`` for `deferred`."""
        renamed = {"rounds": "chunks", "owed": "deferred"}
        return cls(**{renamed.get(key, key): value for key, value in content.items()})


class Batch(list):
    """A list of samples. `stacked[key]` is the (B, …) tensor whose rows are the samples' tensors of that key."""

    def __init__(self, samples: list, stacked: dict[str, torch.Tensor] | None = None):
        super().__init__(samples)
        self.stacked = stacked or {}


def stack(samples: list[dict], key: str) -> torch.Tensor:
    """The samples' tensors of one key as (B, …), without a copy if they are rows of one tensor already."""
    stacked = samples.stacked if isinstance(samples, Batch) else {}
    return stacked[key] if key in stacked else torch.stack([sample[key] for sample in samples])


def pack(samples: list) -> Any:
    """Samples that are dictionaries → columns, in which tensors of one shape are stacked; others are unchanged.

    Every tensor that a worker sends takes a file handle: with one per image, 32 workers would exhaust the usual limit
    of a thousand. Arrays are sent by value, which is slower for large ones. The tensors of documents are therefore
    columns of their own, `SEGMENT_COLUMNS`.
    """
    if not isinstance(samples[0], dict) or any(sample.keys() != samples[0].keys() for sample in samples):
        return samples  # texts, and batches in which some samples have pixels and others codes
    columns = {key: _column([sample[key] for sample in samples]) for key in samples[0]}
    if SEGMENTS in columns:
        segments = [segment for document in columns[SEGMENTS] for segment in document]
        for key, column in SEGMENT_COLUMNS.items():
            if tensors := [segment[key] for segment in segments if key in segment]:
                columns[column] = torch.stack(tensors)
        columns[SEGMENTS] = [[_without_tensors(segment) for segment in document] for document in columns[SEGMENTS]]
    return columns


def _without_tensors(segment: dict) -> dict:
    return {key: None if key in SEGMENT_COLUMNS else value for key, value in segment.items()}


def _column(values: list) -> torch.Tensor | list:
    if not isinstance(values[0], torch.Tensor):
        return values
    return torch.stack(values) if len({v.shape for v in values}) == 1 else [value.numpy() for value in values]


def unpack(packed: Any) -> Batch:
    """The inverse of `pack`. Images, sent as uint8, a quarter of the size, become (3, H, W) float32 in [-1, 1]."""
    if not isinstance(packed, dict):
        return Batch([unpack(pack([s]))[0] if isinstance(s, dict) else s for s in packed])
    stacked = {key: column for key, column in packed.items() if isinstance(column, torch.Tensor)}
    for key in ("image", SEGMENT_COLUMNS["image"]):
        if key in stacked and stacked[key].dtype == torch.uint8:
            stacked[key] = normalized(stacked[key])
    if SEGMENTS in packed:
        rows = {key: iter(stacked.pop(column, ())) for key, column in SEGMENT_COLUMNS.items()}
        packed = {key: column for key, column in packed.items() if key not in SEGMENT_COLUMNS.values()}
        packed[SEGMENTS] = [[_with_tensors(segment, rows) for segment in document] for document in packed[SEGMENTS]]
    columns = [
        [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in column]
        for column in (packed | stacked).values()
    ]
    return Batch([dict(zip(packed, values, strict=True)) for values in zip(*columns, strict=True)], stacked)


def _with_tensors(segment: dict, rows: dict[str, Iterator[torch.Tensor]]) -> dict:
    return {key: next(rows[key]) if key in rows else value for key, value in segment.items()}


@dataclass
class _Delivery:
    """Sent by a worker: a batch, the position of its stream after it, and the samples skipped on the way."""

    packed: Any = None
    stream: int = 0
    chunk: int = 0
    position: int = 0
    counters: SkipCounters = field(default_factory=SkipCounters)
    deferred: dict[str, int] = field(default_factory=dict)
    problem: str = ""  # why there is no batch

    def pin_memory(self) -> "_Delivery":
        """Called by the loader's pinning thread."""
        if isinstance(self.packed, dict):
            tensors = {key: column for key, column in self.packed.items() if isinstance(column, torch.Tensor)}
            self.packed |= {key: tensor.pin_memory() for key, tensor in tensors.items()}
        return self


class _Batches(IterableDataset):
    def __init__(self, flow: "Flow", state: StreamState):
        self.source, self.transform, self.batch_size = flow.source, flow.transform, flow.batch_size
        self.seed, self.process, self.num_processes = flow.seed, flow.process, flow.num_processes
        allowed = flow.max_skipped_fraction
        self.patience = ENOUGH_SEEN if allowed < 1 else GIVE_UP
        # Deferred samples counted per raw sample: enough that the share of skipped ones can exceed the allowed one.
        self.deferred_per_sample = math.ceil(1 / (1 - allowed)) if allowed < 1 else 1
        self.state = state

    def __iter__(self) -> Iterator[_Delivery]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # A loader takes batches from its workers in turn, starting with worker 0; batch b belongs to stream
        # b % num_workers, so after a restart the workers are renumbered.
        stream = (worker + self.state.batches) % num_workers
        try:
            yield from self._deliveries(stream, num_workers)
        except UserError as error:  # as a value, since the loader would add its own traceback to an exception
            yield _Delivery(problem=str(error))

    def _deliveries(self, stream: int, num_workers: int) -> Iterator[_Delivery]:
        samples, counters, tried, limit = [], SkipCounters(), 0, self.patience
        deferred = Counter(self.state.deferred[stream] if self.state.deferred else {})
        for raw, index, position, seed in self._raw_samples(stream, num_workers):
            counters.seen, tried = counters.seen + 1, tried + 1
            try:
                if isinstance(raw, Skipped):
                    counters.skip_file(raw, deferred)
                else:
                    sample = self.transform(raw, random.Random(seed))
                    for note in sample.pop("notes", ()) if isinstance(sample, dict) else ():
                        counters.note(note, f"{sample.get('key', '')}: {sample.get('text', '')!r:.80}")
                    samples.append(sample)
                    limit = max(GIVE_UP, 100 * self.batch_size)
            except Skipped as skipped:
                counters.skip(skipped.kind, skipped.detail)
            counters.add_deferred(deferred, self.deferred_per_sample)
            if len(samples) == self.batch_size:
                yield _Delivery(pack(samples), stream, index, position + 1, counters, dict(deferred))
                samples, counters, tried = [], SkipCounters(), 0
            elif tried >= limit:
                yield _Delivery(counters=counters, problem="hardly any sample can be used")
                return

    def _raw_samples(self, stream: int, num_workers: int) -> Iterator[tuple[Any, int, int, int]]:
        """Endless: (raw sample, index of its chunk, position in the chunk, seed of its random numbers)."""
        global_stream = self.process * num_workers + stream
        index, position = self.state.chunks[stream], self.state.positions[stream]
        empty, patience = 0, self.source.patience(self.num_processes * num_workers)
        while empty < patience:
            samples = self.source.chunk(self.seed, global_stream, self.num_processes * num_workers, index)
            empty += 1
            for raw in islice(samples, position, None):
                yield raw, index, position, seed_of(self.seed, global_stream, index, position)
                position, empty = position + 1, 0
            index, position = index + 1, 0
        raise UserError("there is not a single sample in the data")


class Flow:
    """One data flow of a run: an endless, resumable iterator of batches (lists of samples).

    `skipped` (kind → number) and `seen` count raw samples of this process since the start of the run, also across
    restarts.

    Args:
        source: of raw (undecoded) samples.
        transform: decodes one raw sample with its own random generator, or raises `Skipped`.
        batch_size: samples per batch.
        seed: of the run and of this flow.
        process, num_processes: which share of the data this process reads.
        num_workers: as in torch's DataLoader; the order of the data depends on it.
        name: for messages.
        max_skipped_fraction: of the raw samples; skipping more is an error.
        pin_memory: put batches in page-locked memory, if there is a GPU.
        persistent_workers: False ends the workers after each epoch and starts new ones.

    Raises:
        UserError (from `next`): too many samples, or all, are unusable.
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
        """Goes back to the first batch of a new run."""
        streams = max(1, self.num_workers)
        self.load_state_dict(StreamState(positions=[0] * streams, chunks=[0] * streams))

    @property
    def skipped(self) -> Counter:
        return self.counters.skipped

    @property
    def seen(self) -> int:
        return self.counters.seen

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of this process in one epoch of the source; None if its length is unknown."""
        samples = self.source.samples
        return samples and math.ceil(samples / (self.batch_size * self.num_processes))

    def __iter__(self) -> "Flow":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._load()
            _reading.add(self)
        delivery: _Delivery = next(self._iterator)
        for kind in delivery.counters.noted.keys() - self.counters.noted.keys():  # once per run
            if self.process == 0:
                logger.warning("%s: %s", self.name, NOTES[kind].format(delivery.counters.examples[kind]))
        self.counters.add(delivery.counters)
        if problem := self._problem(delivery):
            self.close()
            raise UserError(f"{self.name}: {problem}")
        self.batches += 1
        self.chunks[delivery.stream], self.positions[delivery.stream] = delivery.chunk, delivery.position
        self.deferred[delivery.stream] = delivery.deferred
        epoch = self.batches_per_epoch
        if not self.persistent_workers and self.num_workers and epoch and self.batches % epoch == 0:
            self.close()
        return unpack(delivery.packed)

    def _load(self) -> Iterator:
        # With its own generator: a new loader would otherwise advance the global one, and a resumed run would differ.
        with warnings.catch_warnings():
            # How many workers there are is the user's choice, and changing it changes the data of a resumed run.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            loader = DataLoader(
                _Batches(self, self.state_dict()),
                batch_size=None,
                num_workers=self.num_workers,
                collate_fn=_as_it_is,
                pin_memory=self.pin_memory,
                worker_init_fn=_begin_worker,
                generator=torch.Generator().manual_seed(0),
            )
            return iter(loader)

    def _problem(self, delivery: _Delivery) -> str:
        """Why the run must end here; empty if it need not."""
        if delivery.problem:
            counted = f"; skipped {self.counters.describe()}" if self.skipped else ""
            return f"{delivery.problem}{counted}; fix the data or its path"
        epoch = math.ceil((self.source.samples or ENOUGH_SEEN) / self.num_processes)
        if not self.counters.exceeds(self.max_skipped_fraction, min(ENOUGH_SEEN, epoch)):
            return ""
        return (
            f"skipped {self.counters.describe()}; that is more than dataset.params.max_skipped_fraction "
            f"{self.max_skipped_fraction}; fix the data, or raise the fraction"
        )

    def close(self) -> None:
        """Stops the loader's workers at once, without waiting for garbage collection. `next` starts new ones."""
        self._iterator = None

    def state_dict(self) -> StreamState:
        position = list(self.positions), list(self.chunks)
        deferred = [dict(of_stream) for of_stream in self.deferred] if any(self.deferred) else []
        counters = self.seen, dict(self.skipped), self.counters.largest
        return StreamState(self.batches, *position, *counters, deferred, dict(self.counters.noted))

    def load_state_dict(self, state: StreamState) -> None:
        """Resumes after the first `state.batches` batches; `UserError` if the state was made with another number of
        workers."""
        if len(state.positions) != max(1, self.num_workers):
            raise UserError(
                f"the checkpoint was made with {len(state.positions)} loader workers, dataset.params.num_workers is "
                f"{self.num_workers}; use {len(state.positions)} to continue with the same data"
            )
        self.batches, self.positions = state.batches, list(state.positions)
        self.chunks = list(state.chunks) or [0] * len(self.positions)
        self.deferred = [dict(deferred) for deferred in state.deferred] or [{} for _ in self.positions]
        self.counters = SkipCounters(state.seen, Counter(state.skipped), state.largest, noted=Counter(state.noted))
        self._iterator = None


def _as_it_is(delivery: _Delivery) -> _Delivery:
    return delivery


def _begin_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are parallel already, and tokenizers warn of forks
    # Job schedulers signal all processes of a job. The run then finishes its step and saves, which needs the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)


def _ignore_once(number: int, _) -> None:
    signal.signal(number, signal.SIG_DFL)  # the loader sends a second one to workers that do not end by themselves


_reading: "weakref.WeakSet[Flow]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stops the workers of a failing run before multiprocessing waits for them."""
    for flow in list(_reading):
        flow.close()
