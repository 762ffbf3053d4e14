"""Makes the CLIP folder of a small Show-o: a vision tower of the real class with random weights, and its processor.

    python3 training/data/small_clip.py output_dir=outputs/tiny-clip

The folder takes the place of `openai/clip-vit-large-patch14-336` in `model.clip_vit_name`. What it sees is a random
but fixed view of the image, enough to try the CLIP-ViT branch; the same settings make the same weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from omegaconf import DictConfig
from transformers import CLIPVisionConfig, CLIPVisionModel

from common.config import read_settings
from common.errors import UserError, run_cli
from models.checkpoint_io import quietly
from models.clip_encoder import image_processor_class, num_features


@dataclass
class SmallClipConfig:
    output_dir: str = "???"
    image_size: int = 64
    patch_size: int = 8  # 64 features for an image of 64 x 64
    hidden_size: int = 192
    layers: int = 3  # the last one is not used: features are the hidden state before it
    heads: int = 3
    seed: int = 0


def check(config: DictConfig) -> None:
    """Sizes that make no tower.

    Raises:
        UserError: a size is below its least, or does not divide the other; all of them in one message.
    """
    least = {"image_size": 1, "patch_size": 1, "hidden_size": 1, "layers": 1, "heads": 1, "seed": 0}
    problems = [f"{key} is {config[key]}, it must be {low} or more" for key, low in least.items() if config[key] < low]
    for whole, part in (("image_size", "patch_size"), ("hidden_size", "heads")):
        if not problems and config[whole] % config[part]:
            problems.append(f"{whole} is {config[whole]}, it must be a multiple of {part} ({config[part]})")
    if problems:
        raise UserError("; ".join(problems))


def make_tower(config: DictConfig) -> CLIPVisionModel:
    """Random weights in fp32 that follow from the seed; the program's own random numbers go on as they were."""
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": 4 * config.hidden_size}
    sizes |= {"num_hidden_layers": config.layers, "num_attention_heads": config.heads}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return CLIPVisionModel(
            CLIPVisionConfig(image_size=config.image_size, patch_size=config.patch_size, **sizes)
        ).eval()


def main(argv: list[str]) -> None:
    config = read_settings(argv, SmallClipConfig, "output_dir=outputs/tiny-clip")
    check(config)
    side = {"height": config.image_size, "width": config.image_size}
    with quietly():
        make_tower(config).save_pretrained(config.output_dir)
    processor = image_processor_class()(size={"shortest_edge": config.image_size}, crop_size=side)
    processor.save_pretrained(config.output_dir)
    print(f"{config.output_dir}: {num_features(config)} features of {config.hidden_size} numbers")


if __name__ == "__main__":
    run_cli(main)
