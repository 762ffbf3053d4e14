"""Conversations on images in LLaVA's form: ``{"image": tensor, "input_ids", "labels"}`` (spec §9)."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.files import kind_of, parse_json
from llava.conversation import IGNORE_INDEX
from training.data.image_text import ImageTransform, noted
from training.data.json_records import JsonRecords, RecordUnits
from training.data.shards import members_of
from training.data.sources import BAD_CONVERSATION, CUT, MALFORMED_ITEM, MISSING_FILE, Skipped, checked_text

logger = logging.getLogger(__name__)

IMAGES, TURNS = ("image", "images"), ("conversations", "conversation", "messages")  # keys of a record, first come first
ROLES = {"human": "human", "gpt": "gpt", "user": "human", "assistant": "gpt"}  # other tools' words → LLaVA's


@dataclass(frozen=True)
class LlavaRecord:
    """A record that was checked.

    Args:
        image: file name of the one image; None in a record of text alone.
        turns: ``{"from": "human" | "gpt", "value": text}``, whatever words the file has for them;
            a leading ``system`` turn, for which the formats have no place, is left out.
        content: the whole record.
    """

    image: str | None
    turns: list[dict]
    content: dict

    @classmethod
    def parse(cls, raw: bytes, name: str) -> "LlavaRecord":
        """The record in a JSON text; `Skipped` if it is no record, has several images, or a conversation that is
        none."""
        try:
            record = parse_json(raw, name, dict)
        except UserError as error:
            raise Skipped(MALFORMED_ITEM, str(error)) from None
        if not any(key in record for key in TURNS):
            raise Skipped(MALFORMED_ITEM, f"{name}: a record needs 'conversations', got {record!r:.80}")
        turns = read_turns(next((record[key] for key in TURNS if record.get(key) is not None), None), name)
        if not isinstance(image := image_of(record), str | None):
            raise Skipped(MALFORMED_ITEM, f"{name}: 'image' is {kind_of(image)}, expected one file name")
        return cls(image, turns, record)


def image_of(record: dict) -> Any:
    """What a record says of its image, a list of one as that one; None where there is no image."""
    image = next((record[key] for key in IMAGES if record.get(key) not in (None, "", [])), None)
    return image[0] if isinstance(image, list) and len(image) == 1 else image


def read_turns(turns: Any, name: str) -> list[dict]:
    """The turns of a conversation in LLaVA's words, without a leading ``system`` turn; `Skipped` if they are none."""
    if isinstance(turns, list) and turns and _is_system(turns[0]):
        turns = turns[1:]
    if not isinstance(turns, list) or not turns:
        raise Skipped(BAD_CONVERSATION, f"{name}: the conversation is {kind_of(turns)}, no list of turns")
    return [_turn(turn, f"{name}: turn {index}") for index, turn in enumerate(turns)]


def alternating(turns: list[dict], name: str) -> list[dict]:
    """The turns without a leading answer; `Skipped` if questions and answers do not alternate."""
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if any(turn["from"] != ("human", "gpt")[number % 2] for number, turn in enumerate(turns)):
        raise Skipped(BAD_CONVERSATION, f"{name}: questions and answers do not alternate: {turns!r:.80}")
    return turns


def _is_system(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("from", turn.get("role")) == "system"


def _turn(turn: Any, name: str) -> dict:
    role = text = None
    if isinstance(turn, dict):
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = ROLES.get(role) if isinstance(role, str) else None
    if role is None or not isinstance(text, str):
        raise Skipped(BAD_CONVERSATION, f"{name} is {turn!r:.80}, not a text of {' or '.join(ROLES)}")
    return {"from": role, "value": checked_text(text, name)}


class LlavaRecords(RecordUnits):
    """Records of LLaVA jsons, undecoded; those without an image are left out; `UserError` if a file is no JSON list, or
    no record has an image."""

    def __init__(self, paths: list[str]):
        super().__init__([JsonRecords(path, keep=has_image) for path in paths])
        if left_out := sum(file.left_out for file in self.files):
            logger.info("%s: %d records without an image are left out", ", ".join(paths), left_out)
        if not self.samples:
            raise UserError(f"{', '.join(paths)} hold(s) no record with an image")


def has_image(record: Any) -> bool:
    """Whether a record has an image. Anything that is not a record counts too, and is skipped later."""
    return not isinstance(record, dict) or image_of(record) is not None


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
        """One sample; `Skipped` if the record is malformed, its conversation has nothing to learn, or its image is
        unreadable."""
        key = raw["__key__"]
        if "json" not in raw:
            raise Skipped(MALFORMED_ITEM, f"{key} has no record; {members_of(raw, ('json',))}")
        record = LlavaRecord.parse(raw["json"], key)
        try:
            encoded = self.encode(record.turns, self.tokenizer)
        except ValueError as error:
            raise Skipped(BAD_CONVERSATION, f"{key}: {error}") from None
        if (encoded["labels"][: self.text_length] == IGNORE_INDEX).all():
            raise Skipped(BAD_CONVERSATION, f"{key}: no answer within {self.text_length} tokens to learn from")
        # A sample of shards brings its image along; else the record names the file.
        sample = {**self._image(raw, record, rng), **encoded, "key": key}
        return noted(sample, CUT) if len(encoded["input_ids"]) > self.text_length else sample

    def _image(self, raw: dict, record: LlavaRecord, rng: random.Random) -> dict:
        try:
            return self.images.of({"image": record.image} | raw, rng)
        except Skipped as skipped:
            if skipped.kind != MISSING_FILE:
                raise
            key, root = "dataset.params.train_mmu_image_root", self.images.root
            where = f"relative to {key}={root}" if root else f"relative to its folder, as {key} is not set"
            raise Skipped(MISSING_FILE, f"{skipped.detail}, named by {raw['__key__']}, {where}") from None
