"""Throughput of the image tokenizer's encoder, in the variants a training step can use: published and ours.

    python3 benchmarks/tokenizer.py --pictures 2                      # the published tokenizer's sizes on a CPU
    python3 benchmarks/tokenizer.py --size tiny --pictures 32         # the small default's
    python3 benchmarks/tokenizer.py --pictures 64 --device cuda

Random weights of the given size (speed does not depend on them; which codes change does, so `--weights FOLDER` takes
trained ones). Ways:

- published: fp32, outside autocast, as every published training step does it.
- compiled: `training.vq_compile`.
- bf16: `training.vq_dtype: bf16`, autocast; it changes some codes, and the share that stays the same is told.
- codes from shards: no tokenizer in the step at all (`training/data/encode_images.py`); reading them, from
  `benchmarks/data.py`, costs a loader worker a fraction of decoding a jpeg.

`limit` is the operations of the convolutions and the attention, counted, over the measured matmul rate. Prints a table
and last one JSON line.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import limits, report
from models import MAGVITv2, MAGVITv2Config

TINY = report.ROOT / "checkpoints" / "showo-tiny" / "magvitv2"


def make_model(args) -> MAGVITv2:
    torch.manual_seed(0)
    if args.weights or args.size == "tiny":
        model = MAGVITv2.from_pretrained(str(args.weights or TINY))
    else:
        model = MAGVITv2(MAGVITv2Config())
    return model.requires_grad_(False).eval().to(args.device)


def pictures(args) -> torch.Tensor:
    """Smooth random images (B, 3, R, R) in [-1, 1]."""
    torch.manual_seed(1)
    coarse = torch.rand(args.pictures, 3, 8, 8) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (args.resolution,) * 2, mode="bicubic", align_corners=False)
    return smooth.clamp(-1, 1).to(args.device)


def flops(model: MAGVITv2, pixels: torch.Tensor) -> float:
    """Operations of encoding, all images together."""
    with FlopCounterMode(display=False) as counter:
        model.get_code(pixels[:1])
    return counter.get_total_flops() * len(pixels)


def has_bf16(device: str) -> bool:
    """Whether the machine has instructions for bf16: without them an image takes minutes in it."""
    return device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def measure(args) -> Iterator[tuple[str, dict]]:
    """The limit, then each way: seconds, and the share of codes that are the published way's."""
    model, pixels = make_model(args), pictures(args)
    count = flops(model, pixels)
    yield "limit", {"seconds": limits.measure(args.device).floor(limits.Work(count)), "same_codes": 1.0, "flops": count}
    reference = model.get_code(pixels)

    def timed(bf16: bool) -> dict:
        def encode():
            with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
                return model.get_code(pixels)

        same = (encode() == reference).float().mean().item()
        return {"seconds": limits.best(encode, args.device, args.repeats), "same_codes": same}

    yield "published", timed(False)
    if args.bf16:
        yield "bf16", timed(True)
    if args.compile:
        model.encoder.compile()
        yield "compiled", timed(False)
        if args.bf16:
            yield "compiled, bf16", timed(True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--weights", help="a folder with a trained tokenizer")
    parser.add_argument("--resolution", type=int, default=None, help="default: 256, tiny 64")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: where there are instructions")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    args.resolution = args.resolution or (64 if args.size == "tiny" else 256)
    args.bf16 = has_bf16(args.device) if args.bf16 is None else args.bf16
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    print(f"{'':18}{'ms a picture':>14}{'times':>8}{'of limit':>10}{'same codes':>12}")
    ways, found = measure(args), {}
    _, limit = next(ways)
    for name, one in chain(ways, [("limit", limit)]):
        found[name] = one
        one["times_faster"] = found["published"]["seconds"] / one["seconds"]
        one["share_of_limit"] = limit["seconds"] / one["seconds"]
        figures = (
            f"{1000 * one['seconds'] / args.pictures:14.1f}{one['times_faster']:8.2f}{one['share_of_limit']:10.0%}"
        )
        print(f"{name:18}{figures}{one['same_codes']:12.2%}", flush=True)
    print(json.dumps(report.facts() | {"settings": vars(args), "results": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
