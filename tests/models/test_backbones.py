"""Every family of language models as a Show-o: its weights, its attention, its losses, and what is refused."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, Gemma2Config, MistralConfig, Qwen2Config

from models import OmniMask, Showo, ShowoConfig, UniversalPrompting
from models.backbones import BACKBONES
from tests.tiny_llms import (
    FAMILIES,
    WORDS,
    byte_tokenizer,
    config_of,
    llama_like,
    qwen_like,
    showo_config,
    tiny_llm,
    tiny_showo,
    vocabulary,
)
from training.loss import Objective
from training.packing import PACKED_SDPA, Packing

COUNTS = (3, 2, 2)  # rows of each task
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
TASKS = ("t2i", "lm", "mmu")

every_family = pytest.mark.parametrize("family", FAMILIES)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---- weights ----


@pytest.mark.parametrize("rows", [WORDS, WORDS + 25, WORDS + 100], ids=["exact", "padded", "longer than ours"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@every_family
@torch.no_grad()
def test_a_language_models_own_text_logits_stay(family, tied, rows, tmp_path):
    llm = tiny_llm(family, rows, tie_word_embeddings=tied)
    llm.save_pretrained(tmp_path)
    model = Showo.from_llm(config_of(tmp_path, qk_norm=BACKBONES[family].qk_norm == "own")).eval()
    ids = torch.randint(0, WORDS, (2, 40), generator=torch.Generator().manual_seed(0))
    same(model(ids, OmniMask.lm(2, 40)).logits[..., :WORDS], llm(ids).logits[..., :WORDS])
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied and len(embedding) == len(head) == model.config.vocab_size
    if rows < model.config.vocab_size:
        assert abs(embedding[rows:].std().item() - 0.02) < 0.003, "new rows are drawn"
    kept = min(rows, model.config.vocab_size)  # spare rows are kept, and ids of codes do not depend on them
    assert torch.equal(embedding[:kept], llm.get_input_embeddings().weight[:kept])
    assert model.vocabulary.image_offset == WORDS + 10


@every_family
@torch.no_grad()
def test_a_saved_folder_says_which_language_model_it_holds(family, tmp_path):
    model = tiny_showo(family)
    model.save_pretrained(tmp_path)
    names = {f"showo.{name}" for name in model.showo.state_dict()}
    assert set(model.state_dict()) == names
    loaded, ids = AutoModel.from_pretrained(tmp_path).eval(), torch.arange(12)[None]
    assert type(loaded) is Showo and type(loaded.showo) is BACKBONES[family].model_class
    assert loaded.config.llm_config["model_type"] == family and loaded.config.qk_norm == model.config.qk_norm
    assert loaded.showo.config.to_dict() == model.showo.config.to_dict() | {"dtype": loaded.showo.config.dtype}
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    layer = type(model.showo.get_decoder().layers[0]).__name__
    assert model._no_split_modules == {layer} == {BACKBONES[family].layer_class}


@pytest.mark.slow
def test_a_saved_folder_loads_in_a_fresh_process(tmp_path, repository):
    tiny_showo("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    code = "import models, sys; from transformers import AutoModel; print(AutoModel.from_pretrained(sys.argv[1]).showo)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=repository, capture_output=True, text=True)
    assert "LlamaForCausalLM" in done.stdout, done.stderr


# ---- attention and losses ----


@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@every_family
@torch.no_grad()
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # CPU code for sizes that change does not compile
def test_attention_back_ends_agree(family, implementation, batch):
    ids, _, mask = batch
    torch._dynamo.reset()
    same(tiny_showo(family, attn_implementation=implementation)(ids, mask).logits, tiny_showo(family)(ids, mask).logits)


@every_family
def test_packed_rows_and_checkpointing_give_the_same_losses_and_gradients(family, batch):
    ids, labels, mask = batch
    found = []
    for packed, checkpointing in ((False, False), (True, False), (True, True)):
        model = tiny_showo(family, attn_implementation=PACKED_SDPA if packed else "sdpa").train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        is_used = ids != model.vocabulary.pad_id
        packing = Packing.from_mask(is_used, mask, 4 * ids.shape[1]) if packed else None
        out = model(ids, mask, Objective.from_labels(labels, COUNTS, 12, packing=packing))
        losses = torch.stack([getattr(out, f"loss_{task}") for task in TASKS])
        losses.sum().backward()
        found.append((losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for losses, gradients in found[1:]:
        same(losses, found[0][0])
        same(gradients, found[0][1], 1e-4)
    assert (found[0][0] > 0).all()


# ---- what is refused, and what is completed ----


def test_a_family_that_is_not_here_is_refused_by_name(tmp_path):
    Gemma2Config(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a 'gemma2' model.*use one of phi, llama, mistral, qwen2, qwen3"):
        ShowoConfig(llm_model_path=str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(sliding_window=64), "sliding window of 64"),
        (Qwen2Config(use_sliding_window=True, sliding_window=32, max_window_layers=1), "sliding window of 32"),
        (MistralConfig(sliding_window=None, rope_parameters=DYNAMIC_ROPE), "type 'dynamic'"),
    ],
)
def test_attention_that_is_not_the_masks_alone_is_refused(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"llm_model_path {re.escape(repr(str(tmp_path)))} has .*{message}"):
        ShowoConfig(llm_model_path=str(tmp_path), **vocabulary())


@pytest.mark.parametrize(
    ("families", "wanted", "expected"),  # None: refused
    [
        (("phi", "qwen3"), None, True),
        (("llama", "mistral", "qwen2"), None, False),
        (("phi", "qwen3"), True, True),
        (("llama", "mistral", "qwen2"), True, None),
        (("phi",), False, False),
        (("qwen3",), False, None),
    ],
)
def test_queries_and_keys_are_normalised_where_the_layers_can(families, wanted, expected):
    for family in families:
        if expected is None:
            with pytest.raises(ValueError, match=rf"qk_norm is {wanted}, but .*leave qk_norm out"):
                showo_config(family, wanted)
        else:
            model = tiny_showo(family, wanted)
            norms = [name for name in model.state_dict() if re.search(r"(q|k)_(layer)?norm\.weight", name)]
            assert model.config.qk_norm == expected and len(norms) == (4 if expected else 0)


def test_the_rows_of_a_language_models_pad_are_trained():
    """`nn.Embedding(padding_idx=…)` would keep one row, of another token here, out of training."""
    assert tiny_showo("llama", pad_token_id=5).get_input_embeddings().padding_idx is None


def test_a_tokenizer_without_bos_begins_rows_with_the_token_that_opens_a_turn():
    prompting = UniversalPrompting(qwen_like(), max_text_len=8)
    start, end = prompting.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"])
    pad = prompting.vocabulary.pad_id
    assert pad == prompting.vocabulary.llm_vocab_size == 256 + 3 and pad != end, "Show-o's own, not the tokenizer's"
    ids = prompting((["ab", "<|im_start|>ab"], 6), "lm").input_ids
    assert ids[0].tolist() == ids[1].tolist() == [start, *prompting.tokenizer("ab").input_ids, end, pad, pad]


def test_a_tokenizer_keeps_its_own_bos_and_needs_no_pad():
    prompting = UniversalPrompting(llama_like(), max_text_len=8)
    assert prompting.tokenizer.convert_ids_to_tokens(prompting.bos_id) == "<|begin_of_text|>"
    assert prompting.tokenizer.pad_token_id == prompting.vocabulary.pad_id == 256 + 5


@pytest.mark.parametrize("settings", [{"eos_token": "<|endoftext|>"}, {"bos_token": "<|endoftext|>"}])
def test_a_tokenizer_without_bos_or_eos_and_without_a_stand_in_is_refused(settings):
    with pytest.raises(ValueError, match="needs a bos and an eos token"):
        UniversalPrompting(byte_tokenizer(("<|endoftext|>",), **settings))
