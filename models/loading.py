"""Finds, checks and loads a Show-o and its parts, the same way for the pipeline, the scripts, evaluation and training.

A part is named by a folder, relative to the current folder or else to the repository, or by a hub name. Settings and
configurations are checked before any weights are read, and nothing that a checkpoint holds is executed.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, CLIPVisionConfig

from common.errors import UserError, first_line
from common.files import expand, field, make_folder, read_json, resolve_path, write_json
from llava import QuestionFormat
from models import adapters
from models.adapters import ADAPTER_FILES
from models.adapters import CONFIG as ADAPTER_CONFIG
from models.backbones import DEFAULT_LLM
from models.checkpoint_io import (
    CHECKPOINT_FILES,
    TOKENIZER_FILES,
    portable,
    quietly,
    replacing,
    resolve_folder,
)
from models.clip_encoder import CLIP_VIT_L_336, CLIPVisionTower, read_clip_config, read_image_processor
from models.config_fields import TOKENIZER_FIELDS, check_fields
from models.generation import cpu
from models.generation.sampling import Schedule
from models.modeling_magvitv2 import MAGVITv2, MAGVITv2Config
from models.modeling_showo import Showo, ShowoConfig
from models.prompting import UniversalPrompting
from models.quantization import quantize, require

if TYPE_CHECKING:
    from common.schema import ShowoSection, TrainedShowoSection

logger = logging.getLogger(__name__)

PUBLISHED_VQ = "showlab/magvitv2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = {"showo": "showo", "vq_model": "magvitv2", "llm": "llm", "clip": "clip"}  # sub-folders of a whole pipeline
PIPELINE_FILES = (*CHECKPOINT_FILES, "*.model")
INDEX, PIPELINE_CLASS = "model_index.json", "ShowoPipeline"
SAVED_SETTINGS = {"max_seq_length": int, "resolution": int, "conversation": str, "noise_schedule": str}
VOCABULARY_SIZES = ("vocab_size", "llm_vocab_size", "num_new_special_tokens", "codebook_size")


# ---- where to find and to run it ----


def located(name: str | Path) -> str:
    """Resolves an existing path as the scripts do (current folder, then repository); returns other names unchanged."""
    path = resolve_path(name)
    return str(path if path.exists() else name)


def find_folder(name: str | Path | None, files: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """The folder of a part: of a training checkpoint its `unwrapped_model/`, of a whole pipeline its `showo/`.

    Args:
        files: of a hub name, which are downloaded first.

    Raises:
        UserError: there is none, or it is a run's that has saved no final model yet, or that of an adapter where none
            is wanted.
    """
    if not name:
        raise UserError("model.showo.pretrained_model_path is not given; set it to a checkpoint folder or a hub name")
    folder = resolve_folder(located(name), files)
    for part in ("unwrapped_model", "showo"):
        if (folder / part).is_dir():
            folder = folder / part
            break
    if (folder / ADAPTER_CONFIG).exists():
        if files is not ADAPTER_FILES:
            base = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))[:80]
            raise UserError(
                f"{folder} holds an adapter, not a model; give the model that it was trained on ({base!r}) and "
                f"adapter={name}, or merge them by tools/export.py"
            )
        return folder
    if not (folder / "config.json").exists() and (saved := sorted(folder.glob("checkpoint-*/unwrapped_model"))):
        newest = max(saved, key=lambda place: (len(place.parent.name), place.parent.name)).parent
        raise UserError(f"{folder} is the folder of a run that has not ended; give its checkpoint {newest}")
    return folder


def find_adapter(name: str | Path) -> Path:
    """The folder of an adapter: a run's, its checkpoint's or its own, or a hub name; see `find_folder`."""
    try:
        return find_folder(name, ADAPTER_FILES)
    except UserError as error:
        raise UserError(f"adapter={name}: {error}") from None


def choose_device(name: str | torch.device | None) -> torch.device:
    """The named device; by default a GPU if there is one. Raises `UserError` if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={name} cannot be used ({first_line(error)}); give cpu, or cuda on a machine with a GPU"
        ) from None
    return device


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of this name; by default bf16 on a GPU and fp32 elsewhere. Raises `UserError` for any other."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype not in DTYPES.values():
        raise UserError(f"dtype is {name!r}, expected {', '.join(DTYPES)} or torch's own of this precision")
    return dtype


# ---- whether the sizes fit ----


def check_sizes(showo: ShowoSection, resolution: int, vq_model_name: str) -> None:
    """Checks that need the settings alone, so that they come before any download; `UserError` if sizes do not fit."""
    _new_config(showo, VOCABULARY_SIZES)
    published = MAGVITv2Config().downsampling_factor if vq_model_name == PUBLISHED_VQ else None
    _check_resolution(resolution, showo.num_vq_tokens, published)


def check_image_tokenizer(
    name: str, sizes: ShowoSection | ShowoConfig, resolution: int | None = None, *, more_codes: bool = False
) -> None:
    """Compares the configuration of an image tokenizer with the sizes of the model.

    Args:
        resolution: of the images; None: any.
        more_codes: whether it may have codes that the model does not know, which only decoding never meets.

    Raises:
        UserError: they do not fit.
    """
    config = MAGVITv2._read_config(find_folder(name), {})
    if config.codebook_size < sizes.codebook_size or config.codebook_size > sizes.codebook_size and not more_codes:
        raise UserError(
            f"model.vq_model.vq_model_name={name} has {config.codebook_size} codes, but model.showo.codebook_size is "
            f"{sizes.codebook_size}; give the image tokenizer that the model was trained with"
        )
    if config.codebook_size > sizes.codebook_size:
        logger.warning("%s has more codes than the model's %d", name, sizes.codebook_size)
    if resolution is not None:
        _check_resolution(resolution, sizes.num_vq_tokens, config.downsampling_factor)


def _check_resolution(resolution: int, num_vq_tokens: int, factor: int | None) -> None:
    """`factor`: pixels per token along one side; None: not known yet."""
    side = math.isqrt(max(num_vq_tokens, 0))
    if side < 2 or side**2 != num_vq_tokens:
        raise UserError(f"model.showo.num_vq_tokens is {num_vq_tokens}, expected a square such as 256 or 1024")
    if factor is not None and side * factor != resolution:
        raise UserError(
            f"dataset.preprocessing.resolution={resolution} does not match model.showo.num_vq_tokens={num_vq_tokens}: "
            f"with {factor} x {factor} pixels per token they make {side * factor} x {side * factor} pixels"
        )


def _new_config(section: ShowoSection, keys: Sequence[str], **settings) -> ShowoConfig:
    """A configuration with these keys of a section; `UserError` if sizes do not fit, or the language model does not."""
    try:
        return ShowoConfig(**{key: getattr(section, key) for key in keys}, **settings)
    except (ValueError, OSError) as error:
        raise UserError(f"model.showo: {first_line(error)}") from error


# ---- the parts ----


def load_text_tokenizer(
    name: str | None, llm_vocab_size: int, max_text_len: int = 128, **settings
) -> UniversalPrompting:
    """The text tokenizer of a language model, with Show-o's special tokens added.

    Args:
        name: of the language model; default: the published one.
        llm_vocab_size: ids it must have; with another number all special and image ids would shift.
        max_text_len, settings: see `UniversalPrompting`.

    Raises:
        UserError: there is no such tokenizer, it is unusable, or has another number of ids.
    """
    name = name or DEFAULT_LLM
    with _usable(f"model.showo.llm_model_path={name}", "tokenizer"):
        folder = find_folder(name, TOKENIZER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
        check_fields({"model_max_length": tokenizer.model_max_length}, TOKENIZER_FIELDS)
        prompting = UniversalPrompting(tokenizer, max_text_len, **settings)
    found = prompting.vocabulary.llm_vocab_size
    if found != llm_vocab_size:
        raise UserError(
            f"the tokenizer in model.showo.llm_model_path={name} has {found} tokens, but model.showo.llm_vocab_size is "
            f"{llm_vocab_size}; give the tokenizer that the model was trained with, or to a new model its number"
        )
    return prompting


def load_image_tokenizer(name: str, weights_file: str | None = None) -> MAGVITv2:
    """The image tokenizer in fp32, frozen, with the weights of its folder or those of `weights_file`; `UserError` if
    there is no such tokenizer or file, or the weights do not fit."""
    file = weights_file and located(weights_file)
    return MAGVITv2.from_pretrained(find_folder(name), weights_file=file).requires_grad_(False)


def load_clip(name: str, feature_size: int) -> CLIPVisionTower:
    """The CLIP vision tower in fp32; `UserError` if it is unusable, or its features are not as wide as they must be."""
    width = read_clip(name)[0].hidden_size
    if width != feature_size:
        raise UserError(
            f"model.clip_vit_name={name} has features of size {width}, but the checkpoint expects {feature_size}; "
            f"the published one is {CLIP_VIT_L_336}"
        )
    with _usable(f"model.clip_vit_name={name}", "CLIP vision model"):
        return CLIPVisionTower(find_folder(name))


def read_clip(name: str) -> tuple[CLIPVisionConfig, Any]:
    """The settings of a CLIP vision tower and its image processor; `UserError` if they are unusable."""
    with _usable(f"model.clip_vit_name={name}", "CLIP vision model"):
        folder = find_folder(name)
        config = read_clip_config(folder)
        return config, read_image_processor(folder, config)


@contextmanager
def _usable(place: str, what: str) -> Iterator[None]:
    """Turns what missing and damaged files raise, a dozen unrelated classes, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place} holds no usable {what} ({first_line(error)}); copy its files again") from error


def initial_showo(
    section: TrainedShowoSection,
    start: str | Path | None = None,
    *,
    clip_vit_name: str = CLIP_VIT_L_336,
    attn_implementation: str = "sdpa",
) -> Showo:
    """The model that a training starts from, in fp32: a checkpoint, a language model's weights, or random weights.

    Args:
        section: sizes, and what to start from: the weights of `llm_model_path`, those of `pretrained_model_path`, or
            (without a path) random ones.
        start: a checkpoint that takes precedence over the section's; whatever `find_folder` finds one in.
        clip_vit_name: with `w_clip_vit`, the tower whose features the projector takes.

    Raises:
        UserError: the weights are missing or do not match the sizes.
    """
    llm = section.llm_model_path or DEFAULT_LLM
    settings: dict[str, Any] = {"attn_implementation": attn_implementation}
    if section.w_clip_vit:
        settings["clip_feature_size"] = read_clip(clip_vit_name)[0].hidden_size
    keys = (*VOCABULARY_SIZES, "num_vq_tokens", "w_clip_vit", "qk_norm")
    config = _new_config(section, keys, llm_model_path=located(llm), **settings)
    config.llm_model_path = llm  # as given, so that no absolute path is saved
    start = start or (section.pretrained_model_path if section.load_from_showo else None)
    try:
        if start is not None:
            # Faithful: the CLIP-ViT branch may start from a checkpoint trained on image codes, without a projector
            # (spec §12).
            allowed = ("mm_projector.",) if section.w_clip_vit else ()
            model = Showo.from_pretrained(find_folder(start), config=config, allow_missing=allowed)
            model.config.name_or_path = str(start)  # as given
            return model
        return Showo.from_config(config) if section.load_from_showo else Showo.from_llm(config, located(llm))
    except ValueError as error:
        raise UserError(f"model.showo: {first_line(error)}") from error


# ---- the parts of a pipeline ----


def find_parts(name_or_path: str | Path) -> dict[str, Any]:
    """Arguments of `load_parts`: a Showo checkpoint, or sub-folders in `PARTS` and the settings that were saved."""
    folder = Path(located(name_or_path))
    if not (folder / "showo").is_dir():
        return {"showo": str(name_or_path)}
    found = {key: str(folder / part) for key, part in PARTS.items() if (folder / part).is_dir()}
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        found |= {key: field(index, key, kind, INDEX) for key, kind in SAVED_SETTINGS.items() if key in index}
    return found


def save_parts(
    folder: str | Path,
    model: Showo,
    vq_model: MAGVITv2,
    prompting: UniversalPrompting,
    clip: CLIPVisionTower | None,
    settings: dict[str, Any],
) -> None:
    """Writes what `find_parts` finds again; the folder is whole or absent, and files of others in it stay.

    Args:
        settings: of `SAVED_SETTINGS`.

    Raises:
        UserError: the folder holds anything but a pipeline that was saved, or cannot be written.
    """
    goal = Path(os.path.abspath(expand(folder)))
    if goal.is_symlink():
        raise UserError(f"{goal} is a link, which would be replaced; give the folder that it leads to")
    if goal.exists() and not (goal.is_dir() and not any(goal.iterdir())):
        index = goal / INDEX
        if not index.is_file() or read_json(index).get("_class_name") != PIPELINE_CLASS:
            raise UserError(f"{goal} exists and holds no pipeline that was saved by Show-o; give a new folder")
    make_folder(goal.parent)
    with replacing(goal) as new, quietly():
        named, model.config.llm_model_path = model.config.llm_model_path, portable(model.config.llm_model_path)
        try:
            model.save_pretrained(new / "showo")
        finally:
            model.config.llm_model_path = named
        vq_model.save_pretrained(new / "magvitv2")
        prompting.tokenizer.save_pretrained(new / "llm")
        write_json(new / "llm" / "config.json", model.config.llm_config)
        if clip is not None:
            clip.vision_tower.save_pretrained(new / "clip")
            clip.image_processor.save_pretrained(new / "clip")
        write_json(new / INDEX, {"_class_name": PIPELINE_CLASS} | settings)


def in_python(error: UserError) -> str:
    """The message of an error with the names of `from_pretrained` instead of a script's settings."""
    names = {
        "model.showo.pretrained_model_path": "name_or_path",
        "model.showo.llm_model_path": "llm",
        "model.vq_model.vq_model_name": "vq_model",
        "model.clip_vit_name": "clip",
    }
    return re.sub(r"\b(model|dataset)(\.\w+)+", lambda found: names.get(found[0], found[0].split(".")[-1]), str(error))


def load_parts(
    showo: str | None,
    *,
    vq_model: str = PUBLISHED_VQ,
    llm: str | None = None,
    clip: str = CLIP_VIT_L_336,
    vq_weights: str | None = None,
    max_seq_length: int = 128,
    resolution: int | None = None,
    section: ShowoSection | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    compile: bool = False,
    cpu_kernels: bool = True,
    conversation: str = "vicuna",
    noise_schedule: str | Schedule = "cosine",
    adapter: str | None = None,
    quantization: str | None = None,
) -> dict[str, Any]:
    """Loads the arguments of `ShowoPipeline`.

    Args:
        showo, vq_model, clip: names of the parts; `clip` is used with `w_clip_vit` only.
        llm: of the text tokenizer and the language model's config; default: as named by the Showo checkpoint.
        vq_weights: a file whose weights replace those of `vq_model`.
        section: settings whose sizes must be those of the checkpoint.
        device, dtype: see `choose_device` and `choose_dtype`; the dtype is that of `model` alone.
        compile, cpu_kernels: see `Showo.compile_steps` and `models/generation/cpu.py`; the first excludes the second.
        adapter: a folder that `adapters.load_adapter` reads, a run's or a hub name; it is put on `model`.
        quantization: int8, int4 or nf4, see `models/quantization.py`; an adapter is merged first.

    Raises:
        UserError: a part is missing, broken, or does not match the others.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    folder, adapter_folder = find_folder(showo), find_adapter(adapter) if adapter else None
    if adapter_folder:
        adapters.read_adapter_config(adapter_folder)
    if quantization:
        require("torchao", f"quantization={quantization}")
    config = Showo._read_config(folder, {"llm_model_path": located(llm)} if llm else {})
    if section is not None:
        _check_section(section, folder, config)
    prompting = load_text_tokenizer(config.llm_model_path, config.llm_vocab_size, max_seq_length)
    try:
        QuestionFormat.of(conversation, prompting.tokenizer, config.w_clip_vit)
    except ValueError as error:
        raise UserError(f"conversation={conversation}: {error}") from None
    check_image_tokenizer(vq_model, section or config, resolution, more_codes=True)
    tower = load_clip(clip, config.clip_feature_size).to(device) if config.w_clip_vit else None
    tokenizer = load_image_tokenizer(vq_model, vq_weights).to(device)
    settings = {"dtype": dtype, "attn_implementation": attn_implementation}
    model = Showo.from_pretrained(folder, config=config, **settings).to(device)
    if adapter_folder:
        adapters.load_adapter(model, adapter_folder)
    if quantization:
        if adapter_folder:
            adapters.merge_adapter(model)
        quantize(model, quantization)
    if compile:
        model.compile_steps()
    elif cpu_kernels and device.type == "cpu":
        cpu.enable(model)
    parts = {"model": model, "vq_model": tokenizer, "prompting": prompting, "clip": tower}
    return parts | {"resolution": resolution, "conversation": conversation, "noise_schedule": noise_schedule}


def _check_section(section: ShowoSection, folder: Path, config: ShowoConfig) -> None:
    for key in (*VOCABULARY_SIZES, "w_clip_vit"):
        given, stored = getattr(section, key), getattr(config, key)
        if given != stored:
            raise UserError(
                f"model.showo.{key} is {given}, but the checkpoint {folder} has {stored}; use the checkpoint's value, "
                "or another checkpoint"
            )
    if config.num_vq_tokens != section.num_vq_tokens:
        logger.warning(
            "%s was trained with %d image tokens, not %d", folder, config.num_vq_tokens, section.num_vq_tokens
        )
