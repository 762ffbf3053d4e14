"""Makes the language-model folder of a small Show-o: a BPE tokenizer from a text file, and a Phi configuration.

    python3 training/data/small_llm.py corpus=data/emoji_world/text/train.txt output_dir=checkpoints/showo-tiny/llm

The folder takes the place of `microsoft/phi-1_5` in `model.showo.llm_model_path`; it holds no weights, so start with
`load_from_showo: True` and `pretrained_model_path: null` (random weights).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PreTrainedTokenizerFast

from common.config import read_settings
from common.errors import UserError, run_cli

END_OF_TEXT = "<|endoftext|>"  # bos, eos and unk at once, as in Phi-1.5


@dataclass
class SmallLlmConfig:
    corpus: str = "???"  # text file, one text per line
    output_dir: str = "???"
    vocab_size: int = 1000  # the end-of-text token counted
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 3
    intermediate_size: int = 768
    hidden_act: str = "gelu_pytorch_tanh"  # Phi's gelu_new as one fused operation
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = True


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
    settings = OmegaConf.to_container(config)
    del settings["corpus"], settings["output_dir"]
    tokenizer = train_tokenizer(corpus.read_text(encoding="utf-8").splitlines(), settings["vocab_size"])
    tokenizer.save_pretrained(config.output_dir)
    end_id = tokenizer.eos_token_id
    PhiConfig(**settings, bos_token_id=end_id, eos_token_id=end_id).save_pretrained(config.output_dir)
    print(f"{config.output_dir}: {settings['vocab_size']} tokens")


if __name__ == "__main__":
    run_cli(main)
