"""The keys of a model's `config.json` and their ranges, compared before anything is built from them.

Without it a size that cannot be ends in a traceback deep in a library, and one beyond reason in an endless loop or
without memory. Keys that are not listed stay as they are.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.activations import ACT2FN

from common.files import KINDS


@dataclass(frozen=True)
class Field:
    """One key.

    Args:
        kind: type of the value; a float may be given as a whole number.
        low, high: the least and the greatest value; of a text the allowed ones are in `choices`.
        null: whether null is allowed.
        most: greatest length of a list of such values; None: no list.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    null: bool = False
    most: int | None = None

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.null
        if self.most is not None:
            one = Field(self.kind, self.low, self.high)
            return isinstance(value, list | tuple) and 0 < len(value) <= self.most and all(map(one.accepts, value))
        if type(value) is not self.kind and not (self.kind is float and type(value) is int):
            return False
        return value in self.choices if self.choices else self.kind in (bool, str) or self.low <= value <= self.high

    def __str__(self) -> str:
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = KINDS[self.kind] + (f" from {self.low:g} to {self.high:g}" if self.kind in (int, float) else "")
        words = words if self.most is None else f"a list of at most {self.most}, each {words}"
        return words + (" or null" if self.null else "")


def size(high: int, low: int = 1, **more) -> Field:
    return Field(int, low, high, **more)


SWITCH, SHARE = Field(bool), Field(float, 0, 1)
LABELS = size(2**12, 0)  # `transformers` makes a dictionary of so many names in every configuration
LLM_FIELDS = {
    "hidden_size": size(2**16),
    "intermediate_size": size(2**19),
    "num_hidden_layers": size(512),
    "num_attention_heads": size(2**12),
    "num_key_value_heads": size(2**12, null=True),
    "head_dim": size(2**12, null=True),
    "vocab_size": size(2**22),
    "max_position_embeddings": size(2**26),
    "hidden_act": Field(str, choices=tuple(ACT2FN)),
    "initializer_range": Field(float, 0, 10),
    "rms_norm_eps": SHARE,
    "layer_norm_eps": SHARE,
    "attention_dropout": SHARE,
    "embd_pdrop": SHARE,
    "resid_pdrop": SHARE,
    "partial_rotary_factor": Field(float, 1e-3, 1),
    "rope_theta": Field(float, 1e-3, 1e12),
    "factor": Field(float, 1e-3, 1e6),
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
SHOWO_FIELDS = {
    "llm_model_path": Field(str),
    "vocab_size": size(2**23),
    "llm_vocab_size": size(2**22),
    "num_new_special_tokens": size(2**12, 0),
    "codebook_size": size(2**22),
    "num_vq_tokens": size(2**16),
    "clip_feature_size": size(2**16),
    "w_clip_vit": SWITCH,
    "qk_norm": Field(bool, null=True),
}
TOKENIZER_FIELDS = {"model_max_length": Field(float, 1)}
LEVELS = size(2**8, most=12)
MAGVIT_FIELDS = {
    "ch": size(2**14),
    **dict.fromkeys(("encoder_ch_mult", "decoder_ch_mult", "encoder_num_res_blocks", "decoder_num_res_blocks"), LEVELS),
    "code_bits": size(22),
    "num_groups": size(2**14),
    "stem_patch_size": size(2**6),
    "local_encoder": SWITCH,
    "encoder_mid": SWITCH,
    "decoder_mid": SWITCH,
}


def check_fields(settings: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Raises `ValueError` for the first of the settings that is not what its field says."""
    for key, field in {**fields, "num_labels": LABELS}.items():
        if key in settings and not field.accepts(settings[key]):
            raise ValueError(f"{key} is {repr(settings[key])[:60]}; it must be {field}")


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
