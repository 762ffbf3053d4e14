"""The compiled drawing step: the tokens stay, and other prompts need no other graph."""

import pytest
import torch
from torch._dynamo.utils import counters

from models import compiled_block
from models.compiled_block import CompiledBlock
from models.image_block import ImageBlock
from tests.models.test_generation import LONG, MASK, NUM_CODES, N, seeded, t2i_rows
from tests.parity.goldens import tiny_showo


@pytest.fixture
def eager_step(monkeypatch):
    """What would be compiled, as it stands."""
    monkeypatch.setattr(compiled_block, "_on_cpu", compiled_block._step)


def compiled_model():
    model = tiny_showo()
    model.showo.model.compile(dynamic=True)
    return model


@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
@pytest.mark.parametrize("texts", [["w1 w2"], ["w1 w2", "", LONG], [LONG]], ids=["one", "different pads", "full"])
def test_logits_are_those_of_the_other_block(eager_step, texts, guidance_scale):
    """The first step and one with known codes, also where the bucket is wider than the row."""
    model = tiny_showo()
    ids, uncond_ids = t2i_rows(texts)
    rows = torch.cat([ids, uncond_ids]) if guidance_scale else ids
    codes = torch.full((len(texts), N), MASK)
    with torch.no_grad():
        blocks = [block(model, rows, len(texts), guidance_scale) for block in (ImageBlock, CompiledBlock)]
        for step in range(2):
            logits = [block.code_logits(codes, block.positions(step, codes == MASK)).clone() for block in blocks]
            at = blocks[0].positions(step, codes == MASK)[..., None].expand(-1, -1, NUM_CODES)
            assert logits[1].shape == (len(texts), N, NUM_CODES)
            torch.testing.assert_close(logits[0], logits[1].gather(1, at), atol=1e-4, rtol=1e-4)
            codes = codes.clone()
            codes[:, ::2] = torch.randint(0, NUM_CODES, (len(texts), N // 2), generator=seeded(step))


def compare(compiled, texts: list[str], known=None, seed: int = 0, **settings) -> None:
    """Against the model that is not compiled, which `test_generation.py` compares with the plain loop."""
    rows = t2i_rows(texts, known)
    drawn = (model.t2i_generate(*rows, generator=seeded(seed), **settings) for model in (compiled, tiny_showo()))
    assert torch.equal(*drawn)


def test_a_compiled_model_draws_the_published_tokens(eager_step):
    compare(compiled_model(), ["w1 w2", "", LONG], guidance_scale=3.0, timesteps=5)
    known = torch.randint(0, NUM_CODES, (2, N), generator=seeded(1))
    known[0, :5], known[1, 3:] = -1, -1
    compare(compiled_model(), ["w1", "w2 w3"], known, guidance_scale=1.0, timesteps=5)


def test_prompts_of_all_lengths_share_buckets(eager_step):
    model, shapes = compiled_model(), set()
    for words in range(0, 9):
        ids, uncond_ids = t2i_rows([" ".join(["w1"] * words)])
        block = CompiledBlock(model, torch.cat([ids, uncond_ids]), 1, 2.0)
        shapes.add((tuple(block.past.shape), tuple(block.bias.shape)))
    assert len(shapes) == 1
    assert shapes.pop()[1][3] % compiled_block.BUCKET == 0


@pytest.mark.slow
def test_one_graph_for_all_steps_and_prompts():
    """Counted by torch: after the first drawing nothing is compiled again; the tokens are the published ones."""
    model = compiled_model()
    counters.clear()
    compare(model, ["w1 w2"], guidance_scale=3.0, timesteps=4)
    graphs = counters["stats"]["unique_graphs"]
    for seed, (texts, scale) in enumerate(([["w3"], 3.0], [["w4 w5 w6"], 5.0], [["w1 w2 w3 w4 w5"], 1.5])):
        compare(model, texts, seed=seed, guidance_scale=scale, timesteps=3 + seed)
    assert counters["stats"]["unique_graphs"] == graphs >= 1
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = compiled_model().to("cuda", dtype)
    ids, uncond_ids = (rows.cuda() for rows in t2i_rows(["w1 w2", LONG]))
    rows, codes = torch.cat([ids, uncond_ids]), torch.full((2, N), MASK, device="cuda")
    with torch.no_grad():
        blocks = [block(model, rows, 2, 2.0) for block in (ImageBlock, CompiledBlock)]
        for step in range(3):  # more than CUDA graphs need to warm up
            positions = [block.positions(step, codes == MASK) for block in blocks]
            logits = [block.code_logits(codes, at).clone() for block, at in zip(blocks, positions, strict=True)]
            bound = 1e-3 if dtype == torch.float32 else 0.1
            same = logits[1].gather(1, positions[0][..., None].expand(-1, -1, NUM_CODES))
            torch.testing.assert_close(logits[0], same, atol=bound, rtol=bound)
            codes[:, step] = step
