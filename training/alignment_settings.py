"""Settings of the tasks that change a trained Show-o (docs/alignment.md): those of its training, and each task's own.

Apart from the tasks, so that --help and mistakes are told without torch.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from common.schema import (
    ROWS,
    STEPS,
    TOKENS,
    WEIGHT,
    DataParams,
    DatasetSection,
    ShowoExperimentSection,
    TrainingConfig,
    TrainingSection,
)
from common.settings import setting

# ---- reconstruction ----


@dataclass
class ReconstructionParams(DataParams):
    train_reconstruction_shards_path_or_url: Any = setting(None, "images: shards or parquet files", is_data=True)
    eval_reconstruction_shards_path_or_url: Any = setting(None, "held-out images; null: none", is_data=True, free=True)


@dataclass
class ReconstructionDataset(DatasetSection):
    params: ReconstructionParams = field(default_factory=ReconstructionParams)


@dataclass
class ReconstructionTraining(TrainingSection):
    batch_size_reconstruction: int = setting(2, "images to restore in a batch; 0: off", low=0, high=TOKENS)
    batch_size_t2i: int = 0
    batch_size_lm: int = 0
    batch_size_mmu: int = 2
    reconstruction_coeff: float = setting(1.0, "weight of the reconstruction loss", **WEIGHT)


@dataclass
class ReconstructionSection:
    condition: str = setting(
        "small",
        "what the model sees of the image; small: the codes of a smaller copy; blurred: those of a blurred copy; clip: "
        "CLIP-ViT features (with w_clip_vit)",
        choices=("small", "blurred", "clip"),
    )
    factor: int = setting(2, "the copy is smaller by this, or was before it got its size back", low=2, high=64)


@dataclass
class ReconstructionConfig(TrainingConfig):
    """Settings of task=reconstruction."""

    task: str = "reconstruction"
    dataset: ReconstructionDataset = field(default_factory=ReconstructionDataset)
    training: ReconstructionTraining = field(default_factory=ReconstructionTraining)
    reconstruction: ReconstructionSection = field(default_factory=ReconstructionSection)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        condition, factor = config.reconstruction.condition, config.reconstruction.factor
        found, side = [], config.dataset.preprocessing.resolution
        if condition == "clip" and not config.model.showo.w_clip_vit:
            found.append(
                "reconstruction.condition is clip, but model.showo.w_clip_vit is false; give small or blurred, or "
                "weights that were trained with CLIP-ViT"
            )
        if condition != "clip" and side % factor:
            found.append(f"reconstruction.factor is {factor}; it must divide dataset.preprocessing.resolution ({side})")
        return found
