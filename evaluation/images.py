"""Images compared: PSNR and SSIM, FID and CLIPScore by torchmetrics, with networks from files or the hub."""

import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from common.errors import UserError, first_line
from common.files import check_file, resolve_path
from common.progress import progress
from models.images import preprocess
from models.loading import choose_device

BATCH = 50
ALONE = {"sync_on_compute": False}  # only the main process judges; the others do not answer
INCEPTION = "torch-fidelity's Inception (FID's own weights)"


def as_bytes(image: Image.Image, size: int) -> torch.Tensor:
    """(3, size, size) uint8, preprocessed as for the model: shorter side to `size` (bicubic), centre crop."""
    return (preprocess(image, size, normalize=False) * 255).round().byte()


def square(image: Image.Image, size: int) -> Image.Image:
    """`as_bytes` as a PIL image."""
    return Image.fromarray(as_bytes(image, size).permute(1, 2, 0).numpy())


def psnr(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(N,) peak signal-to-noise ratio in dB of (N, F) pixels in [0, 1]; 100 at most."""
    return -10 * (values - others).square().mean(dim=-1).clamp(min=1e-10).log10()


def side_by_side(*images: Image.Image) -> Image.Image:
    """Images next to each other, at the size of the first."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for number, image in enumerate(images):
        row.paste(image.resize((width, height)), (number * width, 0))
    return row


def psnr_and_ssim(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[tuple[float, float]]:
    """(dB, [-1, 1]) of each pair of 8-bit images of one size; 100 dB at most, SSIM with the usual 11 x 11 window."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    found = []
    for image, other in zip(images, others, strict=True):
        one, two = (as_bytes(each, min(each.size))[None].double() / 255 for each in (image, other))
        found.append((float(psnr(one.flatten(1), two.flatten(1))), float(ssim(one, two, data_range=1.0))))
    return found


def need(library: str, what: str, remedy: str) -> None:
    """`UserError` where a library is not installed."""
    if find_spec(library.replace("-", "_")) is None:
        raise UserError(f"{what} needs {library}, which is not installed; {remedy}")


def check_fid(config) -> str:
    """Which network FID will look through; `UserError` where that cannot work."""
    need("torchmetrics", "FID", "pip install 'torchmetrics>=1.4'")
    for key in ("fid_features", "fid_weights"):
        if config[key]:
            check_file(resolve_path(config[key]), f"{key}={config[key]}")
    if config.fid_features:
        return f"the network in {Path(config.fid_features).name}"
    need(
        "torch-fidelity",
        "FID",
        "pip install torch-fidelity (it brings torchvision), or give fid_features=FILE, an Inception as TorchScript",
    )
    return INCEPTION


class FID:
    """Fréchet Inception distance of two sets of images of any size.

    Args:
        config: `fid_features` (a TorchScript network: (B, 3, H, W) uint8 → (B, F)), or null for torchmetrics' own with
            `fid_weights`, a local file, or null for the hub; `fid_size`, the side of both sets' images.
    """

    def __init__(self, config) -> None:
        self.size, self.metric = config.fid_size, fid_metric(config).to(choose_device(config.device))

    @torch.inference_mode()
    def add(self, count: int, opened: Callable[[int], Image.Image], *, real: bool) -> None:
        """Counts `count` images in, of which `opened` reads the n-th."""
        what = "real images" if real else "ours"
        for batch in _batches(range(count), f"FID, {what}"):
            pixels = torch.stack([as_bytes(opened(number), self.size) for number in batch])
            self.metric.update(pixels.to(self.metric.device), real=real)

    def value(self) -> float:
        """`UserError` if it is not finite."""
        found = float(self.metric.compute())
        if not math.isfinite(found):
            raise UserError("FID is not finite: its network gives NaN or infinite features; give another fid_features")
        return found


def fid_metric(config):
    """torchmetrics' FID with its network.

    Raises:
        UserError: the network is unusable, or its weights cannot be fetched.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if config.fid_features:
        return FrechetInceptionDistance(_scripted(config.fid_features), **ALONE)
    weights = config.fid_weights and str(resolve_path(config.fid_weights))
    try:
        return FrechetInceptionDistance(2048, feature_extractor_weights_path=weights, **ALONE)
    except Exception as error:  # broken files and failing downloads raise almost anything
        given = f"fid_weights={weights} does not" if weights else "the hub does not"
        raise UserError(
            f"FID: {given} give the weights of torch-fidelity's Inception ({first_line(error)}); give "
            "fid_weights=FILE, or fid_features=FILE, an Inception as TorchScript"
        ) from None


class _Scripted(torch.nn.Module):
    """A TorchScript network as torchmetrics wants one."""

    def __init__(self, network: torch.jit.ScriptModule, num_features: int) -> None:
        super().__init__()
        self.network, self.num_features = network, num_features

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(pixels)


def _scripted(file: str) -> _Scripted:
    try:
        network = torch.jit.load(str(resolve_path(file)), map_location="cpu").eval()
        found = network(torch.zeros(2, 3, 299, 299, dtype=torch.uint8))
    except (RuntimeError, ValueError) as error:
        reason = first_line(error, -1)  # TorchScript's own traceback comes first
        raise UserError(
            f"fid_features={file} is no TorchScript network that takes (B, 3, H, W) uint8 ({reason})"
        ) from None
    if not isinstance(found, torch.Tensor) or found.dim() != 2:
        raise UserError(f"fid_features={file} does not give (B, F) features; take the layer before the classifier")
    return _Scripted(network, found.shape[1])


def check_clip(config) -> None:
    need("torchmetrics", "CLIPScore", "pip install 'torchmetrics>=1.4'")


def clip_scores(config, images: Iterator[Image.Image], texts: Sequence[str]) -> list[float]:
    """CLIPScore of each image with its text: 100 times the cosine, 0 at least.

    Args:
        config: see `clip_network`.
    """
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(model_name_or_path=lambda: clip_network(config), **ALONE)
    metric = metric.to(choose_device(config.device))
    found = []
    with torch.inference_mode():
        for image, text in progress(zip(images, texts, strict=True), total=len(texts), desc="CLIPScore"):
            metric.update(as_bytes(image, min(image.size)).to(metric.device), text)
            found.append(float(metric.compute()))
            metric.reset()
    if not all(map(math.isfinite, found)):
        raise UserError(f"CLIPScore is not finite: clip_score_model={config.clip_score_model} has broken weights")
    return found


@torch.inference_mode()
def clip_image_similarity(config, images: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
    """100 times the cosine of CLIP's features of each pair of images.

    Args:
        config: see `clip_network`.
    """
    model, processor = clip_network(config)
    model.to(choose_device(config.device))
    found = []
    for batch in _batches(range(len(images)), "CLIP"):
        part = slice(batch.start, batch.stop)
        pixels = processor.image_processor([*images[part], *others[part]], return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixels.to(model.device))
        found += (100 * torch.cosine_similarity(*features.chunk(2))).tolist()
    return found


def clip_network(config) -> tuple:
    """Model and processor; torchmetrics expects features, transformers 5 gives them inside an output.

    Args:
        config: `clip_score_model`, a folder or a hub name.

    Raises:
        UserError: there is no usable CLIP model under that name.
    """
    from transformers import CLIPModel, CLIPProcessor

    class Features(CLIPModel):
        def get_image_features(self, *args, **settings):
            return _pooled(super().get_image_features(*args, **settings))

        def get_text_features(self, *args, **settings):
            return _pooled(super().get_text_features(*args, **settings))

    name = config.clip_score_model
    located = str(resolve_path(name)) if resolve_path(name).exists() else name
    try:
        return Features.from_pretrained(located).eval(), CLIPProcessor.from_pretrained(located)
    except Exception as error:  # broken files raise almost anything
        raise UserError(
            f"clip_score_model={name} holds no usable CLIP model with its processor ({first_line(error)}); give the "
            "folder of one"
        ) from None


def _pooled(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _batches(numbers: range, what: str) -> Iterator[range]:
    starts = range(0, len(numbers), BATCH)
    return (numbers[start : start + BATCH] for start in progress(starts, desc=what, leave=False))
