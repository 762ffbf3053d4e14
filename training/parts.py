"""What a run is put together from, each made from the configuration and checked before a step is taken (SPEC §12)."""

import os

from accelerate import Accelerator
from transformers import AutoTokenizer

from common.config import mask_schedule_of, resolve_path
from common.errors import UserError
from models import MAGVITv2, Showo, ShowoConfig, UniversalPrompting, get_mask_schedule
from models.modeling_showo import read_llm_config
from training.batches import BatchBuilder
from training.masking import MaskingNoise


def make_accelerator(config) -> Accelerator:
    """Processes, precision and accumulation.

    Raises:
        UserError: several processes were launched that do not know of each other.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        mixed_precision=config.training.mixed_precision,
        cpu=config.device == "cpu",
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but this one trains with {accelerator.num_processes}; on CPUs set "
            "device=cpu or the environment variable ACCELERATE_USE_CPU=true"
        )
    return accelerator


def make_model(config) -> Showo:
    """The model a run starts from: a checkpoint, a language model's weights, or (no path) random weights."""
    settings = config.model.showo
    keys = ("llm_vocab_size", "vocab_size", "codebook_size", "num_vq_tokens", "num_new_special_tokens", "w_clip_vit")
    llm_path = str(resolve_path(settings.llm_model_path))
    try:
        showo_config = ShowoConfig(
            llm_model_path=settings.llm_model_path,  # as given, so that no path of this machine is saved
            llm_config=read_llm_config(llm_path),
            attn_implementation=config.attn_implementation,
            **{key: settings[key] for key in keys},
        )
        if not settings.load_from_showo:
            return Showo.from_llm(showo_config, llm_path).train()
    except (ValueError, OSError) as error:
        raise UserError(f"model.showo: {str(error).splitlines()[0]}") from error
    if settings.pretrained_model_path is None:
        return Showo(showo_config).train()
    folder = str(resolve_path(settings.pretrained_model_path))
    return Showo.from_pretrained(folder, config=showo_config).train()


def make_vq_model(config) -> MAGVITv2:
    """The frozen image tokenizer, fp32 and outside autocast."""
    name = config.model.vq_model.vq_model_name
    return MAGVITv2.from_pretrained(str(resolve_path(name))).requires_grad_(False).eval()


def check_sizes(config, vq_model: MAGVITv2) -> None:
    """Image tokenizer, resolution and model must agree before a step is taken.

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
        UserError: it cannot be loaded, or has another number of entries than the model's vocabulary leaves it.
    """
    path, expected = config.model.showo.llm_model_path, config.model.showo.llm_vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(resolve_path(path)), padding_side="left")
    except (ValueError, OSError) as error:
        raise UserError(f"model.showo.llm_model_path {path!r}: {str(error).splitlines()[0]}") from error
    max_text_len = config.dataset.preprocessing.max_seq_length
    prompting = UniversalPrompting(tokenizer, max_text_len, cond_dropout_prob=config.training.cond_dropout_prob)
    found = prompting.vocabulary.llm_vocab_size
    if found != expected:
        raise UserError(
            f"model.showo.llm_vocab_size is {expected}, but the tokenizer of {path} has {found} entries; set "
            f"{found}, and model.showo.vocab_size to match"
        )
    return prompting


def make_builder(config, model: Showo, vq_model: MAGVITv2, understanding, device) -> BatchBuilder:
    training, vocabulary = config.training, model.vocabulary
    prompting = make_prompting(config)
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
    return BatchBuilder(prompting, vq_model, noise, understanding, row_length, device)


def enable_gradient_checkpointing(model: Showo) -> None:
    """Under whichever name this version of transformers calls it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def read_prompts(file: str) -> list[str]:
    """Lines of a prompts file.

    Raises:
        UserError: the file is missing or has no prompt.
    """
    path = resolve_path(file)
    if not path.is_file():
        raise UserError(f"validation_prompts_file {file!r} does not exist; give a text file with one prompt per line")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"validation_prompts_file {file!r} is empty; write one prompt per line")
    return prompts
