"""Turns a LLaVA-format JSON and its images into WebDataset shards for the captioning flow.

    python3 tools/llava_shards.py json=data/emoji_world/llava_train.json image_root=data/emoji_world/images \\
        output=data/emoji_world/shards/qa repeat=name:3

    … json=llava_v1_5_mix665k.json image_root=llava_data output=data/llava/tuning records=true

Every question with its answer becomes one sample: the image and ``USER: \\n{question} ASSISTANT: {answer}``, the
very text that `inference_mmu.py` asks with, so train on it with `dataset.params.add_caption_prompt: False`. With
`records=true` a sample is the image and the whole record as `json`, which the flows llava_pretrain and llava_tuning
read, also when `encode_images.py` has encoded the images. `repeat` weighs the values of the records' key `task`.
Records without an image are left out (spec §9). Like the flows, it reads json (a list, or one in ``{"data": […]}``) and
jsonl; what they skip, and images that are missing or cannot be read, are left out and counted. An existing set is kept
until the new one is complete.
"""

import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import common  # noqa: F401  Ctrl-C is one word from here on

from PIL import Image

from common.config import read_settings
from common.errors import UserError, run_cli
from common.files import check_file
from common.progress import progress
from common.schema import ImageSection
from common.settings import setting
from llava import question_prompt_vq
from tools.make_shards import image_members
from tools.shard_writing import counted, in_order, new_set, write_manifest, write_shards
from training.data.json_records import JsonRecords
from training.data.llava import LlavaRecord, alternating
from training.data.sources import BAD_CONVERSATION, MISSING_FILE, SkipCounters, Skipped

MOST_REPEATS = 10_000


@dataclass
class LlavaShardsConfig:
    json: str = setting("???", "records in LLaVA's format")
    image_root: str = setting("???", "folder that their image names are relative to")
    output: str = setting("???", "prefix of the shards: {output}-000000.tar")
    repeat: str = setting("", "task:times, comma-separated; empty: every record once")
    records: bool = setting(False, "whole records for the llava flows, instead of questions for the captioning flow")
    shard_size: int = setting(2000, "samples in a shard", low=1)
    seed: int = setting(0, "of the shuffled order")
    resize: int = setting(0, "scale larger images until their shorter side is this; 0 keeps every byte", low=0)
    quality: int = setting(95, "of the JPEG and WebP images that were scaled", low=1, high=100)
    num_workers: int = setting(4, "threads that read and check images", low=1, high=1024)
    overwrite: bool = setting(False, "replace another data set of this prefix")
    image: ImageSection = field(default_factory=ImageSection)


@dataclass(frozen=True)
class Planned:
    """A sample that is to be written: a question of a record, or a whole one, where `text` is None."""

    key: str
    record: int
    image: Path
    text: str | None


def planned(records: JsonRecords, config, repeat: dict[str, int], counters: SkipCounters) -> Iterator[Planned]:
    """One sample per question, or record with `records`, and repetition; records that are unusable are counted."""
    for index in range(len(records)):
        where = f"{records.path}: record {index + 1}"
        try:
            record = LlavaRecord.parse(records[index], where)
            if record.image is None:
                continue
            image = Path(config.image_root) / record.image
            if not image.is_file():
                name = f"record {record.content['id']!r}: " if "id" in record.content else ""
                raise Skipped(MISSING_FILE, f"{where}: {name}image {image} does not exist; check image_root")
            if not (pairs := questions_and_answers(record.turns, where)):
                raise Skipped(BAD_CONVERSATION, f"{where}: there is no question with an answer")
        except Skipped as skipped:
            counters.seen += 1
            counters.skip(skipped.kind, skipped.detail)
            continue
        task = record.content.get("task")
        texts = [f"{question_prompt_vq(question)} {answer}" for question, answer in pairs]
        for number, text in enumerate([None] if config.records else texts):
            for time in range(repeat.get(task, 1) if isinstance(task, str) else 1):
                yield Planned(f"{index:06d}-{number}-{time}", index, image, text)


def make_sample(one: Planned, records: JsonRecords, config) -> dict | Skipped:
    """The members of a sample, its image read and checked."""
    try:
        image = image_members(one.image, str(one.image), config)
    except Skipped as skipped:
        return skipped
    text = {"json": records[one.record]} if one.text is None else {"txt": one.text.encode()}
    return {"__key__": one.key, **image, **text}


def questions_and_answers(turns: list[dict], where: str = "") -> list[tuple[str, str]]:
    """Pairs of a conversation without their image tags; a leading answer and a trailing question are dropped; `Skipped`
    if questions and answers do not alternate."""
    texts = [turn["value"].replace("<image>", "").strip() for turn in alternating(turns, where)]
    return list(zip(texts[::2], texts[1::2], strict=False))


def read_repeat(setting: str) -> dict[str, int]:
    """``name:3,style:1`` as a dictionary; `UserError` if it is not of that form."""
    try:
        repeat = {task: int(times) for task, times in (part.split(":") for part in setting.split(",") if part)}
    except ValueError:
        raise UserError(f"repeat={setting} is not of the form task:times,task:times, for example name:3") from None
    if not all(0 <= times <= MOST_REPEATS for times in repeat.values()):
        raise UserError(f"repeat={setting}: a record can be repeated 0 to {MOST_REPEATS:,} times")
    return repeat


def main(argv: list[str]) -> None:
    config = read_settings(argv, LlavaShardsConfig, "json=… image_root=… output=data/shards/qa")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit, which is allowed
    json = check_file(config.json, f"json={config.json}")
    repeat, records, counters = read_repeat(config.repeat), JsonRecords(str(json)), SkipCounters()
    chosen = list(planned(records, config, repeat, counters))
    random.Random(config.seed).shuffle(chosen)
    with new_set(config) as new, progress(total=len(chosen), unit=" samples", desc="writing shards") as bar:
        make = partial(make_sample, records=records, config=config)
        samples = in_order(make, chosen, config.num_workers, ahead=8 * config.num_workers)
        shards = write_shards(new, counted(samples, counters, bar), config.shard_size)
        manifest = write_manifest(new, shards, counters, config)
    counters.print()
    print(f"{config.output}: {manifest['samples']} samples")


if __name__ == "__main__":
    run_cli(main)
