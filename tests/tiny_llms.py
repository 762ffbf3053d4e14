"""A tiny language model of every family that a Show-o can be made of, and the Show-o of each."""

from pathlib import Path

from transformers import PreTrainedModel

from models import Showo, ShowoConfig
from models.backbones import BACKBONES
from tests.parity.goldens import fill_

WORDS, CODES, IMAGE_TOKENS = 118, 64, 16
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 256, "bos_token_id": 117, "eos_token_id": 117}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "phi": {"num_key_value_heads": 4},
    "llama": GROUPED | {"rope_parameters": LLAMA3_ROPE},
    "mistral": GROUPED | {"sliding_window": None, "head_dim": 16},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
}


def tiny_llm(family: str, rows: int = WORDS, **settings) -> PreTrainedModel:
    """The language model as its makers have it, with weights from parameter names."""
    model_class = BACKBONES[family].model_class
    config = model_class.config_class(**SIZES | FAMILIES[family] | settings, vocab_size=rows)
    return fill_(model_class(config)).eval()


def showo_config(family: str, qk_norm: bool | None = None, **settings) -> ShowoConfig:
    llm = {"model_type": family} | SIZES | FAMILIES[family] | settings
    return ShowoConfig(llm_config=llm, qk_norm=qk_norm, **vocabulary())


def config_of(folder: Path, **settings) -> ShowoConfig:
    """The Show-o of a language model's folder."""
    return ShowoConfig(llm_model_path=str(folder), **vocabulary() | settings)


def vocabulary() -> dict:
    sizes = {"llm_vocab_size": WORDS, "codebook_size": CODES, "num_vq_tokens": IMAGE_TOKENS}
    return sizes | {"vocab_size": WORDS + 10 + CODES + 1}


def tiny_showo(family: str, qk_norm: bool | None = None, attn_implementation: str = "sdpa", **settings) -> Showo:
    config = showo_config(family, qk_norm, **settings)
    return fill_(Showo._from_config(config, attn_implementation=attn_implementation)).eval()
