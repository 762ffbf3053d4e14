"""Train an image tokenizer (MAGVIT-v2, spec §10) on images from WebDataset shards.

    python3 training/train_magvitv2.py config=configs/showo_tiny_magvitv2.yaml
    accelerate launch --config_file accelerate_configs/1_gpu.yaml --quiet training/train_magvitv2.py config=...

`{output_dir}/checkpoint-{step}/` holds all that an exact resume needs, and in `unwrapped_model/` the averaged weights,
loadable by `MAGVITv2.from_pretrained`; the final ones are written to `output_dir`. SIGTERM, SIGUSR1 and Ctrl-C
finish the step, save and end; the same command then goes on from there.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.config import load_config
from common.errors import run_cli
from training.tokenizer_config import TokenizerTrainingConfig


def main(argv: list[str]) -> None:
    config = load_config(argv, TokenizerTrainingConfig)
    from training.tokenizer_trainer import TokenizerTrainer  # after the config: its mistakes are told at once

    TokenizerTrainer(config).train()


if __name__ == "__main__":
    run_cli(main)
