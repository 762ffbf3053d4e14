"""The three data flows of a run: which source and which transform a configuration means (spec §15, docs/data.md).

A sample is ``{"image": (3, res, res) float32 in [-1, 1], "text": str}``; with ``"codes"``, (N,) int64, in place of the
image where shards hold codes, ``"pixel_values"``, (3, S, S), in the CLIP-ViT branch, and ``"input_ids"`` and
``"labels"``, (L,) int64, in place of the text where it is a conversation. A language sample is a text.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.config import resolve_path
from common.errors import UserError
from llava import ChatFormat, encode_conversation, encode_plain
from training.data.flow_paths import LLAVA, FlowPaths, all_or_problems
from training.data.image_text import Captions, ExternalCaptions, ImageTextSample, ImageTransform
from training.data.imagenet import ImageFolder
from training.data.json_records import JsonTable
from training.data.language import Documents, text_sample
from training.data.llava import LlavaRecords, LlavaSample
from training.data.parquet import IMAGE_COLUMNS, TEXT_COLUMNS, ParquetUnits
from training.data.paths import JSON, PARQUET, has_suffix
from training.data.shards import ShardUnits, check_codes, manifests, promised_samples, read_shards, tokenizer_sha256
from training.data.sources import Epochs, Resampled, Source
from training.data.streams import Flow


def build_flows(
    config,
    *,
    process: int = 0,
    num_processes: int = 1,
    tokenizer=None,
    image_processor=None,
    split: str = "train",
    text_length: int | None = None,
) -> dict[str, Flow]:
    """The flows ``t2i``, ``lm``, ``mmu`` whose batch size is not 0.

    Args:
        config: a `TrainingConfig`.
        process, num_processes: which share of the data this process reads.
        tokenizer: of the model; flows of conversations cannot be read without one.
        image_processor: CLIP's, for the images of the mmu flow in the CLIP-ViT branch.
        split: ``train``, or ``eval``: the held-out data of the `eval_*` paths, in an order that is the same in every
            run, without augmentation, read by this process itself. Flows without such a path are absent.
        text_length: tokens of a conversation that a row has room for; `max_seq_length` if not given.

    Raises:
        UserError: paths are not set or missing (all of them in one message), or their content does not match.
    """
    setup = _Setup(config, split, tokenizer, image_processor, text_length)
    names = setup.places.check_all()
    sources = dict(zip(names, all_or_problems(partial(setup.source, name) for name in names), strict=True))
    if config.dataset.combined_loader_mode == "min_size" and split == "train":
        end_together(sources, setup.places.batch_sizes)
    shares = {"process": process, "num_processes": num_processes}
    return {
        name: Flow(source, setup.transform(name), setup.places.batch_sizes[name], **shares, **setup.reading(name))
        for name, source in sources.items()
    }


def check_data(config) -> None:
    """Whether all paths of training and evaluation exist; reads none of them.

    Raises:
        UserError: paths are not set or missing, all of them in one message.
    """
    all_or_problems(FlowPaths(config, split).check_all for split in ("train", "eval"))


def check_tokenizer(config, vq_model) -> None:
    """Whether shards of codes were made with the image tokenizer of the run, as far as their manifests tell.

    Raises:
        UserError: with another one.
    """
    made_with = {}
    for split in ("train", "eval"):
        places = FlowPaths(config, split)
        for name in set(places.check_all()) - {"lm"}:
            for file, manifest in manifests(places.files(name)).items():
                if found := manifest.get("tokenizer_sha256"):
                    made_with[file] = found
    own = tokenizer_sha256(vq_model) if made_with else None
    if wrong := sorted(file for file, found in made_with.items() if found != own):
        raise UserError(
            f"{wrong[0]}: these codes were made with another image tokenizer than model.vq_model names; encode the "
            "images again with tools/encode_images.py, or name that tokenizer"
        )


def end_together(sources: dict[str, Source], batch_sizes: dict[str, int]) -> None:
    """`min_size`: every source begins its next epoch when the shortest, in steps, has ended one."""
    steps = [source.samples / batch_sizes[name] for name, source in sources.items() if source.samples]
    for name, source in sources.items():
        if steps:
            source.samples = max(1, round(min(steps) * batch_sizes[name]))


class _Setup:
    """The flows of one split, according to a configuration."""

    def __init__(self, config, split: str, tokenizer, image_processor, text_length: int | None):
        self.config, self.training, self.params = config, split == "train", config.dataset.params
        self.places = FlowPaths(config, split)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.text_length = text_length or config.dataset.preprocessing.max_seq_length

    def source(self, name: str) -> Source:
        """The source of a flow."""
        kind, paths, params = self.places.kinds[name], self.places.files(name), self.params
        samples = self.config.experiment[f"max_train_examples_{name}"] if name != "lm" and self.training else None
        if Path(paths[0]).is_dir():
            return Epochs(ImageFolder(paths[0], _resolved(params.class_names_path)), samples)
        if has_suffix(paths[0], PARQUET):
            return Epochs(ParquetUnits(paths, *self.columns(name), params.shuffle_buffer_size), samples)
        if name == "lm":
            return Epochs(Documents(paths, params.lm_column), samples)
        if kind in LLAVA and has_suffix(paths[0], JSON):
            return Epochs(LlavaRecords(paths), samples)
        check_codes(paths, self.code_sizes(), self.image_transform(name).refuses_codes())
        promised = promised_samples(paths)
        if not self.training:
            return Epochs(ShardUnits(paths, promised))
        return Resampled(partial(read_shards, paths, params.shuffle_buffer_size, promised), samples)

    def columns(self, name: str) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Parquet columns of a flow, and the keys that name them."""
        params = self.params
        if name == "lm":
            return {"text": (params.lm_column,)}, {"text": "dataset.params.lm_column"}
        image, text = params.image_column, params.text_column
        names = {"image": (image,) if image else IMAGE_COLUMNS, "text": (text,) if text else TEXT_COLUMNS}
        return names, {key: f"dataset.params.{key}_column" for key in names}

    def code_sizes(self) -> dict[str, int]:
        """The values that a manifest of codes must have."""
        model, resolution = self.config.model.showo, self.config.dataset.preprocessing.resolution
        return {"resolution": resolution, "num_vq_tokens": model.num_vq_tokens, "codebook_size": model.codebook_size}

    def transform(self, name: str) -> Callable:
        """The transform of raw samples to samples."""
        kind, images = self.places.kinds[name], self.image_transform(name)
        if name == "lm":
            return text_sample
        if kind in LLAVA:
            plain = kind == "llava_pretrain" and self.image_processor is not None
            encode = encode_plain if plain else self.encode_conversation()
            return LlavaSample(images, encode, self.tokenizer, self.text_length)
        external = self.external_captions() if kind in ("t2i", "captioning") else None
        instructions = name == "mmu" and self.params.add_caption_prompt
        return ImageTextSample(images, Captions(external, instructions, shorten=name == "t2i"))

    def encode_conversation(self) -> Callable:
        """Turns and tokenizer → a sample, in the format that `conversation` names."""
        if self.config.conversation != "chat":
            return encode_conversation
        try:
            return ChatFormat.of(self.tokenizer).encode
        except ValueError as error:
            raise UserError(f"conversation=chat: {error}") from None

    def image_transform(self, name: str) -> ImageTransform:
        preprocessing, model = self.config.dataset.preprocessing, self.config.model.showo
        understanding = name == "mmu"
        flip = preprocessing.random_flip or (understanding and preprocessing.und_random_flip)
        return ImageTransform(
            preprocessing.resolution,
            model.num_vq_tokens,
            model.codebook_size,
            flip=flip and self.training,
            jitter=preprocessing.und_jitter if understanding and self.training else 0.0,
            processor=self.image_processor if understanding else None,
            root=self.places.image_root(name),
        )

    def external_captions(self) -> ExternalCaptions | None:
        params = self.params
        if not params.external_caption_path:
            return None
        folders = [params[f"external_{key}caption_path"] for key in ("", "laion12m_", "cc12m_")]
        table = _resolved(params.external_journeydb_caption_path)
        return ExternalCaptions(*map(_resolved, folders), JsonTable(table) if table else None)

    def reading(self, name: str) -> dict[str, Any]:
        """Arguments of `Flow`."""
        params = self.params
        return {
            "name": name,
            "seed": f"{self.config.training.seed or 0}/{name}" if self.training else f"eval/{name}",
            "num_workers": params.num_workers if self.training else 0,
            "max_skipped_fraction": params.max_skipped_fraction,
            "pin_memory": params.pin_memory,
            "persistent_workers": params.persistent_workers,
        }


def _resolved(path: str | None) -> str | None:
    return str(resolve_path(path)) if path else None
