"""Settings of `training/train_magvitv2.py`: every key, its type and its default."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig

from common.schema import WandbSection, out_of_range


@dataclass
class Experiment:
    project: str = "tokenizer"
    name: str = "magvitv2"
    output_dir: str = "outputs/magvitv2"
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 1000
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = "latest"  # "latest", a folder, or null to start again
    log_grad_norm_every: int = 500
    generate_every: int = 500  # sample images
    eval_batches: int = 16
    accept_config_changes: bool = False
    num_sheet_pictures: int = 24


@dataclass
class Model:
    """Fields of `MAGVITv2Config`; `pretrained_model_path` starts from a folder instead and ignores them."""

    pretrained_model_path: str | None = None
    ch: int = 128
    encoder_ch_mult: list[int] = field(default_factory=lambda: [1, 2, 2, 4, 4])
    decoder_ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    encoder_num_res_blocks: list[int] = field(default_factory=lambda: [4, 3, 4, 3, 4])
    decoder_num_res_blocks: list[int] = field(default_factory=lambda: [4, 4, 3, 4, 3])
    code_bits: int = 13
    num_groups: int = 32
    stem_patch_size: int = 1
    encoder_mid: bool = True
    decoder_mid: bool = True


@dataclass
class DatasetParams:
    train_shards: Any = None  # a path, a brace list or a pattern with `*`, or a list of such
    eval_shards: Any = None
    resolution: int = 256
    image_column: str | None = None
    text_column: str | None = None
    max_skipped_fraction: float = 0.1
    pin_memory: bool = True
    persistent_workers: bool = True
    shuffle_buffer_size: int = 1000
    num_workers: int = 4
    random_flip: bool = True
    max_shift: int = 0  # pixels; the border is repeated


@dataclass
class Dataset:
    params: DatasetParams = field(default_factory=DatasetParams)


@dataclass
class Losses:
    """Weights. Entropies are in nats, summed over the bits of a code."""

    l1: float = 1.0
    mse: float = 0.0
    edge: float = 0.5
    perceptual: float = 0.0
    commit: float = 0.1
    sample_entropy: float = 0.02
    codebook_entropy: float = 0.03
    entropy_group_bits: int = 7


@dataclass
class OptimizerParams:
    learning_rate: float = 1e-4
    scale_lr: bool = False
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    epsilon: float = 1e-8


@dataclass
class Optimizer:
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class SchedulerParams:
    warmup_steps: int = 100
    num_training_steps: int | None = None  # over which the rate decays; null: training.max_train_steps


@dataclass
class Scheduler:
    scheduler: str = "cosine"
    params: SchedulerParams = field(default_factory=SchedulerParams)


@dataclass
class Training:
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    overfit_one_batch: bool = False
    max_nonfinite_batches: int | None = 10
    max_train_steps: int = 100_000
    mixed_precision: str = "bf16"  # "no", "fp16" or "bf16"
    max_grad_norm: float | None = 1.0
    ema_decay: float = 0.999
    enable_tf32: bool = True
    seed: int = 10086


RANGES = {  # beside those of common/schema.py
    "training.max_train_steps": (1, math.inf),
    "dataset.params.resolution": (1, math.inf),
    "dataset.params.max_shift": (0, math.inf),
    **{f"losses.{item.name}": (0, math.inf) for item in fields(Losses)},
    "losses.entropy_group_bits": (1, math.inf),
    "experiment.num_sheet_pictures": (1, math.inf),
}


@dataclass
class TokenizerTrainingConfig:
    task: str = "tokenizer"
    device: str | None = None
    compile: bool = False
    wandb: WandbSection = field(default_factory=WandbSection)
    experiment: Experiment = field(default_factory=Experiment)
    model: Model = field(default_factory=Model)
    dataset: Dataset = field(default_factory=Dataset)
    losses: Losses = field(default_factory=Losses)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: Scheduler = field(default_factory=Scheduler)
    training: Training = field(default_factory=Training)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        """What is wrong with a complete config, one text each."""
        found = out_of_range(config, RANGES)
        for key in ("train_shards", "eval_shards"):
            if not config.dataset.params[key]:
                found.append(f"dataset.params.{key} is not given; name the WebDataset shards, as in 'data/train-*.tar'")
        if config.training.ema_decay == 1:
            found.append("training.ema_decay is 1; it must be less, or the average stays where it began")
        return found
