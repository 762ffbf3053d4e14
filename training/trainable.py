"""What a run trains: everything, or only what the language model did not bring (`training.trainable`).

A language model that is trained whole from the first step forgets what it knew: Show-o2's fell from 60 to 28 on MMLU,
and to 57 only where a stage came first that trained nothing but what was new to it. `new` is that stage.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from training.processes import local


def choose_trainable(model: nn.Module, which: str) -> dict[str, int]:
    """Freezes what a run does not train.

    Args:
        which: ``all``, or ``new``: the rows, norms and projector that the language model did not bring.

    Returns:
        Parameter name → number of its first rows that must stay as they are: matrices of which a part is trained.
        `keep_old_rows` sees to it, and weight decay must leave those parameters alone.
    """
    if which == "all":
        return {}
    first_new = model.first_new_rows()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in first_new)
    return {name: rows for name, rows in first_new.items() if rows}


def keep_old_rows(model: nn.Module, old_rows: dict[str, int]) -> None:
    """Lets no gradient reach the first rows of some parameters; AdamW without weight decay then never moves them.

    FSDP makes parameters of its own when it shards a model, so call this behind it. DeepSpeed takes a gradient away as
    soon as there is one, so there call it before. DDP does not mind.
    """
    parameters = dict(model.named_parameters())
    for name, rows in old_rows.items():
        if parameters[name].requires_grad:  # CLIP pre-training trains the projector alone
            parameters[name].register_post_accumulate_grad_hook(lambda p, rows=rows: _drop(p.grad, rows))


def _drop(gradient: torch.Tensor, rows: int) -> None:
    """Zeroes the first rows of a gradient; of a sharded one those of them that this process holds."""
    if isinstance(gradient, DTensor):
        mesh = gradient.device_mesh
        for dim, placement in enumerate(gradient.placements):
            if placement.is_shard(0):  # FSDP2 cuts as `torch.chunk` does
                rows -= mesh.get_local_rank(dim) * -(-gradient.shape[0] // mesh.size(dim))
    local(gradient)[: max(0, rows)] = 0
