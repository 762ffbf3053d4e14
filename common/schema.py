"""Every setting of Show-o, its type and its default: published keys and command-line keys (spec §13, §14), and ours.

The defaults are the values that all published training files share. A script that needs more keys subclasses a section
and uses it in a top-level class of its own.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import II, DictConfig, OmegaConf


@dataclass
class WandbSection:
    entity: str | None = None
    resume: bool | str | None = "auto"
    run_id: str | None = None
    mode: str | None = None  # online, offline or disabled; null: online if logged in, else offline


@dataclass
class ExperimentSection:
    project: str = "training"
    name: str = "show-o"
    output_dir: str = "outputs/show-o"
    max_train_examples_t2i: int | None = None
    max_train_examples_mmu: int | None = None
    save_every: int = 10000
    eval_every: int = 2500
    generate_every: int = 1000
    log_every: int = 50
    log_grad_norm_every: int = 500
    init_from: str | None = (
        None  # weights that a new run starts from: a folder (e.g. of the previous stage) or a hub name
    )
    resume_from_checkpoint: bool | str | None = "latest"
    accept_config_changes: bool = False  # resume a run although settings that affect training have changed
    checkpoints_total_limit: int | None = None
    eval_batches: int = 8  # batches per evaluation, of each flow that has held-out data


@dataclass
class VqModelSection:
    type: str = "magvitv2"
    vq_model_name: str = "showlab/magvitv2"  # hub name or folder
    pretrained_model_path: str | None = None  # a file with a state dict under the key `model`


@dataclass
class ShowoSection:
    load_from_showo: bool = True  # False: start from the weights of `llm_model_path`
    pretrained_model_path: str | None = "showlab/show-o"  # hub name or folder
    w_clip_vit: bool = False
    vocab_size: int = 58498
    llm_vocab_size: int = 50295
    llm_model_path: str | None = None  # hub name or folder; null: the published one (models/backbones.py)
    codebook_size: int = 8192
    num_vq_tokens: int = 256
    num_new_special_tokens: int = 10
    qk_norm: bool | None = None  # null: as the language model's family has it, see models/backbones.py


@dataclass
class ModelSection:
    vq_model: VqModelSection = field(default_factory=VqModelSection)
    showo: ShowoSection = field(default_factory=ShowoSection)
    clip_vit_name: str = "openai/clip-vit-large-patch14-336"  # hub name or folder; used only with `w_clip_vit`
    gradient_checkpointing: bool = True


@dataclass
class DataParams:
    train_t2i_shards_path_or_url: Any = None  # a path, glob or brace list, or a list of them
    train_mmu_shards_path_or_url: Any = None
    train_mmu_image_root: str | None = None  # LLaVA: the folder that image names in the JSON are relative to
    train_lm_shards_path_or_url: Any = None
    train_t2i_image_root: str | None = None  # the same for file names in parquet files; null: the folder of that file
    eval_t2i_shards_path_or_url: Any = None  # held-out data; null: this flow is not evaluated
    eval_mmu_shards_path_or_url: Any = None
    eval_lm_shards_path_or_url: Any = None
    eval_t2i_image_root: str | None = None  # null: as for training
    eval_mmu_image_root: str | None = None
    class_names_path: str | None = (
        None  # imagenet1k: a file with the name of each class folder, one per line or as JSON
    )
    image_column: str | None = None  # of parquet files with images; null: the first column with a usual name
    text_column: str | None = None
    lm_column: str = "content"  # text column of parquet and jsonl files of the lm flow
    max_skipped_fraction: float = 0.1  # the run ends when a larger share of a flow's samples cannot be read
    add_caption_prompt: bool = True
    external_caption_path: str | None = None
    external_journeydb_caption_path: str | None = None
    external_laion12m_caption_path: str | None = None
    external_cc12m_caption_path: str | None = None
    validation_prompts_file: str = "validation_prompts/text2image_prompts.txt"
    shuffle_buffer_size: int = 1000
    num_workers: int = 32
    resolution: int = II("dataset.preprocessing.resolution")
    pin_memory: bool = True
    persistent_workers: bool = True
    batch_size: int | None = II("training.batch_size")


@dataclass
class PreprocessingSection:
    max_seq_length: int = 128
    resolution: int = 256
    center_crop: bool = False  # no effect: images are always centre-cropped, as published
    random_flip: bool = False
    und_random_flip: bool = False  # flips images of the mmu flow only
    und_jitter: float = 0.0  # shifts and scales images of the mmu flow by up to this share


@dataclass
class DatasetSection:
    gen_type: str = "t2i"
    und_type: str = "captioning"
    combined_loader_mode: str = "max_size_cycle"
    add_system_prompt: bool = False
    packing: bool = False  # puts several samples into a row, so that no padding is computed; same losses
    packing_length: int | None = None  # maximum length of a packed row; null: four times an ordinary row's
    params: DataParams = field(default_factory=DataParams)
    preprocessing: PreprocessingSection = field(default_factory=PreprocessingSection)


@dataclass
class OptimizerParams:
    learning_rate: float = 1e-4
    scale_lr: bool = False  # multiplies the rate by the number of rows of an optimiser step, over all processes
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    epsilon: float = 1e-8


@dataclass
class OptimizerSection:
    name: str = "adamw"
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class SchedulerParams:
    learning_rate: float = II("optimizer.params.learning_rate")
    warmup_steps: int = 5000
    num_training_steps: int | None = None  # over which the rate decays; null: training.max_train_steps


@dataclass
class SchedulerSection:
    scheduler: str = "cosine"
    params: SchedulerParams = field(default_factory=SchedulerParams)


@dataclass
class TrainingSection:
    gradient_accumulation_steps: int = 1
    noise_type: str = "mask"
    predict_all_tokens: bool = False
    eval_mask_ratios: list[float] | None = None
    mask_contiguous_region_prob: float | None = None
    pre_encode: bool = False
    batch_size_t2i: int = 10
    batch_size_lm: int = 4
    batch_size_mmu: int = 10
    batch_size: int = 1  # images generated at once by the inference scripts
    trainable: str = "all"  # new: only parameters that the language model did not have, see docs/backbones.md
    mixed_precision: str = "bf16"
    enable_tf32: bool = True
    seed: int | None = 10086
    max_train_steps: int = 500000
    overfit_one_batch: bool = False
    cond_dropout_prob: float = 0.1
    min_masking_rate: float = 0.0
    label_smoothing: float = 0.0
    max_grad_norm: float | None = None
    guidance_scale: float = 1.5
    generation_timesteps: int = 12
    generation_temperature: float = 1.0
    t2i_coeff: float = 1.0
    lm_coeff: float = 0.1
    mmu_coeff: float = 1.0
    und_mask_ratio: float = 0.0  # masks a random share, up to this one, of the image tokens of mmu rows
    vq_dtype: str = "fp32"  # of the image tokenizer's encoder; bf16 changes some codes
    vq_compile: bool = False  # compiles the image tokenizer's encoder
    max_nonfinite_batches: int | None = 10  # skipped batches with NaN or Inf losses before the run ends; null: no check
    ema_decay: float | None = (
        None  # keeps an exponential moving average of the weights, which is saved and sampled from
    )
    mask_schedule: str = "cosine"  # the section of the same name takes precedence


@dataclass
class MaskScheduleSection:
    schedule: str | None = None
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class SamplingSection:
    """Approximate, faster image generation; the defaults are exact. docs/performance.md gives the cost of each."""

    refresh_every: int = 1  # all keys and values are computed every so many steps; in between, known tokens keep theirs
    guidance_start: float = 0.0  # guidance is used from this share of the steps on,
    guidance_stop: float = 1.0  # and up to this share
    order: str = "confidence"  # in which positions become known: confidence or halton


@dataclass
class TrainingConfig:
    """Settings of the training scripts: the published sections, and where and how to run."""

    task: str = "showo"  # what is trained: a module of training/tasks

    wandb: WandbSection = field(default_factory=WandbSection)
    experiment: ExperimentSection = field(default_factory=ExperimentSection)
    model: ModelSection = field(default_factory=ModelSection)
    dataset: DatasetSection = field(default_factory=DatasetSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    lr_scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    mask_schedule: MaskScheduleSection = field(default_factory=MaskScheduleSection)

    # Short names: setting the left one sets the key on the right, and both read the same value.
    ALIASES: ClassVar[dict[str, str]] = {
        "seed": "training.seed",
        "output_dir": "experiment.output_dir",
        "validation_prompts_file": "dataset.params.validation_prompts_file",
    }
    seed: int | None = II("training.seed")
    output_dir: str = II("experiment.output_dir")
    validation_prompts_file: str = II("dataset.params.validation_prompts_file")
    device: str | None = None  # null: cuda if there is one
    dtype: str | None = None  # null: bf16 on a GPU, fp32 on a CPU
    attn_implementation: str = "sdpa"
    compile: bool = False
    conversation: str = "vicuna"  # as published; chat: the chat template of the language model (docs/backbones.md)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        """What is wrong with the values of a merged and resolved config, one message each."""
        found = find_problems(config)
        if config.dtype is not None:
            found.append("dtype has no effect on training; give training.mixed_precision")
        if config.device not in (None, "cpu", "cuda"):
            found.append(
                f"device is {config.device!r}, but the launcher gives each process its GPU; omit it and set "
                "CUDA_VISIBLE_DEVICES"
            )
        return found

    @staticmethod
    def unread(config: DictConfig) -> list[str]:
        """The data paths of flows that are off, which need not exist."""
        sizes = OmegaConf.to_container(config.training, resolve=False)
        return data_paths(config, [flow for flow in FLOWS if sizes[f"batch_size_{flow}"] == 0])


@dataclass
class InferenceConfig(TrainingConfig):
    """Settings of the inference scripts: the above and the published command-line keys (spec §13)."""

    ALIASES: ClassVar[dict[str, str]] = {
        "seed": "training.seed",
        "validation_prompts_file": "dataset.params.validation_prompts_file",
        "batch_size": "training.batch_size",
        "guidance_scale": "training.guidance_scale",
        "generation_timesteps": "training.generation_timesteps",
        "generation_temperature": "training.generation_temperature",
    }
    output_dir: str | None = None  # null: {experiment.output_dir}/{mode}
    batch_size: int = II("training.batch_size")
    guidance_scale: float = II("training.guidance_scale")
    generation_timesteps: int = II("training.generation_timesteps")
    generation_temperature: float = II("training.generation_temperature")
    cpu_kernels: bool = True  # on a CPU in fp32: faster products for few rows, the same tokens
    sampling: SamplingSection = field(default_factory=SamplingSection)

    mode: str | None = None  # t2i, inpainting, extrapolation
    prompt: str | None = None  # several, and several directions or questions, are split at " *** "
    image_path: str | None = None
    inpainting_mask_path: str | None = None
    extra_direction: str | None = None
    offset: int = 0
    num_images_per_prompt: int | None = None  # null: 1, but batch_size for inpainting and extrapolation, as published

    question: str | None = None
    mmu_image_root: str | None = None
    max_new_tokens: int = 100
    temperature: float = 1.0  # of answers; images have generation_temperature
    top_k: int | None = 1
    top_p: float | None = None

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        """As for training, but any `dtype` and `device` may be chosen."""
        return find_problems(config)

    @staticmethod
    def unread(config: DictConfig) -> list[str]:
        """All data paths, so that a training file can be used for inference without its data."""
        return data_paths(config, FLOWS)


ShowoScriptConfig = InferenceConfig

CHOICES = {
    "mode": ("t2i", "inpainting", "extrapolation"),
    "sampling.order": ("confidence", "halton"),
    "dtype": ("fp32", "bf16", "fp16"),
    "attn_implementation": ("sdpa", "eager", "flex_attention"),
    "conversation": ("vicuna", "chat"),
    "wandb.mode": ("online", "offline", "disabled"),
    "model.vq_model.type": ("magvitv2",),
    "dataset.gen_type": ("imagenet1k", "t2i", "t2i_parquet"),
    "dataset.und_type": ("captioning", "captioning_parquet", "llava_pretrain", "llava_tuning"),
    "dataset.combined_loader_mode": ("max_size_cycle", "min_size"),
    "optimizer.name": ("adamw",),
    "lr_scheduler.scheduler": (
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ),
    "training.pre_encode": (False,),
    "training.trainable": ("all", "new", "lora"),
    "training.vq_dtype": ("fp32", "bf16"),
    "training.noise_type": ("mask", "random_replace"),
    "training.mixed_precision": ("no", "bf16", "fp16"),
}

RANGES = {  # both ends are allowed, infinite values never
    **{f"experiment.{what}_every": (1, math.inf) for what in ("save", "eval", "generate", "log", "log_grad_norm")},
    "dataset.preprocessing.max_seq_length": (1, math.inf),
    "dataset.preprocessing.resolution": (8, math.inf),
    "dataset.params.shuffle_buffer_size": (0, math.inf),
    "dataset.params.num_workers": (0, math.inf),
    "dataset.params.max_skipped_fraction": (0, 1),
    "experiment.max_train_examples_t2i": (1, math.inf),
    "experiment.max_train_examples_mmu": (1, math.inf),
    "optimizer.params.learning_rate": (0, math.inf),
    "lr_scheduler.params.warmup_steps": (0, math.inf),
    "lr_scheduler.params.num_training_steps": (1, math.inf),
    "dataset.packing_length": (1, math.inf),
    "training.gradient_accumulation_steps": (1, math.inf),
    "training.batch_size_t2i": (0, math.inf),
    "training.batch_size_lm": (0, math.inf),
    "training.batch_size_mmu": (0, math.inf),
    "training.batch_size": (1, math.inf),
    "training.max_train_steps": (0, math.inf),
    "training.cond_dropout_prob": (0, 1),
    "training.min_masking_rate": (0, 1),
    "training.mask_contiguous_region_prob": (0, 1),
    "training.label_smoothing": (0, 1),
    "training.und_mask_ratio": (0, 1),
    "training.ema_decay": (0, 1),
    "training.max_nonfinite_batches": (0, math.inf),
    "training.max_grad_norm": (0, math.inf),
    "experiment.eval_batches": (1, math.inf),
    "experiment.checkpoints_total_limit": (1, math.inf),
    "dataset.preprocessing.und_jitter": (0, 0.5),
    "training.guidance_scale": (0, math.inf),
    "training.generation_timesteps": (1, math.inf),
    "training.generation_temperature": (0, math.inf),
    "sampling.refresh_every": (1, math.inf),
    "sampling.guidance_start": (0, 1),
    "sampling.guidance_stop": (0, 1),
    "num_images_per_prompt": (1, math.inf),
    "max_new_tokens": (1, math.inf),
    "temperature": (0, math.inf),
    "top_k": (1, math.inf),
    "top_p": (0, 1),
    "training.seed": (0, 2**63 - 1),
}
ABOVE_LOW = ("top_p",)  # the lower end is not allowed

FLOWS = ("t2i", "mmu", "lm")
SHARDS = [f"dataset.params.{split}_{flow}_shards_path_or_url" for split in ("train", "eval") for flow in FLOWS]


def data_paths(config: DictConfig, flows: Iterable[str]) -> list[str]:
    """The keys of these flows' paths, for training and evaluation."""
    starts = tuple(f"{split}_{flow}_" for split in ("train", "eval") for flow in flows)
    return [f"dataset.params.{name}" for name in config.dataset.params if name.startswith(starts)]


def out_of_range(config: DictConfig, ranges: dict[str, tuple[float, float]] | None = None) -> list[str]:
    """Messages about values that are not in `CHOICES`, or outside `RANGES` or `ranges`; absent keys are fine."""
    found = []
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value is not None and value not in allowed:
            found.append(f"{key} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    for key, (low, high) in (RANGES | (ranges or {})).items():
        value = OmegaConf.select(config, key)
        if value is None or (low <= value <= high and math.isfinite(value) and (value > low or key not in ABOVE_LOW)):
            continue
        allowed = f"{low} or more" if high > 1 else f"from {low} to {high}"
        allowed = f"more than {low}, up to {high}" if key in ABOVE_LOW else allowed
        found.append(f"{key} is {value}; it must be {allowed}")
    return found


def find_problems(config: DictConfig) -> list[str]:
    """Messages about values of the right type that are invalid, contradictory or would be ignored silently."""
    found = out_of_range(config)
    if config.dataset.packing and config.compile and config.attn_implementation == "sdpa":
        found.append(
            "dataset.packing with compile=true recompiles at every step under attn_implementation=sdpa; give "
            "flex_attention, or drop one of the two"
        )
    if config.dataset.add_system_prompt and config.conversation == "chat":
        found.append(
            "dataset.add_system_prompt has no effect with conversation=chat, whose template has its own; leave it out"
        )
    if config.training.trainable == "lora":
        found.append("training.trainable=lora is not built yet; give new to keep the language model as it is, or all")
    if config.dataset.packing_length is not None and not config.dataset.packing:
        found.append("dataset.packing_length has no effect without dataset.packing=true")
    for key in SHARDS:
        value = OmegaConf.select(config, key)
        paths = value if OmegaConf.is_list(value) else [value]
        if value is not None and not all(isinstance(path, str) for path in paths):
            found.append(f"{key} is {value!r}; it must be one path or a list of paths")
    for key, same in (
        ("dataset.params.resolution", "dataset.preprocessing.resolution"),
        ("lr_scheduler.params.learning_rate", "optimizer.params.learning_rate"),
        ("dataset.params.batch_size", "training.batch_size"),
    ):
        value, expected = OmegaConf.select(config, key), OmegaConf.select(config, same)
        if value != expected:
            found.append(f"{key} is {value} and {same} is {expected}; they must agree (omit the first one)")
    sampling = OmegaConf.select(config, "sampling")
    if sampling is not None and sampling.guidance_start > sampling.guidance_stop:
        span = f"{sampling.guidance_start} and {sampling.guidance_stop}"
        found.append(f"sampling.guidance_start and sampling.guidance_stop are {span}; the first must not be larger")
    return found


def mask_schedule_of(config: DictConfig) -> tuple[str, dict[str, Any]]:
    """Name and parameters of the mask schedule: the section `mask_schedule`, else `training.mask_schedule`."""
    section = config.mask_schedule
    return section.schedule or config.training.mask_schedule, OmegaConf.to_container(section.params)
