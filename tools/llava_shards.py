"""Turns a LLaVA-format JSON and its images into WebDataset shards for the captioning flow.

    python3 tools/llava_shards.py json=data/emoji_world/llava_train.json image_root=data/emoji_world/images \\
        output=data/emoji_world/shards/qa repeat=name:3

    … json=llava_v1_5_mix665k.json image_root=llava_data output=data/llava/tuning records=true

Every question with its answer becomes one sample: the image and ``USER: \\n{question} ASSISTANT: {answer}``, the
very text that `inference_mmu.py` asks with, so train on it with `dataset.params.add_caption_prompt: False`. With
`records=true` a sample is the image and the whole record as `json`, which the flows llava_pretrain and llava_tuning
read, also when `encode_images.py` has encoded the images. `repeat` weighs the values of the records' key `task`.
Records without an image are left out (spec §9).
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import common  # noqa: F401  Ctrl-C is one word from here on

import webdataset

from common.config import read_settings
from common.errors import UserError, run_cli
from common.settings import setting
from llava import question_prompt_vq


@dataclass
class LlavaShardsConfig:
    json: str = setting("???", "records in LLaVA's format")
    image_root: str = setting("???", "folder that their image names are relative to")
    output: str = setting("???", "prefix of the shards: {output}-000000.tar")
    repeat: str = setting("", "task:times, comma-separated; empty: every record once")
    records: bool = setting(False, "whole records for the llava flows, instead of questions for the captioning flow")
    shard_size: int = setting(2000, "samples in a shard", low=1)
    seed: int = setting(0, "of the shuffled order")


def samples(records: list[dict], image_root: Path, repeat: dict[str, int], whole: bool) -> Iterator[dict]:
    """One sample per question, or record if `whole`, and repetition; its image is the path, yet to be read.

    Raises:
        UserError: a record's image is missing.
    """
    for index, record in enumerate(records):
        if "image" not in record:
            continue
        image = image_root / record["image"]
        if not image.is_file():
            raise UserError(f"record {record.get('id', index)!r}: image {image} does not exist; check image_root")
        questions = () if whole else questions_and_answers(record["conversations"])
        texts = [{"txt": f"{question_prompt_vq(question)} {answer}"} for question, answer in questions]
        for number, text in enumerate([{"json": record}] if whole else texts):
            for time in range(repeat.get(record.get("task"), 1)):
                key = f"{index:06d}-{number}-{time}"
                yield {"__key__": key, image.suffix.lstrip(".").lower(): image, **text}


def questions_and_answers(turns: list[dict]) -> list[tuple[str, str]]:
    """Pairs of a conversation without their image tags; a leading answer and a trailing question are dropped."""
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    texts = [turn["value"].replace("<image>", "").strip() for turn in turns]
    return list(zip(texts[::2], texts[1::2], strict=False))


def read_repeat(setting: str) -> dict[str, int]:
    """``name:3,style:1`` as a dictionary.

    Raises:
        UserError: it is not of that form.
    """
    try:
        return {task: int(times) for task, times in (part.split(":") for part in setting.split(",") if part)}
    except ValueError:
        raise UserError(f"repeat={setting} is not of the form task:times,task:times, for example name:3") from None


def main(argv: list[str]) -> None:
    config = read_settings(argv, LlavaShardsConfig, "json=… image_root=… output=data/shards/qa")
    file = Path(config.json)
    if not file.is_file():
        raise UserError(f"json={file} does not exist")
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"json={file} is no valid JSON ({error})") from None
    chosen = list(samples(records, Path(config.image_root), read_repeat(config.repeat), config.records))
    random.Random(config.seed).shuffle(chosen)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{config.output}-%06d.tar", maxcount=config.shard_size, verbose=0, mtime=0) as writer:
        for sample in chosen:
            writer.write(
                {key: value.read_bytes() if isinstance(value, Path) else value for key, value in sample.items()}
            )
    print(f"{config.output}: {len(chosen)} samples")


if __name__ == "__main__":
    run_cli(main)
