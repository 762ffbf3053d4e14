"""Prompts without images, for tasks that sample their own images: ``{"text", "record", "key"}``."""

import random
from collections.abc import Iterator

from training.data.documents import record_of
from training.data.flows import FlowReader, Reading
from training.data.image_text import own_text
from training.data.json_records import JsonRecords, RecordUnits
from training.data.language import Documents
from training.data.paths import JSON, SHARDS, expand_paths, has_suffix
from training.data.shards import read_shard
from training.data.sources import MALFORMED_ITEM, SkipCounters, Skipped, Units, checked_text
from training.data.streams import Transform

FORMATS = SHARDS + JSON + (".txt",)
PROMPT_KEYS = ("prompt", "caption", "text")  # of a record, first come first


class PromptReader(FlowReader):
    """Shards, whose captions are the prompts, records with a `prompt`, or lines of text."""

    formats = FORMATS

    @property
    def setting(self) -> str:
        return f"{self.split}_prompts"

    def code_sizes(self) -> dict[str, int]:
        return {}  # images and codes are not looked at

    def units(self, paths: list[str]) -> Units:
        return _units(paths)

    def transform(self, reading: Reading) -> Transform:
        return prompt_sample


def _units(paths: list[str]) -> Units:
    return RecordUnits(list(map(JsonRecords, paths))) if has_suffix(paths[0], JSON) else Documents(paths, "text")


def iter_prompts(setting: str, value, counters: SkipCounters) -> Iterator[dict]:
    """Every prompt of the files that a setting names, once, as `prompt_sample` gives them.

    Args:
        counters: of what is skipped.

    Raises:
        UserError: files are missing, or cannot be read.
    """
    rng = random.Random(0)
    for path in expand_paths(setting, value, FORMATS):
        if has_suffix(path, SHARDS):
            raws = read_shard(path)
        else:
            units = _units([path])
            raws = (raw for index in range(len(units)) for raw in units.read(index, rng))
        for raw in raws:
            counters.seen += 1
            try:
                if isinstance(raw, Skipped):
                    raise raw
                yield prompt_sample(raw, rng)
            except Skipped as skipped:
                counters.skip(skipped.kind, skipped.detail, skipped.count)


def prompt_sample(raw: dict, rng: random.Random) -> dict:
    """The prompt, and the record that it comes with, which a reward may want to know; empty if there is none."""
    key, record = raw["__key__"], record_of(raw) if "json" in raw else {}
    if "__url__" in raw and raw["__url__"].endswith(JSON):
        given = next((record[name] for name in PROMPT_KEYS if name in record), None)
        if given is None:
            raise Skipped(MALFORMED_ITEM, f"{key}: a record needs one of {', '.join(PROMPT_KEYS)}, has {list(record)}")
        text = checked_text(given, key)
    else:
        text = own_text(raw, rng)
    return {"text": text.strip(), "record": record, "key": key}
