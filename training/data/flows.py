"""The three data flows of a training step: where their raw samples come from and how one becomes an item (SPEC §15).

An image item is ``{"image": (3, res, res) float32 in [-1, 1], "text": str}``, a language item is a text.
"""

import glob
import io
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import braceexpand
import torch
import webdataset
from PIL import Image

from common.config import REPOSITORY, resolve_path
from common.errors import UserError
from models.images import preprocess
from training.data.streams import Flow

CAPTION_INSTRUCTIONS = (
    "Describe this image.",
    "What does the picture show?",
    "Give a short description of the image.",
    "Please caption this picture.",
    "Tell me what you see in this image.",
    "What can be seen here?",
    "Write a caption for the image.",
    "Summarise the content of this picture.",
    "Explain what is in this image.",
    "What is depicted in the picture?",
)
MAX_LM_CHARACTERS = 8000
SUPPORTED_KINDS = {"t2i": ("gen_type", "t2i"), "mmu": ("und_type", "captioning")}
IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp")
TEXT_SUFFIXES = ("text", "txt", "caption")


def expand_paths(setting: str, value) -> list[str]:
    """Existing files of a path, a brace list (``train-{000000..000003}.tar``), a glob, or several of them.

    Raises:
        UserError: the setting is empty, or a file does not exist.
    """
    if not value:
        example = f"{setting}=data/train-{{000000..000009}}.tar"
        raise UserError(f"{setting} is not set; give the path of the data, for example {example}")
    paths = []
    for item in [value] if isinstance(value, str) else value:
        for path in braceexpand.braceexpand(item):
            paths += _matches(path) or [str(resolve_path(path))]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"{setting}: {len(missing)} of {len(paths)} files do not exist, first {missing[0]}")
    return paths


def _matches(pattern: str) -> list[str]:
    """Files that a pattern with ``*`` or ``?`` means here, else in the repository; none for a plain path."""
    if not any(c in pattern for c in "*?"):
        return []
    return sorted(glob.glob(pattern)) or sorted(glob.glob(str(REPOSITORY / pattern)))


# ---- raw samples: a seed → an endless iterator ----


def read_shards(urls: list[str], buffer_size: int, seed: int) -> Iterator[dict]:
    """Undecoded samples of WebDataset shards, drawn with replacement and mixed in a buffer."""
    shards = webdataset.ResampledShards(urls, seed=seed, worker_seed=lambda: 0, deterministic=True)
    samples = webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue)(shards)
    return _mixed(samples, buffer_size, random.Random(seed))


def _mixed(samples: Iterator, buffer_size: int, rng: random.Random) -> Iterator:
    """Each sample waits in a buffer for a random time."""
    buffer = []
    for sample in samples:
        if len(buffer) < buffer_size:
            buffer.append(sample)
            continue
        if buffer:
            index = rng.randrange(len(buffer))
            buffer[index], sample = sample, buffer[index]
        yield sample


def read_texts(paths: list[str], seed: int) -> Iterator[str]:
    """Column ``content`` of parquet files, files and row groups in random order, endless."""
    import pyarrow.parquet

    rng = random.Random(seed)
    groups = []
    for path in paths:
        file = pyarrow.parquet.ParquetFile(path)
        if "content" not in file.schema_arrow.names:
            raise UserError(f"{path} has no column 'content'; its columns are {', '.join(file.schema_arrow.names)}")
        groups += [(path, index) for index in range(file.num_row_groups)]
    while True:
        for path, index in rng.sample(groups, len(groups)):
            table = pyarrow.parquet.ParquetFile(path).read_row_group(index, columns=["content"])
            texts = table.column("content").to_pylist()
            yield from rng.sample(texts, len(texts))


# ---- transforms: a raw sample and its own random numbers → an item ----


def image_text_item(
    raw: dict, rng: random.Random, *, resolution: int, flip: bool, jitter: float, add_caption_prompt: bool
) -> dict | None:
    """One picture with its text; None when either cannot be read."""
    data = next((raw[s] for s in IMAGE_SUFFIXES if s in raw), None)
    text = next((raw[s] for s in TEXT_SUFFIXES if s in raw), None)
    if data is None or text is None:
        return None
    try:
        text = text.decode("utf-8").strip()
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except Exception:  # decoders of broken files raise almost anything, even SyntaxError
        return None
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if jitter:
        image = jittered(image, jitter, rng)
    if add_caption_prompt:
        text = f"USER: \n{rng.choice(CAPTION_INSTRUCTIONS)} ASSISTANT: {text}"
    return {"image": preprocess(image, resolution), "text": text}


def jittered(image: Image.Image, amount: float, rng: random.Random) -> Image.Image:
    """Shifted and scaled by up to `amount` (a share of the size); the rim takes the colour of the top left corner."""
    width, height = image.size
    scale = 1 + rng.uniform(-amount, amount)
    shift_x, shift_y = (rng.uniform(-amount, amount) * side for side in image.size)
    matrix = (scale, 0, width / 2 * (1 - scale) + shift_x, 0, scale, height / 2 * (1 - scale) + shift_y)
    corner = image.getpixel((0, 0))
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=corner)


def text_item(raw: str | None, rng: random.Random) -> str | None:
    """Newlines removed; texts over 8000 characters cut to a random window; None for an empty one."""
    text = (raw or "").replace("\n", "")
    if len(text) > MAX_LM_CHARACTERS:
        start = rng.randrange(len(text) - MAX_LM_CHARACTERS)
        text = text[start : start + MAX_LM_CHARACTERS]
    return text or None


# ---- flows ----


def build_flows(config, *, process: int = 0) -> dict[str, Flow]:
    """The flows ``t2i``, ``lm``, ``mmu`` whose batch size is not 0.

    Raises:
        UserError: a source is not set or missing (all of them in one message), or its kind is not supported.
    """
    training, params, preprocessing = config.training, config.dataset.params, config.dataset.preprocessing
    problems, flows = [], {}
    shared = {"process": process, "num_workers": params.num_workers}
    for name in ("t2i", "lm", "mmu"):
        batch_size = training[f"batch_size_{name}"]
        if batch_size == 0:
            continue
        try:
            setting = f"dataset.params.train_{name}_shards_path_or_url"
            _check_kind(config, name)
            paths = expand_paths(setting, params[f"train_{name}_shards_path_or_url"])
        except UserError as error:
            problems.append(str(error))
            continue
        if name == "lm":
            read, transform = partial(read_texts, paths), text_item
        else:
            read = partial(read_shards, paths, params.shuffle_buffer_size)
            augmented = name == "mmu"
            transform = partial(
                image_text_item,
                resolution=preprocessing.resolution,
                flip=preprocessing.random_flip or (augmented and preprocessing.und_random_flip),
                jitter=preprocessing.und_jitter if augmented else 0.0,
                add_caption_prompt=augmented and params.add_caption_prompt,
            )
        flows[name] = Flow(read, transform, batch_size, seed=f"{training.seed or 0}/{name}", **shared)
    if problems:
        raise UserError("; ".join(problems))
    if not flows:
        raise UserError("training.batch_size_t2i, batch_size_lm and batch_size_mmu are all 0; nothing to train on")
    return flows


def _check_kind(config, flow: str) -> None:
    key, supported = SUPPORTED_KINDS.get(flow, (None, None))
    if key and config.dataset[key] != supported:
        given = config.dataset[key]
        raise UserError(f"dataset.{key} is {given!r}; this version trains from {supported!r} (WebDataset shards)")


def collate_images(items: list[dict]) -> tuple[torch.Tensor, list[str]]:
    """(B, 3, res, res) pixels and B texts."""
    return torch.stack([item["image"] for item in items]), [item["text"] for item in items]
