"""What this machine could do at best: its measured matmul rate and copy bandwidth, and the work of the model, counted.

rates = limits.measure("cpu", torch.float32)
work = limits.layers(config, tokens, pairs) + limits.head(config, positions)
rates.floor(work)                                  # seconds that no implementation on this machine can beat

python3 benchmarks/limits.py                       # prints the rates
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

import torch

from models import ShowoConfig

REPEATS = 5
SHORT = 0.1  # seconds of a run that is long enough to measure
COPIED = 2**28  # bytes of the block that is copied, beyond every cache


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products (a multiply-add is two), and bytes that must be moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Rates:
    """flops: of matrix products per second; bytes: read and written per second."""

    flops: float
    bytes: float

    def floor(self, work: Work) -> float:
        """Seconds of one stretch of work whose products and transfers overlap completely."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def measure(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Rates:
    """The best of several runs of a large square product and of a large copy."""
    return Rates(matmul_rate(device, dtype), copy_bandwidth(device))


def matmul_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a product of two square matrices: as wide as fits a short run, up to 2048 on a CPU, 8192 on a GPU.

    Processors without instructions for half precision are hundreds of times slower in it.
    """
    width, largest = 256, 2048 if device == "cpu" else 8192
    while True:
        a, b, c = (torch.randn(width, width, device=device).to(dtype) for _ in range(3))
        multiply = partial(torch.mm, a, b, out=c)
        if width == largest or min(timed(multiply, device) for _ in range(2)) > SHORT:
            return 2 * width**3 / best(multiply, device)
        width *= 2


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes/s read and written while a block is copied."""
    source, target = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    return 2 * COPIED / best(lambda: target.copy_(source), device)


def best(run: Callable[[], object], device: str = "cpu", repeats: int = REPEATS) -> float:
    """Seconds of the fastest of `repeats` runs, after one that is not counted."""
    seconds = [timed(run, device) for _ in range(repeats + 1)]
    return min(seconds[1:])


def timed(run: Callable[[], object], device: str = "cpu", results: list | None = None) -> float:
    """Seconds of one run; a GPU is waited for. What it returns is put into `results`."""
    _wait(device)
    started = time.perf_counter()
    result = run()
    _wait(device)
    seconds = time.perf_counter() - started
    if results is not None:
        results[:] = [result]
    return seconds


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# ---- the model's work, one forward pass ----


def layers(config: ShowoConfig, tokens: float, pairs: float, *, num_layers: int | None = None) -> Work:
    """All transformer layers.

    Args:
        tokens: positions that run.
        pairs: query-key pairs that the mask lets see each other, over all rows.
        num_layers: default: all.
    """
    llm = config.backbone_config()
    num_layers = llm.num_hidden_layers if num_layers is None else num_layers
    head_size = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    return Work(num_layers * (2 * tokens * layer_weights(config) + 4 * pairs * llm.num_attention_heads * head_size))


def layer_weights(config: ShowoConfig) -> int:
    """Weights of the matrices of one transformer layer, whatever the language model."""
    with torch.device("meta"):
        decoder = config.backbone.model_class(config.backbone_config()).get_decoder()
    return sum(weight.numel() for weight in decoder.layers[0].parameters() if weight.ndim == 2)


def head(config: ShowoConfig, positions: float, vocabulary: int | None = None) -> Work:
    """The vocabulary head at some positions, over all of the vocabulary or a part of it."""
    return Work(2 * positions * config.backbone_config().hidden_size * (vocabulary or config.vocab_size))


def weights(config: ShowoConfig, bytes_per_weight: int = 4, *, with_head: bool = True) -> Work:
    """Reading the layers' weights, and the head's, once."""
    llm = config.backbone_config()
    count = llm.num_hidden_layers * layer_weights(config) + with_head * config.vocab_size * llm.hidden_size
    return Work(0.0, count * bytes_per_weight)


def main(argv: list[str]) -> None:
    device = argv[0] if argv else "cpu"
    dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        print(json.dumps({"device": device, "dtype": str(dtype)} | asdict(measure(device, dtype))))


if __name__ == "__main__":
    main(sys.argv[1:])
