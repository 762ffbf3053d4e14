"""A tiny language model of every family that a Show-o can be made of, and the Show-o of each."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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


CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def byte_tokenizer(tokens: tuple[str, ...], **settings) -> PreTrainedTokenizerFast:
    """One id for each byte, and special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **settings)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def qwen_like() -> PreTrainedTokenizerFast:
    """No bos; the end of a turn is not eos; a pad of its own."""
    return byte_tokenizer(CHATML_TOKENS, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def llama_like() -> PreTrainedTokenizerFast:
    """No pad; the end of a turn is not eos."""
    return byte_tokenizer(LLAMA3_TOKENS, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
