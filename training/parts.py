"""Builds and checks the models of a run from its configuration (spec §12)."""

from pathlib import Path

from transformers import AutoTokenizer

from common.config import mask_schedule_of, resolve_path
from common.errors import UserError
from models import MAGVITv2, Showo, ShowoConfig, UniversalPrompting, get_mask_schedule
from models.backbones import DEFAULT_LLM, read_llm_config
from models.checkpoint_io import resolve_folder
from models.clip_encoder import read_clip_config
from models.pipeline_loading import load_magvitv2, without_loading_bars
from training.batches import FLOWS, BatchBuilder
from training.masking import MaskingNoise
from training.packing import PACKED_SDPA


def make_model(config, start: Path | None = None) -> Showo:
    """The initial model: a checkpoint, a language model's weights, or (without a path) random weights.

    Args:
        start: folder of the weights to resume from; takes precedence over `experiment.init_from`, and that over
            `model.showo`.

    Raises:
        UserError: the weights are missing or do not match the sizes of the configuration.
    """
    settings = config.model.showo
    keys = ("llm_vocab_size", "vocab_size", "codebook_size", "num_vq_tokens", "num_new_special_tokens")
    keys += ("w_clip_vit", "qk_norm")
    llm = settings.llm_model_path or DEFAULT_LLM
    llm_path = str(resolve_path(llm))
    source = start or config.experiment.init_from
    try:
        showo_config = ShowoConfig(
            llm_model_path=llm,  # as given, so that no absolute path is saved
            llm_config=read_llm_config(llm_path),
            attn_implementation=_attention(config),
            **_feature_size(config),
            **{key: settings[key] for key in keys},
        )
        if source is None and not settings.load_from_showo:
            return Showo.from_llm(showo_config, llm_path).train()
    except (ValueError, OSError) as error:
        raise UserError(f"model.showo: {str(error).splitlines()[0]}") from error
    source = source or settings.pretrained_model_path
    if source is None:
        return Showo(showo_config).train()
    # Faithful: the CLIP-ViT branch may start from a checkpoint trained on image codes, without a projector (spec §12).
    allowed = ("mm_projector.",) if settings.w_clip_vit else ()
    folder = weights_folder(resolve_path(source))
    with without_loading_bars():
        return Showo.from_pretrained(str(folder), config=showo_config, allow_missing=allowed).train()


def _attention(config) -> str:
    """The attention implementation; for packed rows, a variant of sdpa that runs sample by sample."""
    return (
        PACKED_SDPA if config.dataset.packing and config.attn_implementation == "sdpa" else config.attn_implementation
    )


def weights_folder(path: Path) -> Path:
    """The folder of a checkpoint's weights: in a training checkpoint `unwrapped_model`."""
    return path / "unwrapped_model" if (path / "unwrapped_model").is_dir() else path


def _feature_size(config) -> dict[str, int]:
    """The width of the CLIP features, the projector's input, as a setting of `ShowoConfig`."""
    if not config.model.showo.w_clip_vit:
        return {}
    folder = resolve_folder(resolve_path(config.model.clip_vit_name))
    return {"clip_feature_size": read_clip_config(folder).hidden_size}


def make_vq_model(config) -> MAGVITv2:
    """The frozen image tokenizer, fp32 and outside autocast."""
    section = config.model.vq_model
    weights = section.pretrained_model_path
    folder = resolve_folder(resolve_path(section.vq_model_name))
    with without_loading_bars():
        model = load_magvitv2(folder, str(resolve_path(weights)) if weights else None)
    if config.training.vq_compile:
        model.encoder.compile()
    return model.requires_grad_(False).eval()


def check_sizes(config, vq_model: MAGVITv2) -> None:
    """Checks that image tokenizer, resolution and model match.

    Raises:
        UserError: they do not.
    """
    showo, resolution = config.model.showo, config.dataset.preprocessing.resolution
    codes, factor = vq_model.config.codebook_size, vq_model.config.downsampling_factor
    if codes != showo.codebook_size:
        raise UserError(
            f"model.showo.codebook_size is {showo.codebook_size}, but the image tokenizer has {codes} codes; "
            "change one of them"
        )
    if resolution % factor:
        raise UserError(f"dataset.preprocessing.resolution is {resolution}; it must be a multiple of {factor}")
    if (resolution // factor) ** 2 != showo.num_vq_tokens:
        raise UserError(
            f"dataset.preprocessing.resolution {resolution} makes {(resolution // factor) ** 2} image tokens, but "
            f"model.showo.num_vq_tokens is {showo.num_vq_tokens}; change one of them"
        )


def make_prompting(config) -> UniversalPrompting:
    """The text tokenizer with the special tokens.

    Raises:
        UserError: it cannot be loaded, or its length is not `llm_vocab_size`.
    """
    path, expected = config.model.showo.llm_model_path or DEFAULT_LLM, config.model.showo.llm_vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(resolve_path(path)), padding_side="left")
        max_text_len = config.dataset.preprocessing.max_seq_length
        prompting = UniversalPrompting(tokenizer, max_text_len, cond_dropout_prob=config.training.cond_dropout_prob)
    except (ValueError, OSError) as error:
        raise UserError(f"model.showo.llm_model_path {path!r}: {str(error).splitlines()[0]}") from error
    found = prompting.vocabulary.llm_vocab_size
    if found != expected:
        raise UserError(
            f"model.showo.llm_vocab_size is {expected}, but the tokenizer of {path} has {found} entries; set "
            f"{found}, and model.showo.vocab_size to match"
        )
    return prompting


def make_builder(
    config, model: Showo, vq_model: MAGVITv2, prompting: UniversalPrompting, understanding, device
) -> BatchBuilder:
    training, vocabulary = config.training, model.vocabulary
    schedule, params = mask_schedule_of(config)
    noise = MaskingNoise(
        get_mask_schedule(schedule, **params),
        vocabulary.mask_token_id,
        vocabulary.image_offset,
        vocabulary.codebook_size,
        min_masking_rate=training.min_masking_rate,
        contiguous_region_prob=training.mask_contiguous_region_prob,
        noise_type=training.noise_type,
        predict_all_tokens=training.predict_all_tokens,
    )
    row_length = model.config.num_vq_tokens + 3 + prompting.max_text_len
    return BatchBuilder(
        prompting,
        vq_model,
        noise,
        understanding,
        row_length,
        device,
        packing_length=_packing_length(config, row_length),
        bf16=training.vq_dtype == "bf16",
        coefficients={name: training[f"{name}_coeff"] for name in FLOWS},
        label_smoothing=training.label_smoothing,
    )


def _packing_length(config, row_length: int) -> int | None:
    """Length limit of packed rows, by default that of four rows; None without sample packing.

    Raises:
        UserError: shorter than the longest sample.
    """
    dataset = config.dataset
    if not dataset.packing:
        return None
    longest = dataset.packing_length or 4 * row_length
    if longest < row_length:
        raise UserError(
            f"dataset.packing_length is {longest}, but a sample may have {row_length} positions; give that or more"
        )
    return longest
