"""The language models a Show-o can be made of, and everything in which they differ.

A Show-o takes the decoder layers of a causal language model as `transformers` has them and gives them its own mask, its
own vocabulary and its own losses. That works for every decoder whose layers attend to whatever the mask shows and whose
logits are a linear map of the last hidden state. The families below were tried; each is one record.

Three rules hold for all of them, so that nothing else asks which family it has before it:

- Ids: the pad, the task tokens and the image codes follow the *tokenizer's* length (`models/vocabulary.py`), also where
  the embedding matrix has spare rows behind it (Qwen2.5 stores 151,936 rows for 151,665 tokens, Phi-1.5 51,200 for
  50,295). A tokenizer is at hand wherever rows are made, a matrix is not; so the ids can be told without weights.
- Rows: spare rows that the language model stores keep their values, as published (spec §4); only later ones are new.
- Tied matrices stay tied: a new row is then the embedding and the head of its id at once.
"""

from dataclasses import dataclass
from pathlib import Path

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

from models.checkpoint_io import read_json

DEFAULT_LLM = "microsoft/phi-1_5"  # of the published checkpoints; its settings are the defaults of its class
DEFAULT_MODEL_TYPE = "phi"  # of settings without a `model_type`


@dataclass(frozen=True)
class Backbone:
    """One family of language models.

    Args:
        model_class: the causal language model of `transformers`; its `config_class` reads the settings.
        layer_class: name of the decoder layer, the unit that FSDP shards and gathers.
        qk_norm: ``"own"``: the layers normalise queries and keys by themselves; ``"switch"``: where the setting
            `qk_norm_setting` says so; ``"none"``: they cannot.
        qk_norm_setting: key of the language model's configuration that turns QK-norm on.
        qk_norm_names: parts of the names of the norms that the switch adds, which no language model brings.
        bos_token: begins a row where the tokenizer has no bos token of its own.
    """

    model_class: type[PreTrainedModel]
    layer_class: str
    qk_norm: str = "none"
    qk_norm_setting: str | None = None
    qk_norm_names: tuple[str, ...] = ()
    bos_token: str | None = None


BACKBONES = {
    # Show-o adds QK-norm to Phi (spec §4); the language model itself was trained without.
    "phi": Backbone(
        PhiForCausalLM,
        "PhiDecoderLayer",
        qk_norm="switch",
        qk_norm_setting="qk_layernorm",
        qk_norm_names=("q_layernorm", "k_layernorm"),
    ),
    "llama": Backbone(LlamaForCausalLM, "LlamaDecoderLayer"),
    "mistral": Backbone(MistralForCausalLM, "MistralDecoderLayer"),
    # Without a bos token of its own Show-o2 begins rows with the token that opens a turn.
    "qwen2": Backbone(Qwen2ForCausalLM, "Qwen2DecoderLayer", bos_token="<|im_start|>"),
    "qwen3": Backbone(Qwen3ForCausalLM, "Qwen3DecoderLayer", qk_norm="own", bos_token="<|im_start|>"),
}

# Of these rotary embeddings every position is rotated by the same angle however long the row is. The others ("dynamic",
# "longrope") rotate it otherwise in a long row, so that cached keys would be wrong as soon as the row has grown.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")

# The same formula as one operation instead of eight, each of which keeps its result for the backward pass.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}

# Settings of a language model that are not those of its layers, or that a Show-o has its own of. A `pad_token_id` would
# make `nn.Embedding` keep the row of that id, which is another token here, out of training.
LEFT_OUT = ("model_type", "architectures", "vocab_size", "pad_token_id", "dtype", "torch_dtype", "transformers_version")

# Formats of a conversation for tokenizers that know the tokens of one but bring no template (base models), by the token
# that opens a turn.
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
    """The language model's settings: a folder's `config.json`, the default's own without network, or the hub's.

    Raises:
        ValueError: a language model that does not work here. OSError: neither a folder nor to be had from the hub.
    """
    file = Path(llm_model_path) / "config.json"
    if file.is_file():
        settings = read_json(file)
    elif llm_model_path == DEFAULT_LLM:
        return {"model_type": DEFAULT_MODEL_TYPE}
    else:
        settings = AutoConfig.from_pretrained(llm_model_path).to_dict()
    find_backbone(settings, llm_model_path)
    return {key: value for key, value in settings.items() if not key.startswith("_")}  # no `_name_or_path`


def find_backbone(llm_config: dict, llm_model_path: str = "llm_config") -> Backbone:
    """The record of a language model's family.

    Raises:
        ValueError: there is none.
    """
    family = llm_config.get("model_type", DEFAULT_MODEL_TYPE)
    if family not in BACKBONES:
        raise ValueError(
            f"llm_model_path {llm_model_path!r} is a {family!r} model, which does not work here: its layers may limit "
            f"what the mask shows, or cap their logits; give one of {', '.join(BACKBONES)}"
        )
    return BACKBONES[family]


def has_qk_norm(llm_config: dict, wanted: bool | None, llm_model_path: str = "llm_config") -> bool:
    """Whether the layers normalise queries and keys.

    Args:
        wanted: None: as the family has it, and with the added norms where Show-o adds them.

    Raises:
        ValueError: the layers cannot do what is wanted.
    """
    backbone = find_backbone(llm_config, llm_model_path)
    if backbone.qk_norm == "switch":
        return wanted is not False
    own = backbone.qk_norm == "own"
    if wanted not in (None, own):
        owners = ", ".join(name for name, other in BACKBONES.items() if other.qk_norm != "none")
        raise ValueError(
            f"qk_norm is {wanted}, but the layers of {llm_model_path!r} "
            + ("always have it" if own else f"have none; those of {owners} have")
            + "; leave qk_norm out, or take a configuration of another family"
        )
    return own


def backbone_config(
    llm_config: dict, vocab_size: int, qk_norm: bool | None = None, llm_model_path: str = "llm_config"
) -> PreTrainedConfig:
    """A language model's configuration with the joint vocabulary.

    Raises:
        ValueError: another family, or attention that is not the mask's alone.
    """
    backbone = find_backbone(llm_config, llm_model_path)
    settings = {key: value for key, value in llm_config.items() if key not in LEFT_OUT}
    normalised = has_qk_norm(llm_config, qk_norm, llm_model_path)
    if backbone.qk_norm == "switch":
        settings[backbone.qk_norm_setting] = normalised
    config = backbone.model_class.config_class(**settings, vocab_size=vocab_size, pad_token_id=None)
    config.hidden_act = FUSED_ACTIVATIONS.get(config.hidden_act, config.hidden_act)
    _check_attention(config, llm_model_path)
    return config


def _check_attention(config: PreTrainedConfig, llm_model_path: str) -> None:
    """Refuses layers that see less than the mask shows, or in which a position's rotation depends on the row."""
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) is not None or layer_types != {"full_attention"}:
        raise ValueError(
            f"llm_model_path {llm_model_path!r} has a sliding window of {getattr(config, 'sliding_window', None)}; "
            "layers here attend to all that the mask shows: give a model without one (sliding_window: null)"
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        raise ValueError(
            f"llm_model_path {llm_model_path!r} has rotary embeddings of type {rope!r}, which change with the length "
            f"of a row; allowed: {', '.join(FIXED_ROPE)}"
        )


def complete_tokenizer(tokenizer) -> None:
    """Gives a tokenizer what rows and conversations need and it lacks: a bos token, a chat template.

    Its pad is not looked at: every Show-o has one of its own.

    Raises:
        ValueError: it has no eos token, or neither a bos token nor one that may stand for it.
    """
    known = tokenizer.get_vocab()
    if tokenizer.bos_token is None:
        stand_ins = dict.fromkeys(backbone.bos_token for backbone in BACKBONES.values() if backbone.bos_token)
        found = [token for token in stand_ins if token in known]
        if found:
            tokenizer.bos_token = found[0]
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer needs a bos and an eos token, e.g. <|endoftext|> for both")
    if not tokenizer.chat_template:
        templates = [template for opening, template in CHAT_TEMPLATES.items() if opening in known]
        tokenizer.chat_template = templates[0] if templates else None
