"""Conversations on images in LLaVA's form: ``{"image": tensor, "input_ids", "labels"}`` (spec §9)."""

import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from common.errors import UserError
from llava.conversation import IGNORE_INDEX
from training.data.image_text import ImageTransform
from training.data.json_records import JsonRecords
from training.data.sources import BAD_CONVERSATION, MALFORMED_ITEM, MISSING_FILE, Skipped, SkipSample, checked_text


class LlavaRecords:
    """Records of LLaVA jsons, undecoded; those without an image are left out.

    Raises:
        UserError: a file is no JSON list, or no record has an image.
    """

    def __init__(self, paths: list[str]):
        self.files = [JsonRecords(path, keep=_has_image) for path in paths]
        self.ends = list(accumulate(len(file) for file in self.files))
        self.samples = self.ends[-1]
        if not self.samples:
            raise UserError(f"{', '.join(paths)} hold(s) no record with an image")

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int, rng: random.Random) -> Iterator[dict | Skipped]:
        number = bisect_right(self.ends, index)
        file = self.files[number]
        place = index - self.ends[number] + len(file)
        try:
            yield {"__key__": f"{file.path}: record {place}", "__url__": file.path, "json": file[place]}
        except OSError as error:
            yield Skipped(MISSING_FILE, f"{file.path}: {error}")


def _has_image(record: Any) -> bool:
    """Whether a record has an image. Anything that is not a record counts too, and is skipped later."""
    return not isinstance(record, dict) or record.get("image") is not None


@dataclass(frozen=True)
class LlavaSample:
    """Transform of a record of LLaVA's form.

    Args:
        images: decodes the image.
        encode: turns and tokenizer → ``input_ids`` and ``labels``, (L,) int64 each.
        tokenizer: of the model.
        text_length: tokens that a row has room for; a conversation whose answers begin later teaches nothing.
    """

    images: ImageTransform
    encode: Callable
    tokenizer: Any
    text_length: int

    def __call__(self, raw: dict, rng: random.Random) -> dict:
        """One sample.

        Raises:
            SkipSample: the record is malformed, its conversation has nothing to learn, or its image is unreadable.
        """
        record, key = _parse(raw), raw["__key__"]
        checked_text(json.dumps(record["conversations"], ensure_ascii=False), key)
        try:
            encoded = self.encode(record["conversations"], self.tokenizer)
        except ValueError as error:
            raise SkipSample(BAD_CONVERSATION, f"{key}: {error}") from None
        if (encoded["labels"][: self.text_length] == IGNORE_INDEX).all():
            raise SkipSample(BAD_CONVERSATION, f"{key}: no answer within {self.text_length} tokens to learn from")
        # A sample of shards brings its image along; else the record names the file.
        return {**self.images.of({"image": _file_name(record)} | raw, rng), **encoded, "key": key}


def _file_name(record: dict) -> str | None:
    name = record.get("image")
    return name if isinstance(name, str) else None  # LLaVA's form has one image; several are no LLaVA record


def _parse(raw: dict) -> dict:
    try:
        record = json.loads(raw["json"])
    except (LookupError, ValueError, RecursionError) as error:
        raise SkipSample(MALFORMED_ITEM, f"{raw['__key__']}: no readable record ({error})") from None
    if not isinstance(record, dict) or "conversations" not in record:
        raise SkipSample(MALFORMED_ITEM, f"{raw['__key__']}: a record needs 'conversations', got {record!r:.80}")
    return record
