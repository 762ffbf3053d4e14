"""Trains Show-o with understanding from CLIP-ViT features; the same as `train.py`, which takes them too.

accelerate launch --config_file accelerate_configs/1_gpu.yaml --quiet training/train_w_clip_vit.py \\
    config=configs/showo_instruction_tuning_1_w_clip_vit.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

from common.errors import UserError, run_cli
from training.train import make_task, train


def main(argv: list[str]) -> None:
    task = make_task(argv, "showo")
    if not task.config.model.showo.w_clip_vit:
        raise UserError("model.showo.w_clip_vit is false; set it to true, or train with training/train.py")
    train(task)


if __name__ == "__main__":
    run_cli(main)
