"""How good a small default is on the emoji world: reconstruction, drawing, naming.

    python3 benchmarks/emoji_figures.py config=configs/showo_tiny_demo.yaml data=data/emoji_world

Drawing: each caption is drawn once and compared with all real pictures by pixel distance; it counts when its name is
among the names of the 1 or 5 nearest. For a held-out combination its own picture is taken out of the gallery. Naming:
"What is this?" about each picture, exact match. Ends with one JSON line.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch
from PIL import Image

from common.config import InferenceConfig, load_config, resolve_path
from common.errors import run_cli
from models import ShowoPipeline
from models.images import contact_sheet, load_image, preprocess
from training.data.emoji_text import NAME_QUESTION, caption
from training.data.emoji_world import load_manifest

BATCH = 64


@dataclass
class FiguresConfig(InferenceConfig):
    data: str = "data/emoji_world"
    sheet: str = ""  # prefix of two sheets with 32 drawings each, seen and held out


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B,) dB of pixels (B, 3, H, W) in [-1, 1]."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def drawing_rank(drawn: Image.Image, wanted: dict, gallery: list[dict], pixels: torch.Tensor) -> int:
    """Rank (0 = nearest) of the first gallery picture with the right name; a held-out picture is not in its gallery."""
    distance = (pixels - preprocess(drawn, pixels.shape[-1])).square().mean(dim=(1, 2, 3))
    others = [gallery[i] for i in distance.argsort().tolist()]
    if wanted["held_out"]:
        others = [other for other in others if other["key"] != wanted["key"]]
    return next(rank for rank, other in enumerate(others) if other["name"] == wanted["name"])


def share(hits: list[bool]) -> float:
    return round(sum(hits) / max(1, len(hits)), 4)


def measure(pipeline: ShowoPipeline, config, split: str, gallery: list[dict], images: list[Image.Image]) -> dict:
    """PSNR, naming and drawing figures of the seen or the held-out pictures."""
    pixels = torch.stack([preprocess(image, pipeline.resolution) for image in images])  # (gallery, 3, res, res)
    index = [i for i, item in enumerate(gallery) if item["held_out"] == (split == "held_out")]
    wanted, own = [gallery[i] for i in index], [images[i] for i in index]
    with torch.no_grad():
        restored = [
            pipeline.vq_model.decode_code(pipeline.encode(own[i : i + BATCH])) for i in range(0, len(own), BATCH)
        ]
    answers = pipeline.answer(own, [NAME_QUESTION], max_new_tokens=12, batch_size=BATCH)
    prompts = [caption(item["name"], item["style"]) for item in wanted]
    drawn = pipeline.text_to_image(
        prompts,
        guidance_scale=config.guidance_scale,
        timesteps=config.generation_timesteps,
        temperature=config.generation_temperature,
        batch_size=BATCH,
        generator=pipeline.generator(config.seed),
    )
    ranks = [drawing_rank(image, item, gallery, pixels) for image, item in zip(drawn, wanted, strict=True)]
    if config.sheet:
        step = max(1, len(drawn) // 32)
        contact_sheet(drawn[::step][:32], prompts[::step][:32], columns=8).save(f"{config.sheet}{split}.png")
    return {
        f"{split}_pictures": len(index),
        f"{split}_psnr": round(float(psnr(torch.cat(restored).cpu(), pixels[index]).mean()), 2),
        f"{split}_naming": share([a[0] == item["name"] for a, item in zip(answers, wanted, strict=True)]),
        f"{split}_drawing_top1": share([rank < 1 for rank in ranks]),
        f"{split}_drawing_top5": share([rank < 5 for rank in ranks]),
    }


def main(argv: list[str]) -> None:
    config = load_config(argv, FiguresConfig)
    folder = resolve_path(config.data)
    gallery = load_manifest(folder)["pictures"]
    pipeline = ShowoPipeline.from_config(config)
    images = [load_image(folder / "images" / f"{item['key']}.png") for item in gallery]
    started = time.perf_counter()
    figures = measure(pipeline, config, "held_out", gallery, images) | measure(
        pipeline, config, "seen", gallery, images
    )
    for name, value in figures.items():
        print(f"{name:24} {value}")
    settings = {
        key: config[key] for key in ("guidance_scale", "generation_timesteps", "generation_temperature", "seed")
    }
    print(json.dumps(figures | settings | {"seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    run_cli(main)
