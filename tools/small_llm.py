"""Makes the language-model folder of a small Show-o: a BPE tokenizer from a text file, and a configuration.

    python3 tools/small_llm.py corpus=data/emoji_world/text/train.txt output_dir=checkpoints/showo-tiny/llm

`model.showo.llm_model_path` takes the folder in place of a language model's; it holds no weights, so start with
`load_from_showo: True` and `pretrained_model_path: null` (random weights).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import common  # noqa: F401  Ctrl-C is one word from here on

from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.activations import ACT2FN

from common.config import read_settings
from common.errors import UserError, run_cli
from common.files import owned_folder, read_text
from common.settings import setting
from models.backbones import BACKBONES, DEFAULT_MODEL_TYPE, make_llm_config

END_OF_TEXT = "<|endoftext|>"  # bos, eos and unk at once, as in the published model's tokenizer
FEWEST = 257  # the bytes and the end of text


@dataclass
class SmallLlmConfig:
    corpus: str = setting("???", "text file, one text per line")
    output_dir: str = setting("???", "the folder to make", is_output=True)
    family: str = setting(DEFAULT_MODEL_TYPE, "kind of language model", choices=tuple(BACKBONES))
    vocab_size: int = setting(1000, "entries of the tokenizer, the end-of-text token counted", low=1, high=2**22)
    hidden_size: int = setting(192, "width", low=1, high=2**16)
    num_hidden_layers: int = setting(6, "layers", low=1, high=512)
    num_attention_heads: int = setting(3, "attention heads", low=1, high=2**12)
    num_key_value_heads: int | None = setting(
        None, "heads of keys and values, to be shared; null: as many", low=1, high=2**12
    )
    intermediate_size: int = setting(768, "width of the feed-forward layers", low=1, high=2**19)
    hidden_act: str | None = setting(None, "activation; null: the family's", choices=tuple(ACT2FN))
    max_position_embeddings: int = setting(512, "longest row", low=1, high=2**26)
    rope_theta: float | None = setting(
        None, "base of the rotary frequencies; null: the family's, which is meant for longer rows", low=1, high=1e9
    )
    tie_word_embeddings: bool = setting(True, "one matrix for embeddings and head")

    @staticmethod
    def problems(config: DictConfig) -> list[str]:
        if config.vocab_size >= FEWEST:
            return []
        return [f"vocab_size is {config.vocab_size}; it must be at least {FEWEST}: the 256 bytes and {END_OF_TEXT}"]


def train_tokenizer(lines: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab_size` entries; `UserError` if the corpus is too small for so many entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"the corpus gives {tokenizer.get_vocab_size()} tokens, vocab_size is {vocab_size}; use the smaller number"
        )
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, model_max_length=2048)


def main(argv: list[str]) -> None:
    config = read_settings(argv, SmallLlmConfig, "corpus=text.txt output_dir=llm")
    left_out = ("corpus", "output_dir", "family", "rope_theta")
    settings = {key: value for key, value in OmegaConf.to_container(config).items() if key not in left_out}
    settings["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
    settings = {key: value for key, value in settings.items() if value is not None}
    try:
        llm_config = make_llm_config(settings, config.family)
    except ValueError as error:
        raise UserError(f"these sizes make no {config.family} model: {error}") from None
    tokenizer = train_tokenizer(read_text(config.corpus, f"corpus={config.corpus}").splitlines(), config.vocab_size)
    llm_config.bos_token_id = llm_config.eos_token_id = tokenizer.eos_token_id
    if config.rope_theta is not None:
        llm_config.rope_parameters["rope_theta"] = config.rope_theta
    if hasattr(llm_config, "sliding_window"):
        llm_config.sliding_window = None  # some families have one by default, which a Show-o cannot use
    with owned_folder(config.output_dir, "output_dir") as folder:
        tokenizer.save_pretrained(folder)
        llm_config.save_pretrained(folder)
    print(f"{config.output_dir}: {config.vocab_size} tokens")


if __name__ == "__main__":
    run_cli(main)
