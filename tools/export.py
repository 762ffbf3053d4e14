"""Writes a trained Showo or MAGVITv2 as a folder to share: safetensors in the wanted precision and a config.json.

    python3 tools/export.py from=outputs/showo-tiny/checkpoint-1000/unwrapped_model \\
        to=checkpoints/showo-tiny/showo dtype=bf16
    python3 tools/export.py from=checkpoints/showo-tiny/showo adapter=outputs/showo-tiny-lora to=outputs/merged

With `adapter` the model is written with that adapter merged into its weights. The new folder is whole or absent. Where
`to` is a checkpoint already, its weights are replaced and other files (a model card) stay. No path of this machine is
written.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run
    import common  # noqa: F401  Ctrl-C is one word from here on

import torch

from common.config import read_settings
from common.errors import UserError, run_cli
from common.files import expand, read_json, real_path
from common.settings import setting
from models import MAGVITv2, Showo
from models.adapters import load_adapter, merge_adapter
from models.checkpoint_io import portable, quietly, replacing
from models.loading import DTYPES, find_adapter, find_folder

CLASSES = {"Showo": Showo, "showo": Showo, "MAGVITv2": MAGVITv2, "magvitv2": MAGVITv2}


@dataclass
class ExportConfig:
    from_: str = setting("???", "folder of a trained Showo or MAGVITv2")
    to: str = setting("???", "the folder to write")
    adapter: str | None = setting(None, "adapter of a Showo, to be merged: a run's folder, its checkpoint or its own")
    dtype: str = setting("bf16", "precision of the weights", choices=tuple(DTYPES))


def kind_of(folder: Path) -> str:
    """What the folder's config.json says that it holds."""
    content = read_json(folder / "config.json")
    return str(content.get("_class_name") or content.get("model_type"))


def load(folder: Path, dtype: torch.dtype, adapter: str | None = None) -> Showo | MAGVITv2:
    """The model of a folder, of whichever class its config.json names, with an adapter in its weights."""
    if (kind := kind_of(folder)) not in CLASSES:
        raise UserError(f"{folder} holds a {kind!r} checkpoint; only Showo and MAGVITv2 can be exported")
    if adapter and CLASSES[kind] is not Showo:
        raise UserError(f"adapter={adapter} is for a Showo, but {folder} holds a {kind}; leave one of them out")
    model = CLASSES[kind].from_pretrained(str(folder), dtype=torch.float32 if adapter else dtype)
    if adapter:
        load_adapter(model, find_adapter(adapter))
        merge_adapter(model)
        model.to(dtype)
    if path := getattr(model.config, "llm_model_path", None):
        model.config.llm_model_path = portable(path)
    return model


def check_goal(goal: Path, source: Path) -> None:
    """Raises `UserError` if `goal` is anything but a new or empty folder, or another checkpoint of the same class."""
    if goal.is_symlink():
        raise UserError(f"to={goal} is a link, which would be replaced; give the folder that it leads to")
    if not goal.exists() or (goal.is_dir() and not any(goal.iterdir())):
        return
    same = (goal / "config.json").is_file() and CLASSES.get(kind_of(goal)) is CLASSES.get(kind_of(source))
    if not same:
        raise UserError(f"to={goal} exists and is no checkpoint folder of the same kind of model; give a new one")
    here, there = real_path(goal), real_path(source)
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise UserError(f"to={goal} and from={source} are one folder, or one is in the other; give a new one")


def export(source: str, target: str, dtype: str, adapter: str | None = None) -> str:
    """Writes the folder; returns a one-line summary.

    Raises:
        UserError: `source` is no checkpoint, or `target` is something else than a checkpoint or a new folder, or
            cannot be written.
    """
    folder, goal = find_folder(source), expand(target)
    check_goal(goal, folder)
    model = load(folder, DTYPES[dtype], adapter)
    with replacing(goal) as new:
        with quietly():
            model.save_pretrained(new)
        size = sum(file.stat().st_size for file in new.iterdir())
    return f"{target}: {type(model).__name__}, {model.num_parameters():,} parameters, {dtype}, {size / 1e6:.1f} MB"


def main(argv: list[str]) -> None:
    config = read_settings(argv, ExportConfig, "from=outputs/run/checkpoint-1000/unwrapped_model to=checkpoints/mine")
    print(export(config.from_, config.to, config.dtype, config.adapter))


if __name__ == "__main__":
    run_cli(main)
