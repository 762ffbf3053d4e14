"""Images for training an image tokenizer, out of WebDataset shards, as uint8 batches.

Two readers give the same thing: `CachedImages` decodes a small set once and keeps it in memory,
`StreamedImages` reads shards as it goes. Which images step s sees follows from the seed and s alone, so a resumed
run sees exactly the images of an uninterrupted one.
"""

import io
import logging
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from glob import glob
from itertools import count, islice
from pathlib import Path

import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from webdataset.shardlists import expand_urls

from common.config import resolve_path
from common.errors import UserError
from models.images import preprocess

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = ("png", "jpg", "jpeg", "webp")


def find_shards(patterns: str | Sequence[str], setting: str) -> list[str]:
    """Files of one or several patterns with brace lists (`{000..012}`) and `*`, in order.

    Raises:
        UserError: a file is missing, or nothing matches; `setting` is the key to name.
    """
    shards = []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for name in (name for pattern in patterns for name in expand_urls(str(pattern))):
        path = str(resolve_path(Path(name).parent) / Path(name).name)
        found = sorted(glob(path)) if "*" in path else [path] if Path(path).is_file() else []
        if not found:
            raise UserError(f"{setting}: no shard at {name}; make the data first or correct the pattern")
        shards += found
    return shards


def read_encoded(shards: list[str]) -> Iterator[bytes]:
    """The encoded images of some shards, in order. A damaged shard yields its intact samples and a warning."""
    for sample in wds.tarfile_to_samples(handler=wds.warn_and_continue)({"url": shard} for shard in shards):
        encoded = next((sample[suffix] for suffix in PICTURE_SUFFIXES if suffix in sample), None)
        if encoded is not None:
            yield encoded


def decode(encoded: bytes, resolution: int) -> torch.Tensor | None:
    """Encoded image -> (3, R, R) uint8, or None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = preprocess(image, resolution, normalize=False)
    # PIL: SyntaxError = broken PNG; UserError: too narrow
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, UserError) as error:
        logger.warning("an image cannot be read and is skipped: %s", error)
        return None
    return (pixels * 255).round().to(torch.uint8)


def load_images(shards: list[str], resolution: int, limit: int | None = None, quiet: bool = False) -> torch.Tensor:
    """All (or the first `limit`) readable images of some shards: (n, 3, R, R) uint8."""
    images = (decode(encoded, resolution) for encoded in read_encoded(shards))
    readable = islice((image for image in images if image is not None), limit)
    decoded = list(tqdm(readable, desc="decoding images", unit="", disable=quiet, leave=False))
    if not decoded:
        raise UserError(f"no readable image in {shards[0]} and its {len(shards) - 1} neighbours")
    return torch.stack(decoded)


class CachedImages:
    """Endless shuffled batches from images in memory; every epoch has its own order."""

    def __init__(self, images: torch.Tensor, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.images = images  # (n, 3, R, R) uint8
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self._order = lru_cache(maxsize=2)(self._order_of)

    def _order_of(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.images), generator=generator_for(self.seed, epoch)).tolist()

    def batches_from(self, step: int) -> Iterator[torch.Tensor]:
        """Batches (B, 3, R, R) uint8 for `step`, `step` + 1, ..."""
        for s in count(step):
            start = (s * self.world_size + self.rank) * self.batch_size
            places = (divmod(i, len(self.images)) for i in range(start, start + self.batch_size))
            yield self.images[[self._order(epoch)[place] for epoch, place in places]]


class StreamedImages(IterableDataset):
    """Endless batches read from shards by DataLoader workers, shuffled by shard and in a buffer.

    Resuming reads on from the same sample: the samples before it are skipped without being decoded.
    An unreadable image's place is taken by another one of its batch, so that positions stay the same.
    """

    def __init__(
        self,
        shards: list[str],
        resolution: int,
        batch_size: int,
        seed: int,
        shuffle_buffer_size: int = 1000,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(shards) < world_size:
            raise UserError(f"dataset.params.train_shards: {len(shards)} shards for {world_size} processes; make more")
        self.shards, self.resolution, self.batch_size, self.seed = shards, resolution, batch_size, seed
        self.shuffle_buffer_size = shuffle_buffer_size
        self.num_workers = min(num_workers, len(shards) // world_size)
        self.rank, self.world_size = rank, world_size
        self.first_batch = 0

    def batches_from(self, step: int) -> Iterator[torch.Tensor]:
        """Batches (B, 3, R, R) uint8 for `step`, `step` + 1, ..."""
        self.first_batch = step
        return iter(DataLoader(self, batch_size=None, num_workers=self.num_workers))

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # The loader takes batches from its workers in turn and begins with worker 0. After a resume at batch f it would
        # be another worker's turn, so each worker continues that one's part, skipping the batches already taken.
        part = (worker + self.first_batch) % num_workers
        num_done = len(range(part, self.first_batch, num_workers)) * self.batch_size
        samples = islice(
            self._encoded(part * self.world_size + self.rank, num_workers * self.world_size), num_done, None
        )
        while batch := list(islice(samples, self.batch_size)):
            yield self._decode_batch(batch)

    def _encoded(self, part: int, num_parts: int) -> Iterator[bytes]:
        for epoch in count():
            order = torch.randperm(len(self.shards), generator=generator_for(self.seed, epoch)).tolist()
            shards = [self.shards[i] for i in order[part::num_parts]]
            shuffle = wds.shuffle(self.shuffle_buffer_size, rng=random.Random(f"{self.seed} {epoch} {part}"))
            found = False
            for encoded in shuffle(read_encoded(shards)):
                found = True
                yield encoded
            if not found:
                raise UserError(f"dataset.params.train_shards: no image in {', '.join(shards)}")

    def _decode_batch(self, batch: list[bytes]) -> torch.Tensor:
        decoded = [decode(encoded, self.resolution) for encoded in batch]
        readable = [image for image in decoded if image is not None]
        if not readable:
            raise UserError(f"none of {len(batch)} images in a row can be read; are these shards of images?")
        return torch.stack([readable[i % len(readable)] if p is None else p for i, p in enumerate(decoded)])


def generator_for(*numbers: int) -> torch.Generator:
    """A generator seeded by a tuple of non-negative numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def augment(images: torch.Tensor, random_flip: bool, max_shift: int, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of (B, 3, H, W) images and move each by up to `max_shift` pixels, repeating the border."""
    size, (height, width) = len(images), images.shape[2:]
    flip = (torch.rand(size, generator=generator) < 0.5) & random_flip
    shift = torch.randint(-max_shift, max_shift + 1, (2, size, 1), generator=generator)
    rows = (torch.arange(height) + shift[0]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) + shift[1]).clamp(0, width - 1)  # (B, W)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    samples = torch.arange(size)[:, None, None]
    return images.transpose(0, 1)[:, samples, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
