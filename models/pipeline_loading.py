"""Finds, checks and loads the components of a `ShowoPipeline`. All cheap checks run before any weights are read."""

import logging
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from llava import QuestionFormat
from models.backbones import DEFAULT_LLM
from models.checkpoint_io import TOKENIZER_FILES, check_state_dict, load_weights_file, read_json, resolve_folder
from models.clip_encoder import CLIP_VIT_L_336, CLIPVisionTower
from models.generation import cpu
from models.modeling_magvitv2 import MAGVITv2, MAGVITv2Config
from models.modeling_showo import Showo, ShowoConfig
from models.prompting import UniversalPrompting
from models.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

PUBLISHED_VQ = "showlab/magvitv2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = ("vocab_size", "llm_vocab_size", "num_new_special_tokens", "codebook_size", "w_clip_vit")


@dataclass
class Source:
    """Folder or hub name of every component, and the settings to run them with.

    Args:
        llm: source of the text tokenizer and the language model's config; default: as named by the Showo checkpoint.
        vq_weights: a file whose weights replace those of `vq_model` (`vq_model.pretrained_model_path`).
        sizes: section `model.showo` of a script's config, which must agree with the checkpoint.
    """

    showo: str
    vq_model: str = PUBLISHED_VQ
    llm: str | None = None
    clip: str = CLIP_VIT_L_336
    vq_weights: str | None = None
    max_seq_length: int = 128
    resolution: int | None = None
    sizes: object | None = None
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    attn_implementation: str = "sdpa"
    compile: bool = False
    cpu_kernels: bool = True
    conversation: str = "vicuna"

    @classmethod
    def of_folder(cls, name_or_path: str | Path, **settings) -> "Source":
        """A Showo checkpoint, or a folder with sub-folders `showo/`, `magvitv2/`, `llm/` and optionally `clip/`."""
        given = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        given = {key: value for key, value in given.items() if value is not None}
        folder = Path(name_or_path).expanduser()
        if (folder / "showo").is_dir():
            parts = {"showo": "showo", "vq_model": "magvitv2", "llm": "llm", "clip": "clip"}
            inside = {key: str(folder / part) for key, part in parts.items() if (folder / part).is_dir()}
            return cls(**inside | given)
        return cls(str(name_or_path), **given)

    @classmethod
    def of_config(cls, config) -> "Source":
        """The components that a script's config (`InferenceConfig`) names, with relative paths as in the scripts."""
        showo, vq_model = config.model.showo, config.model.vq_model
        return cls(
            showo=_located(showo.pretrained_model_path),
            vq_model=_located(vq_model.vq_model_name),
            llm=_located(showo.llm_model_path),
            clip=_located(config.model.clip_vit_name),
            vq_weights=_located(vq_model.pretrained_model_path),
            max_seq_length=config.dataset.preprocessing.max_seq_length,
            resolution=config.dataset.preprocessing.resolution,
            sizes=showo,
            **{
                key: config[key]
                for key in ("device", "dtype", "attn_implementation", "compile", "cpu_kernels", "conversation")
            },
        )


def load(source: Source) -> dict:
    """Loads the arguments of `ShowoPipeline`: `model`, `vq_model`, `prompting`, `resolution`, `clip`, `conversation`.

    Raises:
        UserError: a component is missing, broken, or does not match the others.
    """
    device = choose_device(source.device)
    dtype = choose_dtype(source.dtype, device)
    folder, vq_folder = resolve_folder(source.showo), resolve_folder(source.vq_model)
    llm = source.llm or read_json(folder / "config.json").get("llm_model_path", DEFAULT_LLM)
    prompting = load_prompting(llm, source.max_seq_length)
    config = read_showo_config(folder, llm, source.sizes)
    check_text_tokenizer(llm, prompting, config)
    check_conversation(source.conversation, prompting, config)
    check_image_tokenizer(source, config, MAGVITv2._read_config(vq_folder, {}))
    settings = {"dtype": dtype, "attn_implementation": source.attn_implementation}
    with without_loading_bars():
        clip = load_clip(source.clip, config.clip_feature_size).to(device) if config.w_clip_vit else None
        vq_model = load_magvitv2(vq_folder, source.vq_weights).to(device)
        model = Showo.from_pretrained(folder, config=config, **settings).to(device)
    if source.compile:
        model.compile_steps()
    elif source.cpu_kernels and device.type == "cpu":
        cpu.enable(model)
    parts = {"model": model, "vq_model": vq_model, "prompting": prompting, "clip": clip}
    parts["conversation"] = source.conversation
    return parts | {"resolution": source.resolution}


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hides transformers' progress bars over tensors, which only copy within memory. Download bars stay."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _located(name: str | None) -> str | None:
    """Resolves a path as the scripts do (current folder, then repository); returns hub names unchanged."""
    from common.config import resolve_path

    return str(resolve_path(name)) if name and resolve_path(name).exists() else name


# ---- device and dtype ----


def choose_device(name: str | torch.device | None) -> torch.device:
    """The named device; by default a GPU if there is one. Raises `UserError` if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"device={name} cannot be used ({reason}); give cpu, or cuda on a machine with a GPU") from None
    return device


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of this name; by default bf16 on a GPU and fp32 elsewhere."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name] if isinstance(name, str) else name


# ---- the components ----


def load_prompting(llm: str, max_seq_length: int) -> UniversalPrompting:
    """The text tokenizer of a language model, with Show-o's tokens added; `UserError` if there is none."""
    try:
        # without this, transformers would retry every file of a hub name when there is no network
        folder = resolve_folder(llm, TOKENIZER_FILES) if "/" in llm else llm
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
        return UniversalPrompting(tokenizer, max_text_len=max_seq_length)
    except Exception as error:  # missing files, no network and broken JSON raise a dozen unrelated classes
        remedy = (
            "copy its tokenizer files again"
            if Path(llm).is_dir()
            else "it is not a local folder and could not be fetched from the hub: give the path of a folder with it"
        )
        raise UserError(
            f"no usable tokenizer in model.showo.llm_model_path={llm} ({_reason(error)}); {remedy}"
        ) from error


def read_showo_config(folder: Path, llm: str, sizes=None) -> ShowoConfig:
    """The configuration of a Showo folder; `UserError` if a script's config says otherwise."""
    config = Showo._read_config(folder, {"llm_model_path": llm})
    for key in SIZES if sizes is not None else ():
        if getattr(config, key) != getattr(sizes, key):
            raise UserError(
                f"model.showo.{key} is {getattr(sizes, key)}, but the checkpoint {folder} has {getattr(config, key)}; "
                "use the checkpoint's value, or another checkpoint"
            )
    if sizes is not None and config.num_vq_tokens != sizes.num_vq_tokens:
        logger.warning("%s was trained with %d image tokens, not %d", folder, config.num_vq_tokens, sizes.num_vq_tokens)
    return config


def load_magvitv2(folder: Path, weights_file: str | None = None) -> MAGVITv2:
    """The image tokenizer in fp32, with the folder's weights or those of `weights_file`."""
    if weights_file is None:
        return MAGVITv2.from_pretrained(folder)
    state_dict = load_weights_file(weights_file)
    model = MAGVITv2(MAGVITv2._read_config(folder, {}))
    check_state_dict(weights_file, model.state_dict(), state_dict)
    model.load_state_dict(state_dict)
    return model


def load_clip(name: str, feature_size: int) -> CLIPVisionTower:
    """The CLIP vision tower in fp32; `UserError` if it is missing or its width is not that of the projector."""
    folder = resolve_folder(name)
    if (kind := read_json(folder / "config.json").get("model_type")) not in ("clip", "clip_vision_model"):
        raise UserError(f"model.clip_vit_name={name} holds a {kind!r} model, expected a CLIP (vision) model")
    try:
        tower = CLIPVisionTower(folder)
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"model.clip_vit_name={name} holds no readable CLIP vision model ({_reason(error)})") from error
    width = tower.vision_tower.config.hidden_size
    if width != feature_size:
        raise UserError(
            f"model.clip_vit_name={name} has features of size {width}, but the checkpoint expects {feature_size}; "
            f"the published one is {CLIP_VIT_L_336}"
        )
    return tower


# ---- consistency checks ----


def check_config(config) -> None:
    """Checks that need nothing but a script's config; `UserError` if its sizes are inconsistent."""
    sizes, resolution = config.model.showo, config.dataset.preprocessing.resolution
    if not sizes.pretrained_model_path:
        raise UserError("model.showo.pretrained_model_path is not given; set it to a checkpoint folder or a hub name")
    try:
        vocab_size = Vocabulary(sizes.llm_vocab_size, sizes.num_new_special_tokens, sizes.codebook_size).vocab_size
    except ValueError as error:
        raise UserError(f"model.showo: {error}") from None
    if sizes.vocab_size != vocab_size:
        raise UserError(
            f"model.showo.vocab_size is {sizes.vocab_size}, but llm_vocab_size + num_new_special_tokens + "
            f"codebook_size + 1 is {vocab_size}; they must agree"
        )
    side = math.isqrt(max(sizes.num_vq_tokens, 0))
    if side < 2 or side**2 != sizes.num_vq_tokens:
        raise UserError(f"model.showo.num_vq_tokens is {sizes.num_vq_tokens}, expected a square such as 256 or 1024")
    published = config.model.vq_model.vq_model_name == PUBLISHED_VQ
    _check_resolution(resolution, side, MAGVITv2Config().downsampling_factor if published else resolution // side)


def check_text_tokenizer(llm: str, prompting: UniversalPrompting, config: ShowoConfig) -> None:
    """Refuses a tokenizer whose length is not the model's text vocabulary: all special and image ids would shift."""
    found = prompting.vocabulary.llm_vocab_size
    if found != config.llm_vocab_size:
        raise UserError(
            f"the tokenizer in model.showo.llm_model_path={llm} has {found} tokens, but llm_vocab_size is "
            f"{config.llm_vocab_size}; give the tokenizer the model was trained with"
        )


def check_conversation(conversation: str, prompting: UniversalPrompting, config: ShowoConfig) -> None:
    """Refuses an unknown question format, and ``chat`` for a tokenizer without a usable chat template."""
    try:
        QuestionFormat.of(conversation, prompting.tokenizer, config.w_clip_vit)
    except ValueError as error:
        raise UserError(f"conversation={conversation}: {error}") from None


def check_image_tokenizer(source: Source, config: ShowoConfig, vq_config: MAGVITv2Config) -> None:
    """Refuses an image tokenizer that has fewer codes than the model, or does not match the resolution."""
    if vq_config.codebook_size < config.codebook_size:
        raise UserError(
            f"model.vq_model.vq_model_name={source.vq_model} has {vq_config.codebook_size} codes, the model "
            f"{config.codebook_size}; give the image tokenizer the model was trained with"
        )
    if vq_config.codebook_size > config.codebook_size:
        logger.warning("%s has more codes than the model's %d", source.vq_model, config.codebook_size)
    if source.resolution is not None:
        num_vq_tokens = (source.sizes or config).num_vq_tokens
        _check_resolution(source.resolution, math.isqrt(num_vq_tokens), vq_config.downsampling_factor)


def _check_resolution(resolution: int, side: int, factor: int) -> None:
    if factor < 1 or side * factor != resolution:
        raise UserError(
            f"dataset.preprocessing.resolution={resolution} does not match model.showo.num_vq_tokens={side**2}"
            + (f": with {factor} pixels per token {side**2} tokens make {side * factor} pixels" if factor else "")
        )


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
