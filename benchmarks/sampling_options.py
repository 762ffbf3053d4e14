"""Speed and quality of the sampling options that change the image, against exact generation, in one run.

    python3 benchmarks/sampling_options.py config=configs/showo_tiny_demo.yaml guidance_scale=2 data=data/emoji_world

Quality: the small default generates an image for each caption of the emoji world. An image counts as correct if the
real image nearest to it, by pixel distance, shows the right thing (`examples/emoji_world/benchmark.py`). `differ` is
the share of tokens that differ from exact generation with the same seed; another seed is a row for comparison.
Time: seconds of the small default for all captions, and of one 256-token image of a randomly initialised model
(8 layers x 512, full vocabulary, guidance 5). Prints a table, then one JSON line.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch

from benchmarks import generation, report
from common.config import InferenceConfig, load_config
from common.errors import run_cli
from common.files import resolve_path
from common.settings import setting
from evaluation.images import square
from examples.emoji_world.benchmark import SPLITS, read_world
from examples.emoji_world.features import name_ranks, pixels
from examples.emoji_world.text import caption
from models import SamplingParameters, ShowoPipeline
from models.images import load_image

BATCH = 64
# label -> sampling options and other generation settings
WAYS = {
    "exact": {},
    "exact, another seed": {"seed": 1},
    "refresh_every 2": {"refresh_every": 2},
    "refresh_every 3": {"refresh_every": 3},
    "refresh_every 6": {"refresh_every": 6},
    "guidance_start 0.25": {"guidance_start": 0.25},
    "guidance_stop 0.75": {"guidance_stop": 0.75},
    "guidance_stop 0.5": {"guidance_stop": 0.5},
    "order halton": {"order": "halton"},
    "timesteps 8": {"timesteps": 8},
    "timesteps 6": {"timesteps": 6},
    "timesteps 6, pow2": {"timesteps": 6, "schedule": "pow2"},
    "timesteps 6, halton": {"timesteps": 6, "order": "halton"},
    "timesteps 4, halton": {"timesteps": 4, "order": "halton"},
    "temperature 2": {"temperature": 2.0},
    "temperature 4": {"temperature": 4.0},
    "timesteps 8, refresh 3, guidance_stop 0.75": {"timesteps": 8, "refresh_every": 3, "guidance_stop": 0.75},
}
OPTIONS = SamplingParameters.__dataclass_fields__


@dataclass
class WaysConfig(InferenceConfig):
    data: str = setting("data/emoji_world", "the emoji world")
    pictures: int = setting(200, "seen images, evenly spread; all held-out ones are added", low=1)
    repeats: int = setting(2, "of the timed generation with the random model; the fastest counts", low=0)
    quality: bool = setting(True, "false: time the random model only")


def settings_of(way: dict, config) -> dict:
    """Arguments of `t2i_generate` except for the generator."""
    return {
        "timesteps": way.get("timesteps", config.generation_timesteps),
        "temperature": way.get("temperature", config.generation_temperature),
        "sampling": SamplingParameters(**{key: value for key, value in way.items() if key in OPTIONS}),
    }


class EmojiWorld:
    """The gallery (all training images) and the captions to generate images for."""

    def __init__(self, config):
        self.pipeline = ShowoPipeline.from_config(config)
        world = read_world(resolve_path(config.data))
        seen, held_out = ([picture for picture in world if picture.split == split] for split in SPLITS)
        size = self.pipeline.resolution
        self.names = [picture.name for picture in seen]
        self.gallery = pixels([square(load_image(picture.path), size) for picture in seen])
        self.wanted = seen[:: max(1, len(seen) // config.pictures)][: config.pictures] + held_out
        self.prompts = [caption(picture.name, picture.style) for picture in self.wanted]

    def generate(self, way: dict, config) -> tuple[float, torch.Tensor]:
        """(seconds, codes of all captions)."""
        pipeline = self.pipeline
        pipeline.noise_schedule = generation.get_mask_schedule(way.get("schedule", "cosine"))
        generator, codes = pipeline.generator(way.get("seed", config.seed)), []
        started = time.perf_counter()
        for first in range(0, len(self.prompts), BATCH):
            batch = self.prompts[first : first + BATCH]
            blank = torch.full((len(batch), pipeline.window**2), -1, device=pipeline.device)
            settings = settings_of(way, config) | {"guidance_scale": config.guidance_scale, "generator": generator}
            codes.append(pipeline.generate_codes(batch, blank, **settings))
        return time.perf_counter() - started, torch.cat(codes)

    def top1(self, codes: torch.Tensor) -> list[float]:
        """Top-1 accuracy on the seen and on the held-out captions."""
        images = pixels([image for some in codes.split(BATCH) for image in self.pipeline.decode(some)])
        ranks = name_ranks(images, self.gallery, self.names, [picture.name for picture in self.wanted], cosine=False)
        hits = {split: [] for split in SPLITS}
        for picture, (rank, _) in zip(self.wanted, ranks, strict=True):
            hits[picture.split].append(rank == 0)
        return [sum(hits[split]) / max(1, len(hits[split])) for split in SPLITS]


def time_random_model(ways: dict[str, dict], config) -> dict[str, float]:
    """Seconds per image. The options take turns, so that a slow moment of the machine does not hit only one of them."""
    args = generation.parse([])
    model = generation.make_model(args)
    row, uncond, _ = generation.make_prompts(model, args)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(config.repeats + 1):
        for name, way in ways.items():
            settings = settings_of(way, config) | {"noise_schedule": way.get("schedule", "cosine")}
            started = time.perf_counter()
            model.t2i_generate(row, uncond, guidance_scale=args.guidance, generator=torch.Generator(), **settings)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def main(argv: list[str]) -> None:
    config = load_config(argv, WaysConfig)
    results = {name: {"random_s": seconds} for name, seconds in time_random_model(WAYS, config).items()}
    world = EmojiWorld(config) if config.quality else None
    print(f"{'':44}{'8x512 s':>9}{'tiny s':>9}{'top-1 seen':>12}{'held-out':>10}{'differ':>8}")
    exact = None
    for name, way in WAYS.items():
        result, cells = results[name], ""
        if world is not None:
            seconds, codes = world.generate(way, config)
            exact = codes if exact is None else exact
            figures = *world.top1(codes), float((codes != exact).float().mean())
            result |= dict(zip(("tiny_s", "top1_seen", "top1_held_out", "differ"), (seconds, *figures), strict=True))
            cells = f"{seconds:9.1f}{figures[0]:12.1%}{figures[1]:10.1%}{figures[2]:8.1%}"
        print(f"{name:44}{result['random_s']:9.2f}{cells}", flush=True)
    keys = "guidance_scale", "generation_timesteps", "generation_temperature", "seed", "pictures"
    print(json.dumps(report.facts() | {key: config[key] for key in keys} | {"results": results}))


if __name__ == "__main__":
    run_cli(main)
