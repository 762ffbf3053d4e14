"""The processes of a run: setup as launched, decisions in common, and full tensors from sharded ones.

One process, DDP, DeepSpeed (ZeRO-2, ZeRO-3) and FSDP2 come from `accelerate launch --config_file …`; nothing here
chooses between them.
"""

import argparse
import importlib.util
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch.distributed.checkpoint import metadata
from torch.distributed.tensor import DTensor

from common.errors import UserError
from common.files import check_file
from common.launch import launched_processes, use_physical_cores
from models.checkpoint_io import silence_deepspeed


def make_accelerator(config, rows: int, written_by: int | None = None) -> Accelerator:
    """The `Accelerator` with the run's devices, precision and gradient accumulation.

    Args:
        rows: of one batch, which DeepSpeed wants to know.
        written_by: number of processes that wrote the checkpoint to resume from.

    Raises:
        UserError: several processes were launched that are not connected, or DeepSpeed cannot be used as asked for.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError("the launch file asks for DeepSpeed, which is not installed: pip install 'deepspeed>=0.19'")
    silence_deepspeed()
    launched = launched_processes()
    on_cpus = launched > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        mixed_precision=config.training.mixed_precision,
        # Without it, processes on CPUs would not synchronise; with it, accelerate ignores DeepSpeed.
        cpu=(config.device == "cpu" or on_cpus) and not deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpus else None,
        step_scheduler_with_optimizer=False,
    )
    if deepspeed and accelerator.state.deepspeed_plugin is None:
        raise UserError(
            "the launch file asks for DeepSpeed, but accelerate leaves it out on CPUs (ACCELERATE_USE_CPU or use_cpu "
            "is true) and would train otherwise; leave that out, or take another launch file"
        )
    if launched != accelerator.num_processes or (launched > 1 and accelerator.distributed_type == DistributedType.NO):
        raise UserError(
            f"{launched} processes were launched, but this one trains with {accelerator.num_processes} or alone; on "
            "CPUs set device=cpu or the environment variable ACCELERATE_USE_CPU=true"
        )
    if deepspeed or accelerator.distributed_type == DistributedType.FSDP:
        _refuse_sharded(config)
    if accelerator.device.type == "cpu":
        use_physical_cores()
    # It warns at each save of a model with tied embeddings, which is correct here.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if accelerator.state.deepspeed_plugin is not None:
        _configure_deepspeed(accelerator.state.deepspeed_plugin, config, rows)
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # which imports DeepSpeed

        # Under ZeRO-3, transformers would also shard the frozen models that it loads, and nothing gathers those.
        unset_hf_deepspeed_config()
        if written_by not in (None, launched):
            accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    return accelerator


def _refuse_sharded(config) -> None:
    """Raises `UserError` for settings that work on one process and with DDP only."""
    whole = {"training.trainable": "lora", "training.share_code_bits": True, "optimizer.name": "adamw8bit"}
    for key, value in whole.items():
        section, name = key.split(".")
        if config[section].get(name) == value:
            raise UserError(
                f"{key}={value} does not work with DeepSpeed or FSDP2 here: it needs whole weights and moments on each "
                "process; use one process, or DDP (accelerate launch --multi_gpu)"
            )


def _configure_deepspeed(plugin, config, rows: int) -> None:
    """Sets the run's settings in the launch file's, whose gradient clipping is kept if the run has none; `UserError`
    for one that DeepSpeed cannot honour."""
    training, settings = config.training, plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = rows  # DeepSpeed cannot infer it, as no loader is prepared
    settings["gradient_accumulation_steps"] = training.gradient_accumulation_steps
    if training.max_grad_norm is not None:
        settings["gradient_clipping"] = training.max_grad_norm
    elif not isinstance(settings.get("gradient_clipping"), int | float):
        settings["gradient_clipping"] = 0.0
    if config.compile:
        raise UserError("compile=True does not work with DeepSpeed here; leave it out, or use 8_gpus_fsdp2.yaml")
    if training.ema_decay and plugin.zero_stage == 3:
        raise UserError("training.ema_decay needs full weights on every process; ZeRO-3 has none: use ZeRO-2 or FSDP2")


def call_before_deepspeed_steps(engine, hook) -> None:
    """Calls a hook with the engine, on all processes, before each optimiser step of DeepSpeed.

    DeepSpeed steps inside `accelerator.backward` and frees the gradients, so this is the only place to read them.
    """
    step = engine.step

    def step_after_hook(*args, **kwargs):
        hook(engine)
        return step(*args, **kwargs)

    engine.step = step_after_hook


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The full gradient, or None. Under DeepSpeed it is gathered from all processes, which must all call this."""
    if not any(hasattr(parameter, mark) for mark in ("ds_id", "_hp_mapping")):  # of ZeRO-3, ZeRO-2
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


@contextmanager
def executing_nothing(folder: Path) -> Iterator[None]:
    """A context in which libraries read a checkpoint's pickles as tensors and plain values, whatever they ask for.

    Raises:
        pickle.UnpicklingError: the index of FSDP2's files, which torch reads by itself, holds anything else. Within
            the context `torch.load` raises it.
        UserError: an index is no regular file.
    """
    for index in (*folder.glob(".metadata"), *folder.glob("*/.metadata")):  # not `**`, which does not follow links
        with check_file(index).open("rb") as file:
            _IndexReader(file).load()
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in forced}
    os.environ.update(forced)
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _IndexReader(pickle.Unpickler):
    """Reads the index of `torch.distributed.checkpoint`; names of anything else are refused."""

    allowed = {
        "torch.distributed.checkpoint.metadata": (*metadata.__all__, "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
        "torch.serialization": ("_get_layout",),
        "collections": ("OrderedDict",),
        "pathlib": ("Path", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> type | Callable:
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint and was not executed")
        return super().find_class(module, name)


def _deepspeed_classes() -> list:
    """What DeepSpeed's own files hold besides tensors: numbers in classes of its own."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def universal_checkpoint(accelerator: Accelerator, folder: Path) -> Iterator[Path]:
    """A temporary copy of a DeepSpeed checkpoint that any number of processes can read (a "universal checkpoint").

    Checkpoints of DDP and FSDP2 need no conversion and are returned as they are.
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
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
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
    """Gives each parameter its own step counter: ZeRO-3 loads one tensor for all, which each would increment."""
    for optimizer in accelerator._optimizers:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the weights are sharded over the processes (FSDP2, ZeRO-3)."""
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.distributed_type == "FSDP" or (plugin is not None and plugin.zero_stage == 3)


def full_state_dict(accelerator: Accelerator, model, wrapped) -> dict[str, torch.Tensor]:
    """The plain model's state dict, also of one that the wrapper which is trained (DDP, DeepSpeed engine, …) has
    sharded: then all processes must call this, and the main one gets full tensors."""
    return accelerator.get_state_dict(wrapped) if is_sharded(accelerator) else model.state_dict()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor; all of it if it is not sharded by FSDP2."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from all processes' shards; all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ProcessGroup:
    """Decisions of all processes in common, over gloo on the hosts, so that no GPU is synchronised."""

    def __init__(self, accelerator: Accelerator):
        several = accelerator.num_processes > 1
        self.group = torch.distributed.new_group(backend="gloo") if several else None

    def check_same(self, value: str, otherwise: str) -> None:
        """Raises `UserError` with the message `otherwise` on all processes if `value` differs between them."""
        values = [value]
        if self.group is not None:
            values = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(values, value, group=self.group)
        if len(set(values)) > 1:
            raise UserError(otherwise)

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any process. All must leave a loop at the same step, or some wait forever."""
        if self.group is None:
            return value
        flag = torch.tensor(int(value))
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)
