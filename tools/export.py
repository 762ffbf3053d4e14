"""Writes a trained Showo or MAGVITv2 as a folder to share: safetensors in the wanted precision and a config.json.

    python3 tools/export.py from=outputs/showo-tiny/checkpoint-1000/unwrapped_model \\
        to=checkpoints/showo-tiny/showo dtype=bf16

The new folder is whole or absent. Where `to` is a checkpoint already, its weights are replaced and other files
(a model card) stay. No path of this machine is written.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run
    import common  # noqa: F401  Ctrl-C is one word from here on

import torch

from common.config import read_settings
from common.errors import UserError, run_cli
from common.files import REPOSITORY, read_json, resolve_path
from common.settings import setting
from models import MAGVITv2, Showo
from models.checkpoint_io import INDEX_NAMES, resolve_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES = {"Showo": Showo, "showo": Showo, "MAGVITv2": MAGVITv2, "magvitv2": MAGVITv2}
WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass
class ExportConfig:
    from_: str = setting("???", "folder of a trained Showo or MAGVITv2")
    to: str = setting("???", "the folder to write")
    dtype: str = setting("bf16", "precision of the weights", choices=tuple(DTYPES))


def load(folder: Path, dtype: torch.dtype) -> Showo | MAGVITv2:
    """The model of a folder, of whichever class its config.json names."""
    content = read_json(folder / "config.json")
    kind = content.get("_class_name") or content.get("model_type")
    if kind not in CLASSES:
        raise UserError(f"{folder} holds a {kind!r} checkpoint; only Showo and MAGVITv2 can be exported")
    model = CLASSES[kind].from_pretrained(str(folder), dtype=dtype)
    path = getattr(model.config, "llm_model_path", None)
    if path and Path(path).is_absolute():
        model.config.llm_model_path = portable(Path(path))
    return model


def portable(path: Path) -> str:
    """An absolute path as others can read it: from the repository, or its last part only."""
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name


def replace_folder(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`, taking along the files there that are no weights."""
    if not folder.exists():
        new.rename(folder)
        return
    for file in folder.iterdir():
        if file.suffix not in WEIGHT_SUFFIXES and file.name not in (*INDEX_NAMES, "config.json"):
            copy = shutil.copytree if file.is_dir() else shutil.copy2
            copy(file, new / file.name)
    old = folder.rename(folder.with_name(f".{folder.name}.old"))
    new.rename(folder)
    shutil.rmtree(old)


def export(source: str, target: str, dtype: str) -> str:
    """Writes the folder; returns a one-line summary.

    Raises:
        UserError: `source` is no checkpoint, or `target` is something else than a checkpoint or a new folder.
    """
    folder = Path(target)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise UserError(f"to={target} exists and is no checkpoint folder; give a new one")
    model = load(resolve_folder(resolve_path(source)), DTYPES[dtype])
    temporary = folder.with_name(f".{folder.name}.new")
    for left_over in (temporary, folder.with_name(f".{folder.name}.old")):
        shutil.rmtree(left_over, ignore_errors=True)
    model.save_pretrained(temporary)
    files = list(temporary.iterdir())
    for file in files:
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in files)
    replace_folder(temporary, folder)
    return f"{target}: {type(model).__name__}, {model.num_parameters():,} parameters, {dtype}, {size / 1e6:.1f} MB"


def main(argv: list[str]) -> None:
    config = read_settings(argv, ExportConfig, "from=outputs/run/checkpoint-1000/unwrapped_model to=checkpoints/mine")
    print(export(config.from_, config.to, config.dtype))


if __name__ == "__main__":
    run_cli(main)
