"""Trains Show-o with understanding from image codes.

accelerate launch --config_file accelerate_configs/1_gpu.yaml --quiet training/train.py \\
    config=configs/showo_tiny_train.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

from common.config import TrainingConfig, load_config  # noqa: E402
from common.errors import run_cli  # noqa: E402
from training.trainer import Trainer  # noqa: E402
from training.understanding import VqUnderstanding  # noqa: E402


def main(argv: list[str]) -> None:
    config = load_config(argv, TrainingConfig)
    Trainer(config, VqUnderstanding.of(config)).train()


if __name__ == "__main__":
    run_cli(main)
