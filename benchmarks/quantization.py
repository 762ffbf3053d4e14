"""Quantised weights against whole ones: memory of the weights, time of an image and of an answer, on random weights.

    python3 benchmarks/quantization.py --hidden 512 --layers 8 --heads 8 --timesteps 4 --new-tokens 20
    python3 benchmarks/quantization.py --layers 24 --device cuda --dtype bf16

Takes the options of `benchmarks/generation.py`. Prints a table with a row for each form, ratios against the first, and
last one JSON line. Random weights say nothing of quality: `evaluate.py … quantization=int8` does, for a trained model.
"""

import gc
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch

from benchmarks import report
from benchmarks.generation import make_model, make_prompts, ours, parse, timed
from common.errors import UserError
from common.schema import QUANTIZATIONS
from models.generation import cpu
from models.loading import DTYPES
from models.quantization import quantize


def num_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of those that a quantised one consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def measure(args, kind: str | None) -> dict[str, float]:
    model = make_model(args).to(DTYPES[args.dtype])
    if kind:
        quantize(model, kind)
    if args.device == "cpu" and args.cpu_kernels:
        cpu.enable(model)
    size = sum(num_bytes(parameter.data) for parameter in model.parameters()) / report.MIB
    loops = ours(model, args, make_prompts(model, args))
    return {"weights_mib": size} | {f"{name}_s": timed(loops[name], args)[0] for name in args.loops}


def main(argv: list[str]) -> None:
    args = parse(argv)
    results: dict[str, dict | str] = {}
    print(f"{'':8}{'weights MiB':>20}" + "".join(f"{name + ' s':>20}" for name in args.loops))
    for kind in (None, *QUANTIZATIONS):
        name = kind or args.dtype
        try:
            results[name] = found = measure(args, kind)
        except UserError as error:
            results[name] = str(error)
            print(f"{name:8}  {error}")
            continue
        whole = results[args.dtype]
        print(f"{name:8}" + "".join(f"{found[key]:12.2f} ({found[key] / whole[key]:4.2f})" for key in found))
        gc.collect()
    print(json.dumps({"arguments": vars(args), "results": results} | report.facts()))


if __name__ == "__main__":
    main(sys.argv[1:])
