"""What `evaluate.py` reads beside the settings of the model and its generation."""

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import DictConfig

from common.schema import PipelineConfig
from common.settings import setting


@dataclass
class EvaluationConfig(PipelineConfig):
    PURPOSE: ClassVar[str] = "evaluation"

    output_dir: str | None = setting(None, "null: {experiment.output_dir}/evaluation", is_output=True)
    max_new_tokens: int | None = setting(None, "longest answer, in tokens; null: each task's own", low=1, high=2**20)
    tasks: str | None = setting(None, "names, separated by commas")
    data_root: str = setting("data/benchmarks", "holds the official files, laid out as docs/evaluation.md says")
    max_items: int | None = setting(None, "at most so many of each task, spread evenly; null: all", low=1)
    compare: str | None = setting(None, "two finished output folders or two checkpoints, separated by a comma")
    bootstrap_samples: int = setting(1000, "resamplings for confidence intervals", low=100, high=100_000)
    vqav2_split: str = setting(
        "val",
        "test-dev and test have no public answers: predictions for the server only",
        choices=("val", "test-dev", "test"),
    )
    mmmu_split: str = setting("validation", "part of MMMU", choices=("dev", "validation", "test"))
    geneval_repository: str | None = setting(
        None, "a clone of the official one; runs its script where mmdet is installed"
    )
    geneval_detector: str | None = setting(None, "folder with that detector's weights")
    coco_captions: str | None = setting(
        None, "within data_root, in the form of captions_val2014.json, which is the default"
    )
    coco_scores: str = setting("fid,clip", "fid, clip or fid,clip")
    clip_score_model: str = setting("openai/clip-vit-large-patch14", "CLIP of the CLIPScore: a folder or hub name")
    fid_features: str | None = setting(None, "a TorchScript network in place of torchmetrics' Inception")
    fid_weights: str | None = setting(None, "a file with that Inception's weights; null: from the hub")
    fid_size: int = setting(256, "pixels per side of the images that FID and rFID compare", low=8, high=4096)
    reconstruction_images: str | None = setting(None, "a folder of images")
    reconstruction_fid: bool = setting(True, "rFID too")
    editing_triples: str | None = setting(
        None, "json, jsonl, csv, tsv or parquet: before, instruction, after of each edit, and perhaps a mask"
    )
    editing_image_root: str | None = setting(None, "a folder that their images are in; null: that of the file")
    editing_clip: bool = setting(True, "CLIP's similarity to the right image too")
    emoji_world: str = setting("emoji_world", "the folder in data_root that `make data-emoji` wrote")
    scenes_samples: int = setting(100, "scenes of each kind and split in the tasks of the scene world", low=1)
    flickr30k_prompt: str = setting(
        "Provide a one-sentence caption for the provided image.", "question asked about every image", is_prose=True
    )

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        found = []
        if not set(scores := config.coco_scores.split(",")) <= {"fid", "clip"} or len(set(scores)) < len(scores):
            found.append(f"coco_scores is {config.coco_scores!r}; allowed: fid, clip or fid,clip")
        if not config.flickr30k_prompt.strip():
            found.append("flickr30k_prompt is empty; it is the question asked about every image")
        return found
