"""The folder that takes Phi-1.5's place in a small Show-o."""

import json

import pytest
from transformers import AutoTokenizer

from common.errors import UserError
from models import Showo, ShowoConfig, UniversalPrompting
from tests.training.tiny import CAPTIONS, LLM_VOCAB_SIZE, write_llm
from training.data.small_llm import main, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llm")
    (path / "corpus.txt").write_text("\n".join(CAPTIONS * 3))
    return write_llm(path / "llm", path / "corpus.txt")


def test_the_tokenizer_has_the_asked_size_and_loses_no_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    assert len(tokenizer) == LLM_VOCAB_SIZE
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    for text in (CAPTIONS[0], "Ünïcödé 🦊 \n\ttabs", "  spaces  ", "USER: \nWhat? ASSISTANT: x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert len(tokenizer(CAPTIONS[0])["input_ids"]) < len(CAPTIONS[0]) / 2, "it has learnt from the corpus"


def test_prompting_adds_the_special_tokens_behind_it(folder):
    prompting = UniversalPrompting(AutoTokenizer.from_pretrained(folder, padding_side="left"), max_text_len=8)
    assert prompting.vocabulary.llm_vocab_size == prompting.vocabulary.pad_id == LLM_VOCAB_SIZE
    assert prompting.bos_id == prompting.eos_id


def test_the_settings_make_a_show_o(folder):
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model_type"] == "phi" and settings["vocab_size"] == LLM_VOCAB_SIZE
    sizes = {"vocab_size": LLM_VOCAB_SIZE + 10 + 8 + 1, "llm_vocab_size": LLM_VOCAB_SIZE}
    config = ShowoConfig(llm_model_path=str(folder), codebook_size=8, num_vq_tokens=4, **sizes)
    phi = Showo(config).showo.config
    assert (phi.hidden_size, phi.num_hidden_layers, phi.num_attention_heads, phi.intermediate_size) == (32, 2, 2, 64)
    assert phi.qk_layernorm and phi.tie_word_embeddings
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert phi.bos_token_id == phi.eos_token_id == end


def test_the_same_corpus_makes_the_same_tokenizer(folder):
    again = train_tokenizer(CAPTIONS * 3, LLM_VOCAB_SIZE)
    assert again.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_mistakes_are_named(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a b a b\n")
    with pytest.raises(UserError, match=r"gives 2\d\d tokens, vocab_size is 5000"):
        main([f"corpus={corpus}", f"output_dir={tmp_path / 'llm'}", "vocab_size=5000"])
    with pytest.raises(UserError, match="corpus and output_dir not given"):
        main([])
    with pytest.raises(UserError, match="unknown key layers; the nearest known key is num_hidden_layers"):
        main([f"corpus={corpus}", "output_dir=x", "layers=3"])
    with pytest.raises(UserError, match="does not exist"):
        main([f"corpus={tmp_path / 'gone.txt'}", "output_dir=x"])
    assert not (tmp_path / "llm").exists()
