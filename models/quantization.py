"""Weights of fewer bits in the linear layers of the decoder; embeddings, norms, head and projector stay as they are.

All by torchao; what multiplies such weights knows nothing of it.

- int8: a scale for each row.
- int4: scale and zero point for each 32 columns; in bf16 only.
- nf4: levels of a normal distribution, a scale for each 64 weights; QLoRA trains an adapter beside them.
"""

import importlib.util
import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from common.errors import UserError, first_line

INSTALL = {"torchao": "torchao==0.13.0", "bitsandbytes": "bitsandbytes>=0.49"}
GROUP, BLOCK = 32, 64  # columns of an int4 group, weights of an nf4 block


def require(package: str, setting: str) -> None:
    """Raises `UserError` if a package that a setting needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{setting} needs {package}, which is not installed: pip install '{INSTALL[package]}'")


def quantize(model: nn.Module, kind: str, setting: str = "quantization") -> None:
    """Quantises a Showo where it is; it then stays on this device and in this dtype.

    Args:
        kind: int8, int4 or nf4.
        setting: what asked for it, for messages.

    Raises:
        UserError: the package is missing, or does not run this kind for this model here.
    """
    given = f"{setting}={kind}"
    require("torchao", given)
    backbone = model.config.backbone
    wanted = (*backbone.attention, *backbone.mlp)
    targets = {name for name, module in model.named_modules() if name.rpartition(".")[2] in wanted}
    _check_sizes(model, kind, given, targets)
    try:
        _to_nf4(model, targets) if kind == "nf4" else _by_torchao(model, kind, targets)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        raise UserError(f"{given} does not run on {model.device} here ({first_line(error)}); leave it out") from error


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights are neither plain nor sharded by FSDP2."""
    return any(type(p) is not nn.Parameter and not isinstance(p, DTensor) for p in model.parameters())


def _check_sizes(model: nn.Module, kind: str, given: str, targets: set[str]) -> None:
    for name in sorted(targets):
        rows, columns = model.get_submodule(name).weight.shape
        if kind == "int4" and columns % GROUP or kind == "nf4" and rows * columns % BLOCK:
            raise UserError(f"{given} does not fit {name} of {rows} x {columns} weights; give int8")
    if kind == "int4" and model.dtype != torch.bfloat16:  # on a CPU torch's product in fp32 is 100 times slower
        raise UserError(f"{given} needs bf16; give dtype=bf16")


def _by_torchao(model: nn.Module, kind: str, targets: set[str]) -> None:
    from torchao.dtypes import Int4CPULayout
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if kind == "int8":
        config = Int8WeightOnlyConfig()
    else:
        layout = {"layout": Int4CPULayout()} if model.device.type == "cpu" else {}
        config = Int4WeightOnlyConfig(group_size=GROUP, **layout)
    quantize_(model, config, filter_fn=lambda module, name: name in targets)


def _to_nf4(model: nn.Module, targets: set[str]) -> None:
    from torchao.dtypes import to_nf4

    for name in targets:
        layer = model.get_submodule(name)
        blocks = layer.weight.numel() // BLOCK
        quantized = to_nf4(layer.weight.detach(), BLOCK, scaler_block_size=math.gcd(blocks, 256))
        layer.weight = nn.Parameter(quantized, requires_grad=False)
