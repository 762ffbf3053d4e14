"""Checkpoints of a run: written completely or not at all, with everything needed to resume exactly (spec §12)."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, load
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from common.config import leaves, read_yaml
from common.errors import UserError
from common.files import field as member
from common.files import read_json, write_bytes, write_json
from common.settings import free_keys
from common.tracking import read_lines
from models.adapters import ADAPTER_FILES, check_base, save_adapter
from models.adapters import CONFIG as ADAPTER_CONFIG
from models.checkpoint_io import check_finite, check_state_dict, has_adapter, load_weights_file, quietly
from training.data.streams import StreamState
from training.optimization import decay_steps, trained
from training.processes import executing_nothing, full_state_dict, local, universal_checkpoint

COURSE = ".course.json"  # in the output folder while a run begins, see `begin_course`
MOST_STEPS = 10**12  # of a run
FINAL_MODEL = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors")
FINAL_MODEL += ("model.safetensors.index.json", *ADAPTER_FILES)
TRAINED = "trained.safetensors"  # in a checkpoint of an adapter, instead of all weights

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
# torch reports a full disk as a RuntimeError with one of these texts; other RuntimeErrors have other causes.
TORCH_CANNOT_WRITE = re.compile(r"inline_container|PytorchStreamWriter|write failed")


@dataclass
class TrainState:
    """Progress of a run, besides weights, optimiser, schedule and random states.

    Args:
        global_step: optimiser steps taken.
        streams: how far this process has read each flow.
        counts: this process's counters for the next log line, as JSON.
    """

    global_step: int = 0
    streams: dict[str, StreamState] = field(default_factory=dict)
    counts: dict = field(default_factory=dict)


@dataclass
class Start:
    """The checkpoint that a run resumes from.

    Args:
        folder: of the checkpoint.
        step: optimiser steps taken.
        written_by: number of processes that wrote it.
        weights: folder of the weights, if only they are loaded (from the previous stage, or from a checkpoint of the
            published code); None: the full state is restored.
    """

    folder: Path
    step: int
    weights: Path | None = None
    written_by: int | None = None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of the run's course, oldest first. Incomplete ones have other names."""
    leaving = _read_course(Path(output_dir)).get("leaving", [])
    return [folder for folder in _checkpoint_folders(Path(output_dir)) if folder.name not in leaving]


def _checkpoint_folders(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _read_course(output_dir: Path) -> dict:
    file = output_dir / COURSE
    if not file.exists():
        return {}
    course, where = read_json(file), str(file)
    leaving, to = member(course, "leaving", list, where), member(course, "to", str, where)
    if not re.fullmatch(r"abandoned-\d+", to) or not isinstance(course.get("start"), str | None):
        raise UserError(f"{file} is damaged; remove it")
    return course | {"leaving": leaving}


def find_resume(output_dir: str | Path, setting: str | bool | None) -> Path | None:
    """The checkpoint that `experiment.resume_from_checkpoint` means: ``latest``, a folder, or none.

    ``latest`` is the newest checkpoint of the run's course, see `begin_course`.

    Raises:
        UserError: a named checkpoint does not exist.
    """
    if not setting:
        return None
    if setting in ("latest", True):
        if found := checkpoints(output_dir):
            return found[-1]
        start = _read_course(Path(output_dir)).get("start")
        return Path(output_dir) / start if start else None
    for folder in (Path(setting), Path(output_dir) / str(setting)):
        if folder.is_dir():
            return folder
    raise UserError(f"experiment.resume_from_checkpoint is {setting!r}: no such folder; give one, or latest, or false")


def find_start(output_dir: str | Path, setting: str | bool | None) -> Start | None:
    """The checkpoint that a run resumes from, if any.

    Only the weights are loaded from a folder named `checkpoint-0`, which is a copy of the previous stage's last
    checkpoint (spec §12), and from a checkpoint of the published code, which contains nothing else.

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
    step, written_by = metadata.get("global_step"), metadata.get("num_processes")
    if type(step) is not int or not 0 <= step <= MOST_STEPS or not (written_by is None or type(written_by) is int):
        raise UserError(
            f"{folder / 'metadata.json'} has no global_step; the checkpoint is damaged: remove or replace it"
        )
    if written_by is not None:  # ours; the published code writes the step alone
        return Start(folder, step, written_by=written_by)
    if not weights.is_dir():
        raise UserError(f"{folder} is incomplete (it holds no unwrapped_model); remove it or copy it again")
    return Start(folder, step, weights)


def begin_course(accelerator: Accelerator, output_dir: Path, start: Start | None) -> None:
    """Makes the run's course begin at `start`; sets aside in `abandoned-{n}/` what does not lead there.

    All processes must call this when the main process holds the folder's lock, before the first step.

    **The rule.** A folder holds one course: its checkpoints lead to one another, and ``latest`` is the newest. Where a
    run starts decides which of them stay: up to the start, if it is one of them; none, if the run starts anew or from
    a checkpoint elsewhere. The others are moved, whole, with the lines of `metrics.jsonl` and the images of their
    steps and the final model. A run that returns to ``abandoned-{n}/checkpoint-{step}`` gets its lines back, too.

    **At every moment.** The start takes effect when `.course.json` is written, at once and before anything is moved.
    The file lists what is `leaving`, which `checkpoints` ignores from then on, and the folder that it goes `to`: the
    next start, whichever it is, goes on from there. A `start` elsewhere is what ``latest`` means until the course has
    a checkpoint of its own; then, or else when all has been moved, the file goes.
    """
    if accelerator.is_main_process:
        _set_aside(output_dir, start)
    accelerator.wait_for_everyone()


def _set_aside(output_dir: Path, start: Start | None) -> None:
    before, present = _read_course(output_dir), _checkpoint_folders(output_dir)
    own = start is not None and start.folder.resolve() in [folder.resolve() for folder in present]
    elsewhere = start is not None and not own
    last = _number(start.folder) if own else -1  # up to which step everything stays
    leaving = [folder.name for folder in present if _number(folder) > last]
    unfinished = bool(before.get("leaving"))
    if leaving or unfinished or (not own and (output_dir / "metrics.jsonl").exists()):  # else no run wrote the model
        leaving += [file.name for pattern in FINAL_MODEL for file in output_dir.glob(pattern)]
    if leaving or unfinished:
        images = sorted((output_dir / "images").glob("*-" + "[0-9]" * 8 + ".png"))
        leaving += [f"images/{file.name}" for file in images if int(file.stem[-8:]) > last]
    if not (leaving or before or elsewhere):
        return
    numbers = [int(name) for f in output_dir.glob("abandoned-*") if (name := f.name.split("-")[1]).isdecimal()]
    to = before["to"] if unfinished else f"abandoned-{max(numbers, default=0) + 1}"
    course = {"start": _path_from(output_dir, start.folder) if elsewhere else None, "leaving": leaving, "to": to}
    write_json(output_dir / COURSE, course, flush=True)
    _flush(output_dir)
    for name in leaving:
        (output_dir / to / name).parent.mkdir(parents=True, exist_ok=True)
        (output_dir / name).rename(output_dir / to / name)
    _divide_metrics(output_dir, output_dir / to, last, start if elsewhere else None)
    if elsewhere:
        write_json(output_dir / COURSE, course | {"leaving": []}, flush=True)
    else:
        (output_dir / COURSE).unlink()
    if leaving or unfinished:
        _describe_abandoned(output_dir / to)


def _path_from(output_dir: Path, folder: Path) -> str:
    """Relative if it is inside, so that the run may be moved as a whole."""
    folder, output_dir = folder.resolve(), output_dir.resolve()
    return str(folder.relative_to(output_dir) if folder.is_relative_to(output_dir) else folder)


def _divide_metrics(output_dir: Path, abandoned: Path, last: int, elsewhere: Start | None) -> None:
    """Leaves the lines of the course in `metrics.jsonl`; those of other checkpoints go to `abandoned`, if it exists."""
    returning: list[tuple[float, bytes]] = []
    if elsewhere and elsewhere.folder.resolve().parent.parent == output_dir.resolve():  # in abandoned-{n}/
        lines = read_lines(elsewhere.folder.parent / "metrics.jsonl")
        returning = [(step, line) for step, line in lines if step <= elsewhere.step]
        last = min((int(step) for step, _ in returning), default=0) - 1
    lines = read_lines(output_dir / "metrics.jsonl")
    kept = [line for step, line in lines if step <= last] + [line for _, line in returning]
    if abandoned.is_dir():
        there = [line for _, line in read_lines(abandoned / "metrics.jsonl")]
        known = {*kept, *there}
        there += [line for step, line in lines if step < float("inf") and line not in known]
        write_bytes(abandoned / "metrics.jsonl", b"".join(there), flush=True)
    if lines or kept:
        write_bytes(output_dir / "metrics.jsonl", b"".join(kept), flush=True)


def _describe_abandoned(folder: Path) -> None:
    if found := _checkpoint_folders(folder):
        what = f"{len(found)} checkpoint{'s' * (len(found) > 1)} up to {found[-1].name}"
        back = f"experiment.resume_from_checkpoint={folder.name}/{found[-1].name}"
    else:
        what, back = "the final model of an earlier run", f"experiment.init_from={folder}"
    print(f"{what} set aside in {folder}, since this run does not continue from there; to return: {back}")


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
    """Writes ``checkpoint-{step}`` under a temporary name and renames it; then removes the oldest beyond `limit`.

    It contains accelerate's full state (model, optimiser, schedule, random states), the weight average, the data
    position of every process, the configuration, and `unwrapped_model/`, which can be loaded on its own. All processes
    must call this.

    Args:
        model, wrapped: the plain model, and the wrapper that is trained (itself, DDP, DeepSpeed engine, …).

    Raises:
        UserError: it cannot be written, for example because the disk is full. Earlier checkpoints are kept.
    """
    final = output_dir / f"checkpoint-{state.global_step}"
    with _temporary_folder(accelerator, final) as temporary:
        accelerator.save_state(str(temporary))
        streams = {name: asdict(stream) for name, stream in state.streams.items()}
        (temporary / _process_file("streams", accelerator)).write_text(json.dumps(streams))
        (temporary / _process_file("counts", accelerator)).write_text(json.dumps(state.counts))
        save_model(accelerator, model, temporary / "unwrapped_model", wrapped=wrapped, average=average)
        average_state = average.state_dict() if average is not None else None
        accelerator.wait_for_everyone()  # the others write their states into it
        if accelerator.is_main_process:
            if average_state is not None:
                torch.save(average_state, temporary / "average.pt")
            if config is not None:
                OmegaConf.save(config, temporary / "config.yaml")
            metadata = {"global_step": state.global_step, "num_processes": accelerator.num_processes}
            (temporary / "metadata.json").write_text(json.dumps(metadata))
            _publish(temporary, final, limit)
    accelerator.wait_for_everyone()
    return final


@contextmanager
def _temporary_folder(accelerator: Accelerator, final: Path) -> Iterator[Path]:
    """The path of a temporary folder for the content of `final`; removed if that cannot be written.

    Earlier incomplete folders are removed first.
    """
    temporary = final.with_name(f".incomplete-{final.name}")
    with disk_errors_as_user_errors(final.parent):
        if accelerator.is_main_process:
            for incomplete in final.parent.glob(".incomplete-*"):
                shutil.rmtree(incomplete)
        accelerator.wait_for_everyone()
        try:
            yield temporary
        except (Exception, CheckpointException):
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def disk_errors_as_user_errors(output_dir: Path) -> Iterator[None]:
    """Ends the run with one line, which names the last good checkpoint, when a write finds the disk full or gone."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        cause = _cause(error)
        is_of_disk = cause.errno in DISK_ERRORS if isinstance(cause, OSError) else isinstance(cause, SafetensorError)
        if not is_of_disk and not TORCH_CANNOT_WRITE.search(str(cause)):
            raise
        raise UserError(
            f"experiment.output_dir {output_dir} cannot be written to ({_reason(error)}); "
            f"{describe_last_checkpoint(output_dir)}. Make room on the disk, or mend it, and start again"
        ) from error


def describe_last_checkpoint(output_dir: Path) -> str:
    """The newest checkpoint, for an error message."""
    kept = checkpoints(output_dir)
    return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"


def _flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    """Flushes a folder and all its files, before it is renamed."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _publish(temporary: Path, final: Path, limit: int | None) -> None:
    _flush_all(temporary)
    doomed = [hide(final)] if final.exists() else []
    temporary.rename(final)
    _flush(final.parent)  # the new name must be on the disk before an old checkpoint is removed
    (final.parent / COURSE).unlink(missing_ok=True)  # the course has a checkpoint of its own, see `begin_course`
    # The user has put checkpoint-0 there, see `find_start`.
    others = [folder for folder in checkpoints(final.parent) if folder not in (final, final.parent / "checkpoint-0")]
    doomed += [hide(old) for old in others[: max(0, len(others) + 1 - limit)]] if limit else []
    for folder in doomed:
        shutil.rmtree(folder)


def hide(folder: Path) -> Path:
    """Renames a checkpoint before it is removed, so that a partly removed one is not mistaken for a complete one."""
    return folder.rename(folder.with_name(f".incomplete-{folder.name}-removed"))


def _process_file(kind: str, accelerator: Accelerator) -> str:
    """Name of a file that each process writes for itself."""
    return f"{kind}_{accelerator.process_index}.json"


def save_final_model(accelerator: Accelerator, model, output_dir: Path, *, wrapped=None, average=None) -> None:
    """Saves the model of a finished run in `output_dir` itself. All processes must call this.

    Files are written to a temporary folder and then moved, `config.json` (of an adapter its own) last.

    Raises:
        UserError: it cannot be written.
    """
    with _temporary_folder(accelerator, output_dir / "model") as temporary:
        save_model(accelerator, model, temporary, wrapped=wrapped, average=average)
        if accelerator.is_main_process:
            _flush_all(temporary)
            for file in sorted(temporary.iterdir(), key=lambda file: file.name in ("config.json", ADAPTER_CONFIG)):
                file.replace(output_dir / file.name)
            _flush(output_dir)
            temporary.rmdir()
    accelerator.wait_for_everyone()


def save_model(accelerator: Accelerator, model, folder: Path, *, wrapped=None, average=None) -> None:
    """Saves the unwrapped model, or its moving average if there is one, as safetensors and config.json.

    Of a model with an adapter it is the adapter alone. All processes must call this; the main one writes.
    """
    with average.applied_to(model) if average is not None else nullcontext():
        weights = full_state_dict(accelerator, model, wrapped)
        if accelerator.is_main_process and has_adapter(model):
            save_adapter(model, folder, weights)
        elif accelerator.is_main_process:
            with quietly():
                model.save_pretrained(folder, state_dict=weights)


def save_trained_only(accelerator: Accelerator, model) -> None:
    """Lets checkpoints hold the trained weights of a model with an adapter, not the frozen ones, which all share.

    Args:
        model: the plain one, on one process or below DDP.
    """

    def save(models: list, weights: list, folder: str) -> None:
        weights.clear()  # accelerate writes what is left of them
        if accelerator.is_main_process:
            save_file({name: p.detach().contiguous() for name, p in trained(model).items()}, Path(folder) / TRAINED)

    def load(models: list, folder: str) -> None:
        models.clear()
        check_base(model, Path(folder) / "unwrapped_model")
        stored, parameters = load_weights_file(Path(folder) / TRAINED), trained(model)
        check_state_dict(str(Path(folder) / TRAINED), parameters, stored)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _cause(error: BaseException) -> BaseException:
    """The first process's error inside a `CheckpointException` (of sharded files); other errors are returned as is."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    if "Weights only load failed" in str(cause):  # torch's text goes on with how to execute it all the same
        return "a file is damaged, or holds more than tensors and was not executed"
    return f"{type(cause).__name__}: {cause}".splitlines()[0][:160]


@contextmanager
def damage_as_user_error(folder: Path) -> Iterator[None]:
    """Raises `UserError` where the content of a checkpoint is not what a run writes."""
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # damaged files raise a dozen unrelated classes
        raise UserError(f"{folder} cannot be continued from ({_reason(error)}); remove or replace it") from error


def load_checkpoint(accelerator: Accelerator, folder: Path, average=None, model=None) -> TrainState:
    """Restores everything that `save_checkpoint` wrote, and prints what is lost if the number of processes changed.

    Nothing in the files is executed.

    Args:
        model: if the checkpoint has no weight average, the average restarts from this model's loaded weights.

    Raises:
        UserError: the folder is damaged or contains weights only.
    """
    content = read_json(folder / "metadata.json")
    with damage_as_user_error(folder):
        state = TrainState(int(content["global_step"]))
        before = content.get("num_processes", 1)
        same = before == accelerator.num_processes
        with executing_nothing(folder):
            if same:  # accelerate skips random states that it cannot read
                load(folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
            with nullcontext(folder) if same else universal_checkpoint(accelerator, folder) as readable:
                accelerator.load_state(str(readable))
        if same:
            streams = read_json(folder / _process_file("streams", accelerator))
            state.streams = {name: _read_stream(stream) for name, stream in streams.items()}
            state.counts = read_json(folder / _process_file("counts", accelerator))
            _check_counts("nonfinite_batches", [state.counts.get("nonfinite_batches", 0)])
        else:
            accelerator.print(
                f"{folder} was written by {before} processes, now there are {accelerator.num_processes}: weights, "
                "optimiser and schedule are kept; data, running means and the counts of NaN batches and skipped "
                "samples start again, and random numbers differ"
            )
        if average is not None and (folder / "average.pt").is_file():
            average.load_state_dict(torch.load(folder / "average.pt", map_location="cpu", weights_only=True))
        elif average is not None and model is not None:
            average.restart(model)
    return state


def _read_stream(content: dict) -> StreamState:
    """The position of a flow; `ValueError` if it holds anything but counts."""
    state = StreamState.from_dict(content)
    for name, value in vars(state).items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if name == "deferred":
            items = [number for kinds in value for number in kinds.values()]
        if type(value) is not type(getattr(StreamState(), name)):
            raise ValueError(f"{name} of a flow's position is {str(value)[:60]}")
        _check_counts(f"{name} of a flow's position", items)
    if {len(state.chunks), len(state.deferred)} - {0, len(state.positions)}:
        raise ValueError(f"a flow has {len(state.positions)} positions, but {len(state.chunks)} chunks")
    return state


def _check_counts(name: str, counts: Iterable) -> None:
    for count in counts:
        if type(count) is not int or not 0 <= count < 2**62:
            raise ValueError(f"{name} is {str(count)[:60]}")


def check_restored(folder: Path, model, optimizer, schedule, average=None) -> None:
    """Checks that a run can train on what it has loaded from a checkpoint.

    Raises:
        ValueError: the optimiser or the schedule is not this model's.
        UserError: weights are not finite.
    """
    for value in (schedule.last_epoch, *schedule.base_lrs):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"the schedule of the learning rate holds {value!r}")
    for parameter, moments in getattr(optimizer, "state", {}).items():
        for name, moment in moments.items():
            of_blocks = name.startswith(("qmap", "absmax"))  # what 8-bit moments are scaled by
            if torch.is_tensor(moment) and not of_blocks and moment.shape not in (parameter.shape, ()):
                raise ValueError(f"{name} of the optimiser has shape {tuple(moment.shape)}")
    averaged = average.shadow if average is not None else {}
    for tensors in (dict(model.named_parameters()), averaged):
        check_finite(folder, {name: local(tensor.detach()) for name, tensor in tensors.items()})


def _settings(tree: dict) -> dict:
    """Every dotted key with its value. `mask_schedule.params`, which may have any keys, is a single value."""
    params = tree.get("mask_schedule", {}).pop("params", {})
    return dict(leaves(tree)) | {"mask_schedule.params": params}


def _config_of(folder: Path) -> dict | None:
    """The configuration of the run that wrote a checkpoint, if it is there."""
    file = folder / "config.yaml"
    return read_yaml(file, str(file)) if file.exists() else None


def check_same_config(folder: Path, config) -> None:
    """Compares the configuration with that of the checkpoint to resume from, except for its `free_keys`.

    Args:
        config: as `load_config` returns it.

    Raises:
        UserError: settings that affect training differ; the message lists them.
    """
    if (tree := _config_of(folder)) is None:
        return
    free = free_keys(OmegaConf.get_type(config))
    now = _settings(OmegaConf.to_container(config))
    with damage_as_user_error(folder / "config.yaml"):
        before = _settings(tree)
    changed = [
        f"{key} {before.get(key, 'unset')} → {now[key]}"
        for key in sorted(now)
        if key in before and before[key] != now[key] and key not in free
    ]
    if changed:
        raise UserError(
            f"the configuration differs from that of {folder}: {'; '.join(changed)}. Undo the changes, choose "
            "another output_dir (with experiment.init_from to keep the weights), or allow them with "
            "experiment.accept_config_changes=true"
        )


def describe_decay(folder: Path, config) -> str | None:
    """One line about the learning rate if the run to resume now has another number of steps; else None."""
    tree = _config_of(folder)
    if tree is None or config.lr_scheduler.scheduler.startswith("constant"):
        return None
    before = OmegaConf.create(tree)
    old, new = decay_steps(before), decay_steps(config)
    if before.training.max_train_steps == config.training.max_train_steps and old == new:
        return None
    steps = f"training.max_train_steps {before.training.max_train_steps} → {config.training.max_train_steps}"
    if old == new:
        return f"{steps}: the learning rate still decays over {new} steps and stays at its last value after them"
    keep = f"lr_scheduler.params.num_training_steps={old}"
    return f"{steps}: the learning rate now decays over {new} steps, not {old}; {keep} keeps the old schedule"


def describe_images(folder: Path, config) -> str | None:
    """One line if the run to resume began when transparent and deep images were read otherwise; else None."""
    tree = _config_of(folder)
    if tree is None or "image" not in config or "background" in (tree.get("image") or ()):
        return None
    return (
        f"the run began before image.background: transparent images are now seen on {config.image.background}, and "
        "those of 16 bits with their greys; image.background=null keeps the hidden colours of transparent ones"
    )
