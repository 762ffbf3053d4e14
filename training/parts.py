"""Builds the models of a run and its batch builder from its configuration."""

from pathlib import Path

from common.config import mask_schedule_of
from common.errors import UserError
from models import MAGVITv2, Showo, UniversalPrompting, get_mask_schedule
from models.loading import check_image_tokenizer, initial_showo, load_image_tokenizer, load_text_tokenizer
from training.batches import BatchBuilder
from training.loss import TASKS
from training.masking import MaskingNoise
from training.packing import PACKED_SDPA


def make_model(config, start: Path | None = None) -> Showo:
    """The initial model; `start`, the weights to resume from, takes precedence over `experiment.init_from`."""
    attention = config.attn_implementation
    if config.dataset.packing and attention == "sdpa":
        attention = PACKED_SDPA  # sample by sample
    source, clip = start or config.experiment.init_from, config.model.clip_vit_name
    return initial_showo(config.model.showo, source, clip_vit_name=clip, attn_implementation=attention).train()


def make_vq_model(config) -> MAGVITv2:
    """The frozen image tokenizer, fp32 and outside autocast; `UserError` if it does not fit resolution and model."""
    section, resolution = config.model.vq_model, config.dataset.preprocessing.resolution
    check_image_tokenizer(section.vq_model_name, config.model.showo, resolution)
    model = load_image_tokenizer(section.vq_model_name, section.pretrained_model_path)
    if config.training.vq_compile:
        model.encoder.compile()
    return model


def make_prompting(config) -> UniversalPrompting:
    """The text tokenizer with the special tokens."""
    showo, max_text_len = config.model.showo, config.dataset.preprocessing.max_seq_length
    dropout = config.training.cond_dropout_prob
    return load_text_tokenizer(showo.llm_model_path, showo.llm_vocab_size, max_text_len, cond_dropout_prob=dropout)


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
        coefficients=tuple(training[f"{task}_coeff"] for task in TASKS),
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
