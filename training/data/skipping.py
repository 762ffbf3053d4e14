"""Bad data: how a reader or a transform says that a sample cannot be used, and when there is too much of it."""

from collections import Counter
from dataclasses import dataclass, field

UNREADABLE_IMAGE = "unreadable_image"  # broken, truncated, enormous, or no image at all
TRUNCATED_SHARD = "truncated_shard"  # a shard or row group that ends early or is corrupt; counts what is lost of it
MISSING_FILE = "missing_file"
EMPTY_TEXT = "empty_text"
MALFORMED_ITEM = "malformed_item"  # parts missing, of the wrong type, or not to be parsed
BAD_CONVERSATION = "bad_conversation"  # turns out of order, or no token of an answer to learn from
BAD_CODES = "bad_codes"  # of another length or range than the model's
KINDS = (
    UNREADABLE_IMAGE,
    TRUNCATED_SHARD,
    MISSING_FILE,
    EMPTY_TEXT,
    MALFORMED_ITEM,
    BAD_CONVERSATION,
    BAD_CODES,
)


@dataclass(frozen=True)
class Skipped:
    """What a reader yields in place of a raw sample, or of the rest of a file, that it cannot read.

    count: samples that are lost with it, as far as the reader can know.
    """

    kind: str
    detail: str
    count: int = 1


class SkipSample(Exception):
    """Raised by a transform: this sample cannot be used."""

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def checked_text(text: object, name: str) -> str:
    """The text itself.

    Raises:
        SkipSample: it is no text, or holds half of a character (as ``"\\ud83d"`` in JSON), which no tokenizer takes.
    """
    if not isinstance(text, str):
        raise SkipSample(MALFORMED_ITEM, f"{name}: {text!r:.80} is no text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SkipSample(MALFORMED_ITEM, f"{name}: {error}") from None
    return text


@dataclass
class Tally:
    """How many raw samples were seen and how many of them, by kind, were skipped; one example of each kind.

    Samples lost with a file count as seen, too. `largest` is the most that one file has cost.
    """

    seen: int = 0
    skipped: Counter = field(default_factory=Counter)
    largest: int = 1
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, kind: str, detail: str, count: int = 1) -> None:
        """Notes `count` samples as skipped, of which one was counted as seen."""
        self.skipped[kind] += count
        self.seen += count - 1
        self.largest = max(self.largest, count)
        self.examples.setdefault(kind, detail)

    def lose(self, lost: Skipped, owed: Counter) -> None:
        """Notes one sample of a lost file as skipped; the others are owed: they are noted bit by bit by `collect`."""
        self.skip(lost.kind, lost.detail)
        self.largest = max(self.largest, lost.count)
        owed[lost.kind] += lost.count - 1

    def collect(self, owed: Counter, most: int) -> None:
        """Notes up to `most` of the samples that are owed.

        A lost file costs no time, while a whole one is read for long: noted at once, a hundredth of the files could
        look like half of the data for as long as the first ones are being read.
        """
        for kind in list(owed):
            count = min(most, owed[kind])
            self.skipped[kind] += count
            self.seen, most, owed[kind] = self.seen + count, most - count, owed[kind] - count
            if not owed[kind]:
                del owed[kind]

    def add(self, other: "Tally") -> None:
        self.seen += other.seen
        self.skipped.update(other.skipped)
        self.largest = max(self.largest, other.largest)
        self.examples = other.examples | self.examples

    @property
    def share(self) -> float:
        return self.skipped.total() / self.seen if self.seen else 0.0

    def exceeds(self, fraction: float, enough: int) -> bool:
        """Whether too much is skipped, judged from `enough` samples on, the costliest file counted as one sample.

        It may be the only bad one of a thousand and says nothing of the others. Where it is a large part of the data,
        it is soon read again and counts.
        """
        left_out = max(0, min(self.largest, self.skipped.total()) - 1)
        skipped, seen = self.skipped.total() - left_out, self.seen - left_out
        return seen >= enough and skipped > fraction * seen

    def describe(self) -> str:
        """``12 of 200 samples (6.0%): 9 unreadable_image (such as a/b.jpg: …), 3 empty_text (such as …)``."""
        kinds = [f"{count} {kind}{self._example(kind)}" for kind, count in self.skipped.most_common()]
        return f"{self.skipped.total()} of {self.seen} samples ({self.share:.1%}): {', '.join(kinds)}"

    def _example(self, kind: str) -> str:
        return f" (such as {self.examples[kind]})" if kind in self.examples else ""  # none from before a restart
