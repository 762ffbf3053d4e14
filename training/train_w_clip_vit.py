"""Trains Show-o with understanding from CLIP-ViT features.

accelerate launch --config_file accelerate_configs/1_gpu.yaml --quiet training/train_w_clip_vit.py \\
    config=configs/showo_instruction_tuning_1_w_clip_vit.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

from common.config import TrainingConfig, load_config  # noqa: E402
from common.errors import run_cli  # noqa: E402
from training.trainer import Trainer  # noqa: E402
from training.understanding import ClipVitUnderstanding  # noqa: E402


def main(argv: list[str]) -> None:
    config = load_config(argv, TrainingConfig)
    Trainer(config, ClipVitUnderstanding(config)).train()


if __name__ == "__main__":
    run_cli(main)
