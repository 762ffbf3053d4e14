"""Keeps a share of a data set's images out of its shards, in shards of their own: what a training is evaluated on."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from tools.shard_writing import heldout_prefix, shard_path, write_shard


class Holdout:
    """Diverts samples on their way into the shards.

    Of every ``1 / share`` images one is held out, at a place drawn from the seed; copies of an image, and so the
    samples of its other captions, go where it goes.

    Args:
        prefix: of the data set.
        config: settings `holdout`, `seed` and `shard_size`.
        num_images: of the source; a small one holds out one image.
    """

    def __init__(self, prefix: Path, config, num_images: int):
        self.prefix, self.share, self.shard_size = heldout_prefix(prefix), config.holdout, config.shard_size
        self.stride = min(1 / self.share, max(num_images, 1)) if self.share else 0
        self.rng = random.Random(config.seed)
        self.held: dict[bytes, bool] = {}  # by the checksum of the image
        self.num_held, self.next = 0, 0.0
        self._choose_next()
        self.waiting: list[dict] = []
        self.entries: list[dict] = []  # of the manifest

    def divert(self, samples: Iterator[dict]) -> Iterator[dict]:
        """The samples of the data set itself; the others are written as soon as they fill a shard."""
        for sample in samples:
            if not self.share or not self._is_held(sample):
                yield sample
                continue
            self.waiting.append(sample)
            if len(self.waiting) == self.shard_size:
                self._write()
        if self.waiting:
            self._write()
        if self.share and not self.entries:
            raise UserError(f"holdout={self.share} of {len(self.held)} images is none; give a larger share")

    def _is_held(self, sample: dict) -> bool:
        images = (data for suffix, data in sample.items() if suffix not in ("__key__", "txt", "json"))
        image = next(images, sample.get("json"))  # of a document the first one, if it has any
        checksum = hashlib.blake2b(image, digest_size=16).digest()
        if checksum not in self.held:
            self.held[checksum] = len(self.held) >= int(self.next)
            if self.held[checksum]:
                self.num_held += 1
                self._choose_next()
        return self.held[checksum]

    def _choose_next(self) -> None:
        # in the first half, so that a small source still holds one out if many of its images cannot be read
        self.next = (self.num_held + self.rng.random() / 2) * self.stride

    def _write(self) -> None:
        self.entries.append(write_shard(shard_path(self.prefix, len(self.entries)), self.waiting))
        self.waiting = []
