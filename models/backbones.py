"""The language models that can be the backbone of a Show-o, and all differences between them.

Show-o uses a causal language model's decoder layers as implemented in `transformers`, with its own attention mask,
vocabulary and losses. This works for every decoder whose layers attend to all that the mask allows and whose logits are
a linear map of the last hidden state. Each supported family is one record below.

Three rules hold for all families, so that no other module needs to know which one it has:

- Ids: the pad, the task tokens and the image codes start at the *tokenizer's* length (`models/vocabulary.py`), even if
  the embedding matrix has unused rows from there on (Qwen2.5 stores 151,936 rows for 151,665 tokens, Phi-1.5 51,200 for
  50,295). All ids thus follow from the tokenizer, without reading weights.
- Initial values: unused rows of the language model keep their values, as published (spec §4); only rows beyond the
  matrix are newly initialised.
- Tied embeddings stay tied: a new row is both the embedding and the output weight of its id.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from common.files import read_json
from models.checkpoint_io import CALLERS_KEYS
from models.config_fields import LLM_FIELDS, check_divides, check_fields

DEFAULT_LLM = "microsoft/phi-1_5"  # as published; `PhiConfig()` is its configuration
DEFAULT_MODEL_TYPE = "phi"  # of an `llm_config` without `model_type`


@dataclass(frozen=True)
class Backbone:
    """One family of language models.

    Args:
        model_class: the `ForCausalLM` class of `transformers`.
        layer_class: name of the decoder layer class, the unit in which FSDP shards the model.
        qk_norm: whether the layers have QK-norm (normalised queries and keys): ``"own"``: always; ``"switch"``: if the
            setting `qk_norm_setting` is true; ``"none"``: never.
        qk_norm_setting: key of the `transformers` configuration that switches QK-norm on.
        qk_norm_names: substrings of the parameter names that the switch adds; pretrained checkpoints lack them.
        bos_token: stand-in for tokenizers that have no bos token.
        attention, mlp: names of the linear layers in each decoder layer, for adapters and quantised weights.
    """

    model_class: type[PreTrainedModel]
    layer_class: str
    qk_norm: str = "none"
    qk_norm_setting: str | None = None
    qk_norm_names: tuple[str, ...] = ()
    bos_token: str | None = None
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")


BACKBONES = {
    # Show-o adds QK-norm to Phi (spec §4), which was pretrained without it.
    "phi": Backbone(
        PhiForCausalLM,
        "PhiDecoderLayer",
        qk_norm="switch",
        qk_norm_setting="qk_layernorm",
        qk_norm_names=("q_layernorm", "k_layernorm"),
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        mlp=("fc1", "fc2"),
    ),
    "llama": Backbone(LlamaForCausalLM, "LlamaDecoderLayer"),
    "mistral": Backbone(MistralForCausalLM, "MistralDecoderLayer"),
    # These have no bos token; as in Show-o2, the token that opens a turn takes its place.
    "qwen2": Backbone(Qwen2ForCausalLM, "Qwen2DecoderLayer", bos_token="<|im_start|>"),
    "qwen3": Backbone(Qwen3ForCausalLM, "Qwen3DecoderLayer", qk_norm="own", bos_token="<|im_start|>"),
}

# Types of RoPE whose angles depend on the position alone. Other types ("dynamic", "longrope") also depend on the
# sequence length, so keys in the KV cache would become wrong as the sequence grows.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")

# The same formula as one fused operation instead of eight, each of which saves a tensor for the backward pass.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}

# Keys of a language model's configuration that Show-o sets itself or does not need. `pad_token_id` must go because
# `nn.Embedding` does not train the row of that id, and Show-o's pad has another id.
LEFT_OUT = (
    "architectures",
    "vocab_size",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "transformers_version",
    *CALLERS_KEYS,
)

# Chat templates for the tokenizers of base models, which have a format's special tokens but no template. Keyed by the
# token that opens a turn.
CHAT_TEMPLATES = {
    "<|im_start|>": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "<|start_header_id|>": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}


def read_llm_config(llm_model_path: str) -> dict:
    """The language model's configuration, from a folder or the hub; that of `DEFAULT_LLM` needs no network.

    Raises:
        ValueError: the family is not supported.
        OSError: neither a folder nor available from the hub.
    """
    file = Path(llm_model_path) / "config.json"
    if file.is_file():
        settings = read_json(file)
    elif llm_model_path == DEFAULT_LLM:
        return {"model_type": DEFAULT_MODEL_TYPE}
    else:
        settings = AutoConfig.from_pretrained(llm_model_path, trust_remote_code=False).to_dict()
    find_backbone(settings, llm_model_path)
    return {key: value for key, value in settings.items() if not key.startswith("_")}  # no `_name_or_path`


def find_backbone(llm_config: dict, llm_model_path: str = "llm_config") -> Backbone:
    """The family of a language model.

    Raises:
        ValueError: it is not supported.
    """
    family = llm_config.get("model_type", DEFAULT_MODEL_TYPE)
    if not isinstance(family, str) or family not in BACKBONES:
        raise ValueError(
            f"llm_model_path {llm_model_path!r} is a {family!r} model, which is not supported: its layers may restrict "
            f"attention further than the mask, or cap the logits; use one of {', '.join(BACKBONES)}"
        )
    return BACKBONES[family]


def has_qk_norm(llm_config: dict, wanted: bool | None, llm_model_path: str = "llm_config") -> bool:
    """Whether the layers have QK-norm.

    Args:
        wanted: the setting `qk_norm`; None: the family's default, which includes the norms that Show-o adds to Phi.

    Raises:
        ValueError: the family does not support the wanted setting.
    """
    backbone = find_backbone(llm_config, llm_model_path)
    if backbone.qk_norm == "switch":
        return wanted is not False
    own = backbone.qk_norm == "own"
    if wanted not in (None, own):
        owners = ", ".join(name for name, other in BACKBONES.items() if other.qk_norm != "none")
        raise ValueError(
            f"qk_norm is {wanted}, but the layers of {llm_model_path!r} "
            + ("always have it" if own else f"have none; only those of {owners} do")
            + "; leave qk_norm out, or use a model of another family"
        )
    return own


def make_llm_config(settings: dict, family: str) -> PreTrainedConfig:
    """The `transformers` configuration of a language model, whose sizes are compared before they are used.

    Raises:
        ValueError: a setting of a wrong type or out of range, or sizes that do not divide each other.
    """
    check_fields(settings, LLM_FIELDS)
    if not settings.get("head_dim"):
        check_divides(settings, "hidden_size", "num_attention_heads")
    try:
        config = BACKBONES[family].model_class.config_class(**settings)
    except (StrictDataclassError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())[:160]) from error
    sizes = config.to_dict()
    check_fields(sizes, LLM_FIELDS)
    rope = sizes.get("rope_parameters") or {}
    for key, value in rope.items():
        if isinstance(value, float | int) and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{key} of the rotary embeddings is {value}; it must be a number above 0")
    check_fields(rope, LLM_FIELDS)
    check_divides(sizes, "num_attention_heads", "num_key_value_heads")
    head_dim = sizes.get("head_dim") or config.hidden_size // config.num_attention_heads
    rotated = int(head_dim * (rope.get("partial_rotary_factor") or 1))
    if rotated < 2 or rotated % 2:
        raise ValueError(
            f"hidden_size {config.hidden_size} with num_attention_heads {config.num_attention_heads} gives heads of "
            f"{head_dim} numbers, of which {rotated} are rotated by position; that must be an even number"
        )
    return config


def backbone_config(
    llm_config: dict, vocab_size: int, qk_norm: bool, llm_model_path: str = "llm_config"
) -> PreTrainedConfig:
    """The `transformers` configuration of the backbone, with `vocab_size` for text, special tokens and image codes.

    Args:
        qk_norm: as `has_qk_norm` says.

    Raises:
        ValueError: an unsupported family, sizes that cannot be, sliding-window attention, or RoPE that depends on the
            sequence length.
    """
    backbone = find_backbone(llm_config, llm_model_path)
    settings = {key: value for key, value in llm_config.items() if key not in LEFT_OUT}
    if backbone.qk_norm == "switch":
        settings[backbone.qk_norm_setting] = qk_norm
    settings |= {"vocab_size": vocab_size, "pad_token_id": None}
    try:
        config = make_llm_config(settings, llm_config.get("model_type", DEFAULT_MODEL_TYPE))
    except ValueError as error:
        raise ValueError(f"the settings of llm_model_path {llm_model_path!r} do not work: {error}") from error
    config.hidden_act = FUSED_ACTIVATIONS.get(config.hidden_act, config.hidden_act)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) is not None or layer_types != {"full_attention"}:
        raise ValueError(
            f"llm_model_path {llm_model_path!r} has a sliding window of {getattr(config, 'sliding_window', None)}; "
            "layers must attend to all that the mask allows: use a model without one (sliding_window: null)"
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        raise ValueError(
            f"llm_model_path {llm_model_path!r} has rotary embeddings of type {rope!r}, which depend on the length "
            f"of the sequence; allowed: {', '.join(FIXED_ROPE)}"
        )
    return config


def complete_tokenizer(tokenizer) -> None:
    """Sets the bos token and the chat template of a tokenizer that lacks them.

    The tokenizer's own pad token is ignored, since Show-o adds one.

    Raises:
        ValueError: it has no eos token, or neither a bos token nor a known stand-in for one.
    """
    known = tokenizer.get_vocab()
    if tokenizer.bos_token is None:
        stand_ins = dict.fromkeys(backbone.bos_token for backbone in BACKBONES.values() if backbone.bos_token)
        found = [token for token in stand_ins if token in known]
        if found:
            tokenizer.bos_token = found[0]
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer needs a bos and an eos token; both may be the same, such as <|endoftext|>")
    if not tokenizer.chat_template:
        templates = [template for opening, template in CHAT_TEMPLATES.items() if opening in known]
        tokenizer.chat_template = templates[0] if templates else None
