"""The keys of a model's `config.json` and their ranges, compared before anything is built from them.

Without it a size that cannot be ends in a traceback deep in a library, and one beyond reason in an endless loop or
without memory. Keys that are not listed stay as they are.
"""

import os
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from transformers.activations import ACT2FN

from common.schema import MagvitSection, TrainedShowoSection
from common.settings import Rule, Setting, settings_of

MOST_LEVELS = 12  # entries of a list


def within(hint: Any, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Setting:
    """A key whose value has the type `hint`, in this range; every entry of a list."""
    return Setting("", hint, Rule(low=low, high=high, choices=choices))


def size(high: int, low: int = 1, hint: Any = int) -> Setting:
    return within(hint, low, high)


SWITCH, SHARE = within(bool), within(float, 0, 1)
LABELS = size(2**12, 0)  # `transformers` makes a dictionary of so many names in every configuration
LLM_FIELDS = {
    "hidden_size": size(2**16),
    "intermediate_size": size(2**19),
    "num_hidden_layers": size(512),
    "num_attention_heads": size(2**12),
    "num_key_value_heads": size(2**12, hint=int | None),
    "head_dim": size(2**12, hint=int | None),
    "vocab_size": size(2**22),
    "max_position_embeddings": size(2**26),
    "hidden_act": within(str, choices=tuple(ACT2FN)),
    "initializer_range": within(float, 0, 10),
    "rms_norm_eps": SHARE,
    "layer_norm_eps": SHARE,
    "attention_dropout": SHARE,
    "embd_pdrop": SHARE,
    "resid_pdrop": SHARE,
    "partial_rotary_factor": within(float, 1e-3, 1),
    "rope_theta": within(float, 1e-3, 1e12),
    "factor": within(float, 1e-3, 1e6),
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": SWITCH,
}
CLIP_FIELDS = {
    **{key: LLM_FIELDS[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")},
    **{key: LLM_FIELDS[key] for key in ("num_attention_heads", "attention_dropout", "layer_norm_eps")},
    "image_size": size(2**13),
    "patch_size": size(2**10),
    "num_channels": size(3, 3),
}
SECTION = settings_of(TrainedShowoSection)
SHOWO_FIELDS = {
    **{key: SECTION[key] for key in ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens")},
    **{key: SECTION[key] for key in ("w_clip_vit", "qk_norm")},
    "llm_model_path": within(str),
    "num_new_special_tokens": size(2**12, 0),
    "clip_feature_size": size(2**16),
}
TOKENIZER_FIELDS = {"model_max_length": within(float, 1, 1e31)}
MAGVIT_FIELDS = settings_of(MagvitSection)


def check_fields(settings: Mapping[str, Any], fields: Mapping[str, Setting]) -> None:
    """Raises `ValueError` for the first of the settings that is not what its field says."""
    for key, field in {**fields, "num_labels": LABELS}.items():
        if key in settings and not _accepts(field.hint, field.rule, settings[key]):
            raise ValueError(f"{key} is {repr(settings[key])[:60]}; it must be {field.allowed}")


def _accepts(hint: Any, rule: Rule, value: Any) -> bool:
    """Whether a value has a type, of which a whole number is also a number and truth is none, and keeps a rule."""
    if get_origin(hint) is list:
        is_list = isinstance(value, list | tuple) and 0 < len(value) <= MOST_LEVELS
        return is_list and all(_accepts(get_args(hint)[0], rule, one) for one in value)
    kinds = get_args(hint) or (hint,)
    is_kind = type(value) in kinds or (type(value) is int and float in kinds)
    return is_kind and (value is None or rule.problem(value) is None)


def check_divides(settings: Mapping[str, Any], whole: str, part: str) -> None:
    """Raises `ValueError` unless the setting `whole` is a multiple of the setting `part`, where both are given."""
    if whole in settings and part in settings and settings[whole] % settings[part]:
        raise ValueError(f"{whole} is {settings[whole]}; it must be a multiple of {part} ({settings[part]})")


def check_memory(num_bytes: int, what: str) -> None:
    """Raises `ValueError` if this machine has less memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise ValueError(
            f"{what} would take {num_bytes / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f}; give smaller sizes"
        )
