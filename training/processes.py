"""The processes of a run: joined as launched, agreeing on what they do, and whole weights out of sharded ones.

One process, DDP, DeepSpeed (ZeRO-2, ZeRO-3) and FSDP2 come from `accelerate launch --config_file …`; nothing here
chooses between them.
"""

import argparse
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.errors import UserError
from common.launch import launched_processes


def make_accelerator(config, written_by: int | None = None) -> Accelerator:
    """Processes, precision and accumulation.

    Args:
        written_by: number of processes that wrote the checkpoint which the run continues.

    Raises:
        UserError: several processes were launched that do not know of each other, or DeepSpeed is not installed.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError("the launch file asks for DeepSpeed, which is not installed: pip install 'deepspeed>=0.19'")
    launched = launched_processes()
    on_cpus = launched > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        mixed_precision=config.training.mixed_precision,
        # Without it processes on CPUs would not synchronise; with it, accelerate forgets about DeepSpeed.
        cpu=(config.device == "cpu" or on_cpus) and not deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpus else None,
        step_scheduler_with_optimizer=False,
    )
    if launched != accelerator.num_processes or (launched > 1 and accelerator.distributed_type == DistributedType.NO):
        raise UserError(
            f"{launched} processes were launched, but this one trains with {accelerator.num_processes} or alone; on "
            "CPUs set device=cpu or the environment variable ACCELERATE_USE_CPU=true"
        )
    # A word at each saving of a model with tied embeddings, although that is right.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if accelerator.state.deepspeed_plugin is not None:
        _configure_deepspeed(accelerator.state.deepspeed_plugin, config)
        # Under ZeRO-3 transformers would shard every model it loads, the frozen ones, too, which nobody gathers.
        unset_hf_deepspeed_config()
        if written_by not in (None, launched):
            accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    return accelerator


def _configure_deepspeed(plugin, config) -> None:
    """The run's own settings win over the launch file's; its clipping stands where the run has none.

    Raises:
        UserError: a setting that DeepSpeed cannot honour.
    """
    training, settings = config.training, plugin.deepspeed_config
    rows = training.batch_size_t2i + training.batch_size_lm + training.batch_size_mmu
    settings["train_micro_batch_size_per_gpu"] = rows  # nobody else can know: no loader is prepared
    settings["gradient_accumulation_steps"] = training.gradient_accumulation_steps
    if training.max_grad_norm is not None:
        settings["gradient_clipping"] = training.max_grad_norm
    elif not isinstance(settings.get("gradient_clipping"), int | float):
        settings["gradient_clipping"] = 0.0
    if config.compile:
        raise UserError("compile=True does not work with DeepSpeed here; leave it out, or use 8_gpus_fsdp2.yaml")
    if training.trainable != "all" and plugin.zero_stage == 3:
        raise UserError(
            f"training.trainable={training.trainable} does not work with ZeRO-3 here (its first step never ends): use "
            "ZeRO-2 or FSDP2"
        )
    if training.ema_decay and plugin.zero_stage == 3:
        raise UserError("training.ema_decay needs whole weights on every process; ZeRO-3 has none: use ZeRO-2 or FSDP2")


def before_each_step(engine, call) -> None:
    """DeepSpeed takes its steps within `accelerator.backward` and drops the gradients; here they can still be had.

    Args:
        call: with the engine, on all processes.
    """
    step = engine.step

    def after_call(*args, **kwargs):
        call(engine)
        return step(*args, **kwargs)

    engine.step = after_call


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Its gradient, if it has one; under DeepSpeed put together from all processes, which must all call this."""
    if not any(hasattr(parameter, mark) for mark in ("ds_id", "_hp_mapping")):  # of ZeRO-3, ZeRO-2
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


@contextmanager
def readable_by_any_number(accelerator: Accelerator, folder: Path) -> Iterator[Path]:
    """A DeepSpeed checkpoint in the form that another number of processes than wrote it can read, while it is needed.

    Others (DDP, FSDP2) can do without.
    """
    if accelerator.state.deepspeed_plugin is None:
        yield folder
        return
    copy = folder.with_name(f".incomplete-{folder.name}-universal")
    if accelerator.is_main_process:
        from deepspeed.checkpoint import ds_to_universal

        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("pytorch_model", "unwrapped_model"))
        paths = {"input_folder": str(folder / "pytorch_model"), "output_folder": str(copy / "pytorch_model")}
        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            ds_to_universal.main(
                argparse.Namespace(**paths, **workers, keep_temp_folder=False, strict=True, inject_missing_state=True)
            )
    accelerator.wait_for_everyone()
    yield copy
    _separate_step_counters(accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(copy)


def _separate_step_counters(accelerator: Accelerator) -> None:
    """ZeRO-3 reads one counter of steps for all parameters, and each of them would count it up."""
    for optimizer in accelerator._optimizers:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole weights (FSDP, ZeRO-3)."""
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.distributed_type == "FSDP" or (plugin is not None and plugin.zero_stage == 3)


def whole_weights(accelerator: Accelerator, model, wrapped) -> dict[str, torch.Tensor]:
    """The plain model's state dict; where it is sharded all processes must call this, and the main one gets it whole.

    Args:
        model, wrapped: the plain model, and what trains it.
    """
    return accelerator.get_state_dict(wrapped) if is_sharded(accelerator) else model.state_dict()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor: all of it, unless FSDP has sharded it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from all processes' parts; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Agreement:
    """What all processes decide together, over gloo between the hosts, so that no GPU is waited for."""

    def __init__(self, accelerator: Accelerator):
        several = accelerator.num_processes > 1
        self.group = torch.distributed.new_group(backend="gloo") if several else None

    def check_same(self, value: str, otherwise: str) -> None:
        """Raises `UserError` with the message `otherwise` on all processes if they differ in a value."""
        values = [value]
        if self.group is not None:
            values = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(values, value, group=self.group)
        if len(set(values)) > 1:
            raise UserError(otherwise)

    def any(self, value: bool) -> bool:
        """Whether any process says so: all must leave a loop at the same step, or the others wait forever."""
        if self.group is None:
            return value
        asked = torch.tensor(int(value))
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(asked)
