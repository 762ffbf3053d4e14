"""Makes the CLIP folder of a small Show-o: a vision tower of the real class with random weights, and its processor.

    python3 tools/small_clip.py output_dir=outputs/tiny-clip

The folder takes the place of `openai/clip-vit-large-patch14-336` in `model.clip_vit_name`. What it sees is a random
but fixed view of the image, enough to try the CLIP-ViT branch; the same settings make the same weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import common  # noqa: F401  Ctrl-C is one word from here on

import torch
from omegaconf import DictConfig
from transformers import CLIPVisionConfig, CLIPVisionModel

from common.config import read_settings
from common.errors import run_cli
from common.files import owned_folder
from common.settings import setting
from models.checkpoint_io import quietly
from models.clip_encoder import image_processor_class, num_features
from models.config_fields import check_memory


@dataclass
class SmallClipConfig:
    output_dir: str = setting("???", "the folder to make", is_output=True)
    image_size: int = setting(64, "pixels per side", low=1, high=2**13)
    patch_size: int = setting(8, "pixels per side of a feature: 64 features for an image of 64 x 64", low=1, high=2**10)
    hidden_size: int = setting(192, "width", low=1, high=2**13)
    layers: int = setting(
        3, "layers; the last one is not used: features are the hidden state before it", low=1, high=64
    )
    heads: int = setting(3, "attention heads", low=1, high=2**12)
    seed: int = setting(0, "of the random weights", low=0, high=2**63 - 1)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        found = [
            f"{whole} is {config[whole]}; it must be a multiple of {part} ({config[part]})"
            for whole, part in (("image_size", "patch_size"), ("hidden_size", "heads"))
            if config[part] > 0 and config[whole] % config[part]
        ]
        numbers = 12 * config.hidden_size**2 * config.layers
        numbers += config.hidden_size * (config.image_size // max(config.patch_size, 1)) ** 2
        try:
            check_memory(4 * numbers, "the tower")
        except ValueError as error:
            found.append(str(error))
        return found


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
    side = {"height": config.image_size, "width": config.image_size}
    processor = image_processor_class()(size={"shortest_edge": config.image_size}, crop_size=side)
    with quietly(), owned_folder(config.output_dir, "output_dir") as folder:
        make_tower(config).save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"{config.output_dir}: {num_features(config)} features of {config.hidden_size} numbers")


if __name__ == "__main__":
    run_cli(main)
