"""A decode step of fixed shapes equals one that grows; captured as a CUDA graph it gives the same tokens."""

import pytest
import torch

from models.decode_graph import StaticStep
from models.decoding import Prompts
from tests.parity.goldens import tiny_showo

PAD, SOI, EOI, MMU, OFFSET, N = 118, 119, 120, 124, 128, 16
IMAGE = [SOI, *range(OFFSET, OFFSET + N), EOI]
ROWS = torch.tensor([[MMU, *IMAGE, 117, 3, 4, 5], [MMU, *IMAGE, 117, 9, PAD, PAD]])


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_step_of_fixed_shapes(rows):
    model = tiny_showo()
    prompts = Prompts.of(ROWS[:rows], model.vocabulary, 6)
    growing, transformer = prompts.read(model)[0], prompts.read(model)[0]
    for layer in transformer.layers:  # free memory may hold anything
        layer.keys[:, transformer.length :] = layer.values[:, transformer.length :] = torch.nan
    fixed = StaticStep(transformer)
    for token in torch.arange(20, 20 + 5 * rows).view(5, rows, 1):
        torch.testing.assert_close(fixed.extend(token), growing.extend(token), atol=2e-5, rtol=1e-5)
    assert fixed.transformer.length == growing.length


@torch.no_grad()
def test_a_step_in_half_precision():
    """As on a GPU, where weights are bf16."""
    model = tiny_showo().bfloat16()
    prompts = Prompts.of(ROWS, model.vocabulary, 6)
    growing, fixed = prompts.read(model)[0], StaticStep(prompts.read(model)[0])
    token = torch.tensor([[20], [21]])
    torch.testing.assert_close(fixed.extend(token), growing.extend(token), atol=0.05, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("max_draft", [0, 8])
def test_a_graph_gives_the_same_tokens(max_draft):
    model, ids = tiny_showo().cuda(), ROWS[:1].cuda()
    settings = {"max_new_tokens": 40, "top_k": 1, "max_draft": max_draft}
    expected = model.mmu_generate(ids, **settings)
    model.showo.model.compile()
    assert torch.equal(model.mmu_generate(ids, **settings), expected)
