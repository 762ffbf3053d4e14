"""Preference pairs: records of a better and a worse image, or answer (docs/alignment.md)."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from models.vocabulary import IGNORE_ID
from training.data.documents import record_of
from training.data.flows import Reading, ShowoImageReader, encoder_of
from training.data.image_text import ImageTransform
from training.data.json_records import JsonRecords, RecordUnits
from training.data.paths import JSON
from training.data.sources import BAD_CONVERSATION, MALFORMED_ITEM, Skipped, Units, checked_text
from training.data.streams import Transform

KINDS = {"image_pairs": "image", "answer_pairs": "answer"}  # flow → `kind` of its records


class PairReader(ShowoImageReader):
    """The records of one kind of a file of pairs (docs/alignment.md)."""

    formats = JSON

    @property
    def setting(self) -> str:
        return f"{self.split}_pairs"

    def _root_key(self) -> str:
        return ""

    @property
    def max_samples(self) -> None:
        return None

    def units(self, paths: list[str]) -> Units:
        kind = KINDS[self.name]
        files = [JsonRecords(path, keep=lambda record: _kind_of(record) in (kind, None)) for path in paths]
        if not sum(map(len, files)):
            raise UserError(
                f"dataset.params.{self.setting}: {', '.join(paths)} hold(s) no pair whose kind is {kind!r}; make some, "
                f"or give training.batch_size_{self.name}=0"
            )
        return RecordUnits(files)

    def transform(self, reading: Reading) -> Transform:
        if self.name == "image_pairs":
            return ImagePair(self.images(reading))
        images, encode = self.images(reading, processor=reading.image_processor), encoder_of(self.config, reading)
        return AnswerPair(images, encode, reading.tokenizer, reading.text_length)


def _kind_of(record: Any) -> Any:
    """What a record says of itself; None for what is no record, which is skipped and counted later."""
    return record.get("kind") if isinstance(record, dict) else None


def _members(raw: dict, *names: str) -> dict[str, str]:
    """The texts of a record; `Skipped` if one is missing."""
    key, record = raw["__key__"], record_of(raw)
    if missing := [name for name in names if name not in record]:
        raise Skipped(MALFORMED_ITEM, f"{key}: a pair of this kind needs {', '.join(names)}, lacks {missing}")
    return {name: checked_text(record[name], f"{key}: {name}") for name in names}


@dataclass(frozen=True)
class ImagePair:
    """Record → ``{"image", "rejected"}``, (R, R, 3) uint8 each, ``"text"`` and ``"key"``."""

    images: ImageTransform

    def __call__(self, raw: dict, rng: random.Random) -> dict:
        said = _members(raw, "caption", "chosen", "rejected")
        found = [self.images.of(raw | {"image": said[name]}, rng)["image"] for name in ("chosen", "rejected")]
        return {"image": found[0], "rejected": found[1], "text": said["caption"], "key": raw["__key__"]}


@dataclass(frozen=True)
class AnswerPair:
    """Record → its image, ``"input_ids"`` and ``"labels"`` of the chosen answer, and of the ``"rejected_…"`` one.

    Args:
        images, encode, tokenizer, text_length: see `training.data.llava.LlavaSample`.
    """

    images: ImageTransform
    encode: Callable
    tokenizer: Any
    text_length: int

    def __call__(self, raw: dict, rng: random.Random) -> dict:
        said = _members(raw, "image", "question", "chosen", "rejected")
        sample = self.images.of(raw | {"image": said["image"]}, rng) | {"key": raw["__key__"]}
        for prefix, answer in (("", said["chosen"]), ("rejected_", said["rejected"])):
            turns = [{"from": "human", "value": said["question"]}, {"from": "gpt", "value": answer}]
            try:
                encoded = self.encode(turns, self.tokenizer)
            except ValueError as error:
                raise Skipped(BAD_CONVERSATION, f"{raw['__key__']}: {error}") from None
            if (encoded["labels"][: self.text_length] == IGNORE_ID).all():
                raise Skipped(BAD_CONVERSATION, f"{raw['__key__']}: no answer within {self.text_length} tokens")
            sample |= {prefix + name: tensor for name, tensor in encoded.items()}
        return sample
