"""Checkpoints of a run: whole or absent, and everything that must survive a crash (SPEC §12)."""

import json
import pickle
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from common.errors import UserError
from models.checkpoint_io import read_json
from training.data.streams import StreamState


@dataclass
class TrainState:
    """Where a run stands, beside weights, optimiser, schedule and random states."""

    global_step: int = 0
    streams: dict[str, StreamState] = field(default_factory=dict)

    def to_json(self) -> dict:
        return {"global_step": self.global_step, "streams": {k: asdict(v) for k, v in self.streams.items()}}

    @classmethod
    def from_json(cls, content: dict) -> "TrainState":
        streams = {k: StreamState(**v) for k, v in content.get("streams", {}).items()}
        return cls(int(content["global_step"]), streams)


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


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, state: TrainState, *, model, average=None, limit=None
) -> Path:
    """Writes ``checkpoint-{step}`` aside, then renames it; afterwards removes the oldest beyond `limit`.

    It holds accelerate's full state (model, optimiser, schedule, random states), the weight average, the data position,
    and `unwrapped_model/`, which loads on its own. All processes call it.
    """
    final = output_dir / f"checkpoint-{state.global_step}"
    aside = output_dir / f".incomplete-{final.name}"
    if accelerator.is_main_process:
        for left_over in output_dir.glob(".incomplete-checkpoint-*"):
            shutil.rmtree(left_over)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()  # the others write their random states into it
    if accelerator.is_main_process:
        if average is not None:
            torch.save(average.state_dict(), aside / "average.pt")
        save_model(model, aside / "unwrapped_model", average)
        (aside / "metadata.json").write_text(json.dumps(state.to_json()))
        doomed = [hide(final)] if final.exists() else []
        aside.rename(final)
        others = [folder for folder in checkpoints(output_dir) if folder != final]
        doomed += [hide(old) for old in others[: max(0, len(others) + 1 - limit)]] if limit else []
        for folder in doomed:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    return final


def hide(folder: Path) -> Path:
    """Takes a checkpoint's name away, since a half-removed one must not look like a whole one."""
    return folder.rename(folder.with_name(f".incomplete-{folder.name}-removed"))


def save_model(model, folder: Path, average=None) -> None:
    """The unwrapped model (its moving average where there is one) as safetensors + config.json."""
    with average.applied_to(model) if average is not None else nullcontext():
        model.save_pretrained(folder)


DAMAGED = (OSError, RuntimeError, LookupError, ValueError, TypeError, EOFError, pickle.PickleError, SafetensorError)


def load_checkpoint(accelerator: Accelerator, folder: Path, average=None, model=None) -> TrainState:
    """Brings everything back that `save_checkpoint` wrote.

    Args:
        model: where the checkpoint has no weight average, it begins anew from this model, freshly loaded.

    Raises:
        UserError: the folder is damaged, or holds weights only.
    """
    content = read_json(folder / "metadata.json")
    try:
        state = TrainState.from_json(content)
        accelerator.load_state(str(folder))
        if average is not None and (folder / "average.pt").is_file():
            average.load_state_dict(torch.load(folder / "average.pt", map_location="cpu", weights_only=True))
        elif average is not None and model is not None:
            average.restart(model)
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(f"{folder} cannot be continued from ({reason}); remove or replace it") from error
    return state
