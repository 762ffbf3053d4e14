"""Optimiser, schedule and moving average of a run (spec §14)."""

from collections.abc import Callable, Collection
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.quantization import require
from training.processes import full_tensor, gradient_of, local

# Faithful: matched against parameter names. The published model's `*_layernorm.weight` and `embed_tokens.weight` match
# none of them and are decayed (pinned by tests/training/test_optimization.py).
NO_DECAY = ("bias", "layer_norm.weight", "mlm_ln.weight", "embeddings.weight")


def parameter_groups(named_parameters, weight_decay: float, undecayed: Collection[str] = ()) -> list[dict]:
    """Trainable parameters with and without weight decay.

    Args:
        undecayed: further names without weight decay: parameters with rows that must not change.
    """
    groups = {True: [], False: []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups[name not in undecayed and not any(part in name for part in NO_DECAY)].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(
    model: nn.Module, config, scale: float = 1.0, undecayed: Collection[str] = ()
) -> torch.optim.Optimizer:
    """AdamW as configured by `optimizer`, with `scale` times the rate; `undecayed` as in `parameter_groups`.

    Raises:
        UserError: bitsandbytes, which `adamw8bit` needs, is not installed.
    """
    params = config.optimizer.params
    given = model.named_parameters(), params.weight_decay, undecayed
    settings = {"lr": params.learning_rate * scale, "betas": (params.beta1, params.beta2), "eps": params.epsilon}
    if config.optimizer.name == "adamw":
        return adamw(*given, **settings)
    require("bitsandbytes", "optimizer.name=adamw8bit")
    from bitsandbytes.optim import AdamW8bit  # optional, and slow to import

    return AdamW8bit(parameter_groups(*given), **settings)


def adamw(
    named_parameters, weight_decay: float, undecayed: Collection[str] = (), *, fused: bool = True, **settings
) -> torch.optim.AdamW:
    """AdamW over the groups of `parameter_groups`; `fused` makes one pass over weights, gradients and moments."""
    return torch.optim.AdamW(parameter_groups(named_parameters, weight_decay, undecayed), fused=fused, **settings)


def make_schedule(optimizer, config) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up and decay over `decay_steps` optimiser steps, independent of the number of processes.

    After them the rate stays at its last value.

    Args:
        optimizer: prepared or not; accelerate and DeepSpeed wrap torch's own, which the schedule must drive.
    """
    from diffusers.optimization import get_scheduler  # here, since no other part of a training step needs diffusers

    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    warmup, total = config.lr_scheduler.params.warmup_steps, decay_steps(config)
    schedule = get_scheduler(
        config.lr_scheduler.scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total
    )
    # Without a last step, diffusers' cosine would rise again.
    schedule.lr_lambdas = [_constant_after(max(warmup, total), rate) for rate in schedule.lr_lambdas]
    return schedule


def _constant_after(last: int, rate: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: rate(min(step, last))


def decay_steps(config) -> int:
    """Optimiser steps over which the learning rate decays: those of the run, unless a key of its own says otherwise."""
    steps = config.lr_scheduler.params.get("num_training_steps")  # older checkpoints do not have it
    return config.training.max_train_steps if steps is None else steps


def set_rate(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Sets the optimiser's rate to that of the schedule at its step; a loaded one may come from another schedule."""
    groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, rate in groups:
        group["lr"] = base * rate(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]  # what `get_last_lr` returns


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Under whichever name this version of transformers calls it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def gradient_norms(model: nn.Module, clipping: float = 0.0, loss_scale: float = 1.0) -> dict[str, torch.Tensor]:
    """``grad_norm/{parameter}`` = L2 norm of its gradient / its number of elements (spec §15), still on the device.

    Under FSDP and DeepSpeed all processes must call this.

    Args:
        clipping, loss_scale: operations still to be applied to the gradients: clipping of their total norm (0: none),
            and division by the loss scale.
    """
    norms, sizes = {}, {}
    for name, parameter in model.named_parameters():
        if (gradient := gradient_of(parameter)) is not None:
            norms[name], sizes[name] = full_tensor(gradient.detach().norm()) / loss_scale, gradient.numel()
    factor = 1.0
    if clipping:
        factor = (clipping / (torch.stack(list(norms.values())).norm() + 1e-6)).clamp(max=1.0)
    return {f"grad_norm/{name}": norm * factor / sizes[name] for name, norm in norms.items()}


class WeightAverage:
    """Exponential moving average of a model's trained parameters, in fp32; sharded as the parameters are.

    Args:
        decay: weight of the previous average; the first steps use (1 + n) / (10 + n) while that is smaller.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.restart(model)

    def restart(self, model: nn.Module) -> None:
        """Restarts the average from the current weights."""
        self.updates, self.displaced = 0, {}
        self.shadow = {name: p.detach().float().clone() for name, p in trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names, parameters = zip(*((n, local(p.detach()).float()) for n, p in trained(model).items()), strict=True)
        get_ema_multi_avg_fn(decay)([local(self.shadow[name]) for name in names], list(parameters), self.updates)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the model's weights with the average; a second call exchanges them back."""
        for name, parameter in trained(model).items():
            weight, average = local(parameter), local(self.shadow[name])
            if name in self.displaced:
                weight.copy_(self.displaced.pop(name))
                continue
            kept = weight.detach().clone()
            weight.copy_(average)
            if weight.dtype == average.dtype:
                average.copy_(kept)
            else:  # DeepSpeed's bf16 weights, in which the average would be rounded
                self.displaced[name] = kept

    @contextmanager
    def applied_to(self, model: nn.Module):
        """A context in which the model has the averaged weights; its own are restored at exit, also after an error."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    def state_dict(self) -> dict:
        """Full tensors; if they are sharded, all processes must call this."""
        return {"updates": self.updates, "shadow": {name: full_tensor(tensor) for name, tensor in self.shadow.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Raises `ValueError` if it is the average of another model."""
        # an older average holds frozen parameters as well
        shadow = {name: tensor for name, tensor in state["shadow"].items() if name in self.shadow}
        if {name: t.shape for name, t in shadow.items()} != {name: t.shape for name, t in self.shadow.items()}:
            raise ValueError("the weight average is that of another model")
        self.updates = int(state["updates"])
        for name, tensor in shadow.items():
            place = self.shadow[name]
            if isinstance(place, DTensor):
                tensor = distribute_tensor(tensor.to(place.device), place.device_mesh, place.placements)
            local(place).copy_(local(tensor))
