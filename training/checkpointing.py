"""Checkpoints of a run: whole or absent, and everything that must survive a crash (spec §12)."""

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, load
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from common.config import leaves
from common.errors import UserError
from models.checkpoint_io import read_json
from models.pipeline_loading import without_loading_bars
from training.data.streams import StreamState
from training.processes import readable_by_any_number, whole_weights

# What differs from run to run without changing what is learned; any other change under a continued run is reported.
FREE_KEYS = re.compile(
    r"wandb\.|experiment\.(?!max_train_examples)|lr_scheduler\.params\.learning"
    r"|(seed|output_dir|validation_prompts_file|device|dtype|compile|attn_implementation)$"
    r"|dataset\.params\.(validation_prompts_file|pin_memory|persistent_workers|eval_|batch_size$|max_skipped_fraction)"
    r"|training\.(guidance_scale|generation_|batch_size$|eval_mask_ratios|enable_tf32|max_nonfinite_batches)"
)

# What torch's writer of files says, all it does of a full disk; any other RuntimeError has nothing to do with the disk.
TORCH_CANNOT_WRITE = re.compile(r"inline_container|PytorchStreamWriter|write failed")


@dataclass
class TrainState:
    """Where a run stands, beside weights, optimiser, schedule and random states.

    Args:
        global_step: optimiser steps taken.
        streams: how far this process has read each flow.
        counts: what this process has counted for the next log line, for JSON.
    """

    global_step: int = 0
    streams: dict[str, StreamState] = field(default_factory=dict)
    counts: dict = field(default_factory=dict)


@dataclass
class Start:
    """The checkpoint a run goes on from.

    Args:
        folder: of the checkpoint.
        step: where to go on.
        written_by: number of processes that wrote it.
        weights: folder of the weights to begin with when nothing else is to be kept (the stage before, or a checkpoint
            of the published code); None brings everything back.
    """

    folder: Path
    step: int
    weights: Path | None = None
    written_by: int | None = None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The run's checkpoint folders, oldest first; half-written ones have another name and do not count."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def find_resume(output_dir: str | Path, setting: str | bool | None) -> Path | None:
    """The checkpoint that `experiment.resume_from_checkpoint` means: ``latest``, a folder, or none.

    Raises:
        UserError: a named checkpoint does not exist.
    """
    if not setting:
        return None
    if setting in ("latest", True):
        found = checkpoints(output_dir)
        return found[-1] if found else None
    for folder in (Path(setting), Path(output_dir) / str(setting)):
        if folder.is_dir():
            return folder
    raise UserError(f"experiment.resume_from_checkpoint is {setting!r}: no such folder; give one, or latest, or false")


def find_start(output_dir: str | Path, setting: str | bool | None) -> Start | None:
    """What a run continues, and how much of it.

    A folder named `checkpoint-0` is the last one of the stage before, put there by hand: only its weights are taken
    (spec §12). So it is with a checkpoint of the published code, which holds nothing else.

    Raises:
        UserError: the checkpoint is incomplete.
    """
    folder = find_resume(output_dir, setting)
    if folder is None:
        return None
    weights = folder / "unwrapped_model"
    if folder.name == "checkpoint-0":
        return Start(folder, 0, weights if weights.is_dir() else folder)
    metadata = read_json(folder / "metadata.json")
    step = metadata.get("global_step")
    if not isinstance(step, int) or step < 0:
        raise UserError(
            f"{folder / 'metadata.json'} has no global_step; the checkpoint is damaged: remove or replace it"
        )
    if "num_processes" in metadata:  # ours; the published code writes the step alone
        return Start(folder, step, written_by=metadata["num_processes"])
    if not weights.is_dir():
        raise UserError(f"{folder} is incomplete (it holds no unwrapped_model); remove it or copy it again")
    return Start(folder, step, weights)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: TrainState,
    *,
    model,
    wrapped=None,
    average=None,
    limit=None,
    config=None,
) -> Path:
    """Writes ``checkpoint-{step}`` aside, then renames it; afterwards removes the oldest beyond `limit`.

    It holds accelerate's full state (model, optimiser, schedule, random states), the weight average, the data position
    of every process, the configuration, and `unwrapped_model/`, which loads on its own. All processes call it.

    Args:
        model, wrapped: the plain model, and what trains it (itself, DDP, DeepSpeed engine, …).

    Raises:
        UserError: it cannot be written (a full disk, say); the checkpoints before it are still there.
    """
    final = output_dir / f"checkpoint-{state.global_step}"
    with _written_aside(accelerator, final) as aside:
        accelerator.save_state(str(aside))
        streams = {name: asdict(stream) for name, stream in state.streams.items()}
        (aside / _name("streams", accelerator)).write_text(json.dumps(streams))
        (aside / _name("counts", accelerator)).write_text(json.dumps(state.counts))
        save_model(accelerator, model, aside / "unwrapped_model", wrapped=wrapped, average=average)
        average_state = average.state_dict() if average is not None else None
        accelerator.wait_for_everyone()  # the others write their states into it
        if accelerator.is_main_process:
            if average_state is not None:
                torch.save(average_state, aside / "average.pt")
            if config is not None:
                OmegaConf.save(config, aside / "config.yaml")
            metadata = {"global_step": state.global_step, "num_processes": accelerator.num_processes}
            (aside / "metadata.json").write_text(json.dumps(metadata))
            _put_in_place(aside, final, limit)
    accelerator.wait_for_everyone()
    return final


@contextmanager
def _written_aside(accelerator: Accelerator, final: Path) -> Iterator[Path]:
    """Where to write what is to stand at `final`; half-written things of before are cleared away first.

    Raises:
        UserError: it cannot be written; says which checkpoint is left, and takes away what was half written.
    """
    aside = final.with_name(f".incomplete-{final.name}")
    try:
        if accelerator.is_main_process:
            for left_over in final.parent.glob(".incomplete-*"):
                shutil.rmtree(left_over)
        accelerator.wait_for_everyone()
        yield aside
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        cause = _cause(error)
        if not isinstance(cause, (OSError, SafetensorError)) and not TORCH_CANNOT_WRITE.search(str(cause)):
            raise
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        reason = f"could not be written ({_reason(error)}); {what_remains(final.parent)}"
        raise UserError(f"{final} {reason}. Make room on the disk and start again") from error


def what_remains(output_dir: Path) -> str:
    """For a message: the newest checkpoint."""
    kept = checkpoints(output_dir)
    return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"


def _flush(path: Path) -> None:
    """Sees to it that a file, or a folder's list of names, is on the disk, not only on its way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems have no such thing for folders
            raise
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    """All that a folder holds, and itself, before it gets its name."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _put_in_place(aside: Path, final: Path, limit: int | None) -> None:
    _flush_all(aside)
    doomed = [hide(final)] if final.exists() else []
    aside.rename(final)
    _flush(final.parent)  # the name, too, before the one before it may go
    others = [folder for folder in checkpoints(final.parent) if folder != final]
    doomed += [hide(old) for old in others[: max(0, len(others) + 1 - limit)]] if limit else []
    for folder in doomed:
        shutil.rmtree(folder)


def hide(folder: Path) -> Path:
    """Takes a checkpoint's name away, since a half-removed one must not look like a whole one."""
    return folder.rename(folder.with_name(f".incomplete-{folder.name}-removed"))


def _name(what: str, accelerator: Accelerator) -> str:
    """File of what each process keeps for itself."""
    return f"{what}_{accelerator.process_index}.json"


def save_final_model(accelerator: Accelerator, model, output_dir: Path, *, wrapped=None, average=None) -> None:
    """The model of a finished run, in `output_dir` itself: written aside, then put there, `config.json` last.

    All processes call it.

    Raises:
        UserError: it cannot be written.
    """
    with _written_aside(accelerator, output_dir / "model") as aside:
        save_model(accelerator, model, aside, wrapped=wrapped, average=average)
        if accelerator.is_main_process:
            _flush_all(aside)
            for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(output_dir / file.name)
            _flush(output_dir)
            aside.rmdir()
    accelerator.wait_for_everyone()


def save_model(accelerator: Accelerator, model, folder: Path, *, wrapped=None, average=None) -> None:
    """The unwrapped model (its moving average where there is one) as safetensors + config.json.

    All processes call it; the main one writes.
    """
    with average.applied_to(model) if average is not None else nullcontext():
        weights = whole_weights(accelerator, model, wrapped)
        if accelerator.is_main_process:
            with without_loading_bars():
                model.save_pretrained(folder, state_dict=weights)


DAMAGED = (OSError, RuntimeError, LookupError, ValueError, TypeError, EOFError)
DAMAGED += (pickle.PickleError, SafetensorError, CheckpointException)  # the last of FSDP2's sharded files


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the first of the processes that torch's sharded files tell of; other errors as they are."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    return f"{type(cause).__name__}: {cause}".splitlines()[0][:160]


def load_checkpoint(accelerator: Accelerator, folder: Path, average=None, model=None) -> TrainState:
    """Brings everything back that `save_checkpoint` wrote; what another number of processes cannot keep is said.

    Args:
        model: where the checkpoint has no weight average, it begins anew from this model, freshly loaded.

    Raises:
        UserError: the folder is damaged, or holds weights only.
    """
    content = read_json(folder / "metadata.json")
    try:
        state = TrainState(int(content["global_step"]))
        before = content.get("num_processes", 1)
        same = before == accelerator.num_processes
        if same:  # accelerate skips random states that it cannot read
            load(folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
        with nullcontext(folder) if same else readable_by_any_number(accelerator, folder) as readable:
            accelerator.load_state(str(readable))
        if same:
            streams = json.loads((folder / _name("streams", accelerator)).read_text())
            state.streams = {name: StreamState(**stream) for name, stream in streams.items()}
            state.counts = json.loads((folder / _name("counts", accelerator)).read_text())
        else:
            accelerator.print(
                f"{folder} was written by {before} processes, now there are {accelerator.num_processes}: weights, "
                "optimiser and schedule are kept; data, running means and the counts of NaN batches and skipped "
                "samples begin anew, and random numbers differ"
            )
        if average is not None and (folder / "average.pt").is_file():
            average.load_state_dict(torch.load(folder / "average.pt", map_location="cpu", weights_only=True))
        elif average is not None and model is not None:
            average.restart(model)
    except DAMAGED as error:
        raise UserError(f"{folder} cannot be continued from ({_reason(error)}); remove or replace it") from error
    return state


def _settings(tree: dict) -> dict:
    """Every dotted key with its value; the parameters of the mask schedule, whose names are free, are one value."""
    params = tree.get("mask_schedule", {}).pop("params", {})
    return dict(leaves(tree)) | {"mask_schedule.params": params}


def check_same_config(folder: Path, config) -> None:
    """A continued run must be the run it was.

    Raises:
        UserError: settings that change what is learned differ from the checkpoint's; lists them.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return
    before, now = (_settings(OmegaConf.to_container(c)) for c in (OmegaConf.load(file), config))
    changed = [
        f"{key} {before.get(key, 'unset')} → {now[key]}"
        for key in sorted(now)
        if key in before and before[key] != now[key] and not FREE_KEYS.match(key)
    ]
    if changed:
        raise UserError(
            f"the configuration differs from that of {folder}: {'; '.join(changed)}. Take the changes back, choose "
            "another output_dir (with experiment.init_from to keep the weights), or allow them with "
            "experiment.accept_config_changes=true"
        )
