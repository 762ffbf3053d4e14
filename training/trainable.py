"""Selects what is trained (`training.trainable`): all, what the language model did not have, or an adapter.

A language model whose weights are all trained from the first step forgets: Show-o2's fell from 60 to 28 on MMLU, but
only to 57 after a first stage that trained nothing but the new parameters. `new` is that stage. `lora` leaves all
weights as they are and trains small matrices beside them (models/adapters.py), for fine-tuning on one GPU.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from models.adapters import add_adapter, describe_base
from models.quantization import quantize
from training.processes import local


def choose_trainable(model: nn.Module, which: str, lora=None) -> dict[str, int]:
    """Freezes the parameters that are not trained.

    Args:
        which: ``all``; ``new``: the embedding rows, norms and projector that the language model did not have; or
            ``lora``: a new adapter.
        lora: the section `lora` of the configuration, for that.

    Returns:
        Parameter name → number of first rows that must not change, for matrices that are trained in part. Pass it to
        `keep_old_rows`, and exclude these parameters from weight decay.

    Raises:
        UserError: torchao, which `lora.base=nf4` needs, is not installed.
    """
    if which == "all":
        return {}
    if which == "lora":
        return add_lora(model, lora)
    first_new = model.first_new_rows()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in first_new)
    return {name: rows for name, rows in first_new.items() if rows}


def add_lora(model: nn.Module, lora) -> dict[str, int]:
    """Puts an adapter as the section `lora` describes it into a model, whose weights become `lora.base`.

    Returns:
        As `choose_trainable`, of the matrices that are trained in part with `lora.new`.
    """
    base, backbone = describe_base(model), model.config.backbone
    new = model.first_new_rows() if lora.new else {}
    new = {name: first for name, first in new.items() if model.get_parameter(name).requires_grad}
    if lora.base != "fp32":
        for tensor in model.state_dict(keep_vars=True).values():  # not the angles of rotary embeddings
            tensor.data = tensor.data.to(torch.bfloat16)
    if lora.base == "nf4":
        quantize(model, "nf4", "lora.base")
    add_adapter(
        model,
        base,
        new,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=[*backbone.attention, *(backbone.mlp if lora.targets == "all" else ())],
    )
    return {name: first for name, first in new.items() if first}


def keep_old_rows(model: nn.Module, old_rows: dict[str, int]) -> None:
    """Zeroes the gradients of the first rows of some parameters, so that AdamW without weight decay never changes them.

    Call it after FSDP has sharded the model, since FSDP replaces the parameters, but before DeepSpeed is set up, since
    DeepSpeed frees gradients in an earlier hook. With DDP either works.
    """
    parameters = dict(model.named_parameters())
    for name, rows in old_rows.items():
        if parameters[name].requires_grad:  # CLIP pre-training trains the projector alone
            parameters[name].register_post_accumulate_grad_hook(lambda p, rows=rows: _drop(p.grad, rows))


def _drop(gradient: torch.Tensor, rows: int) -> None:
    """Zeroes the first rows of a gradient; of a sharded one, those in this process's shard."""
    if isinstance(gradient, DTensor):
        mesh = gradient.device_mesh
        for dim, placement in enumerate(gradient.placements):
            if placement.is_shard(0):  # FSDP2 shards as `torch.chunk` does
                rows -= mesh.get_local_rank(dim) * -(-gradient.shape[0] // mesh.size(dim))
    local(gradient)[: max(0, rows)] = 0
