"""The image tokenizer, MAGVIT-v2 (spec §10), with losses on pixels, edges and the use of the codes."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from common.errors import UserError
from models import MAGVITv2, MAGVITv2Config
from models.devices import send
from models.images import to_pil
from models.loading import find_folder, find_parts
from models.modeling_magvitv2 import MAGVITv2Output
from training.data.flows import FlowReader, ImageReader, check_data
from training.data.streams import stack
from training.metrics import Sums
from training.perceptual import PerceptualLoss
from training.tasks import Outcome, Panel, Task
from training.tokenizer_losses import code_entropies, commitment_loss, edge_loss
from training.tokenizer_settings import TokenizerTrainingConfig

PANEL = "Original | reconstruction"


@dataclass
class Images:
    """pixels (B, 3, R, R) float32 in [-1, 1] on the device; keys: the images' names."""

    pixels: torch.Tensor
    keys: list[str]


class TokenizerTask(Task):
    """Trains every parameter on images of any flow's files, without their texts."""

    settings = TokenizerTrainingConfig

    def __init__(self, config):
        super().__init__(config)
        self.image_readers = {split: ImageReader(config, "images", split) for split in ("train", "eval")}
        check_data(self.image_readers.values())
        self.sheet = []  # held-out images for the panel

    def readers(self, split: str) -> list[FlowReader]:
        return [self.image_readers[split]]

    def load(self) -> None:
        self.perceptual = PerceptualLoss().to(self.device) if self.config.losses.perceptual else None

    def make_model(self, start: Path | None) -> MAGVITv2:
        """A new tokenizer with the sizes of the section `model`, or one with weights."""
        sizes = OmegaConf.to_container(self.config.model)
        given = sizes.pop("pretrained_model_path")
        try:
            if path := start or self.config.experiment.init_from or given:
                folder = find_folder(find_parts(path).get("vq_model", path))
                model = MAGVITv2.from_pretrained(folder, dtype=torch.float32)
            else:
                model = MAGVITv2.from_config(MAGVITv2Config(**sizes))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"model: {error}") from None
        factor, resolution = model.downsampling_factor, self.config.dataset.params.resolution
        if resolution % factor:
            raise UserError(f"dataset.params.resolution is {resolution}; this tokenizer needs a multiple of {factor}")
        self.num_codes = model.config.codebook_size
        return model.train()

    def make_batch(self, samples: dict[str, list]) -> Images:
        images = samples["images"]
        return Images(send(stack(images, "image"), self.device), [sample["key"] for sample in images])

    def outcome(self, forward, batch: Images) -> Outcome:
        output = forward(batch.pixels)
        losses = self.losses(output, batch.pixels)
        signs = {"codebook_entropy": -1}  # diverse codes are wanted
        loss = sum(signs.get(name, 1) * self.config.losses[name] * value for name, value in losses.items())
        sums = {"samples": len(batch.pixels), "codes": self.code_counts(output.codes)}
        return Outcome(loss, losses, sums | {f"train/{k}": v for k, v in ({"loss": loss} | losses).items()})

    def losses(self, output: MAGVITv2Output, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every loss by name, without its weight."""
        reconstruction = output.reconstruction.float()
        sample_entropy, codebook_entropy = code_entropies(output.latents, self.config.losses.entropy_group_bits)
        losses = {
            "l1": F.l1_loss(reconstruction, pixels),
            "mse": F.mse_loss(reconstruction, pixels),
            "edge": edge_loss(reconstruction, pixels),
            "commit": commitment_loss(output.latents),
            "sample_entropy": sample_entropy,
            "codebook_entropy": codebook_entropy,
        }
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(reconstruction, pixels)
        return losses

    def code_counts(self, codes: torch.Tensor) -> torch.Tensor:
        """(codebook_size,) int64: how often each code comes."""
        return torch.bincount(codes.flatten(), minlength=self.num_codes)

    def summary(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        values = {k: v.item() / sums["batches"].item() for k, v in sums.items() if k.startswith("train/")}
        return values | code_use("train", sums["codes"])

    def eval_sums(self, forward, flow: str, samples: list) -> Sums:
        pixels = self.make_batch({"images": samples}).pixels
        if len(self.sheet) < self.config.experiment.num_sheet_pictures:
            self.sheet += pixels.unbind()
        output = forward(pixels)
        values = psnr(output.reconstruction, pixels)
        return {"psnr": values.sum(), "images": len(pixels), "codes": self.code_counts(output.codes)}

    def eval_figures(self, flow: str, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"eval/psnr": (sums["psnr"] / sums["images"]).item()} | code_use("eval", sums["codes"])

    def panels(self, model: MAGVITv2, batch: Images) -> list[Panel]:
        """Held-out images beside their reconstructions; images of the batch before the first evaluation."""
        pixels = torch.stack((self.sheet or list(batch.pixels))[: self.config.experiment.num_sheet_pictures])
        reconstruction = model(pixels).reconstruction.float()
        captions = [f"{value:.1f} dB" for value in psnr(reconstruction, pixels)]
        return [(PANEL, to_pil(torch.cat([pixels, reconstruction], dim=3)), captions)]


def psnr(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each of (B, 3, H, W) images in [-1, 1], clamped first: (B,)."""
    error = (reconstruction.float().clamp(-1, 1) - pixels).flatten(1).square().mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def code_use(split: str, counts: torch.Tensor) -> dict[str, float]:
    """From how often each code came: the number of codes in use, and the perplexity (that many if used evenly)."""
    frequency = counts.double() / counts.sum().clamp_min(1)
    perplexity = torch.special.entr(frequency).sum().exp().item()
    return {f"{split}/codes_used": int((counts > 0).sum()), f"{split}/code_perplexity": perplexity}


TASK = TokenizerTask
