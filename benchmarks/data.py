"""Samples per second of one loader worker, against the bare decoding and resizing of the same images.

    python3 benchmarks/data.py                                        # 256² jpegs, as stage 2 reads them
    python3 benchmarks/data.py --side 512                             # larger images, scaled down to 256²

Images are pieces of the repository's photographs, saved as jpegs with captions in WebDataset shards. Ways:

- bare: PIL's decoding and resizing of the encoded images, all in memory; nothing else. This is the limit.
- worker: the work of a loader worker for the mmu flow of stage 2: reading shards, mixing, captions with instructions,
  images put together as a batch. The row that the target is about.
- worker, codes: the same with shards encoded beforehand (`training/data/encode_images.py`).
- through: the flow with one worker in a process of its own, from here: batches cross the border and become numbers.

They take turns, and the fastest run of each counts. Prints a table and last one JSON line.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import numpy as np
import torch
import webdataset
from omegaconf import OmegaConf
from PIL import Image

from benchmarks import report
from common.config import TrainingConfig
from training.batches import flow_readers
from training.data.flows import Reading, open_flows
from training.data.image_text import read_image
from training.data.streams import Flow, _Batches

PHOTOS = sorted([*report.ROOT.glob("mmu_validation/*.jpg"), *report.ROOT.glob("inpainting_validation/*.jpg")])
TARGET, BATCH, TOKENS, CODEBOOK = 256, 10, 256, 8192
WAYS = ("bare", "worker", "worker, codes", "through")


def encoded_images(count: int, side: int, quality: int = 90) -> list[bytes]:
    """Random squares of the photographs, scaled to `side`, as jpegs."""
    rng, photos = random.Random(0), [Image.open(file).convert("RGB") for file in PHOTOS]
    made = []
    for number in range(count):
        photo = photos[number % len(photos)]
        size = rng.randrange(min(photo.size) // 2, min(photo.size))
        left, top = (rng.randrange(length - size) for length in photo.size)
        buffer = io.BytesIO()
        photo.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + size, top + size)).save(
            buffer, "JPEG", quality=quality
        )
        made.append(buffer.getvalue())
    return made


def write_shards(folder: Path, pictures: list[bytes], codes: bool = False) -> str:
    """Two shards of the images, or of as many random codes, with captions of 10 to 30 words; their pattern."""
    rng, words = random.Random(1), ("a", "red", "house", "behind", "trees")
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for number, picture in list(enumerate(pictures))[shard::2]:
                text = " ".join(rng.choice(words) for _ in range(rng.randrange(10, 31)))
                seen = {"codes.npy": _codes(number)} if codes else {"jpg": picture}
                writer.write({"__key__": f"{number:06d}", "txt": text, **seen})
    return str(folder / "train-{000000..000001}.tar")


def _codes(seed: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(seed).integers(0, CODEBOOK, TOKENS, dtype=np.uint16))
    return buffer.getvalue()


def flow_of(shards: str, workers: int) -> Flow:
    """The mmu flow of stage 2 on these shards."""
    settings = {
        "training.batch_size_t2i": 0,
        "training.batch_size_lm": 0,
        "training.batch_size_mmu": BATCH,
        "dataset.params.num_workers": workers,
        "dataset.params.train_mmu_shards_path_or_url": shards,
    }
    config = OmegaConf.structured(TrainingConfig)
    for key, value in settings.items():
        OmegaConf.update(config, key, value)
    return open_flows(flow_readers(config, "train"), Reading())["mmu"]


def work_of(shards: str) -> Iterator:
    """The batches of a worker, before they leave its process."""
    flow = flow_of(shards, 0)
    return iter(_Batches(flow, flow.state_dict()))


def bare_rate(pictures: list[bytes]) -> float:
    started = time.perf_counter()
    for picture in pictures:
        Image.open(io.BytesIO(picture)).convert("RGB").resize((TARGET, TARGET), Image.Resampling.BICUBIC)
    return len(pictures) / (time.perf_counter() - started)


def batch_rate(batches: Iterator, samples: int) -> float:
    started = time.perf_counter()
    for _ in range(samples // BATCH):
        next(batches)
    return samples // BATCH * BATCH / (time.perf_counter() - started)


def measure(pictures: list[bytes], samples: int, rounds: int) -> dict[str, float]:
    """Samples/s of each way, the fastest of `rounds` that take turns."""
    torch.set_num_threads(1)  # as in a worker
    best = dict.fromkeys(WAYS, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("pictures", "codes")]
        for place in places:
            place.mkdir()
        shards, codes = write_shards(places[0], pictures), write_shards(places[1], pictures, codes=True)
        through = flow_of(shards, 1)
        ways = {"worker": work_of(shards), "worker, codes": work_of(codes), "through": through}
        for batches in ways.values():
            batch_rate(batches, 1000)  # the buffer fills, the worker starts
        for _ in range(rounds):
            best["bare"] = max(best["bare"], bare_rate((pictures * (samples // len(pictures) + 1))[:samples]))
            for name, batches in ways.items():
                best[name] = max(best[name], batch_rate(batches, samples))
        through.close()
    return best


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="of the stored images")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--samples", type=int, default=2000, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    pictures = encoded_images(args.pictures, args.side)
    assert read_image(pictures[0], "").size == (args.side, args.side)
    found = measure(pictures, args.samples, args.rounds)
    for name, rate in found.items():
        print(f"{name:12}{rate:10.0f} samples/s{rate / found['bare']:8.0%} of bare")
    ratios = {name: rate / found["bare"] for name, rate in found.items()}
    print(json.dumps(report.facts() | {"settings": vars(args), "samples_per_second": found, "share_of_limit": ratios}))


if __name__ == "__main__":
    main(sys.argv[1:])
