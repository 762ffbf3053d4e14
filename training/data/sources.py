"""Sources of raw samples, and how readers and transforms report the unusable ones.

A source is endless streams, cut into chunks that can each be read independently. Chunk c of stream s depends only on
the run's seed, s and c. A run therefore resumes by reading from the beginning of its current chunk; nothing before that
is read again.
"""

import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import numpy as np

from common.errors import shown
from common.files import BYTE_ORDER_MARK

CHUNK = 20_000  # raw samples in a chunk of an endless reader
MAX_EXAMPLE = 1000  # characters
GIVE_UP = 10_000  # raw samples, or empty chunks, without a single batch

Reader = Callable[[int], Iterator[Any]]  # seed → endless raw samples


def seed_of(*parts) -> int:
    """A 32-bit seed from names and numbers, the same in every process and Python version."""
    return zlib.crc32(repr(parts).encode())


class Source(Protocol):
    """Raw samples, split into `num_streams` streams: one for each loader worker of each process.

    `samples`: length of one epoch over all streams; None if unknown.
    """

    samples: int | None

    def patience(self, num_streams: int) -> int:
        """Empty chunks of a stream, one after another, after which there is nothing to be expected."""

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

    def patience(self, num_streams: int) -> int:
        return GIVE_UP

    def chunk(self, seed: int | str, stream: int, num_streams: int, index: int) -> Iterator[Any]:
        length = CHUNK if self.samples is None else min(CHUNK, math.ceil(self.samples / num_streams))
        return islice(self.read(seed_of(seed, stream, "round", index)), length)  # "round": of older checkpoints


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

    def patience(self, num_streams: int) -> int:
        # In a hundred epochs a stream reads every unit almost surely.
        return min(GIVE_UP, 100 * max(num_streams, len(self.units)))

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


@lru_cache(maxsize=6)  # two epochs of a few flows
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


# ---- bad data ----

UNREADABLE_IMAGE = "unreadable_image"  # broken, truncated, enormous, or no image at all
TRUNCATED_SHARD = "truncated_shard"  # a shard or row group that ends early or is corrupt; counts its lost samples
MISSING_FILE = "missing_file"
EMPTY_TEXT = "empty_text"
MALFORMED_ITEM = "malformed_item"  # parts are missing, of the wrong type, or cannot be parsed
BAD_CONVERSATION = "bad_conversation"  # turns out of order, or no supervised token
BAD_CODES = "bad_codes"  # of another length or range than the model's
BAD_DOCUMENT = "bad_document"  # images that do not match its texts, or nothing learned within its length
KINDS = (UNREADABLE_IMAGE, TRUNCATED_SHARD, MISSING_FILE, EMPTY_TEXT, MALFORMED_ITEM)
KINDS += (BAD_CONVERSATION, BAD_CODES, BAD_DOCUMENT)

# What is noted of samples that are used.
ROTATED = "rotated"  # by EXIF data that were not applied
CUT = "cut"  # the text is longer than the row has room for
CUT_DOCUMENT = "cut_document"  # the document has more segments than its row has room for
NOTES = {
    ROTATED: "images carry a rotation, ignored as published (such as {}); image.exif=apply turns them",
    CUT: "texts are longer than a row has room for, and cut (such as {}); see dataset.preprocessing.max_seq_length",
    CUT_DOCUMENT: "documents are longer than mixed.max_length, and cut after a whole segment (such as {})",
}


class Skipped(Exception):
    """What cannot be used: raised for a sample, or yielded by a reader in place of one, or of the rest of a file.

    Args:
        count: number of lost samples, as far as the reader can know.
    """

    def __init__(self, kind: str, detail: str, count: int = 1):
        super().__init__(kind, detail, count)
        self.kind, self.detail, self.count = kind, detail, count


def checked_text(text: object, name: str) -> str:
    """The text without byte order marks; `Skipped` if it is none, or has a lone surrogate (``"\\ud83d"`` in JSON),
    which tokenizers reject."""
    if not isinstance(text, str):
        raise Skipped(MALFORMED_ITEM, f"{name}: {text!r:.80} is no text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Skipped(MALFORMED_ITEM, f"{name}: {error}") from None
    return text.replace(BYTE_ORDER_MARK, "")


@dataclass
class SkipCounters:
    """Counts raw samples and skipped ones by kind, with one example of each kind.

    Samples lost with a file count as seen, too. `largest` is the largest number of samples lost with one file, `noted`
    the number of samples that were used, but of which something was noted.
    """

    seen: int = 0
    skipped: Counter = field(default_factory=Counter)
    largest: int = 1
    examples: dict[str, str] = field(default_factory=dict)
    noted: Counter = field(default_factory=Counter)

    def note(self, kind: str, detail: str) -> None:
        """Counts a sample that is used; `kind` of `NOTES`."""
        self.noted[kind] += 1
        self._show(kind, detail)

    def _show(self, kind: str, detail: str) -> None:
        """Keeps the first example of a kind, as one line; names of files may hold anything."""
        self.examples.setdefault(kind, " ".join(shown(detail).split())[:MAX_EXAMPLE])

    def skip(self, kind: str, detail: str, count: int = 1) -> None:
        """Counts `count` samples as skipped, one of which is already in `seen`."""
        self.skipped[kind] += count
        self.seen += count - 1
        self.largest = max(self.largest, count)
        self._show(kind, detail)

    def skip_file(self, lost: Skipped, deferred: Counter) -> None:
        """Counts one sample of a lost file as skipped; the rest goes to `deferred`, for `add_deferred`."""
        self.skip(lost.kind, lost.detail)
        self.largest = max(self.largest, lost.count)
        deferred[lost.kind] += lost.count - 1

    def add_deferred(self, deferred: Counter, most: int) -> None:
        """Counts up to `most` of the deferred samples as skipped.

        A damaged file is lost at once, while reading an intact one takes long. Counted at once, the samples of 1 % of
        the files could look like half of the data while the first intact files are being read.
        """
        for kind in list(deferred):
            count = min(most, deferred[kind])
            self.skipped[kind] += count
            self.seen, most, deferred[kind] = self.seen + count, most - count, deferred[kind] - count
            if not deferred[kind]:
                del deferred[kind]

    def add(self, other: "SkipCounters") -> None:
        self.seen += other.seen
        self.skipped.update(other.skipped)
        self.noted.update(other.noted)
        self.largest = max(self.largest, other.largest)
        self.examples = other.examples | self.examples

    def exceeds(self, fraction: float, enough: int) -> bool:
        """Whether more than `fraction` of the samples were skipped, judged once `enough` were seen.

        The most costly file counts as one sample: it may be the only bad file among thousands. If it is a large part of
        the data, it is soon read again and then counts.
        """
        left_out = max(0, min(self.largest, self.skipped.total()) - 1)
        skipped, seen = self.skipped.total() - left_out, self.seen - left_out
        return seen >= enough and skipped > fraction * seen

    def describe(self) -> str:
        """``12 of 200 samples (6.0%): 9 unreadable_image (such as a/b.jpg: …), 3 empty_text (such as …)``."""
        known = {kind: f" (such as {example})" for kind, example in self.examples.items()}  # none survives a restart
        kinds = [f"{count} {kind}{known.get(kind, '')}" for kind, count in self.skipped.most_common()]
        total = self.skipped.total()
        return f"{total} of {self.seen} samples ({total / (self.seen or 1):.1%}): {', '.join(kinds)}"

    def print(self) -> None:
        """Says what a command has skipped, and what was noted of samples that it used."""
        if self.skipped:
            print(f"skipped {self.describe()}")
        for line in self.noted_lines():
            print(line)

    def noted_lines(self) -> list[str]:
        """``15 images carry a rotation, …``, one line for each kind."""
        earlier = "one before the last restart"  # which examples do not survive
        return [f"{n} {NOTES[kind].format(self.examples.get(kind, earlier))}" for kind, n in self.noted.items()]
