"""Pictures per second that the image tokenizer encodes, in ways a training step could: the published one and ours.

    python3 benchmarks/tokenizer.py --pictures 2                      # the published tokenizer's sizes on a CPU
    python3 benchmarks/tokenizer.py --size tiny --pictures 32         # the small default's
    python3 benchmarks/tokenizer.py --pictures 64 --device cuda

Random weights of the given size (speed does not depend on them; which codes change does, so `--weights FOLDER` takes
trained ones). Ways:

- published: fp32, outside autocast, as every published training step does it.
- compiled: `training.vq_compile`.
- bf16: `training.vq_dtype: bf16`, autocast; it changes some codes, and the share that stays the same is told.
- codes from shards: no tokenizer in the step at all (`training/data/encode_images.py`); reading them, from
  `benchmarks/data.py`, costs a loader worker a fraction of what decoding a jpeg does.

`limit` is the operations of the convolutions and the attention, counted, over the measured matmul rate. Prints a table
and last one JSON line.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import limits, report
from models import MAGVITv2, MAGVITv2Config
from models.pipeline_loading import without_loading_bars

TINY = report.ROOT / "checkpoints" / "showo-tiny" / "magvitv2"


def make_model(args) -> MAGVITv2:
    torch.manual_seed(0)
    with without_loading_bars():
        if args.weights or args.size == "tiny":
            model = MAGVITv2.from_pretrained(str(args.weights or TINY))
        else:
            model = MAGVITv2(MAGVITv2Config())
    return model.requires_grad_(False).eval().to(args.device)


def pictures(args) -> torch.Tensor:
    """Smooth random pictures (B, 3, R, R) in [-1, 1]."""
    torch.manual_seed(1)
    coarse = torch.rand(args.pictures, 3, 8, 8) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (args.resolution,) * 2, mode="bicubic", align_corners=False)
    return smooth.clamp(-1, 1).to(args.device)


def flops(model: MAGVITv2, pixels: torch.Tensor) -> float:
    """Operations of encoding, all pictures together."""
    with FlopCounterMode(display=False) as counter:
        model.get_code(pixels[:1])
    return counter.get_total_flops() * len(pixels)


def measure(args) -> dict[str, dict]:
    """Seconds of each way and the share of codes that are the published way's."""
    model, pixels = make_model(args), pictures(args)
    rates = limits.measure(args.device)
    count, found = flops(model, pixels), {}
    reference = model.get_code(pixels)

    def note(name: str, bf16: bool = False):
        def encode():
            with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
                return model.get_code(pixels)

        same = (encode() == reference).float().mean().item()
        found[name] = {"seconds": limits.best(encode, args.device, args.repeats), "same_codes": same}

    note("published")
    note("bf16", bf16=True)
    if args.compile:
        model.encoder.compile()
        note("compiled")
        note("compiled, bf16", bf16=True)
    found["limit"] = {"seconds": rates.floor(limits.Work(count)), "same_codes": 1.0, "flops": count}
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--weights", help="a folder with a trained tokenizer")
    parser.add_argument("--resolution", type=int, default=None, help="default: 256, tiny 64")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    args.resolution = args.resolution or (64 if args.size == "tiny" else 256)
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    found = measure(args)
    base, floor = found["published"]["seconds"], found["limit"]["seconds"]
    print(f"{'':18}{'ms a picture':>14}{'times':>8}{'of limit':>10}{'same codes':>12}")
    for name, one in found.items():
        one |= {"times_faster": base / one["seconds"], "share_of_limit": floor / one["seconds"]}
        figures = (
            f"{1000 * one['seconds'] / args.pictures:14.1f}{one['times_faster']:8.2f}{one['share_of_limit']:10.0%}"
        )
        print(f"{name:18}{figures}{one['same_codes']:12.2%}")
    print(json.dumps(report.facts() | {"settings": vars(args), "results": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
