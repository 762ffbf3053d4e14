"""Every setting of Show-o: published keys and command-line keys (spec §13, §14), and ours.

The defaults are the values that all published training files share. In order: what several scripts read, what every
trained thing has (`RunConfig`), what training of Show-o adds, what inference has. Something else that is trained
declares a subclass of `RunConfig` with a section more, as `training/tokenizer_settings.py` does.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf
from PIL import ImageColor

from common.settings import alias, repeats, setting

WANDB_MODES = ("online", "offline", "disabled")
QUANTIZATIONS = ("int8", "int4", "nf4")
# Upper ends: beyond them nothing is meant, and memory or time would have none.
MOST_STEPS, TOKENS, IDS, PIXELS = 10**12, 2**16, 2**23, 2**13
STEPS, ROWS, WEIGHT = {"low": 1, "high": MOST_STEPS}, {"low": 1, "high": TOKENS}, {"low": 0, "high": 10**6}
# Scripts that read the same YAML files: in a file, each skips the keys that only the others know. Of a key that several
# know with different defaults, the last one's counts where a script refers to a key of theirs.
SHOWO_SCHEMAS = (
    "training.alignment_settings:ReconstructionConfig",
    "training.alignment_settings:PreferenceConfig",
    "training.alignment_settings:PolicyConfig",
    "training.alignment_settings:DistillationConfig",
    "common.schema:TrainingConfig",
    "common.schema:InferenceConfig",
    "common.schema:MixedInferenceConfig",
    "common.schema:AppConfig",
    "evaluation.schema:EvaluationConfig",
)

# ---- what several scripts read ----


@dataclass
class WandbSection:
    entity: str | None = setting(None, "wandb user or team", free=True)
    resume: bool | str | None = setting("auto", "wandb's own setting of this name", free=True)
    run_id: str | None = setting(None, "wandb run to continue; null: a new one", free=True)
    mode: str | None = setting(None, "null: online if logged in, else offline", choices=WANDB_MODES, free=True)


@dataclass
class ExperimentSection:
    project: str = setting("training", "wandb project", free=True)
    name: str = setting("show-o", "wandb name of the run", free=True)
    output_dir: str = setting("outputs/show-o", "folder of everything that the run writes", free=True, is_output=True)


@dataclass
class SeedSection:
    seed: int | None = setting(
        10086, "fixes every random choice; null: other masks and weights every time", low=0, high=2**63 - 1
    )


@dataclass
class GenerationSection(SeedSection):
    batch_size: int = setting(
        1, "images generated, or questions answered, at once by the inference scripts", **ROWS, free=True
    )
    guidance_scale: float = setting(1.5, "classifier-free guidance; 0: none", **WEIGHT, free=True)
    generation_timesteps: int = setting(12, "MaskGIT steps of an image", low=1, high=TOKENS, free=True)
    generation_temperature: float = setting(1.0, "temperature of the choice of positions", **WEIGHT, free=True)
    mask_schedule: str = setting("cosine", "name of the mask schedule; the section mask_schedule takes precedence")


@dataclass
class MaskScheduleSection:
    schedule: str | None = setting(None, "cosine, linear, pow<exponent>, sigmoid, arccos; null: training.mask_schedule")
    params: dict[str, Any] = setting({}, "parameters of the schedule, as in mask_schedule.params.start=-3")


@dataclass
class VqModelSection:
    type: str = setting("magvitv2", "kind of image tokenizer", choices=("magvitv2",))
    vq_model_name: str = setting("showlab/magvitv2", "image tokenizer: a folder or hub name")
    pretrained_model_path: str | None = setting(None, "a file with its state dict under the key `model`, used instead")


@dataclass
class ShowoSection:
    pretrained_model_path: str | None = setting("showlab/show-o", "weights: a folder or hub name")
    w_clip_vit: bool = setting(False, "understanding from CLIP-ViT features instead of image codes")
    vocab_size: int = setting(58498, "llm_vocab_size + num_new_special_tokens + codebook_size + 1", low=1, high=IDS)
    llm_vocab_size: int = setting(50295, "entries of the text tokenizer", low=1, high=IDS)
    llm_model_path: str | None = setting(None, "language model: a folder or hub name; null: the published one")
    codebook_size: int = setting(8192, "image codes", low=1, high=IDS)
    num_vq_tokens: int = setting(256, "image tokens of an image, a square number", low=1, high=TOKENS)
    num_new_special_tokens: int = setting(10, "special tokens that Show-o adds", low=1, high=TOKENS)


@dataclass
class ModelSection:
    vq_model: VqModelSection = field(default_factory=VqModelSection)
    showo: ShowoSection = field(default_factory=ShowoSection)
    clip_vit_name: str = setting(
        "openai/clip-vit-large-patch14-336", "CLIP-ViT: a folder or hub name; used with w_clip_vit"
    )


@dataclass
class PreprocessingSection:
    max_seq_length: int = setting(128, "text tokens of a row", low=1, high=TOKENS)
    resolution: int = setting(256, "pixels per side of an image", low=8, high=PIXELS)


@dataclass
class ImageSection:
    exif: str = setting(
        "ignore", "orientation that cameras note beside the pixels; ignore: as published", choices=("ignore", "apply")
    )
    background: str | None = setting(
        "white", "colour under transparent pixels, a name or #rrggbb; null: their hidden colours, as published"
    )

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        try:
            if config.image.background is not None:
                ImageColor.getrgb(config.image.background)
        except ValueError:
            return [f"image.background is {config.image.background!r}; it must be a colour such as white or #c0c0c0"]
        return []


@dataclass
class PromptParams:
    validation_prompts_file: str = setting(
        "validation_prompts/text2image_prompts.txt",
        "one prompt per line: of sample images in training, or used without prompt",
        free=True,
    )


@dataclass
class ScriptConfig:
    """What training and inference of anything have."""

    seed: int | None = alias("training.seed")
    device: str | None = setting(None, "cpu or cuda; null: cuda if there is one", free=True)
    compile: bool = setting(False, "run the model through torch.compile", free=True)
    image: ImageSection = field(default_factory=ImageSection)
    wandb: WandbSection = field(default_factory=WandbSection)


@dataclass
class ShowoScript:
    """What training and inference of Show-o have."""

    SHARES_FILES_WITH: ClassVar[tuple[str, ...]] = SHOWO_SCHEMAS

    attn_implementation: str = setting(
        "sdpa", "attention of the language model", choices=("sdpa", "eager", "flex_attention"), free=True
    )
    conversation: str = setting(
        "vicuna",
        "format of questions; chat: the language model's chat template (docs/backbones.md)",
        choices=("vicuna", "chat"),
    )
    mask_schedule: MaskScheduleSection = field(default_factory=MaskScheduleSection)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        steps, tokens = config.training.generation_timesteps, config.model.showo.num_vq_tokens
        if steps <= tokens:
            return []
        return [f"training.generation_timesteps is {steps}; an image has {tokens} tokens, so it must be at most that"]


# ---- whatever is trained ----


@dataclass
class RunExperimentSection(ExperimentSection):
    save_every: int = setting(10000, "steps from one checkpoint to the next", **STEPS, free=True)
    eval_every: int = setting(2500, "steps from one evaluation on held-out data to the next", **STEPS, free=True)
    generate_every: int = setting(1000, "steps from one panel of sample images to the next", **STEPS, free=True)
    log_every: int = setting(50, "steps from one logged line to the next", **STEPS, free=True)
    log_grad_norm_every: int = setting(500, "steps from one log of gradient norms to the next", **STEPS, free=True)
    init_from: str | None = setting(
        None, "weights that a new run starts from: a folder (as of the previous stage) or a hub name", free=True
    )
    resume_from_checkpoint: bool | str | None = setting(
        "latest", "latest, a checkpoint folder, or false: start again", free=True
    )
    accept_config_changes: bool = setting(
        False, "resume a run although settings that affect training have changed", free=True
    )
    checkpoints_total_limit: int | None = setting(None, "checkpoints that are kept; null: all", **STEPS, free=True)
    eval_batches: int = setting(
        8, "batches of each held-out data set that an evaluation reads", low=1, high=10**6, free=True
    )


@dataclass
class LoaderParams:
    shuffle_buffer_size: int = setting(1000, "samples that each worker shuffles among", low=0, high=10**7)
    num_workers: int = setting(32, "processes that read each data set", low=0, high=1024)
    max_skipped_fraction: float = setting(
        0.1, "the run ends when a larger share of a data set's samples cannot be read", low=0, high=1, free=True
    )
    pin_memory: bool = setting(True, "read into memory that is copied to a GPU faster", free=True)
    persistent_workers: bool = setting(True, "keep the processes from one epoch to the next", free=True)


@dataclass
class RunDatasetSection:
    params: LoaderParams = field(default_factory=LoaderParams)


@dataclass
class OptimizerParams:
    learning_rate: float = setting(1e-4, "peak learning rate", **WEIGHT)
    scale_lr: bool = setting(False, "multiply the rate by the rows of an optimiser step, over all processes")
    beta1: float = setting(0.9, "decay of the first moment", low=0, below=1)
    beta2: float = setting(0.999, "decay of the second moment", low=0, below=1)
    weight_decay: float = setting(0.01, "of weight matrices; biases and norms have none", **WEIGHT)
    epsilon: float = setting(1e-8, "added to the root of the second moment", above=0, high=1)


@dataclass
class OptimizerSection:
    name: str = setting(
        "adamw", "optimiser; adamw8bit: bitsandbytes' with moments in 8 bits", choices=("adamw", "adamw8bit")
    )
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class SchedulerParams:
    learning_rate: float = repeats("optimizer.params.learning_rate")
    warmup_steps: int = setting(5000, "steps in which the rate rises from 0", low=0, high=MOST_STEPS)
    num_training_steps: int | None = setting(
        None, "steps over which the rate decays; null: training.max_train_steps", **STEPS, free=True
    )


@dataclass
class SchedulerSection:
    scheduler: str = setting(
        "cosine",
        "course of the learning rate after the warm-up",
        choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    )
    params: SchedulerParams = field(default_factory=SchedulerParams)


@dataclass
class LoopSection(SeedSection):
    # The random numbers of a training include numpy's, whose seeds are shorter.
    seed: int | None = setting(10086, "fixes every random choice; null: others every time", low=0, high=2**32 - 1)
    gradient_accumulation_steps: int = setting(1, "batches of an optimiser step", low=1, high=2**20)
    mixed_precision: str = setting("bf16", "precision of the forward pass", choices=("no", "bf16", "fp16"))
    enable_tf32: bool = setting(True, "TF32 for fp32 matrix products on GPUs", free=True)
    # Free: it says how long the run is, and the log says what becomes of the rate.
    max_train_steps: int = setting(500000, "optimiser steps of the run", low=0, high=MOST_STEPS, free=True)
    overfit_one_batch: bool = setting(False, "repeat the first batch for ever, to see that the loss falls")
    max_grad_norm: float | None = setting(None, "clip gradients to this norm; null: do not", **WEIGHT)
    max_nonfinite_batches: int | None = setting(
        10,
        "skipped batches with NaN or Inf losses before the run ends; null: no check",
        low=0,
        high=MOST_STEPS,
        free=True,
    )
    ema_decay: float | None = setting(
        None, "keep a moving average of the weights, which is saved and sampled from; null: none", low=0, below=1
    )


@dataclass
class RunConfig(ScriptConfig):
    """What every trained thing has. A subclass gives `task` a default and adds its own sections."""

    PURPOSE: ClassVar[str] = "training"
    EXAMPLE: ClassVar[str] = "config=configs/showo_tiny_train.yaml"
    INSTEAD: ClassVar[dict[str, str]] = {"dtype": "training.mixed_precision"}

    task: str = setting("???", "what is trained: a module of training/tasks")
    output_dir: str = alias("experiment.output_dir")
    experiment: RunExperimentSection = field(default_factory=RunExperimentSection)
    dataset: RunDatasetSection = field(default_factory=RunDatasetSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    lr_scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    training: LoopSection = field(default_factory=LoopSection)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        if config.device in (None, "cpu", "cuda"):
            return []
        return [
            f"device is {config.device!r}, but the launcher gives each process its GPU; omit it and set "
            "CUDA_VISIBLE_DEVICES"
        ]


# ---- training of Show-o ----


@dataclass
class ShowoExperimentSection(RunExperimentSection):
    max_train_examples_t2i: int | None = setting(None, "samples of an epoch of the t2i flow; null: all", **STEPS)
    max_train_examples_mmu: int | None = setting(None, "samples of an epoch of the mmu flow; null: all", **STEPS)
    max_train_examples_mixed: int | None = setting(None, "samples of an epoch of the mixed flow; null: all", **STEPS)


@dataclass
class TrainedShowoSection(ShowoSection):
    load_from_showo: bool = setting(True, "false: start from the weights of llm_model_path")
    qk_norm: bool | None = setting(None, "normalise queries and keys; null: as the family does (models/backbones.py)")


@dataclass
class TrainedModelSection(ModelSection):
    showo: TrainedShowoSection = field(default_factory=TrainedShowoSection)
    gradient_checkpointing: bool = setting(True, "recompute activations instead of keeping them: less memory, slower")


@dataclass
class AugmentationSection(PreprocessingSection):
    center_crop: bool = setting(False, "no effect: images are always centre-cropped, as published")
    random_flip: bool = setting(False, "mirror images at random; documents never are")
    und_random_flip: bool = setting(False, "mirror images of the mmu flow only")
    und_jitter: float = setting(0.0, "shift and scale images of the mmu flow by up to this share", low=0, high=0.5)


@dataclass
class DataParams(LoaderParams, PromptParams):
    train_t2i_shards_path_or_url: Any = setting(None, "data of the t2i flow: shards or ImageNet's folder", is_data=True)
    train_mmu_shards_path_or_url: Any = setting(None, "data of the mmu flow: shards or a LLaVA JSON", is_data=True)
    train_lm_shards_path_or_url: Any = setting(None, "data of the lm flow: parquet, jsonl or txt", is_data=True)
    train_mixed_shards_path_or_url: Any = setting(
        None, "documents of the mixed flow: shards, parquet, json, jsonl or csv (docs/data.md)", is_data=True
    )
    train_t2i_image_root: str | None = setting(
        None, "folder of the file names in parquet files; null: that of the parquet file", is_data=True
    )
    train_mmu_image_root: str | None = setting(None, "folder of the image names in a LLaVA JSON", is_data=True)
    train_mixed_image_root: str | None = setting(
        None, "folder of the image names in documents; those that are not there: that of the file", is_data=True
    )
    eval_t2i_shards_path_or_url: Any = setting(None, "held-out data; null: none", is_data=True, free=True)
    eval_mmu_shards_path_or_url: Any = setting(None, "held-out data; null: none", is_data=True, free=True)
    eval_lm_shards_path_or_url: Any = setting(None, "held-out data; null: none", is_data=True, free=True)
    eval_mixed_shards_path_or_url: Any = setting(None, "held-out data; null: none", is_data=True, free=True)
    eval_t2i_image_root: str | None = setting(None, "null: as for training", is_data=True, free=True)
    eval_mmu_image_root: str | None = setting(None, "null: as for training", is_data=True, free=True)
    eval_mixed_image_root: str | None = setting(None, "null: as for training", is_data=True, free=True)
    class_names_path: str | None = setting(
        None, "imagenet1k: a file with the name of each class folder, one per line or as JSON"
    )
    image_column: str | None = setting(None, "of parquet files with images; null: the first with a usual name")
    text_column: str | None = setting(None, "of parquet files with images; null: the first with a usual name")
    lm_column: str = setting("content", "text column of parquet and jsonl files of the lm flow")
    add_caption_prompt: bool = setting(True, "ask for a caption before each caption of the mmu flow")
    external_caption_path: str | None = setting(None, "folder of better captions; the next three are read with it only")
    external_journeydb_caption_path: str | None = setting(None, "JourneyDB's JSON of captions")
    external_laion12m_caption_path: str | None = setting(None, "folder of captions for LAION shards")
    external_cc12m_caption_path: str | None = setting(None, "folder of captions for CC12M shards")
    resolution: int = repeats("dataset.preprocessing.resolution")
    batch_size: int | None = repeats("training.batch_size")


@dataclass
class DatasetSection(RunDatasetSection):
    gen_type: str = setting("t2i", "data of the t2i flow", choices=("imagenet1k", "t2i", "t2i_parquet"))
    und_type: str = setting(
        "captioning",
        "data of the mmu flow",
        choices=("captioning", "captioning_parquet", "llava_pretrain", "llava_tuning"),
    )
    combined_loader_mode: str = setting(
        "max_size_cycle", "which flow's end is that of the epoch", choices=("max_size_cycle", "min_size")
    )
    add_system_prompt: bool = setting(False, "begin conversations with LLaVA's system prompt")
    packing: bool = setting(False, "several samples in a row, so that no padding is computed; same losses")
    packing_length: int | None = setting(
        None, "maximum length of a packed row; null: four times an ordinary row's", low=1, high=2**20
    )
    params: DataParams = field(default_factory=DataParams)
    preprocessing: AugmentationSection = field(default_factory=AugmentationSection)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        found = []
        if config.dataset.packing and config.compile and config.attn_implementation == "sdpa":
            found.append(
                "dataset.packing with compile=true recompiles at every step under attn_implementation=sdpa; give "
                "flex_attention, or drop one of the two"
            )
        if config.dataset.add_system_prompt and config.conversation == "chat":
            found.append(
                "dataset.add_system_prompt has no effect with conversation=chat, whose template has its own; leave it "
                "out"
            )
        if config.dataset.packing_length is not None and not config.dataset.packing:
            found.append("dataset.packing_length has no effect without dataset.packing=true")
        return found


@dataclass
class MixedSection:
    max_length: int | None = setting(
        None,
        "tokens of a document, which is cut after whole segments; null: of four learned images, each with a text",
        low=1,
        high=2**20,
    )
    history: str = setting(
        "clean",
        "what sees a learned image; clean: a clean copy follows the masked one; masked: one copy, as in the paper; "
        "prefix: images before a random one are clean and not learned, as in Show-o2",
        choices=("clean", "masked", "prefix"),
    )
    history_dropout_prob: float = setting(
        0.5, "share of documents without texts, for guidance, whose earlier images are hidden too", low=0, high=1
    )
    text_weight: float = setting(0.2, "weight of the texts beside the images in the mixed loss", **WEIGHT)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        if not (config.training.batch_size_mixed and config.model.showo.w_clip_vit):
            return []
        return [
            "training.batch_size_mixed is not 0, but documents cannot be read with CLIP-ViT features "
            "(model.showo.w_clip_vit=true); give training.batch_size_mixed=0, or train on image codes with "
            "training/train.py"
        ]


@dataclass
class TrainingSection(LoopSection, GenerationSection):
    noise_type: str = setting("mask", "noise on image tokens", choices=("mask", "random_replace"))
    share_code_bits: bool = setting(
        False, "a code's row of the embeddings is trained as its own vector and one for each bit of the code"
    )
    predict_all_tokens: bool = setting(False, "t2i loss at all image tokens, not at masked ones only")
    eval_mask_ratios: list[float] | None = setting(
        None, "evaluate t2i at these too; null: as in training", low=0, high=1, free=True
    )
    mask_contiguous_region_prob: float | None = setting(
        None, "share of images whose masked tokens are one rectangle", low=0, high=1
    )
    pre_encode: bool = setting(False, "no effect; tools/encode_images.py encodes shards", choices=(False,))
    batch_size_t2i: int = setting(10, "rows of the t2i flow in a batch; 0: off", low=0, high=TOKENS)
    batch_size_lm: int = setting(4, "rows of the lm flow in a batch; 0: off", low=0, high=TOKENS)
    batch_size_mmu: int = setting(10, "rows of the mmu flow in a batch; 0: off", low=0, high=TOKENS)
    batch_size_mixed: int = setting(0, "rows of the mixed flow in a batch; 0: off", low=0, high=TOKENS)
    trainable: str = setting(
        "all",
        "new: only what the language model did not have (docs/backbones.md); lora: an adapter (docs/finetuning.md)",
        choices=("all", "new", "lora"),
    )
    cond_dropout_prob: float = setting(0.1, "share of prompts that are left out, for guidance", low=0, high=1)
    min_masking_rate: float = setting(0.0, "least share of masked image tokens", low=0, high=1)
    label_smoothing: float = setting(0.0, "of the t2i loss", low=0, high=1)
    t2i_coeff: float = setting(1.0, "weight of the t2i loss", **WEIGHT)
    lm_coeff: float = setting(0.1, "weight of the lm loss", **WEIGHT)
    mmu_coeff: float = setting(1.0, "weight of the mmu loss", **WEIGHT)
    mixed_coeff: float = setting(1.0, "weight of the mixed loss", **WEIGHT)
    und_mask_ratio: float = setting(
        0.0, "mask a random share, up to this one, of the image tokens of mmu rows", low=0, high=1
    )
    vq_dtype: str = setting("fp32", "of the image tokenizer; bf16 changes some codes", choices=("fp32", "bf16"))
    vq_compile: bool = setting(False, "run the image tokenizer's encoder through torch.compile")


@dataclass
class LoraSection:
    rank: int = setting(16, "width of the two small matrices beside each adapted one", low=1, high=4096)
    alpha: float = setting(32.0, "the adapter's output is multiplied by alpha / rank", above=0, high=10**6)
    dropout: float = setting(0.0, "of the adapter's input", low=0, below=1)
    targets: str = setting("all", "adapted layers; all: of attention and MLP", choices=("all", "attention"))
    new: bool = setting(
        False, "also train whole what trainable=new trains: rows of new ids, added norms, projector (larger files)"
    )
    dora: bool = setting(False, "DoRA: the length of each row of the weights is trained by itself")
    base: str = setting("fp32", "of the frozen weights; nf4: QLoRA, by torchao", choices=("fp32", "bf16", "nf4"))

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        if config.training.trainable != "lora":
            changed = [name for name, value in config.lora.items() if value != getattr(LoraSection, name)]
            return [f"lora.{name} has no effect without training.trainable=lora" for name in changed]
        if config.lora.dora and config.lora.base == "nf4":
            return ["lora.dora=true needs the lengths of weights, which lora.base=nf4 has not; give lora.base=bf16"]
        if config.lora.new and config.lora.base != "fp32":
            return [f"lora.new=true trains weights themselves, in fp32, but lora.base is {config.lora.base}; give fp32"]
        if config.model.showo.w_clip_vit and config.dataset.und_type == "llava_pretrain":
            return [
                "training.trainable=lora with dataset.und_type=llava_pretrain, which trains mm_projector alone, would "
                "train nothing; give training.trainable=all"
            ]
        return []


@dataclass
class TrainingConfig(ShowoScript, RunConfig):
    """Settings of training/train.py and train_w_clip_vit.py."""

    task: str = "showo"
    validation_prompts_file: str = alias("dataset.params.validation_prompts_file")
    experiment: ShowoExperimentSection = field(default_factory=ShowoExperimentSection)
    model: TrainedModelSection = field(default_factory=TrainedModelSection)
    dataset: DatasetSection = field(default_factory=DatasetSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    lora: LoraSection = field(default_factory=LoraSection)
    mixed: MixedSection = field(default_factory=MixedSection)

    @staticmethod
    def unread(config: DictConfig) -> list[str]:
        """The data paths of flows that are off, and of captions that no flow reads, which need not exist."""
        sizes = OmegaConf.to_container(config.training, resolve=False)
        off = [key.removeprefix("batch_size_") for key in sizes if key.startswith("batch_size_") and sizes[key] == 0]
        kinds = {"t2i": config.dataset.gen_type, "mmu": config.dataset.und_type}
        reads_captions = any(kind in ("t2i", "captioning") for flow, kind in kinds.items() if flow not in off)
        captions = [name for name in config.dataset.params if name.startswith("external_")]
        return data_paths(config, off) + [f"dataset.params.{name}" for name in captions if not reads_captions]


def data_paths(config: DictConfig, flows: Iterable[str]) -> list[str]:
    """The keys of these flows' paths, for training and evaluation."""
    starts = tuple(f"{split}_{flow}_" for split in ("train", "eval") for flow in flows)
    return [f"dataset.params.{name}" for name in config.dataset.params if name.startswith(starts)]


# ---- inference ----


@dataclass
class InferenceDatasetSection:
    preprocessing: PreprocessingSection = field(default_factory=PreprocessingSection)


@dataclass
class PromptedDatasetSection(InferenceDatasetSection):
    params: PromptParams = field(default_factory=PromptParams)


# Ways to sample images as their authors do: keys that `sampler` sets (docs/performance.md).
SAMPLERS = {
    "published": {},
    "halton": {
        "sampling.order": "halton_roll",
        "sampling.logit_scale": 1.2,
        "mask_schedule.schedule": "arccos",
    },
    "ml_cache": {
        "sampling.refresh_every": 5,
        "sampling.refresh_share": 0.1,
        "sampling.refresh_warmup": 0.3,
    },
}


@dataclass
class SamplingSection:
    """`SamplingParameters` of `models/generation/sampling.py`."""

    order: str = setting(
        "confidence",
        "in which positions become known",
        choices=("confidence", "entropy", "margin", "halton", "halton_roll"),
    )
    top_k: int | None = setting(None, "codes are sampled among this many; null: all", low=1, high=IDS)
    top_p: float | None = setting(None, "codes are sampled among those of this probability", above=0, high=1)
    logit_scale: float = setting(1.0, "factor of the logits of codes in the last step, from 1 on", above=0, high=100)
    guidance_start: float = setting(0.0, "guidance from this share of the steps on", low=0, high=1)
    guidance_stop: float = setting(1.0, "guidance up to this share of the steps", low=0, high=1)
    guidance_ramp: float = setting(0.0, "guidance rises with this power of the step; 0: constant", low=0, high=100)
    remask: str = setting("cap", "ReMDM's form of masking known tokens again", choices=("cap", "rescale", "confidence"))
    remask_rate: float = setting(0.0, "how often known tokens are masked again; 0: never", low=0, high=1)
    remask_start: float = setting(0.0, "masking again from this share of the steps on", low=0, high=1)
    remask_stop: float = setting(1.0, "masking again up to this share of the steps", low=0, high=1)
    refresh_every: int = setting(
        1, "compute all keys and values every so many steps; in between, some tokens keep theirs", low=1, high=TOKENS
    )
    refresh_share: float = setting(
        1.0, "share of the unknown tokens, the least sure ones, that are computed in between", above=0, high=1
    )
    refresh_warmup: float = setting(0.0, "compute all of them up to this share of the steps", low=0, high=1)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        sampling, found = config.sampling, []
        for name in ("guidance", "remask"):
            start, stop = sampling[f"{name}_start"], sampling[f"{name}_stop"]
            if start > stop:
                span = f"{start} and {stop}; the first must not be larger"
                found.append(f"sampling.{name}_start and sampling.{name}_stop are {span}")
        if sampling.remask != "cap" and sampling.remask_rate == 0:
            found.append(
                f"sampling.remask={sampling.remask} has no effect without sampling.remask_rate; give 0.1 or so"
            )
        return found


@dataclass
class PipelineConfig(ShowoScript, ScriptConfig):
    """What the inference scripts and evaluate.py have: the model, and how it generates images and answers."""

    PURPOSE: ClassVar[str] = "inference"
    INSTEAD: ClassVar[dict[str, str]] = {"training.mixed_precision": "dtype"}

    batch_size: int = alias("training.batch_size")
    guidance_scale: float = alias("training.guidance_scale")
    generation_timesteps: int = alias("training.generation_timesteps")
    generation_temperature: float = alias("training.generation_temperature")
    sampler: str = setting(
        "published", "a name for several keys of sampling and mask_schedule", choices=tuple(SAMPLERS), presets=SAMPLERS
    )
    max_new_tokens: int = setting(100, "longest answer, in tokens", low=1, high=TOKENS)
    temperature: float = setting(1.0, "of answers; images have generation_temperature", **WEIGHT)
    top_k: int | None = setting(1, "answers choose among this many tokens; 1: greedy; null: all", low=1, high=IDS)
    top_p: float | None = setting(None, "answers choose among the tokens of this probability", above=0, high=1)
    dtype: str | None = setting(
        None, "precision of the weights; null: bf16 on a GPU, fp32 on a CPU", choices=("fp32", "bf16", "fp16")
    )
    cpu_kernels: bool = setting(True, "on a CPU in fp32: faster products for few rows, the same tokens")
    adapter: str | None = setting(None, "LoRA on the model: a run of training.trainable=lora, a folder or hub name")
    quantization: str | None = setting(
        None, "of the decoder layers' weights (docs/finetuning.md); an adapter is merged first", choices=QUANTIZATIONS
    )
    experiment: ExperimentSection = field(default_factory=ExperimentSection)
    model: ModelSection = field(default_factory=ModelSection)
    dataset: InferenceDatasetSection = field(default_factory=InferenceDatasetSection)
    training: GenerationSection = field(default_factory=GenerationSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)


@dataclass
class ResultsConfig(PipelineConfig):
    """What the inference scripts have, which write a folder of results."""

    output_dir: str | None = setting(None, "null: {experiment.output_dir}/{mode}, or /mmu", is_output=True)
    overwrite: bool = setting(False, "remove what earlier runs wrote into output_dir, instead of adding to it")


@dataclass
class InferenceConfig(ResultsConfig):
    """Settings of inference_t2i.py and inference_mmu.py, with the published command-line keys (spec §13)."""

    mode: str | None = setting(None, "what inference_t2i.py does", choices=("t2i", "inpainting", "extrapolation"))
    prompt: str | None = setting(None, "what to generate; ' *** ' separates several", is_prose=True)
    validation_prompts_file: str = alias("dataset.params.validation_prompts_file")
    image_path: str | None = setting(None, "image to inpaint or extrapolate")
    inpainting_mask_path: str | None = setting(None, "image whose white regions are regenerated")
    extra_direction: str | None = setting(None, "left, right, up or down; ' *** ' separates several, taken in turn")
    keep_outside_mask: bool = setting(False, "inpainting keeps the pixels, not only the tokens, of black regions")
    offset: int = setting(0, "shifts what extrapolation keeps, in tokens", low=-TOKENS, high=TOKENS)
    num_images_per_prompt: int | None = setting(
        None, "null: 1, but batch_size for inpainting and extrapolation, as published", **ROWS
    )
    seed_per_image: bool = setting(False, "a seed for each image: that of the run plus its number within the run")
    question: str | None = setting(
        "", "what to ask about every image; ' *** ' separates several; null: the caption", is_prose=True
    )
    mmu_image_root: str | None = setting(None, "folder of images to ask about, or one image")
    mmu_together: bool = setting(False, "ask about all images together, instead of about each")
    dataset: PromptedDatasetSection = field(default_factory=PromptedDatasetSection)


@dataclass
class MixedInferenceConfig(ResultsConfig):
    """Settings of inference_mixed.py."""

    PURPOSE: ClassVar[str] = "inference_mixed.py"

    mode: str | None = setting(None, "what comes after what is given", choices=("edit", "story", "free"))
    prompt: str | None = setting(
        None, "the instruction, a story's first text, or any text; ' *** ' separates several", is_prose=True
    )
    image_path: str | None = setting(None, "image or folder of images; ' *** ' separates several")
    documents: str | None = setting(None, "jsonl of segments to go on with, instead of prompt and image_path")
    num_images: int = setting(3, "images of a story", low=1, high=100)
    max_images: int = setting(4, "mode=free: most new images of a document", low=0, high=100)
    max_new_tokens: int = setting(200, "longest new text, in tokens", low=1, high=TOKENS)
    null: str | None = setting(
        None,
        "what guidance leads away from; text: the document without its texts, all: without anything; null: text for "
        "edits, else all",
        choices=("text", "all"),
    )
    text_guidance_scale: float | None = setting(
        None, "with the next one instead of guidance_scale: towards the texts, given the images; 1: none", **WEIGHT
    )
    image_guidance_scale: float | None = setting(None, "towards the images; 1: none", **WEIGHT)

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        found, scales = [], ("text_guidance_scale", "image_guidance_scale")
        given = [key for key in scales if config[key] is not None]
        if len(given) == 1:
            (other,) = set(scales) - set(given)
            found.append(f"{given[0]} is given and {other} is not; give both or none")
        if given and config.null is not None:
            found.append(f"null has no effect with {given[0]}, which leads away from both; leave it out")
        return found


@dataclass
class AppConfig(PipelineConfig):
    """Settings of app.py."""

    PURPOSE: ClassVar[str] = "the page"

    checkpoint: str | None = setting(
        None, "folder or hub name of a whole model, instead of the config's; ' *** ' separates several to choose from"
    )
    host: str = setting("127.0.0.1", "address to listen at; 0.0.0.0: every network of this machine")
    port: int = setting(7860, "0: any that is free", low=0, high=65535)
    root_path: str | None = setting(None, "path under which a proxy shows the page, such as /show-o")
    example_images: str = setting("inpainting_validation", "folder of images to inpaint and extrapolate")
    example_images_of_questions: str = setting("mmu_validation", "folder of images to ask about")
    example_questions: list[str] = setting(["What is this?", "Please describe this image in detail."], "to choose from")
    example_instructions: list[str] = setting(["make it red", "on a white ground"], "of edits, to choose from")
    validation_prompts_file: str = alias("dataset.params.validation_prompts_file")
    dataset: PromptedDatasetSection = field(default_factory=PromptedDatasetSection)


def mask_schedule_of(config: DictConfig) -> tuple[str, dict[str, Any]]:
    """Name and parameters of the mask schedule: the section `mask_schedule`, else `training.mask_schedule`."""
    section = config.mask_schedule
    return section.schedule or config.training.mask_schedule, OmegaConf.to_container(section.params)
