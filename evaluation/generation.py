"""Benchmarks of image generation: images are saved in the task's folder, and an answer is an image's file name."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.config import mask_schedule_of
from evaluation.task import Item, Task
from models import SamplingParameters
from models.images import load_image, preprocess


class GenerationTask(Task):
    """A benchmark that generates an image for each prompt."""

    reads_images = False

    @property
    def is_random(self) -> bool:
        return True

    @property
    def settings(self) -> dict[str, Any]:
        names = ("guidance_scale", "generation_timesteps", "generation_temperature", "seed", "batch_size")
        name, parameters = mask_schedule_of(self.config)
        schedule = " ".join([name, *(f"{key}={value}" for key, value in parameters.items())])
        asked = {key: self.config[key] for key in names} | {"mask_schedule": schedule}
        return super().settings | asked | self._options

    @property
    def _options(self) -> dict[str, Any]:
        """The `sampling.*` keys that differ from their defaults."""
        default = SamplingParameters()
        return {f"sampling.{k}": value for k, value in self.config.sampling.items() if value != getattr(default, k)}

    def notes(self) -> list[str]:
        parts = [f"guidance {self.config.guidance_scale:g}", f"{self.config.generation_timesteps} steps"]
        return [", ".join([*parts, *(f"{key}={value}" for key, value in self._options.items())])]

    @abstractmethod
    def file_of(self, item: Item) -> str:
        """File of an item's image, relative to the task's folder."""

    def predict(self, model, items, images, generator) -> list[str]:
        generated = model.text_to_image(
            [item.prompt for item in items],
            guidance_scale=self.config.guidance_scale,
            timesteps=self.config.generation_timesteps,
            temperature=self.config.generation_temperature,
            generator=generator,
            sampling=SamplingParameters(**self.config.sampling),
        )
        return [save(self.folder, self.file_of(item), image) for item, image in zip(items, generated, strict=True)]

    def picture(self, item, answer) -> Image.Image:
        return load_image(self.folder / answer)

    def generated(self, answers: Sequence[str]) -> list[Image.Image]:
        return [load_image(self.folder / answer) for answer in answers]


def save(folder: Path, name: str, image: Image.Image) -> str:
    """Writes an image to `folder / name`; returns the name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return name


def as_bytes(image: Image.Image, size: int) -> torch.Tensor:
    """(3, size, size) uint8, preprocessed as for the model: shorter side to `size` (bicubic), centre crop."""
    return (preprocess(image, size, normalize=False) * 255).round().byte()


def square(image: Image.Image, size: int) -> Image.Image:
    """`as_bytes` as a PIL image."""
    return Image.fromarray(as_bytes(image.convert("RGB"), size).permute(1, 2, 0).numpy())


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
