"""Documents, rows that mix texts and images in any order (docs/mixed.md).

    <t2i>  then for each segment   text: bos ids eos   image: <soi> N codes <eoi>   and at the end an empty text

What follows a segment is a decision of the model: `<soi>`, an image, or bos, a text; an empty text ends the document.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from models.omni_attention import OmniMask, Span
from models.vocabulary import IGNORE_ID, Vocabulary

# N image tokens, K images of a batch that are learned
HISTORIES = ("clean", "masked", "prefix")
ALL_NOISED = 0.3  # Show-o2's share of documents whose images are all masked
# Segments {"text": str, "loss": bool} or {"image_ids": (N,) int64, "loss": bool}; one with "is_cut": True is the last
# that was kept of its document, so what follows it here is not learned.
Document = Sequence[dict[str, Any]]


@dataclass
class DocumentFormat:
    """How documents become rows.

    Args:
        vocabulary, bos_id, eos_id: of the model.
        text_ids: text → its ids, without bos and eos.
    """

    vocabulary: Vocabulary
    bos_id: int
    eos_id: int
    text_ids: Callable[[str], list[int]]

    def row(
        self,
        document: Document,
        masked: dict[int, tuple[list[int], list[int]]],
        *,
        history: str = "clean",
        without_text: bool = False,
        without_history: bool = False,
    ) -> "DocumentRow":
        """The row that a document is trained on.

        Args:
            masked: number of a segment → (ids, labels) of its masked codes, for the images that are learned.
            history: what later segments see of an image that is learned, see `UniversalPrompting`.
            without_text: all texts are empty, and only images are learned.
            without_history: each image that is learned stands alone behind an empty text.
        """
        row = DocumentRow(self)
        if without_history:
            for ids, labels in masked.values():
                start = row.begin()
                row.text([], [], False)
                row.image(ids, labels, None)
                row.private.append((start, len(row.ids)))
            return row
        row.begin()
        last = len(document) - 1
        decides = False  # whether what follows the segment before is learned
        for number, segment in enumerate(document):
            if "text" not in segment:
                ids = segment["image_ids"].tolist()
                noised, labels = masked.get(number, (ids, None))
                row.image(noised, labels, self.vocabulary.soi_id if decides else None)
                if labels is not None and history == "clean" and number < last:
                    row.clean_copy(ids)
            elif number == 0 or "text" not in document[number - 1]:
                ids, labels = self._joined(document[number:], without_text)
                row.text(ids, labels, decides)
            decides = segment.get("loss", True) and not segment.get("is_cut") and not without_text
        row.text([], [self.eos_id] if decides else [], decides)
        return row

    def _joined(self, segments: Document, empty: bool) -> tuple[list[int], list[int]]:
        """Ids, and labels with that of eos, of the texts that begin these segments; they are one text in the row."""
        ids, labels, learned = [], [], False
        for segment in segments:
            if "text" not in segment:
                break
            part = [] if empty else self.text_ids(segment["text"])
            learned = bool(segment.get("loss", True)) and not empty
            ids += part
            labels += part if learned else [IGNORE_ID] * len(part)
            learned = learned and not segment.get("is_cut")
        return ids, [*labels, self.eos_id if learned else IGNORE_ID]

    def prompt(self, document: Document, open_text: bool = False) -> list[int]:
        """The ids after which a document goes on; with `open_text` within its last text, which has no eos then."""
        if open_text and (not document or "text" not in document[-1]):
            document = [*document, {"text": ""}]
        row = DocumentRow(self)
        row.begin()
        for number, segment in enumerate(document):
            if "text" not in segment:
                row.image(segment["image_ids"].tolist(), None, None)
            elif number == 0 or "text" not in document[number - 1]:
                row.text(self._joined(document[number:], False)[0], [], False)
        return row.ids[:-1] if open_text else row.ids


@dataclass
class DocumentRow:
    """A row as it grows: ids, labels (at the token itself) and position ids; its image blocks and private spans."""

    form: DocumentFormat
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    images: list[Span] = field(default_factory=list)
    private: list[Span] = field(default_factory=list)

    def begin(self) -> int:
        """Adds `<t2i>` at position 0. Returns its index."""
        self._add([self.form.vocabulary.t2i_id], [IGNORE_ID], 0)
        return len(self.ids) - 1

    def text(self, ids: list[int], labels: list[int], decision: bool) -> None:
        """Adds ``bos ids eos``; `labels` of ids and eos, none if empty; `decision`: whether bos is learned."""
        bos, eos = self.form.bos_id, self.form.eos_id
        labels = labels or [IGNORE_ID] * (len(ids) + 1)
        self._add([bos, *ids, eos], [bos if decision else IGNORE_ID, *labels], self.positions[-1] + 1)

    def image(self, ids: list[int], labels: list[int] | None, decision: int | None) -> None:
        """Adds ``<soi> ids <eoi>``; `labels` of the masked ids, `decision` that of `<soi>`."""
        self._image(ids, labels, decision, self.positions[-1] + 1)

    def clean_copy(self, ids: list[int]) -> None:
        """Adds the image before once more, at the same positions; only its first copy's own rows see that one."""
        self.private.append(self.images[-1])
        self._image(ids, None, None, self.positions[-len(ids) - 2])

    def _image(self, ids: list[int], labels: list[int] | None, decision: int | None, position: int) -> None:
        vocabulary, ignored = self.form.vocabulary, [IGNORE_ID] * len(ids)
        self.images.append((len(self.ids), len(self.ids) + len(ids) + 2))
        labels = [IGNORE_ID if decision is None else decision, *(labels or ignored), IGNORE_ID]
        self._add([vocabulary.soi_id, *ids, vocabulary.eoi_id], labels, position)

    def _add(self, ids: list[int], labels: list[int], position: int) -> None:
        self.ids += ids
        self.labels += labels
        self.positions += range(position, position + len(ids))


def learned_images(document: Document, history: str, generator: torch.Generator | None) -> list[int]:
    """The numbers of the segments that are images to be learned in this row; with ``prefix`` drawn as Show-o2 does."""
    found = [n for n, segment in enumerate(document) if "text" not in segment and segment.get("loss", True)]
    if history != "prefix" or not found:
        return found
    share, place = torch.rand(2, generator=generator).tolist()
    return found if share < ALL_NOISED else found[int(place * len(found)) :]


def right_padded(rows: Sequence[DocumentRow], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, OmniMask]:
    """Ids, labels and position ids (B, L) int64, and the mask."""
    length = max(len(row.ids) for row in rows)
    missing = [length - len(row.ids) for row in rows]
    ids = [row.ids + [pad_id] * more for row, more in zip(rows, missing, strict=True)]
    labels = [row.labels + [IGNORE_ID] * more for row, more in zip(rows, missing, strict=True)]
    positions = [row.positions + [0] * more for row, more in zip(rows, missing, strict=True)]
    mask = OmniMask.mixed([row.images for row in rows], [row.private for row in rows], length)
    return *(torch.tensor(values) for values in (ids, labels, positions)), mask
