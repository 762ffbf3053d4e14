"""Trains Show-o, or whatever `task` names in the configuration (a module of training/tasks).

accelerate launch --config_file accelerate_configs/1_gpu.yaml --quiet training/train.py \\
    config=configs/showo_tiny_train.yaml
"""

import sys
from pathlib import Path
from pkgutil import resolve_name

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

from common.config import load_config, read_key
from common.errors import UserError, run_cli

# Found without torch, so that --help and mistakes are told at once; other tasks' settings are in their modules.
SETTINGS = {
    "showo": "common.schema:TrainingConfig",
    "tokenizer": "training.tokenizer_settings:TokenizerTrainingConfig",
    "reconstruction": "training.alignment_settings:ReconstructionConfig",
    "preference": "training.alignment_settings:PreferenceConfig",
    "policy": "training.alignment_settings:PolicyConfig",
    "distillation": "training.alignment_settings:DistillationConfig",
}


def make_task(argv: list[str], name: str | None = None):
    """The task of a command line.

    Args:
        name: of the task that the script is for; None: any.

    Raises:
        UserError: the key `task` names another one, or none that there is.
    """
    given = str(read_key(argv, "task") or name or "showo")
    if name and given != name:
        raise UserError(f"task is {given}, but this script trains {name}; take training/train.py")
    config = load_config(argv, resolve_name(SETTINGS[given])) if given in SETTINGS else None
    from training.tasks import find_task

    task = find_task(given)
    return task(config or load_config(argv, task.settings))


def train(task) -> None:
    from training.trainer import Trainer  # after the settings: their mistakes, and --help, are told at once

    Trainer(task).train()


def main(argv: list[str]) -> None:
    train(make_task(argv))


if __name__ == "__main__":
    run_cli(main)
