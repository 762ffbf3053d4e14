"""Edits by instruction, on anybody's triples of an image, an instruction and the image after it (`editing_triples`).

Without a judge: what the instruction did not ask for must be as before, and what it asked for as in the image after it.
What was asked for is where the two images of the triple differ by more than a tenth of the range in some channel, and
the pixels around that, or a `mask` of the triple, white where it changes. All images are compared as the model sees
them: resized and cropped to its resolution, in 8 bits. An image through the tokenizer and back is the ceiling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.errors import UserError, shown
from common.files import real_path
from common.inputs import required_folder, required_path
from evaluation.images import as_bytes, check_clip, clip_image_similarity, need, psnr, side_by_side, square
from evaluation.task import GenerationTask, Item, Verdict, ratio
from models.images import load_image, open_image
from training.data.documents import TurnWords, located, open_documents, record_of, segments_of
from training.data.sources import Skipped

DIFFERENCE = 0.1  # of the range [0, 1], in some channel; JPEG's noise is below it
AROUND = 32  # the region also has the pixels within a 32nd of the side around it
LEAST = 0.01  # of the image: a smaller part of it is not measured
OUTSIDE, SSIM, INSIDE, CLIP_I = "PSNR outside", "SSIM outside x 100", "PSNR inside", "CLIP-I x 100"
CEILING = "reconstruction"


@dataclass(frozen=True)
class Triple:
    """Images as functions that read them."""

    before: Callable[[], Image.Image]
    instruction: str
    after: Callable[[], Image.Image]
    mask: Callable[[], Image.Image] | None = None


class Editing(GenerationTask):
    name = "editing"
    headline = OUTSIDE
    unit = "dB"
    reads_root, reads_images = False, True
    ceilings = (CEILING,)

    def check(self) -> None:
        need("torchmetrics", "editing", "pip install 'torchmetrics>=1.4'")
        if self.config.editing_clip:
            check_clip(self.config)

    @property
    def _file(self) -> Path:
        return required_path("editing_triples", self.config.editing_triples)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"editing_triples": shown(real_path(self._file))}

    def file_of(self, item: Item) -> str:
        return f"images/{item.facts['number']:05d}.png"

    def files_of(self, item: Item) -> list[str]:
        """The edited image, and the right one through the tokenizer and back."""
        return [self.file_of(item), f"reconstructions/{item.facts['number']:05d}.png"]

    def read_items(self) -> list[Item]:
        triples = self._triples()
        if not triples:
            raise UserError(f"editing_triples={self._file} holds no triple of an image, an instruction and an image")
        return [
            Item(
                f"{number}: {triple.instruction}",
                triple.instruction,
                triple.before,
                str(number),
                facts={"number": number, "triple": triple},
            )
            for number, triple in enumerate(triples)
        ]

    def _triples(self) -> list[Triple]:
        root = self.config.editing_image_root
        root = root and str(required_folder("editing_image_root", root))
        units, found = open_documents([str(self._file)]), []
        for number in range(len(units)):
            for raw in units.read(number, Random(0)):
                try:
                    found.append(self._triple(raw, root))
                except Skipped as skipped:
                    raise UserError(f"editing_triples={self._file}: {skipped.detail}") from None
        return found

    def _triple(self, raw: dict | Skipped, root: str | None) -> Triple:
        if isinstance(raw, Skipped):
            raise raw
        record, name = record_of(raw), raw["__key__"]
        segments = segments_of(record, name, TurnWords())
        if ["image" in segment for segment in segments] != [True, False, True]:
            raise UserError(f"{name} is no triple of an image, an instruction and the image after it")
        before, instruction, after = segments
        parts = {"before": before["image"], "after": after["image"], "mask": record.get("mask")}
        opened = {part: self._opener(one, raw, root, name) for part, one in parts.items() if one is not None}
        return Triple(instruction=instruction["text"], **opened)

    def _opener(self, value: Any, raw: dict, root: str | None, name: str) -> Callable[[], Image.Image]:
        image = located(value, raw, root).get("image")
        if isinstance(image, bytes):
            return partial(open_image, image, name, self.image_options)
        if isinstance(image, str):
            return self.image(Path(image))
        raise UserError(f"{name}: editing needs images, as files or bytes")

    def predict(self, model, items, images, generator) -> list[str]:
        prompts = [item.prompt for item in items]
        edited = model.edit(list(images), prompts, generator=generator, **self.generation)
        restored = model.decode(model.encode([item.facts["triple"].after() for item in items]))
        for item, *pair in zip(items, edited, restored, strict=True):
            for name, image in zip(self.files_of(item), pair, strict=True):
                self.output.save(name, image)
        return [self.file_of(item) for item in items]

    def judge(self, items, answers) -> list[Verdict]:
        made = [[load_image(self.folder / name) for name in self.files_of(item)] for item in items]
        verdicts = []
        for item, images in zip(items, made, strict=True):
            facts, scene = {}, self._pixels(item.facts["triple"])
            for image, suffix in zip(images, ("", f": {CEILING}"), strict=True):
                facts |= {f"{name}{suffix}": value for name, value in measured(self._tensor(image), *scene).items()}
            verdicts.append(Verdict("", facts.get(OUTSIDE, 0.0), facts))
        if self.config.editing_clip:
            after = [self._seen(item.facts["triple"].after) for item in items]
            for place, suffix in enumerate(("", f": {CEILING}")):
                found = clip_image_similarity(self.config, [images[place] for images in made], after)
                for verdict, value in zip(verdicts, found, strict=True):
                    verdict.facts[CLIP_I + suffix] = value
        return verdicts

    def _pixels(self, triple: Triple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(image before, image after, region that changes) of a triple, as `measured` takes them."""
        before, after = self._tensor(triple.before()), self._tensor(triple.after())
        if triple.mask is None:
            return before, after, changed_region(before, after)
        return before, after, self._tensor(triple.mask())[:, 0] > 0.5

    def _tensor(self, image: Image.Image) -> torch.Tensor:
        """(1, 3, H, W) in [0, 1], as the model sees it, in 8 bits."""
        return as_bytes(image, self.config.dataset.preprocessing.resolution)[None].double() / 255

    def _seen(self, opened: Callable[[], Image.Image]) -> Image.Image:
        return square(opened(), self.config.dataset.preprocessing.resolution)

    def counts(self, items, verdicts) -> dict[str, float]:
        found: dict[str, float] = {}
        for verdict in verdicts:
            for name, value in verdict.facts.items():
                found[name] = found.get(name, 0) + value
                found[f"number of {name}"] = found.get(f"number of {name}", 0) + 1
        return found

    def figures(self, sums) -> dict[str, np.ndarray]:
        names = [OUTSIDE, SSIM, INSIDE] + [CLIP_I] * self.config.editing_clip
        return {
            full: ratio(sums[full], sums[f"number of {full}"])
            for name in names
            for full in (name, f"{name}: {CEILING}")
        }

    def sheet_image(self, item, answer) -> Image.Image:
        """Before, what the model made of it, and the right one."""
        triple = item.facts["triple"]
        return side_by_side(self._seen(triple.before), load_image(self.folder / answer), self._seen(triple.after))

    def notes(self) -> list[str]:
        side = self.config.dataset.preprocessing.resolution
        return [*super().notes(), f"{side} x {side} pixels; outside: where the images of a triple do not differ"]


def measured(image: torch.Tensor, before: torch.Tensor, after: torch.Tensor, region: torch.Tensor) -> dict[str, float]:
    """The figures of an image, without those of a part that is too small.

    Args:
        image, before, after: (1, 3, H, W) in [0, 1].
        region: (1, H, W) bool, where something changes.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    figures = {}
    if (~region).double().mean() >= LEAST:
        without = torch.where(region[:, None], before, image)  # windows at its border see nothing of it
        _, similar = ssim(without, before, data_range=1.0, return_full_image=True)
        figures[OUTSIDE] = _psnr_in(image, before, ~region)
        figures[SSIM] = 100 * float(similar[0].mean(0)[~region[0]].mean())
    if region.double().mean() >= LEAST:
        figures[INSIDE] = _psnr_in(image, after, region)
    return figures


def changed_region(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """(1, H, W) bool: where two images (1, 3, H, W) in [0, 1] differ, and the pixels around."""
    differs = ((before - after).abs().amax(1) > DIFFERENCE).double()  # (1, H, W)
    around = before.shape[-1] // AROUND
    return F.max_pool2d(differs, 2 * around + 1, stride=1, padding=around) > 0


def _psnr_in(image: torch.Tensor, other: torch.Tensor, part: torch.Tensor) -> float:
    """dB over the pixels of a part (1, H, W) of two images (1, 3, H, W)."""
    pixels = [one[0][:, part[0]].flatten()[None] for one in (image, other)]
    return float(psnr(*pixels))
