"""What `evaluate.py` reads beside the settings of inference."""

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import II, DictConfig

from common.config import InferenceConfig
from common.schema import find_problems

VQAV2_SPLITS = ("val", "test-dev", "test")
MMMU_SPLITS = ("dev", "validation", "test")


@dataclass
class EvaluationConfig(InferenceConfig):
    ALIASES: ClassVar[dict[str, str]] = InferenceConfig.ALIASES
    output_dir: str | None = None  # null: {experiment.output_dir}/evaluation
    batch_size: int = II("training.batch_size")
    max_new_tokens: int | None = None  # null: each task's own

    tasks: str | None = None  # names, separated by commas
    data_root: str = "data/benchmarks"  # holds the official files, laid out as docs/evaluation.md says
    max_items: int | None = None  # at most so many of each task, spread evenly over its files; null: all
    compare: str | None = None  # two finished output folders or two checkpoints, separated by a comma
    bootstrap_samples: int = 1000
    vqav2_split: str = "val"  # test-dev and test have no public answers: predictions for the server only
    mmmu_split: str = "validation"
    geneval_repository: str | None = None  # a clone of the official one; runs its script where mmdet is installed
    geneval_detector: str | None = None  # folder with that detector's weights
    coco_captions: str | None = None  # within data_root, in the form of captions_val2014.json, which is the default
    coco_scores: str = "fid,clip"
    clip_score_model: str = "openai/clip-vit-large-patch14"  # hub name or folder
    fid_features: str | None = None  # a TorchScript network in place of torchmetrics' Inception
    fid_weights: str | None = None  # a file with that Inception's weights; null: from the hub
    fid_size: int = 256  # pixels per side of the images that FID and rFID compare
    reconstruction_images: str | None = None  # a folder of images
    reconstruction_fid: bool = True
    emoji_world: str = "emoji_world"  # the folder in data_root that `make data-emoji` wrote
    flickr30k_prompt: str = "Provide a one-sentence caption for the provided image."

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        found = find_problems(config)
        for key, allowed in (("vqav2_split", VQAV2_SPLITS), ("mmmu_split", MMMU_SPLITS)):
            if config[key] not in allowed:
                found.append(f"{key} is {config[key]!r}; allowed: {', '.join(allowed)}")
        if not set(scores := config.coco_scores.split(",")) <= {"fid", "clip"} or len(set(scores)) < len(scores):
            found.append(f"coco_scores is {config.coco_scores!r}; allowed: fid, clip or fid,clip")
        for key, low in (("max_items", 1), ("bootstrap_samples", 100), ("fid_size", 8)):
            if config[key] is not None and config[key] < low:
                found.append(f"{key} is {config[key]}; it must be {low} or more")
        if not config.flickr30k_prompt.strip():
            found.append("flickr30k_prompt is empty; it is the question asked about every picture")
        return found
