"""Settings of the tasks that change a trained Show-o (docs/alignment.md): those of its training, and each task's own.

Apart from the tasks, so that --help and mistakes are told without torch.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from common.schema import (
    ROWS,
    TOKENS,
    WEIGHT,
    DataParams,
    DatasetSection,
    RunExperimentSection,
    TrainingConfig,
    TrainingSection,
)
from common.settings import setting

OWN_FLOWS = ("t2i", "lm", "mmu", "mixed")  # of ordinary training

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
        tokens_per_side = math.isqrt(config.model.showo.num_vq_tokens)
        if condition == "small" and tokens_per_side % factor:
            found.append(
                f"reconstruction.factor is {factor}; it must divide the {tokens_per_side} codes along a side "
                "(model.showo.num_vq_tokens)"
            )
        elif condition != "clip" and side % factor:
            found.append(f"reconstruction.factor is {factor}; it must divide dataset.preprocessing.resolution ({side})")
        return found


@dataclass
class OwnFlowsTraining(TrainingSection):
    """Of tasks that read none of the flows of ordinary training."""

    batch_size_t2i: int = 0
    batch_size_lm: int = 0
    batch_size_mmu: int = 0


@dataclass
class ReferenceExperiment(RunExperimentSection):
    """Of tasks whose reference is the model that the run began with, so that it cannot change on the way."""

    init_from: str | None = setting(None, "the model that the run begins with, which is its reference, too")


# ---- preference pairs ----


@dataclass
class PairParams(DataParams):
    train_pairs: Any = setting(None, "jsonl or json of preference pairs (docs/alignment.md)", is_data=True)
    eval_pairs: Any = setting(None, "held-out pairs; null: none", is_data=True, free=True)


@dataclass
class PairDataset(DatasetSection):
    und_type: str = "llava_tuning"
    params: PairParams = field(default_factory=PairParams)


@dataclass
class PairTraining(OwnFlowsTraining):
    batch_size_image_pairs: int = setting(1, "pairs of images in a batch; 0: off", low=0, high=TOKENS)
    batch_size_answer_pairs: int = setting(1, "pairs of answers in a batch; 0: off", low=0, high=TOKENS)
    image_pairs_coeff: float = setting(1.0, "weight of the loss of pairs of images", **WEIGHT)
    answer_pairs_coeff: float = setting(1.0, "weight of the loss of pairs of answers", **WEIGHT)


@dataclass
class PreferenceSection:
    beta: float = setting(0.2, "how closely the model keeps to its reference; larger: more", above=0, high=1000)


@dataclass
class PreferenceConfig(TrainingConfig):
    """Settings of task=preference."""

    task: str = "preference"
    experiment: ReferenceExperiment = field(default_factory=ReferenceExperiment)
    dataset: PairDataset = field(default_factory=PairDataset)
    training: PairTraining = field(default_factory=PairTraining)
    preference: PreferenceSection = field(default_factory=PreferenceSection)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        found = other_flows(config)
        if config.training.noise_type != "mask":
            found.append(f"training.noise_type is {config.training.noise_type}; task=preference needs mask")
        if config.dataset.und_type != "llava_tuning":
            found.append(f"dataset.und_type is {config.dataset.und_type}; pairs of answers are read as llava_tuning")
        return found


# ---- policy gradients ----


@dataclass
class PromptParams(DataParams):
    train_prompts: Any = setting(
        None, "prompts: shards, of which captions are read, jsonl or json with a `prompt`, or txt", is_data=True
    )
    eval_prompts: Any = setting(None, "held-out prompts; null: none", is_data=True, free=True)


@dataclass
class PromptDataset(DatasetSection):
    params: PromptParams = field(default_factory=PromptParams)


@dataclass
class PromptTraining(OwnFlowsTraining):
    batch_size_prompts: int = setting(1, "prompts in a batch", **ROWS)


@dataclass
class PolicySection:
    reward: str = setting("???", "module:function of prompts and images, or an address (docs/alignment.md)")
    reward_timeout: float = setting(60.0, "seconds that an address has to answer", above=0, high=10**5, free=True)
    reward_retries: int = setting(3, "further attempts at an address that does not", low=0, high=100, free=True)
    group_size: int = setting(6, "images of each prompt", low=2, high=TOKENS)
    timesteps: int = setting(50, "MaskGIT steps of each image", low=1, high=TOKENS)
    steps: int | None = setting(None, "of these with gradients, drawn for each batch; null: all", low=1, high=TOKENS)
    min_std: float = setting(1e-3, "groups whose rewards deviate by no more than this are dropped", **WEIGHT)
    clip_low: float = setting(0.9, "least ratio of probabilities now and when sampled", low=0, high=1)
    clip_high: float = setting(1.2, "greatest ratio", low=1, high=1000)
    kl: float = setting(0.0, "weight of the distance to the model that the run began with; 0: none", **WEIGHT)


@dataclass
class PolicyConfig(TrainingConfig):
    """Settings of task=policy."""

    task: str = "policy"
    experiment: ReferenceExperiment = field(default_factory=ReferenceExperiment)
    dataset: PromptDataset = field(default_factory=PromptDataset)
    training: PromptTraining = field(default_factory=PromptTraining)
    policy: PolicySection = field(default_factory=PolicySection)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        found = other_flows(config) + steps_of_images(config, config.policy)
        steps, timesteps = config.policy.steps, config.policy.timesteps
        if steps is not None and steps > timesteps:
            found.append(f"policy.steps is {steps}; there are policy.timesteps={timesteps}")
        return found


# ---- few steps ----


@dataclass
class DistillationSection:
    timesteps: int = setting(32, "MaskGIT steps of the teacher", low=1, high=TOKENS)
    guidance_scale: float = setting(10.0, "of the teacher; the student learns to do without", **WEIGHT)
    temperature: float = setting(1.0, "of the teacher's choice of positions", **WEIGHT)
    segments: list[int] = setting([8, 4, 2], "number of segments of a trajectory, stage by stage", low=1, high=TOKENS)
    points: int | None = setting(4, "of each trajectory, drawn for each batch; null: all", low=1, high=TOKENS)


@dataclass
class DistillationConfig(TrainingConfig):
    """Settings of task=distillation."""

    task: str = "distillation"
    experiment: ReferenceExperiment = field(default_factory=ReferenceExperiment)
    dataset: PromptDataset = field(default_factory=PromptDataset)
    training: PromptTraining = field(default_factory=PromptTraining)
    distillation: DistillationSection = field(default_factory=DistillationSection)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        settings, found = config.distillation, other_flows(config) + steps_of_images(config, config.distillation)
        if not settings.segments or max(settings.segments) > settings.timesteps:
            found.append(
                f"distillation.segments is {list(settings.segments)}; give one number or more, each at most "
                f"distillation.timesteps ({settings.timesteps})"
            )
        if settings.points is not None and settings.points > settings.timesteps:
            found.append(f"distillation.points is {settings.points}; there are {settings.timesteps} timesteps")
        return found


def steps_of_images(config: DictConfig, section: DictConfig) -> list[str]:
    """What is wrong where a section samples images in more steps than they have tokens."""
    tokens = config.model.showo.num_vq_tokens
    if section.timesteps <= tokens:
        return []
    key = f"{config.task}.timesteps"
    return [f"{key} is {section.timesteps}; an image has {tokens} tokens, so it must be at most that"]


def other_flows(config: DictConfig) -> list[str]:
    """What is wrong where a task reads flows of its own alone, and others are on, or a setting of theirs is."""
    if config.training.label_smoothing and config.task != "distillation":
        return [f"training.label_smoothing has no effect on task={config.task}; leave it out"]
    on = [f"training.batch_size_{flow}" for flow in OWN_FLOWS if config.training[f"batch_size_{flow}"]]
    return [f"{', '.join(on)} is not 0, but task={config.task} reads its own data alone; give 0"] if on else []
