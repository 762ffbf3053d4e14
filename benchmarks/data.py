"""Loading: a worker's samples per second against bare decoding, and each hand-written part against a library's way.

    python3 benchmarks/data.py                                        # 256² jpegs, as stage 2 reads them
    python3 benchmarks/data.py --side 512                             # larger images, scaled down to 256²

Images are pieces of the repository's photographs, saved as jpegs with captions in WebDataset shards. Ways:

- bare: PIL's decoding and resizing of the encoded images, all in memory; nothing else. This is the limit.
- worker: the work of a loader worker for the mmu flow of stage 2: reading shards, mixing, captions with instructions,
  images put together as a batch. The row that the target is about.
- worker, codes: the same with shards encoded beforehand (`tools/encode_images.py`).
- through: the flow with one worker in a process of its own, from here: batches cross the border and become numbers.

Parts, each with the same work done by libraries: headers of a shard's members (webdataset, tarfile), decoding of a jpeg
(PIL), a batch from a worker's process (torch's default_collate; as a list of samples), and a LLaVA json in a worker's
memory (json.load; MiB instead of samples per second).

The ways of a row take turns, and the fastest run of each counts. Prints a table and last one JSON line.
"""

import argparse
import io
import json
import multiprocessing
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import numpy as np
import torch
import webdataset
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate
from webdataset.tariterators import tar_file_iterator

from benchmarks import report
from common.config import TrainingConfig
from models.images import normalized, open_image
from training.batches import flow_readers
from training.data.flows import Reading, open_flows
from training.data.image_text import decode_jpeg
from training.data.json_records import JsonRecords
from training.data.shards import tar_members
from training.data.streams import Flow, _Batches, pack, unpack

PHOTOS = sorted([*report.ROOT.glob("mmu_validation/*.jpg"), *report.ROOT.glob("inpainting_validation/*.jpg")])
TARGET, BATCH, TOKENS, CODEBOOK = 256, 10, 256, 8192
WAYS = ("bare", "worker", "worker, codes", "through")

Way = Callable[[], int]  # does some work and returns how many samples it was


def rates(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Samples/s of each way, the fastest of `rounds` that take turns."""
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, work in ways.items():
            started = time.perf_counter()
            samples = work()
            best[name] = max(best[name], samples / (time.perf_counter() - started))
    return best


# ---- data ----


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


def write_shards(folder: Path, images: list[bytes], codes: bool = False) -> str:
    """Two shards of the images, or of as many random codes, with captions of 10 to 30 words; their pattern."""
    rng, words = random.Random(1), ("a", "red", "house", "behind", "trees")
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for number, image in list(enumerate(images))[shard::2]:
                text = " ".join(rng.choice(words) for _ in range(rng.randrange(10, 31)))
                seen = {"codes.npy": _codes(number)} if codes else {"jpg": image}
                writer.write({"__key__": f"{number:06d}", "txt": text, **seen})
    return str(folder / "train-{000000..000001}.tar")


def _codes(seed: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(seed).integers(0, CODEBOOK, TOKENS, dtype=np.uint16))
    return buffer.getvalue()


def write_conversations(file: Path, count: int) -> Path:
    """Records of LLaVA's form with two questions each, about 1,000 bytes as in its 665k."""
    turns = [{"from": side, "value": f"{side} " + "some words " * 20} for side in ("human", "gpt") * 2]
    records = [
        {"id": f"{n:09d}", "image": f"coco/train2017/{n:012d}.jpg", "conversations": turns} for n in range(count)
    ]
    file.write_text(json.dumps(records))
    return file


# ---- the whole way ----


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


def take(batches: Iterator, samples: int) -> int:
    for _ in range(samples // BATCH):
        next(batches)
    return samples // BATCH * BATCH


def bare(images: list[bytes], samples: int) -> int:
    for number in range(samples):
        image = Image.open(io.BytesIO(images[number % len(images)]))
        image.convert("RGB").resize((TARGET, TARGET), Image.Resampling.BICUBIC)
    return samples


def measure(images: list[bytes], samples: int, rounds: int) -> dict[str, float]:
    """Samples/s of each of `WAYS`."""
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder) / "images", images)
        codes = write_shards(Path(folder) / "codes", images, codes=True)
        through = flow_of(shards, 1)
        flows = dict(zip(WAYS[1:], (work_of(shards), work_of(codes), through), strict=True))
        for batches in flows.values():
            take(batches, 1000)  # the buffer fills, the worker starts
        ways: dict[str, Way] = {"bare": lambda: bare(images, samples)}
        ways |= {name: lambda batches=batches: take(batches, samples) for name, batches in flows.items()}
        found = rates(ways, rounds)
        through.close()
    return found


# ---- the parts ----


def resident(build: Callable[[], object]) -> float:
    """MiB that a process holds more after building something."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child() -> None:
        before = report.memory_in_use("cpu")
        held = build()
        sender.send(report.memory_in_use("cpu") - before)
        del held

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    found = receiver.recv()
    process.join()
    return max(found, 0.1)


class Repeated(IterableDataset):
    """The same batch over and over, as `collate` puts it together."""

    def __init__(self, samples: list[dict], collate: Callable[[list], object]):
        self.samples, self.collate = samples, collate

    def __iter__(self) -> Iterator:
        while True:
            yield self.collate(self.samples)


def received(samples: list[dict], collate: Callable, finish: Callable) -> Iterator:
    """Batches from a worker's process, with normalised images."""
    return map(finish, DataLoader(Repeated(samples, collate), batch_size=None, num_workers=1, collate_fn=_unchanged))


def _unchanged(batch):
    return batch


def drained(open_members: Callable, file: str) -> int:
    """Samples of a shard, which has two members for each."""
    with open(file, "rb", buffering=2**20) as stream:
        return sum(1 for _ in open_members(stream)) // 2


def tarfile_members(stream) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            yield member.name, archive.extractfile(member).read()
            archive.members = []


def decoded(decode: Callable[[bytes], np.ndarray], images: list[bytes]) -> int:
    for image in images:
        decode(image)
    return len(images)


def measure_parts(images: list[bytes], samples: int, records: int, rounds: int) -> dict[str, dict[str, float]]:
    """Part → way → samples/s, or MiB for the json; the first way is ours."""
    torch.set_num_threads(1)
    images = images[: max(2, samples)]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(write_conversations(Path(folder) / "llava.json", records))
        builds = {"ours": lambda: JsonRecords(file), "json.load": lambda: json.loads(Path(file).read_bytes())}
        found["json, MiB"] = {name: resident(build) for name, build in builds.items()}
        shard = write_shards(Path(folder) / "images", images).replace("{000000..000001}", "000000")
        readers = {"ours": tar_members, "webdataset": tar_file_iterator, "tarfile": tarfile_members}
        found["tar headers"] = rates(
            {name: lambda reader=reader: drained(reader, shard) for name, reader in readers.items()}, rounds
        )
    decoders = {"ours": decode_jpeg, "PIL": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))}
    found["jpeg"] = rates({name: lambda d=decode: decoded(d, images) for name, decode in decoders.items()}, rounds)
    batch = [{"image": torch.zeros(TARGET, TARGET, 3, dtype=torch.uint8), "text": "x" * 100} for _ in range(BATCH)]
    ways = {
        "ours": received(batch, pack, unpack),
        "default_collate": received(batch, default_collate, lambda b: b | {"image": normalized(b["image"])}),
        "as a list": received(batch, _unchanged, unpack),
    }
    for batches in ways.values():
        take(batches, 10 * BATCH)  # the worker starts
    found["batches"] = rates({name: lambda b=batches: take(b, samples) for name, batches in ways.items()}, rounds)
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="of the stored images")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--samples", type=int, default=2000, help="of each round")
    parser.add_argument("--records", type=int, default=100_000, help="of the json")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    images = encoded_images(args.images, args.side)
    assert open_image(images[0], "the first").size == (args.side, args.side)
    parts = measure_parts(images, args.samples, args.records, args.rounds)
    found = measure(images, args.samples, args.rounds)
    for name, rate in found.items():
        print(f"{name:14}{rate:10,.0f} samples/s{rate / found['bare']:8.0%} of bare")
    for part, ways in parts.items():
        others = [f"{name} {rate:,.1f} ({rate / ways['ours']:.2f})" for name, rate in ways.items() if name != "ours"]
        print(f"{part:14}{ways['ours']:10,.1f} ours; {', '.join(others)} times ours")
    ratios = {name: rate / found["bare"] for name, rate in found.items()}
    results = {"samples_per_second": found, "share_of_limit": ratios, "parts": parts}
    print(json.dumps(report.facts() | {"settings": vars(args)} | results))


if __name__ == "__main__":
    main(sys.argv[1:])
