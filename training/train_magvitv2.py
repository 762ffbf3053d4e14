"""Trains an image tokenizer (MAGVIT-v2, spec §10) on images from WebDataset shards or parquet files.

    python3 training/train_magvitv2.py config=configs/showo_tiny_magvitv2.yaml
    accelerate launch --config_file accelerate_configs/1_gpu.yaml --quiet training/train_magvitv2.py config=...

`{output_dir}/checkpoint-{step}/` holds all that an exact resume needs, and in `unwrapped_model/` the averaged weights,
loadable by `MAGVITv2.from_pretrained`; the final ones are written to `output_dir`.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, from whatever folder this is run

from common.errors import run_cli
from training.train import make_task, train


def main(argv: list[str]) -> None:
    train(make_task(argv, "tokenizer"))


if __name__ == "__main__":
    run_cli(main)
