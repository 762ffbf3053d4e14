"""Settings of `training/train_magvitv2.py`: those of every trained thing, and the tokenizer's own."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from common.schema import (
    PIXELS,
    ROWS,
    WEIGHT,
    LoaderParams,
    LoopSection,
    OptimizerParams,
    OptimizerSection,
    RunConfig,
    RunExperimentSection,
    SchedulerParams,
    SchedulerSection,
)
from common.settings import setting


@dataclass
class Experiment(RunExperimentSection):
    project: str = "tokenizer"
    name: str = "magvitv2"
    output_dir: str = "outputs/magvitv2"
    eval_every: int = 500
    save_every: int = 1000
    checkpoints_total_limit: int | None = 2
    num_sheet_pictures: int = setting(24, "held-out images in the panel", low=1, high=10**4, free=True)


@dataclass
class Model:
    """Fields of `MAGVITv2Config`; `pretrained_model_path` starts from a folder instead and ignores them."""

    pretrained_model_path: str | None = setting(None, "folder of a tokenizer to start from; its sizes are used")
    ch: int = setting(128, "channels of the first level", low=1, high=2**14)
    encoder_ch_mult: list[int] = setting([1, 2, 2, 4, 4], "channels of each level, as multiples of ch", low=1, high=256)
    decoder_ch_mult: list[int] = setting([1, 1, 2, 2, 4], "the same for the decoder", low=1, high=256)
    encoder_num_res_blocks: list[int] = setting([4, 3, 4, 3, 4], "residual blocks of each level", low=1, high=256)
    decoder_num_res_blocks: list[int] = setting([4, 4, 3, 4, 3], "the same for the decoder", low=1, high=256)
    code_bits: int = setting(13, "bits of a code: 2^code_bits codes", low=1, high=22)
    num_groups: int = setting(32, "groups of the group norms", low=1, high=2**14)
    stem_patch_size: int = setting(1, "pixels per side that the first layer makes one position of", low=1, high=64)
    local_encoder: bool = setting(False, "compute each code from its own patch alone, so that equal patches have one")
    encoder_mid: bool = setting(True, "blocks between encoder and codes")
    decoder_mid: bool = setting(True, "blocks between codes and decoder")


@dataclass
class DatasetParams(LoaderParams):
    num_workers: int = 4
    train_shards: Any = setting(None, "images: shards or parquet files", is_data=True)
    eval_shards: Any = setting(None, "held-out images", is_data=True, free=True)
    image_column: str | None = setting(None, "of parquet files; null: the first with a usual name")
    resolution: int = setting(256, "pixels per side of an image", low=1, high=PIXELS)
    random_flip: bool = setting(True, "mirror images at random")
    max_shift: int = setting(0, "shift images by up to so many pixels; the border is repeated", low=0, high=PIXELS)


@dataclass
class Dataset:
    params: DatasetParams = field(default_factory=DatasetParams)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        return [
            f"dataset.params.{key} is not given; name shards or parquet files, as in 'data/train-*.tar'"
            for key in ("train_shards", "eval_shards")
            if not config.dataset.params[key]
        ]


@dataclass
class Losses:
    """Entropies are in nats, summed over the bits of a code."""

    l1: float = setting(1.0, "weight of the absolute error", **WEIGHT)
    mse: float = setting(0.0, "weight of the squared error", **WEIGHT)
    edge: float = setting(0.5, "weight of the error of image gradients", **WEIGHT)
    perceptual: float = setting(0.0, "weight of the distance in a network's features", **WEIGHT)
    commit: float = setting(0.1, "weight of the distance from latents to codes", **WEIGHT)
    sample_entropy: float = setting(0.02, "weight of the entropy of each position, which is made small", **WEIGHT)
    codebook_entropy: float = setting(0.03, "weight of the entropy of all codes, which is made large", **WEIGHT)
    entropy_group_bits: int = setting(7, "bits of a code whose entropy is computed at once", low=1, high=16)


@dataclass
class Training(LoopSection):
    batch_size: int = setting(16, "images of a batch", **ROWS)
    max_train_steps: int = 100_000
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = 0.999


@dataclass
class TokenizerTrainingConfig(RunConfig):
    task: str = "tokenizer"
    experiment: Experiment = field(default_factory=Experiment)
    model: Model = field(default_factory=Model)
    dataset: Dataset = field(default_factory=Dataset)
    losses: Losses = field(default_factory=Losses)
    optimizer: OptimizerSection = field(
        default_factory=lambda: OptimizerSection(params=OptimizerParams(beta2=0.99, weight_decay=0.0))
    )
    lr_scheduler: SchedulerSection = field(
        default_factory=lambda: SchedulerSection(params=SchedulerParams(warmup_steps=100))
    )
    training: Training = field(default_factory=Training)
