"""A thing that the model does not know: fifty images to learn it from, and how many images of it are right.

    python3 examples/scenes/new_icon.py output_dir=data/ladder
    python3 examples/scenes/new_icon.py output_dir=data/ladder score=outputs/ladder-images

The first command writes scenes of the world (examples/scenes/world.py), in each of which one thing is a ladder, an icon
that is not among the world's, as shards (`train-*.tar`: png, txt), and captions of other such scenes as prompts
(`prompts.txt`, `prompts.jsonl` with what each says). The second reads the images that inference_t2i.py generated
for these prompts and prints how many scenes, and how many ladders in them, are right. docs/finetuning.md uses both.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import common  # noqa: F401  Ctrl-C is one word from here on

import numpy as np
from PIL import Image

from common.config import read_settings
from common.errors import UserError, run_cli
from common.files import field, json_records, make_folder, write_json, write_text
from common.settings import setting
from examples.scenes.reader import Reader
from examples.scenes.words import caption
from examples.scenes.world import (
    CELL,
    COLOURS,
    ICONS,
    SIDES,
    Scene,
    add_icon,
    generator,
    holds,
    is_possible,
    png_of,
    render,
    sample_scene,
)
from tools.shard_writing import manifest_path, shard_path, write_shard

NAME = "ladder"
BODY = (
    '<path fill="currentColor" d="M4 1h4v3.5h8V1h4v22h-4v-3.5H8V23H4zm4 7v2.5h8V8zm0 6v2.5h8V14z" fill-rule="evenodd"/>'
)


@dataclass
class NewIconConfig:
    output_dir: str = setting("data/ladder", "folder of the images and prompts", is_output=True)
    score: str | None = setting(None, "folder of inference_t2i.py with images of these prompts, to be scored")
    images: int = setting(50, "images to learn from", low=1, high=100_000)
    prompts: int = setting(100, "captions of other scenes", low=1, high=100_000)
    size: int = setting(96, "pixels per side", choices=tuple(SIDES))
    seed: int = setting(0, "of all scenes")


def scenes(config: NewIconConfig, split: str) -> Iterator[Scene]:
    """Scenes without end with one ladder each."""
    rng = generator(NAME, split, config.seed, config.size)
    while True:
        scene = sample_scene(rng, config.size // CELL, counts=(1, 1, 2, 2, 3))
        things = list(scene.things)
        number = rng.randrange(len(things))
        things[number] = replace(things[number], icon=NAME, colour=rng.choice(tuple(COLOURS)))
        changed = replace(scene, things=tuple(things))
        if len({thing.kind for thing in things}) == len(things) and is_possible(changed):
            yield changed


def write(config: NewIconConfig) -> None:
    folder, rng = make_folder(config.output_dir), generator(NAME, "texts", config.seed)
    learned = [scene for scene, _ in zip(scenes(config, "train"), range(config.images), strict=False)]
    samples = (
        {"__key__": f"{number:04d}", "png": png_of(render(scene)), "txt": caption(scene, rng).text.encode()}
        for number, scene in enumerate(learned)
    )
    entry = write_shard(shard_path(folder / "train", 0), samples)
    write_json(manifest_path(folder / "train"), {"shards": [entry], "samples": len(learned), "skipped": {}})
    asked: dict[str, dict] = {}
    for scene in scenes(config, "prompts"):
        if scene not in learned:
            said = caption(scene, rng)
            asked.setdefault(said.text, said.claims)
        if len(asked) == config.prompts:
            break
    write_text(folder / "prompts.txt", "".join(f"{text}\n" for text in asked))
    lines = (json.dumps({"prompt": text, "claims": claims}) + "\n" for text, claims in asked.items())
    write_text(folder / "prompts.jsonl", "".join(lines))
    print(f"{config.output_dir}: {len(learned)} images of {NAME}s, {len(asked)} prompts")


def score(config: NewIconConfig) -> None:
    """Prints the shares of scenes and of ladders that are right in the images of a folder."""
    asked = json_records(Path(config.output_dir) / "prompts.jsonl")
    known = {line["prompt"]: line["claims"] for _, line in asked}
    folder, counts, reader = Path(config.score), Counter(), Reader(config.size, icons=(*ICONS, NAME))
    for _, line in json_records(folder / "results.jsonl"):
        claims = known.get(field(line, "prompt", str, "results.jsonl"))
        if claims is None:
            continue
        image = np.array(Image.open(folder / field(line, "file", str, "results.jsonl")).convert("RGB"))
        scene = reader.read(image[None])[0]
        wanted = next(thing for thing in claims["things"] if thing["icon"] == NAME)
        counts["images"] += 1
        counts["scenes"] += holds(claims, scene)
        counts["ladders"] += any(
            thing.icon == NAME and wanted.get("colour") in (None, thing.colour) for thing in scene.things
        )
    if not counts["images"]:
        raise UserError(f"score={config.score} holds no image of the prompts in {config.output_dir}/prompts.txt")
    shares = (f"{what} right {counts[what] / counts['images']:.0%}" for what in ("scenes", "ladders"))
    print(f"{counts['images']} images: {', '.join(shares)}")


def main(argv: list[str]) -> None:
    config = read_settings(argv, NewIconConfig, "output_dir=data/ladder")
    add_icon(NAME, BODY)
    score(config) if config.score else write(config)


if __name__ == "__main__":
    run_cli(main)
