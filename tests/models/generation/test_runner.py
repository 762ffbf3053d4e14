"""Positions that run piece by piece give the hidden states of whole rows, over every language model (spec §7, §8)."""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import published
from models import OmniMask, get_mask_schedule
from models.generation import cpu
from models.generation import runner as runner_module
from models.generation.runner import BUCKET, Runner, run_decoder
from tests.parity.goldens import tiny_showo
from tests.tiny_llms import FAMILIES
from tests.tiny_llms import tiny_showo as showo_of

PAD, SOI, EOI, T2I, MMU, OFFSET, MASK, N = 118, 119, 120, 123, 124, 128, 192, 16
BLOCK = [SOI, *(OFFSET + 2 * i if i % 3 else MASK for i in range(N)), EOI]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


def padded(rows: list[list[int]]) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([[PAD] * (length - len(row)) + row for row in rows])


IMAGES = padded([[T2I, 117, *text, 117, *BLOCK] for text in ([3, 4, 5, 6, 7, 8], [20, 21], [])])  # blocks begin at 9
QUESTIONS = padded([[MMU, *BLOCK, 117, 3, 4, 5, 6], [MMU, SOI, *range(OFFSET, OFFSET + 9), EOI, 117, 9, 10, 11]])
TEXT = torch.arange(40).view(2, 20)
# Positions that see each other (an image, and all up to the end of it in a question) are one piece.
CASES = {
    "image": (IMAGES, [9, N + 2]),
    "image, text in pieces": (IMAGES, [6, 3, N + 2]),
    "question": (QUESTIONS, [20, 1, 1, 2]),
    "text": (TEXT, [7, 1, 1, 5, 6]),
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_the_whole(family, implementation, static, monkeypatch):
    """Also in a cache of fixed size, as compiled steps use it, here without compiling."""
    monkeypatch.setattr(runner_module, "compiled_decoder", lambda device_type: run_decoder)
    model = showo_of(family, attn_implementation=implementation)
    for ids, sizes in CASES.values():
        model.step_caches = {} if static else None
        mask = OmniMask.from_ids(ids, model.vocabulary)
        runner, (first, *rest) = Runner(model, mask), ids.split(sizes, dim=1)
        assert runner.cache.max_length == (-(-ids.shape[1] // BUCKET) * BUCKET if static else ids.shape[1])
        parts = [runner.prefill(first), *(runner.step(part) for part in rest)]
        same(torch.cat(parts, dim=1), model.hidden_states(ids, mask))
        assert runner.length == ids.shape[1]


@pytest.mark.parametrize("family", ["phi", "qwen3"])
def test_a_step_replaces_positions(family):
    """Of a slice, and of other positions in each row; the rows with and without text share the ids of their images."""
    model = showo_of(family)
    ids = torch.cat([IMAGES[:2], torch.cat([IMAGES[1:, :9], IMAGES[:2, 9:]], dim=1)])  # 4 rows, 2 images
    mask = OmniMask.from_ids(ids, model.vocabulary)
    runner = Runner(model, mask)
    runner.prefill(ids[:, :9])
    block = slice(9, 9 + N + 2)
    same(runner.step(ids[:2, block], block), model.hidden_states(ids, mask)[:, block])
    at = torch.tensor([[9, 10, 13, 20, 26], [9, 11, 12, 25, 26]])  # rows (2, n)
    new_ids = torch.tensor([[SOI, OFFSET + 1, OFFSET + 2, OFFSET + 3, EOI], [SOI, OFFSET + 4, MASK, OFFSET + 5, EOI]])
    changed = ids.scatter(1, at.repeat(2, 1), new_ids.repeat(2, 1))
    hidden = runner.step(new_ids, at)
    # in the first layer of a whole pass, nothing but the replaced positions differs
    everything = torch.arange(9, 27).repeat(2, 1)
    same(runner.step(changed[:2, block], everything), model.hidden_states(changed, mask)[:, block])
    assert hidden.shape == (4, 5, 32) and runner.length == ids.shape[1]


def test_cropped_positions_leave_nothing():
    model, mask = tiny_showo(), OmniMask.lm(2, 20)
    runner = Runner(model, mask)
    runner.prefill(TEXT[:, :9])
    runner.step(TEXT[:, 9:].flip(0))
    runner.crop(9)
    same(runner.step(TEXT[:, 9:14]), model.hidden_states(TEXT, mask)[:, 9:14])


@pytest.mark.parametrize("family", ["phi", "mistral"])
def test_expanding_a_prefix(family):
    """The rows go on differently, at rotary positions of their own."""
    model = showo_of(family)
    rows = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 20, 21, 22]])
    mask, position_ids = OmniMask.lm(2, 6), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 7, 8, 9]])
    whole = Runner(model, mask, position_ids).prefill(rows)
    runner = Runner(model, OmniMask.lm(1, 3))
    runner.prefill(rows[:1, :3])
    runner.expand(mask, position_ids)
    same(runner.step(rows[:, 3:]), whole[:, 3:])
    assert not torch.allclose(whole[1, 3:], Runner(model, mask).prefill(rows)[1, 3:], atol=1e-3)


def test_a_released_cache_is_used_again():
    """At its address, and without what it held."""
    model, mask = tiny_showo(), OmniMask.lm(2, 20)
    model.step_caches = {}
    addresses = []
    for ids in (TEXT, TEXT.flip(1)):
        runner = Runner(model, mask)
        same(runner.prefill(ids), model.hidden_states(ids, mask))
        runner.cache.values[0][:, :, 30] = torch.nan  # an overflow, say, in a slot that is hidden
        addresses.append(runner.cache.keys[0].data_ptr())
        runner.release()
    assert addresses[0] == addresses[1] and [key[:2] for key in model.step_caches] == [(2, BUCKET)]
    other = Runner(model, mask)
    assert Runner(model, mask).cache is not other.cache  # it serves one runner at a time


# ---- what is put on a model from outside ----


def lora(model):
    """Adapters on every linear layer of a decoder layer, with weights that change the outcome."""
    peft = pytest.importorskip("peft")
    targets = [name for name, module in model.showo.get_decoder().named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model.showo = peft.get_peft_model(model.showo, config)


def int8(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.showo, quantization.Int8WeightOnlyConfig())


def hook(model):
    model.showo.get_decoder().layers[0].register_forward_hook(lambda module, args, output: output + 0.5)


def head_hook(model):
    scale = torch.linspace(0.5, 1.5, model.config.vocab_size)
    model.showo.get_output_embeddings().register_forward_hook(lambda module, args, output: output * scale)


@pytest.mark.parametrize("with_cpu", [False, True])
@pytest.mark.parametrize("family", ["phi", "llama"])
@pytest.mark.parametrize("change", [lora, int8, hook, head_hook])
def test_changes_from_outside_take_effect_in_both_loops(family, change, with_cpu):
    """Cached equals uncached with them, and differs from without."""
    model, plain = showo_of(family), showo_of(family)
    if with_cpu:
        cpu.enable(model)
    change(model)
    model.eval()
    ours = both_loops(partial(model.mmu_generate, top_k=1), model.t2i_generate)
    theirs = both_loops(partial(published.mmu_generate, model), partial(published.t2i_generate, model))
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(model(IMAGES).logits, plain(IMAGES).logits)


def both_loops(answer, generate, num_tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """New ids and image codes by these two functions."""
    ids, uncond_ids = IMAGES[:1].clone(), IMAGES[2:].clone()
    ids[:, 10:26] = MASK
    settings = {"guidance_scale": 2.0, "timesteps": 4, "temperature": 1.0}
    settings |= {"noise_schedule": get_mask_schedule("cosine"), "generator": torch.Generator().manual_seed(0)}
    question = torch.tensor([[MMU, *BLOCK, 117, 3, 4, 5]])
    return answer(question, max_new_tokens=num_tokens), generate(ids, uncond_ids, **settings)


@pytest.mark.slow  # compiles the kernel with g++
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # its CPU code for sizes that change does not compile
def test_flex_attention_in_both_loops():
    torch.compiler.reset()
    models = [showo_of("llama", attn_implementation=form) for form in ("sdpa", "flex_attention")]
    sdpa, flex = (both_loops(partial(model.mmu_generate, top_k=1), model.t2i_generate, 4) for model in models)
    assert all(map(torch.equal, sdpa, flex))
