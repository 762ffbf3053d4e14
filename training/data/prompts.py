"""Prompts without images, for tasks that sample their own images: ``{"text", "record", "key"}``."""

import random

from common.errors import UserError
from common.files import parse_json
from training.data.flows import FlowReader, Reading
from training.data.image_text import own_text
from training.data.json_records import JsonRecords, RecordUnits
from training.data.language import Documents
from training.data.paths import JSON, SHARDS, has_suffix
from training.data.sources import MALFORMED_ITEM, Skipped, Units, checked_text
from training.data.streams import Transform

PROMPT_KEYS = ("prompt", "caption", "text")  # of a record, first come first


class PromptReader(FlowReader):
    """Shards, whose captions are the prompts, records with a `prompt`, or lines of text."""

    formats = SHARDS + JSON + (".txt",)

    @property
    def setting(self) -> str:
        return f"{self.split}_prompts"

    def code_sizes(self) -> dict[str, int]:
        return {}  # images and codes are not looked at

    def units(self, paths: list[str]) -> Units:
        if has_suffix(paths[0], JSON):
            return RecordUnits([JsonRecords(path) for path in paths])
        return Documents(paths, "text")

    def transform(self, reading: Reading) -> Transform:
        return prompt_sample


def prompt_sample(raw: dict, rng: random.Random) -> dict:
    """The prompt, and the record that it comes with, which a reward may want to know; empty if there is none."""
    key = raw["__key__"]
    try:
        record = parse_json(raw["json"], key, dict) if "json" in raw else {}
    except UserError as error:
        raise Skipped(MALFORMED_ITEM, str(error)) from None
    if "__url__" in raw and raw["__url__"].endswith(JSON):
        given = next((record[name] for name in PROMPT_KEYS if name in record), None)
        if given is None:
            raise Skipped(MALFORMED_ITEM, f"{key}: a record needs one of {', '.join(PROMPT_KEYS)}, has {list(record)}")
        text = checked_text(given, key)
    else:
        text = own_text(raw, rng)
    return {"text": text.strip(), "record": record, "key": key}
