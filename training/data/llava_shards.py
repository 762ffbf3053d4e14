"""Turns a LLaVA-format JSON and its pictures into WebDataset shards for the captioning flow.

    python3 training/data/llava_shards.py json=data/emoji_world/llava_train.json image_root=data/emoji_world/images \
        output=data/emoji_world/shards/qa repeat=name:3

Every question with its answer becomes one sample: the picture and ``USER: \\n{question} ASSISTANT: {answer}``, the very
text that `inference_mmu.py` asks with, so train on it with `dataset.params.add_caption_prompt: False`. `repeat` weighs the
values of the records' key `task`.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import webdataset
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError, run_cli
from llava import question_prompt_vq


@dataclass
class LlavaShardsConfig:
    json: str = "???"
    image_root: str = "???"
    output: str = "???"  # prefix of the shards: {output}-000000.tar
    repeat: str = ""  # task:times, comma-separated
    shard_size: int = 2000
    seed: int = 0


def samples(records: list[dict], image_root: Path, repeat: dict[str, int]) -> Iterator[dict]:
    """One sample per question and repetition.

    Raises:
        UserError: a record's picture is missing.
    """
    for index, record in enumerate(records):
        picture = image_root / record["image"]
        if not picture.is_file():
            raise UserError(f"record {record.get('id', index)!r}: picture {picture} does not exist; check image_root")
        turns = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
        pairs = zip(turns[::2], turns[1::2], strict=False)
        for number, (question, answer) in enumerate(pairs):
            for time in range(repeat.get(record.get("task"), 1)):
                yield {
                    "__key__": f"{index:06d}-{number}-{time}",
                    picture.suffix.lstrip(".").lower(): picture.read_bytes(),
                    "txt": f"{question_prompt_vq(question)} {answer}",
                }


def main(argv: list[str]) -> None:
    try:
        config = OmegaConf.merge(OmegaConf.structured(LlavaShardsConfig), OmegaConf.from_dotlist(argv))
    except OmegaConfBaseException as error:
        raise UserError(f"{str(error).splitlines()[0]}; the settings are {', '.join(LlavaShardsConfig.__annotations__)}") from None
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{', '.join(missing)} not given; for example json=… image_root=… output=data/shards/qa")
    file = Path(config.json)
    if not file.is_file():
        raise UserError(f"json={file} does not exist")
    repeat = dict(part.split(":") for part in config.repeat.split(",") if ":" in part)
    chosen = list(samples(json.loads(file.read_text()), Path(config.image_root), {k: int(v) for k, v in repeat.items()}))
    random.Random(config.seed).shuffle(chosen)
    with webdataset.ShardWriter(f"{config.output}-%06d.tar", maxcount=config.shard_size, verbose=0, mtime=0) as writer:
        for sample in chosen:
            writer.write(sample)
    print(f"{config.output}: {len(chosen)} samples")


if __name__ == "__main__":
    run_cli(main)
