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

from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from common.config import read_settings
from common.errors import UserError, run_cli
from common.settings import setting
from models.backbones import BACKBONES, DEFAULT_MODEL_TYPE

END_OF_TEXT = "<|endoftext|>"  # bos, eos and unk at once, as in the published model's tokenizer


@dataclass
class SmallLlmConfig:
    corpus: str = setting("???", "text file, one text per line")
    output_dir: str = setting("???", "the folder to make")
    family: str = setting(DEFAULT_MODEL_TYPE, "kind of language model", choices=tuple(BACKBONES))
    vocab_size: int = setting(1000, "entries of the tokenizer, the end-of-text token counted", low=1)
    hidden_size: int = setting(192, "width", low=1)
    num_hidden_layers: int = setting(6, "layers", low=1)
    num_attention_heads: int = setting(3, "attention heads", low=1)
    num_key_value_heads: int | None = setting(None, "heads of keys and values, to be shared; null: as many", low=1)
    intermediate_size: int = setting(768, "width of the feed-forward layers", low=1)
    hidden_act: str | None = setting(None, "activation; null: the family's")
    max_position_embeddings: int = setting(512, "longest row", low=1)
    tie_word_embeddings: bool = setting(True, "one matrix for embeddings and head")


def train_tokenizer(lines: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab_size` entries.

    Raises:
        UserError: the corpus is too small for so many entries.
    """
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
    corpus = Path(config.corpus)
    if not corpus.is_file():
        raise UserError(f"corpus={corpus} does not exist")
    left_out = ("corpus", "output_dir", "family")
    settings = {key: value for key, value in OmegaConf.to_container(config).items() if key not in left_out}
    settings = {key: value for key, value in settings.items() if value is not None}
    tokenizer = train_tokenizer(corpus.read_text(encoding="utf-8").splitlines(), settings["vocab_size"])
    tokenizer.save_pretrained(config.output_dir)
    end_id = tokenizer.eos_token_id
    config_class = BACKBONES[config.family].model_class.config_class
    llm_config = config_class(**settings, bos_token_id=end_id, eos_token_id=end_id)
    if hasattr(llm_config, "sliding_window"):
        llm_config.sliding_window = None  # some families have one by default, which a Show-o cannot use
    llm_config.save_pretrained(config.output_dir)
    print(f"{config.output_dir}: {settings['vocab_size']} tokens")


if __name__ == "__main__":
    run_cli(main)
