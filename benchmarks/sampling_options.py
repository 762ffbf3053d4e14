"""Quality and time of every sampling option at several numbers of steps, in one run.

    python3 benchmarks/sampling_options.py config=configs/showo_tiny_demo.yaml
    python3 benchmarks/sampling_options.py config=… samples=4 steps='[2, 8]' ways='[published, top_k 200]'

The model of the configuration, of 64, 96 or 128 pixels, generates an image for each of so many captions of the scene
world, seen combinations and held-out ones. One is right if the scene that the reader reads in it is what the caption
says. A cell of the table: images that are right, and seconds of an image in a batch. The last column: seconds of one
256-token image in 8 steps by a randomly initialised model (8 layers x 512, full vocabulary, guidance 5). Prints the
table, then one JSON line, which has more: seen and held-out combinations apart, the 95 % interval, and `differ`,
the share of tokens that are not the published ones with the same seed and steps.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import numpy as np
import torch

from benchmarks import generation, report
from common.config import InferenceConfig, load_config
from common.errors import UserError, run_cli
from common.schema import SAMPLERS
from common.settings import setting
from examples.scenes.parts import sample
from examples.scenes.reader import Reader
from examples.scenes.world import SIDES, SPLITS, holds
from models import SamplingParameters, ShowoPipeline

BATCH = 64
TIMED_STEPS = 8  # of the random model
PUBLISHED = "published"
HALTON, ML_CACHE = ({k.rpartition(".")[2]: v for k, v in SAMPLERS[name].items()} for name in ("halton", "ml_cache"))
# label -> sampling options, and settings of generation other than the number of steps
WAYS = {
    PUBLISHED: {},
    "another seed": {"seed": 1},
    "order entropy": {"order": "entropy"},
    "order margin": {"order": "margin"},
    "order halton": {"order": "halton"},
    "order halton_roll": {"order": "halton_roll"},
    "halton_roll, arccos, logit_scale 1.2": HALTON,
    "the same, guidance_ramp 1": HALTON | {"guidance_ramp": 1.0},
    "top_k 200": {"top_k": 200},
    "top_k 20": {"top_k": 20},
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.5": {"top_p": 0.5},
    "logit_scale 1.2": {"logit_scale": 1.2},
    "guidance_ramp 1": {"guidance_ramp": 1.0},
    "guidance_start 0.25": {"guidance_start": 0.25},
    "guidance_stop 0.5": {"guidance_stop": 0.5},
    "remask cap 0.05": {"remask_rate": 0.05},
    "remask cap 0.2": {"remask_rate": 0.2},
    "remask rescale 0.2": {"remask": "rescale", "remask_rate": 0.2},
    "remask confidence 1": {"remask": "confidence", "remask_rate": 1.0},
    "remask cap 0.2, steps 0.25 to 0.75": {"remask_rate": 0.2, "remask_start": 0.25, "remask_stop": 0.75},
    "refresh_every 3": {"refresh_every": 3},
    "refresh_every 5, share 0.1, warm-up 0.3": ML_CACHE,
    "temperature 0": {"temperature": 0.0},
    "temperature 4": {"temperature": 4.0},
    "schedule pow2": {"schedule": "pow2"},
    "schedule linear": {"schedule": "linear"},
}
PLACES = {"seen": SPLITS[1:2], "held_out": SPLITS[2:]}
OPTIONS = SamplingParameters.__dataclass_fields__


@dataclass
class WaysConfig(InferenceConfig):
    samples: int = setting(150, "captions of seen combinations, and as many of held-out ones", low=3)
    steps: list[int] = setting([2, 4, 8, 16, 32], "numbers of steps", low=1, high=2**16)
    ways: list[str] | None = setting(None, "labels of WAYS in this file; null: all")
    repeats: int = setting(2, "of the timed generation with the random model; the fastest counts; 0: none", low=0)

    @staticmethod
    def problems(config) -> list[str]:
        unknown = [way for way in config.ways or () if way not in WAYS]
        return [f"ways has {unknown[0]!r}; known: {'; '.join(WAYS)}"] if unknown else []


def settings_of(way: dict, steps: int, config) -> dict:
    """Arguments of `t2i_generate` and `generate_codes` except for generator, guidance and schedule."""
    return {
        "timesteps": steps,
        "temperature": way.get("temperature", config.generation_temperature),
        "sampling": SamplingParameters(**{key: value for key, value in way.items() if key in OPTIONS}),
    }


class SceneWorld:
    """Captions of the scene world to generate images for, and the reader that judges them."""

    def __init__(self, config):
        size = config.dataset.preprocessing.resolution
        if size not in SIDES:
            sizes = ", ".join(map(str, SIDES))
            raise UserError(f"dataset.preprocessing.resolution is {size}; give a model of {sizes} pixels")
        self.pipeline, self.reader = ShowoPipeline.from_config(config), Reader(size)
        self.schedule = self.pipeline.noise_schedule
        self.said, self.places = [], []
        for place, splits in PLACES.items():
            for number in range(config.samples):
                split, number = splits[number % len(splits)], number // len(splits)
                self.said.append(sample("captions", number, split=split, cells=self.reader.cells).said)
                self.places.append(place)

    def generate(self, way: dict, steps: int, config) -> tuple[float, torch.Tensor]:
        """(seconds of an image, codes of all captions)."""
        pipeline, name = self.pipeline, way.get("schedule")
        pipeline.noise_schedule = generation.get_mask_schedule(name) if name else self.schedule
        generator, codes = pipeline.generator(way.get("seed", config.seed)), []
        settings = settings_of(way, steps, config) | {"guidance_scale": config.guidance_scale, "generator": generator}
        started = time.perf_counter()
        for first in range(0, len(self.said), BATCH):
            batch = [said["caption"] for said in self.said[first : first + BATCH]]
            blank = torch.full((len(batch), pipeline.window**2), -1, device=pipeline.device)
            codes.append(pipeline.generate_codes(batch, blank, **settings))
        return (time.perf_counter() - started) / len(self.said), torch.cat(codes)

    def right(self, codes: torch.Tensor) -> dict[str, float]:
        """Share of images that are what their captions say, in all, with Wilson's 95 % interval, and by place."""
        images = [np.array(image) for some in codes.split(BATCH) for image in self.pipeline.decode(some)]
        scenes = self.reader.read(np.stack(images))
        hits = np.array([holds(said["claims"], scene) for said, scene in zip(self.said, scenes, strict=True)])
        places, right, count = np.array(self.places), float(hits.mean()), len(hits)
        z = 1.96
        half = z * (right * (1 - right) / count + (z / (2 * count)) ** 2) ** 0.5
        low, high = ((right + z**2 / (2 * count) + sign * half) / (1 + z**2 / count) for sign in (-1, 1))
        found = {place: float(hits[places == place].mean()) for place in PLACES}
        return {"right": right, "low": low, "high": high} | found


def time_random_model(ways: dict[str, dict], config) -> dict[str, float]:
    """Seconds of an image; the ways take turns, so that a slow moment of the machine does not hit only one of them."""
    args = generation.parse(["--hidden", "512", "--layers", "8", "--heads", "8"])
    model = generation.make_model(args)
    row, uncond, _ = generation.make_prompts(model, args)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(config.repeats):
        for name, way in ways.items():
            settings = settings_of(way, TIMED_STEPS, config) | {"noise_schedule": way.get("schedule", "cosine")}
            started = time.perf_counter()
            model.t2i_generate(row, uncond, guidance_scale=args.guidance, generator=torch.Generator(), **settings)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def main(argv: list[str]) -> None:
    config = load_config(argv, WaysConfig)
    world = SceneWorld(config)
    ways = {name: WAYS[name] for name in config.ways or WAYS}
    random_seconds = time_random_model(ways, config) if config.repeats else {}
    published, results = {}, {}
    print(f"| way | {' | '.join(f'{steps} steps' for steps in config.steps)} | 8 × 512, s |")
    print("|---" * (len(config.steps) + 2) + "|")
    for name, way in {PUBLISHED: {}, **ways}.items():
        results[name], cells = {"random_s": random_seconds.get(name)}, []
        for steps in config.steps:
            seconds, codes = world.generate(way, steps, config)
            differ = float((codes != published.setdefault(steps, codes)).float().mean())
            found = results[name][steps] = {"s": seconds, "differ": differ} | world.right(codes)
            cells.append(f"{found['right']:.1%} {seconds:.3f} s")
        last = f"{random_seconds[name]:.2f}" if name in random_seconds else ""
        print(f"| {name} | {' | '.join(cells)} | {last} |", flush=True)
    keys = "guidance_scale", "generation_temperature", "seed", "samples"
    print(json.dumps(report.facts() | {key: config[key] for key in keys} | {"results": results}))


if __name__ == "__main__":
    run_cli(main)
