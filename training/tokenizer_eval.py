"""How good a tokenizer is on images it has not seen: PSNR, code use, and a sheet to look at."""

import torch
from PIL import Image

from models.images import to_pil
from models.modeling_magvitv2 import MAGVITv2


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> float32 in [-1, 1] (spec §11)."""
    return images.float() / 127.5 - 1


def psnr(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each of (B, 3, H, W) images in [-1, 1], clamped first: (B,)."""
    error = (reconstruction.float().clamp(-1, 1) - pixels).flatten(1).square().mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def use_of(counts: torch.Tensor) -> tuple[int, float]:
    """From how often each code came: the number of codes in use, and the perplexity (that many if used evenly)."""
    frequency = counts.double() / counts.sum().clamp_min(1)
    return int((counts > 0).sum()), torch.special.entr(frequency).sum().exp().item()


@torch.no_grad()
def evaluate(model: MAGVITv2, images: torch.Tensor, batch_size: int) -> dict[str, float]:
    """PSNR (mean over images, in dB) and code use of a model on (n, 3, H, W) uint8 images."""
    values, codes = [], []
    for batch in images.split(batch_size):
        pixels = to_pixels(batch).to(model.device)
        codes.append(model.get_code(pixels))
        shape = tuple(side // model.downsampling_factor for side in pixels.shape[2:])
        values.append(psnr(model.decode_code(codes[-1], shape=shape), pixels))
    used, perplexity = use_of(torch.bincount(torch.cat(codes).flatten(), minlength=model.config.codebook_size))
    return {"psnr": torch.cat(values).mean().item(), "codes_used": used, "code_perplexity": perplexity}


@torch.no_grad()
def side_by_side(model: MAGVITv2, images: torch.Tensor) -> tuple[list[Image.Image], list[str]]:
    """Original | reconstruction for each of (n, 3, H, W) uint8 images, and each one's PSNR as its caption."""
    pixels = to_pixels(images).to(model.device)
    shape = tuple(side // model.downsampling_factor for side in pixels.shape[2:])
    reconstruction = model.decode_code(model.get_code(pixels), shape=shape).float()
    captions = [f"{value:.1f} dB" for value in psnr(reconstruction, pixels)]
    return to_pil(torch.cat([pixels, reconstruction], dim=3)), captions
