"""Turns shards of images into shards of image codes, so that the tokenizer runs once and not in every epoch.

    python3 tools/encode_images.py shards='data/pets/train-{000000..000011}.tar' output=data/pets_codes/train \\
        vq_model_name=showlab/magvitv2 resolution=256
    torchrun --standalone --nproc_per_node 8 tools/encode_images.py …      (or accelerate launch)

Every image flow reads the result in place of images: ``codes.npy`` holds the (N,) uint16 codes of the image,
resized and cropped as in training; other members stay as they are. Of a document, with images ``0.jpg``, ``1.png``, …,
the codes are ``0.npy``, ``1.npy``, …. The codes are those of `MAGVITv2.get_code` in fp32
(without TF32) for each image by itself, whatever the batch size. Codes cannot be mirrored or moved: flows that read
them want `random_flip`, `und_random_flip` and `und_jitter` off.

Each shard is written whole or not at all, and an interrupted run continues where it stopped: shards whose source,
tokenizer and settings are the same are not made again. Several processes share the shards; the last to finish writes
`{output}-manifest.json`.
"""

import io
import os
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import common  # noqa: F401  Ctrl-C is one word from here on

import numpy as np
import torch
from tqdm import tqdm

from common.config import read_settings
from common.errors import UserError, run_cli
from common.progress import progress
from common.schema import ImageSection
from common.settings import setting
from models import MAGVITv2
from models.images import ImageOptions, normalized
from models.loading import PUBLISHED_VQ, choose_device, load_image_tokenizer
from tools.encoding_records import Encoding, Plan
from tools.shard_writing import counted, in_order, read_prefix, shard_path, write_shard
from training.data.image_text import IMAGE_KEYS, ImageTransform
from training.data.paths import SHARDS, expand_paths, is_address
from training.data.shards import CODES, promised_samples, read_shard, tokenizer_sha256
from training.data.sources import SkipCounters, Skipped

# Latents this close to 0, as a share of their mean size, may change sign with the batch size: sums are then taken in
# another order. Measured: 4e-6 of the mean (showo-tiny), 1.5e-6 (the published sizes), on a CPU in fp32.
NEAR_ZERO = 3e-5


@dataclass
class EncodeImagesConfig:
    shards: Any = setting("???", "path, brace list, glob or folder, or a list of them", is_data=True)
    output: str = setting("???", "prefix of the new shards: {output}-000000.tar")
    vq_model_name: str = setting(PUBLISHED_VQ, "image tokenizer: a folder or hub name")
    resolution: int = setting(256, "pixels per side of the images that are encoded", low=1, high=8192)
    batch_size: int = setting(32, "images that are encoded at once", low=1, high=65536)
    device: str = setting("", "empty: the process's own GPU if there is one")
    num_workers: int = setting(4, "threads that decode images", low=1, high=1024)
    keep_images: bool = setting(False, "keep the images beside their codes")
    overwrite: bool = setting(False, "replace another data set of this prefix")
    image: ImageSection = field(default_factory=ImageSection)


# ---- images to codes ----


class ImageEncoder:
    """The tokenizer, in fp32, with codes that do not depend on the other images of the batch."""

    def __init__(self, vq_model: MAGVITv2):
        self.vq_model = vq_model

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """(B, 3, H, W) in [-1, 1] → (B, N) uint16, each row as `get_code` gives it for that image alone."""
        pixels = pixels.to(self.vq_model.device)
        latents = self.vq_model.encode(pixels)  # (B, K, h, w)
        codes = self.vq_model.quantize.codes_of(latents)
        if len(pixels) > 1:
            size = latents.abs().flatten(1)
            doubtful = size.amin(1) < NEAR_ZERO * size.mean()
            for row in doubtful.nonzero().flatten().tolist():
                codes[row] = self.vq_model.get_code(pixels[row : row + 1])[0]
        return codes.cpu().numpy().astype(np.uint16)


def decode(raw: dict | Skipped, images: ImageTransform) -> dict | Skipped:
    """A raw sample with its ``_pixels``: member of the codes → (3, R, R)."""
    if isinstance(raw, Skipped):
        return raw
    try:
        old = {key: value for key, value in raw.items() if key != CODES}  # which may be another tokenizer's
        members = {codes: {"__key__": raw["__key__"], "image": raw[name]} for name, codes in numbered_images(raw)}
        found = {codes: images.of(one, random.Random(0)) for codes, one in (members or {CODES: old}).items()}
        notes = dict.fromkeys(note for one in found.values() for note in one.get("notes", ()))
        pixels = {codes: normalized(one["image"]) for codes, one in found.items()}
        return raw | {"_notes": tuple(notes), "_pixels": pixels}
    except Skipped as skipped:
        return skipped


def numbered_images(raw: dict) -> list[tuple[str, str]]:
    """The images of a document and the members of their codes, ``0.jpg`` and ``0.npy``; none of another sample."""
    if "json" not in raw or any(key in raw for key in IMAGE_KEYS):
        return []
    return [(name, f"{name.rpartition('.')[0]}.npy") for name in raw if name.rpartition(".")[2] in IMAGE_KEYS]


def encoded_samples(
    raws: Iterable[dict | Skipped], encoder: ImageEncoder, config, counters: SkipCounters, bar: tqdm
) -> Iterator[dict]:
    """Samples with codes, in order; unreadable ones are counted and left out."""
    options = ImageOptions(config.image.exif, config.image.background)
    images = ImageTransform(config.resolution, num_codes=0, codebook_size=0, options=options)
    decoded = in_order(partial(decode, images=images), raws, config.num_workers, ahead=2 * config.batch_size)
    good = counted(decoded, counters, bar)
    while batch := list(islice(good, config.batch_size)):
        pixels = torch.stack([image for sample in batch for image in sample["_pixels"].values()])
        codes = iter(row for part in pixels.split(config.batch_size) for row in encoder(part))
        for sample in batch:
            yield with_codes(sample, {name: next(codes) for name in sample.pop("_pixels")}, config.keep_images)


def with_codes(raw: dict, codes: dict[str, np.ndarray], keep_images: bool) -> dict:
    """The members of a sample, its images replaced or accompanied by their codes."""
    dropped = () if keep_images else (*IMAGE_KEYS, *(name for name, _ in numbered_images(raw)))
    return {key: value for key, value in raw.items() if key not in dropped} | {
        name: _npy(row) for name, row in codes.items()
    }


def _npy(codes: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, codes)
    return buffer.getvalue()


# ---- the work of this process ----


def encode_shards(plan: Plan, encoder: ImageEncoder, config, rank: int, world_size: int) -> SkipCounters:
    """Encodes every world_size-th of the unfinished shards from number `rank` on; returns what was seen and skipped."""
    share, total = plan.unfinished(rank, world_size), SkipCounters()
    promised = promised_samples(plan.sources)
    known = [promised.get(plan.sources[index]) for index in share]
    bar = progress(
        total=None if None in known else sum(known),
        unit=" images",
        desc="encoding" if world_size == 1 else f"encoding (process 1 of {world_size})",
        disable=rank > 0 or not share,
    )
    with bar:
        for index in share:
            counters, source = SkipCounters(), plan.sources[index]
            raws = read_shard(source, promised.get(source, 0))
            samples = encoded_samples(raws, encoder, config, counters, bar)
            plan.record(index, write_shard(shard_path(plan.prefix, index), samples), counters)
            total.add(counters)
    return total


def local_device(name: str) -> torch.device:
    """The named device; by default each process's own GPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return choose_device(name or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"))


def read_sources(config) -> list[str]:
    """Raises `UserError` if a shard is not a local file."""
    sources = expand_paths("shards", config.shards, SHARDS)
    if addresses := [source for source in sources if is_address(source)]:
        raise UserError(f"shards: {addresses[0]} is not a file; download the shards first")
    return sources


def load_tokenizer(config, device: torch.device) -> MAGVITv2:
    """The image tokenizer in fp32; `UserError` if it does not exist or cannot make such codes."""
    vq_model = load_image_tokenizer(config.vq_model_name)
    if config.resolution % vq_model.downsampling_factor:
        raise UserError(
            f"resolution={config.resolution} must be a multiple of {vq_model.downsampling_factor}, the pixels that "
            f"{config.vq_model_name} makes one code of"
        )
    if vq_model.config.codebook_size > 2**16:
        raise UserError(f"{config.vq_model_name} has {vq_model.config.codebook_size} codes; at most 65536 fit uint16")
    torch.backends.cudnn.allow_tf32 = False
    return vq_model.to(device)


def encoding_of(config, vq_model: MAGVITv2) -> Encoding:
    """The settings that codes depend on."""
    return Encoding(
        tokenizer=config.vq_model_name,
        tokenizer_sha256=tokenizer_sha256(vq_model),
        resolution=config.resolution,
        num_vq_tokens=(config.resolution // vq_model.downsampling_factor) ** 2,
        codebook_size=vq_model.config.codebook_size,
        keep_images=config.keep_images,
        exif=config.image.exif,
        background=config.image.background,
    )


def main(argv: list[str]) -> None:
    config = read_settings(argv, EncodeImagesConfig, "shards='data/pets/train-*.tar' output=data/codes/train")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    sources, device = read_sources(config), local_device(config.device)
    vq_model = load_tokenizer(config, device)
    plan = Plan(sources, read_prefix(config.output), encoding_of(config, vq_model), config.overwrite)
    plan.begin(is_main=rank == 0)
    counters = encode_shards(plan, ImageEncoder(vq_model), config, rank, world_size)
    counters.print()
    if manifest := plan.finish():
        print(f"{config.output}: {manifest['samples']} samples in {len(manifest['shards'])} shards")


if __name__ == "__main__":
    run_cli(main)
