"""Documents: a raw sample → ``{"segments": [{"text" | "image" | "codes", "loss"}, …], "key"}`` (docs/data.md).

The last segment of a document that was cut also has ``"is_cut": True``.

People keep them in several forms. The keys of a record, or the columns of a parquet or csv file, tell which one it is.
"""

import os
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.files import kind_of, parse_json
from llava import ChatFormat, QuestionFormat
from training.data.delimited import DelimitedRecords
from training.data.image_text import ImageTransform
from training.data.json_records import JsonRecords, RecordUnits
from training.data.llava import IMAGES, TURNS, alternating, read_turns
from training.data.parquet import ParquetUnits
from training.data.paths import PARQUET, TABLES, has_suffix, is_address
from training.data.shards import CODES, members_of
from training.data.sources import (
    BAD_DOCUMENT,
    CUT_DOCUMENT,
    EMPTY_TEXT,
    MALFORMED_ITEM,
    MISSING_FILE,
    Skipped,
    Units,
    checked_text,
)

IMAGE_TAG = "<image>"
# Ours first; then as InstructPix2Pix and MagicBrush call them.
BEFORE = ("before", "input_image", "original_image", "source_img")
INSTRUCTION = ("instruction", "edit_prompt", "edit")
AFTER = ("after", "edited_image", "target_img")


# ---- the forms of a document ----


@dataclass(frozen=True)
class TurnWords:
    """The text around the turns of a conversation. The default, nothing, is for those who look at the images only.

    Args:
        before, after: around a question, as at inference.
        further: before a question that follows an answer.
        gap, end: before and after an answer.
        row_ends_so: every text of a row ends with `end` anyway.
    """

    before: str = ""
    after: str = ""
    further: str = ""
    gap: str = ""
    end: str = ""
    row_ends_so: bool = True

    @classmethod
    def of(cls, conversation: str, tokenizer) -> "TurnWords":
        """Those of the setting `conversation`; `ValueError` if the tokenizer's chat template cannot be used."""
        question = QuestionFormat.of(conversation, tokenizer, with_features=False)
        further, end = question.before, tokenizer.eos_token
        if conversation == "chat":
            chat = ChatFormat.of(tokenizer)
            further, end = chat.to_question, chat.end_of_turn
        is_eos = end == tokenizer.eos_token
        return cls(question.before, question.after, further, question.answer_gap, end, is_eos)


@dataclass(frozen=True)
class Form:
    """A form in which documents are kept.

    Args:
        fields: name → the keys that it may have in a record, of which the first that is there counts.
        read: values of the fields, the record's name for messages, and the words of turns → segments.
        optional: fields that a record need not have.
    """

    fields: dict[str, tuple[str, ...]]
    read: Callable[[dict[str, Any], str, TurnWords], list[dict]]
    optional: tuple[str, ...] = ()

    def keys_of(self, keys: Collection[str]) -> dict[str, str]:
        """Field → its key in a record with these keys; empty if the record is of another form."""
        found = {name: key for name, names in self.fields.items() for key in reversed(names) if key in keys}
        return found if found.keys() | set(self.optional) == self.fields.keys() else {}


def form_of(keys: Collection[str]) -> tuple[Form | None, dict[str, str]]:
    """The form of a record with these keys, and field → key; None if there is none."""
    found = ((form, form.keys_of(keys)) for form in FORMS)
    return next(((form, names) for form, names in found if names), (None, {}))


def _segment_list(values: dict, name: str, words: TurnWords) -> list[dict]:
    segments = []
    for number, segment in enumerate(_list(values["segments"], name)):
        where = f"{name}: segment {number}"
        segment = segment if isinstance(segment, dict) else {}
        given = [key for key in ("text", "image") if segment.get(key) is not None]
        loss = True if segment.get("loss") is None else segment["loss"]
        if len(given) != 1 or not isinstance(loss, bool):
            raise Skipped(MALFORMED_ITEM, f"{where} needs a text or an image, and loss as true or false")
        if given == ["text"]:
            _text(segment["text"], where)
        segments.append({given[0]: segment[given[0]], "loss": loss})
    return segments


def _story(values: dict, name: str, words: TurnWords) -> list[dict]:
    images, captions = (_list(values[key], name) for key in ("images", "captions"))
    if len(images) != len(captions):
        raise Skipped(BAD_DOCUMENT, f"{name}: {len(images)} images and {len(captions)} captions")
    pairs = zip(images, captions, strict=True)
    return [segment for image, text in pairs for segment in (_text(text, name), _image(image, name))]


def _interleaved(values: dict, name: str, words: TurnWords) -> list[dict]:
    images, texts = (_list(values[key], name) for key in ("images", "texts"))
    if len(images) != len(texts) or any((i is None) == (t is None) for i, t in zip(images, texts, strict=True)):
        raise Skipped(BAD_DOCUMENT, f"{name}: at each place of images and texts, one of the two must be null")
    pairs = zip(images, texts, strict=True)
    return [_image(image, name) if text is None else _text(text, name) for image, text in pairs]


def _edit(values: dict, name: str, words: TurnWords) -> list[dict]:
    return [
        _image(values["before"], name, loss=False),
        _text(values["instruction"], name, loss=False),
        _image(values["after"], name),
    ]


def _conversation(values: dict, name: str, words: TurnWords) -> list[dict]:
    images = values.get("images") or []
    images = images if isinstance(images, list) else [images]
    parts: list[tuple[str | None, bool]] = []  # a text, or None for an image; whether it is an answer
    for turn in alternating(read_turns(values["turns"], name), name):
        if turn["from"] == "human":
            question = _question(turn["value"], words.further if parts else words.before, words.after)
            parts += [(part, False) for part in question]
            continue
        if IMAGE_TAG in turn["value"]:
            raise Skipped(BAD_DOCUMENT, f"{name}: there is an {IMAGE_TAG} in an answer")
        parts.append((words.gap + _text(turn["value"], name)["text"], True))
    tags = sum(part is None for part, _ in parts)
    if tags != len(images):
        raise Skipped(BAD_DOCUMENT, f"{name}: {tags} {IMAGE_TAG} in the turns, {len(images)} images")
    images, segments = iter(images), []
    for number, (part, is_answer) in enumerate(parts):
        if part is None:
            segments.append(_image(next(images), name, loss=False))
            continue
        next_is_text = number + 1 < len(parts) and parts[number + 1][0] is not None
        end = words.end if is_answer and (next_is_text or not words.row_ends_so) else ""
        segments.append({"text": part + end, "loss": is_answer})
    return segments


def _question(message: str, before: str, after: str) -> list[str | None]:
    """The parts of a question, None for an image. A single image stands before the text, wherever its tag is, as at
    inference; of several, those that the text begins with."""
    pieces = message.split(IMAGE_TAG)
    if len(pieces) == 2:
        pieces = ["", "".join(pieces)]
    parts = [part for piece in pieces for part in (None, piece.strip()) if part != ""][1:]
    if not parts or parts[-1] is None:
        parts.append("")
    first = next(number for number, part in enumerate(parts) if part is not None)
    parts[first] = before + parts[first]
    parts[-1] += after
    return parts


FORMS = (
    Form({"segments": ("segments",)}, _segment_list),
    Form({"turns": TURNS, "images": IMAGES}, _conversation, optional=("images",)),
    Form({"images": ("images",), "captions": ("captions",)}, _story),
    Form({"images": ("images",), "texts": ("texts",)}, _interleaved),
    Form({"before": BEFORE, "instruction": INSTRUCTION, "after": AFTER}, _edit),
)
KNOWN = "segments; images and captions; images and texts; before, instruction and after; or image and conversations"


def _list(value: Any, name: str) -> list:
    if not isinstance(value, list):
        raise Skipped(MALFORMED_ITEM, f"{name}: {kind_of(value)} in place of a list")
    return value


def _text(value: Any, name: str, loss: bool = True) -> dict:
    text = checked_text(value, name).strip()
    if not text:
        raise Skipped(EMPTY_TEXT, name)
    return {"text": text, "loss": loss}


def _image(value: Any, name: str, loss: bool = True) -> dict:
    if value is None:
        raise Skipped(MALFORMED_ITEM, f"{name}: an image is null")
    return {"image": value, "loss": loss}


# ---- records ----


class ParquetDocuments(ParquetUnits):
    """Documents in parquet files, one a row; `UserError` if a file has not the columns of any form."""

    def __init__(self, paths: list[str], buffer_size: int = 1000):
        super().__init__(paths, {}, {}, buffer_size)

    def _chosen(self, path: str, found: list[str]) -> dict[str, str]:
        return {key: key for key in _keys_of(path, found).values()}


def _keys_of(path: str, columns: list[str]) -> dict[str, str]:
    form, names = form_of(columns)
    if form is None:
        raise UserError(f"{path} holds no documents; its columns are {', '.join(columns)}, needed are {KNOWN}")
    return names


def open_documents(paths: list[str], buffer_size: int = 1000) -> Units:
    """The documents of parquet files, or of json, jsonl, csv and tsv files; `UserError` if there is none."""
    if has_suffix(paths[0], PARQUET):
        return ParquetDocuments(paths, buffer_size)
    units = RecordUnits([_table(path) if has_suffix(path, TABLES) else JsonRecords(path) for path in paths])
    if not units.samples:
        raise UserError(f"{', '.join(paths)} hold(s) no document")
    return units


def _table(path: str) -> DelimitedRecords:
    table = DelimitedRecords(path, prose=INSTRUCTION)
    _keys_of(path, table.header)
    return table


def record_of(raw: dict) -> dict:
    """The record of a raw sample; `Skipped` if there is none."""
    if "json" not in raw:
        return raw  # a row of a parquet file
    try:
        return parse_json(raw["json"], raw["__key__"], dict)
    except UserError as error:
        raise Skipped(MALFORMED_ITEM, str(error)) from None


def read_segments(record: dict, name: str, words: TurnWords) -> list[dict]:
    """The segments of a record: ``{"text": str, "loss": bool}``, or ``image`` as the record has it, see `located`.

    Raises:
        Skipped: see `segments_of`; or nothing in it is learned.
    """
    segments = segments_of(record, name, words)
    if not any(segment["loss"] for segment in segments):
        raise Skipped(BAD_DOCUMENT, f"{name}: none of its {len(segments)} segments is learned")
    return segments


def segments_of(record: dict, name: str, words: TurnWords) -> list[dict]:
    """As `read_segments`, of documents to go on with; `Skipped` if the record is of no known form, or its parts do not
    match."""
    form, names = form_of([key for key, value in record.items() if value is not None])
    if form is None:
        raise Skipped(MALFORMED_ITEM, f"{name} is no document; {members_of(record, (KNOWN,))}")
    return form.read({field: record[key] for field, key in names.items()}, name, words)


def located(value: Any, raw: dict, root: str | None) -> dict:
    """An image of a document as `ImageTransform.of` takes it: ``image``, bytes, a path or codes; or `CODES`, bytes.

    Args:
        value: in a record: bytes, a list of codes, a name, or a dictionary of ``bytes`` or ``path``. A name is that of
            a member of the sample, beside which codes may be (``0.npy`` for ``0.jpg``); else of a file.
        root: folder of files; those that are not there are looked for in that of the raw sample's file.

    Raises:
        Skipped: there is no such member or file.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str):
        return {"image": value}
    member, codes = value.lower(), f"{os.path.splitext(value)[0].lower()}.npy"  # members' names are in lower case
    if isinstance(raw.get(codes), bytes):
        return {CODES: raw[codes]}
    if isinstance(raw.get(member), bytes):
        return {"image": raw[member]}
    own = os.path.dirname(raw.get("__url__", ""))
    folders = [own] if root is None else [root, own]
    if found := next((path for folder in folders if os.path.exists(path := os.path.join(folder, value))), None):
        return {"image": found}
    remedy = "; fetch it first" if is_address(value) else ""
    where = " or ".join(folder or "." for folder in dict.fromkeys(folders))
    raise Skipped(MISSING_FILE, f"{raw['__key__']} names {value}, which is not in {where}{remedy}")


# ---- samples ----


def document_length(segments: Sequence[dict], lengths: Sequence[int], is_clean: bool) -> int:
    """Tokens of a document's row: the task, each text between bos and eos, each image between soi and eoi, and an empty
    text at the end.

    Args:
        segments: with ``text`` or without, and ``loss``.
        lengths: tokens of each, without these two.
        is_clean: the history is clean: each image that is learned, and not the last segment, stands twice.
    """
    total = 1 + 2
    for number, (segment, length) in enumerate(zip(segments, lengths, strict=True)):
        is_last = number == len(segments) - 1
        if "text" in segment:
            is_joined = number > 0 and "text" in segments[number - 1]
            total += length + (0 if is_joined else 2)
        else:
            total += (length + 2) * (2 if is_clean and segment["loss"] and not is_last else 1)
    return total


@dataclass(frozen=True)
class DocumentSample:
    """Transform of a raw sample with a document.

    Args:
        images: decodes its images.
        tokenizer: of the model, to measure texts.
        words: of the turns of conversations.
        max_length: tokens of a row; longer documents are cut after a whole segment.
        is_clean: see `document_length`.
    """

    images: ImageTransform
    tokenizer: Any
    words: TurnWords
    max_length: int
    is_clean: bool

    def __call__(self, raw: dict, rng: random.Random) -> dict:
        """One sample; `Skipped` if its record is malformed, nothing of it that fits is learned, or an image is missing
        or unreadable."""
        key = raw["__key__"]
        segments = read_segments(record_of(raw), key, self.words)
        kept = self._cut(segments, key)
        is_cut = len(kept) < len(segments)
        found, notes = [], dict.fromkeys([CUT_DOCUMENT] if is_cut else [])
        for segment in kept:
            if "image" in segment:
                image = self.images.of({"__key__": key} | located(segment["image"], raw, self.images.root), rng)
                notes |= dict.fromkeys(image.pop("notes", ()))
                segment = image | {"loss": segment["loss"]}
            found.append(segment)
        if is_cut:
            found[-1] = found[-1] | {"is_cut": True}
        return {"segments": found, "key": key} | ({"notes": tuple(notes)} if notes else {})

    def _cut(self, segments: list[dict], key: str) -> list[dict]:
        """The longest beginning that fits and teaches something."""
        # No text has more tokens than bytes, so most need not be tokenised here.
        lengths = [len(s["text"].encode()) if "text" in s else self.images.num_codes for s in segments]
        if document_length(segments, lengths, self.is_clean) <= self.max_length:
            return segments
        lengths = [self._tokens(s["text"]) if "text" in s else self.images.num_codes for s in segments]
        for stop in range(len(segments), 0, -1):
            kept = segments[:stop]
            if not any(segment["loss"] for segment in kept):
                break
            if document_length(kept, lengths[:stop], self.is_clean) <= self.max_length:
                return kept
        raise Skipped(BAD_DOCUMENT, f"{key}: nothing is learned within {self.max_length} tokens (mixed.max_length)")

    def _tokens(self, text: str) -> int:
        """Without the bos of a chat template, which the row has anyway."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return len(ids) - (ids[:1] == [self.tokenizer.bos_token_id])
