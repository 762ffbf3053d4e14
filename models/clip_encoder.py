"""The frozen CLIP vision tower of the `w_clip_vit` branch (spec §4)."""

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.utils import is_torchvision_available

from common.files import field, read_json
from models.checkpoint_io import check_finite, quietly, resolve_folder
from models.config_fields import CLIP_FIELDS, check_divides, check_fields

CLIP_VIT_L_336 = "openai/clip-vit-large-patch14-336"


def image_processor_class() -> type:
    """CLIP's image processor. Without torchvision it is imported by its PIL name, since the general name warns."""
    if not is_torchvision_available() and hasattr(transformers, "CLIPImageProcessorPil"):
        return transformers.CLIPImageProcessorPil
    return transformers.CLIPImageProcessor


def read_clip_config(folder: str | Path) -> transformers.CLIPVisionConfig:
    """Configuration of the vision tower in a CLIP folder; reads no weights.

    Raises:
        UserError: the file is missing or damaged.
        ValueError: it is no CLIP (vision) model's, or its sizes cannot be.
    """
    content = read_json(Path(folder) / "config.json")
    if (kind := content.get("model_type")) not in ("clip", "clip_vision_model"):
        raise ValueError(f"it is a {kind!r} model, expected a CLIP (vision) model")
    vision = field(content, "vision_config", dict, str(folder)) if "vision_config" in content else content
    sizes = transformers.CLIPVisionConfig().to_dict() | vision
    check_fields(sizes, CLIP_FIELDS)
    check_divides(sizes, "hidden_size", "num_attention_heads")
    if sizes["patch_size"] > sizes["image_size"]:
        raise ValueError(f"patch_size is {sizes['patch_size']}; it must be at most image_size ({sizes['image_size']})")
    config = transformers.CLIPVisionConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"  # the default; another could be code from the hub
    return config


def read_image_processor(folder: str | Path, config: transformers.CLIPVisionConfig):
    """The image processor in a CLIP folder; `ValueError` if its images are not of the size that the tower reads."""
    processor = image_processor_class().from_pretrained(folder)
    sides = dict(processor.crop_size if processor.do_center_crop else processor.size)
    if set(sides.values()) != {config.image_size} or max(dict(processor.size).values()) > 2 * config.image_size:
        raise ValueError(f"its preprocessor gives images of size {sides}, its tower reads {config.image_size}")
    return processor


def num_features(config: transformers.CLIPVisionConfig) -> int:
    """Features per image, 576 for ViT-L/14 at 336²."""
    return (config.image_size // config.patch_size) ** 2


class CLIPVisionTower(nn.Module):
    """CLIP patch features, the input of `mm_projector`.

    Args:
        name_or_path: hub name or folder of a CLIP or CLIP vision model with its image processor.
        layer: which hidden state to return (without the CLS position); −2 as published.

    Raises:
        ValueError: weights of the vision tower are missing. Those of a text tower are ignored.
    """

    def __init__(self, name_or_path: str = CLIP_VIT_L_336, layer: int = -2):
        super().__init__()
        self.layer = layer
        folder = resolve_folder(name_or_path)
        config = read_clip_config(folder)
        self.image_processor = read_image_processor(folder, config)
        with quietly():
            self.vision_tower, report = transformers.CLIPVisionModel.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True
            )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{name_or_path} lacks {len(missing)} weights of the vision tower, first {missing[0]}")
        check_finite(name_or_path, self.vision_tower.state_dict())
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "CLIPVisionTower":
        """Keeps evaluation mode whatever `mode` is, since the tower is frozen."""
        return super().train(False)

    @property
    def num_features(self) -> int:
        """Features per image."""
        return num_features(self.vision_tower.config)

    def preprocess(self, images: list) -> torch.Tensor:
        """PIL images → pixel values (B, 3, S, S) float32, by CLIP's own resize, crop and normalisation."""
        return self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values (B, 3, S, S) → features (B, num_features, hidden); published: (B, 576, 1024) float32."""
        parameter = next(self.vision_tower.parameters())
        states = self.vision_tower(pixel_values.to(parameter), output_hidden_states=True).hidden_states
        return states[self.layer][:, 1:]
