"""Positions that come piece by piece give the hidden states of whole rows, by both runners (SPEC §7, §8)."""

import pytest
import torch
from models.incremental import ModulePhi, PlainPhi, incremental
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import OmniMask
from tests.parity.goldens import tiny_showo

PAD, SOI, EOI, T2I, MMU, OFFSET, MASK, N = 118, 119, 120, 123, 124, 128, 192, 16
BLOCK = [SOI, *(OFFSET + 2 * i if i % 3 else MASK for i in range(N)), EOI]


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


def padded(rows: list[list[int]]) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([[PAD] * (length - len(row)) + row for row in rows])


DRAWING = padded([[T2I, 117, *text, 117, *BLOCK] for text in ([3, 4, 5, 6, 7, 8], [20, 21], [])])
ANSWERING = padded([[MMU, *BLOCK, 117, 3, 4, 5, 6], [MMU, SOI, *range(OFFSET, OFFSET + 9), EOI, 117, 9, 10, 11]])
TEXT = torch.arange(40).view(2, 20)
# Positions that see each other (an image, and all up to the end of it in an answer) are one piece.
CASES = {
    "drawing": (DRAWING, [6, 3, N + 2]),
    "drawing, text at once": (DRAWING, [9, N + 2]),
    "answering": (ANSWERING, [20, 1, 1, 2]),
    "text": (TEXT, [7, 1, 1, 5, 6]),
    "one piece": (ANSWERING, [24]),
}


@pytest.mark.parametrize("runner", [PlainPhi, ModulePhi])
@pytest.mark.parametrize("case", CASES)
def test_pieces_equal_the_whole(model, runner, case):
    ids, sizes = CASES[case]
    mask = OmniMask.from_ids(ids, model.vocabulary)
    transformer = runner(model, mask)
    parts = [transformer.extend(part) for part in ids.split(sizes, dim=1)]
    same(torch.cat(parts, dim=1), model.hidden_states(ids, mask))


@pytest.mark.parametrize("runner", [PlainPhi, ModulePhi])
@pytest.mark.parametrize("case", CASES)
def test_only_the_needed_positions(model, runner, case):
    """Of every piece, other positions in every row."""
    ids, sizes = CASES[case]
    mask = OmniMask.from_ids(ids, model.vocabulary)
    transformer, whole = runner(model, mask), model.hidden_states(ids, mask)
    for part, expected in zip(ids.split(sizes, dim=1), whole.split(sizes, dim=1), strict=True):
        needed = torch.stack([torch.randperm(part.shape[1])[: (part.shape[1] + 1) // 2] for _ in part])
        rows = torch.arange(len(part))[:, None]
        same(transformer.extend(part, needed=needed), expected[rows, needed])


@pytest.mark.parametrize("runner", [PlainPhi, ModulePhi])
def test_none_needed(model, runner):
    """The keys and values are kept all the same."""
    mask = OmniMask.from_ids(DRAWING, model.vocabulary)
    transformer = runner(model, mask)
    assert transformer.extend(DRAWING[:, :9], needed=torch.zeros(3, 0).long()).shape == (3, 0, 64)
    same(transformer.extend(DRAWING[:, 9:]), model.hidden_states(DRAWING, mask)[:, 9:])


@pytest.mark.parametrize("runner", [PlainPhi, ModulePhi])
def test_equal_rows_are_given_once(model, runner):
    """Rows of other texts and the same images; positions are asked for in the order of the rows given."""
    ids = torch.cat([DRAWING[:2, :9], DRAWING[1:, :9]])
    blocks = DRAWING[:2, 9:].clone()
    blocks[1, 3:9] = MASK
    whole = torch.cat([ids, blocks.repeat(2, 1)], dim=1)
    mask = OmniMask.from_ids(whole, model.vocabulary)
    expected = model.hidden_states(whole, mask)[:, 9:]
    transformer = runner(model, mask)
    transformer.extend(ids)
    same(transformer.extend(blocks), expected)
    transformer.forget(N + 2)
    needed = torch.tensor([[1, 4, 9], [2, 3, 17]])
    same(transformer.extend(blocks, needed=needed), expected[torch.arange(4)[:, None], needed.repeat(2, 1)])


@pytest.mark.parametrize("runner", [PlainPhi, ModulePhi])
def test_forgotten_positions_leave_nothing(model, runner):
    mask = OmniMask.from_ids(DRAWING, model.vocabulary)
    transformer = runner(model, mask)
    transformer.extend(DRAWING[:, :9])
    transformer.extend(DRAWING[:, 9:].flip(0))
    transformer.forget(N + 2)
    same(transformer.extend(DRAWING[:, 9:]), model.hidden_states(DRAWING, mask)[:, 9:])


@pytest.mark.parametrize("runner", [PlainPhi, ModulePhi])
def test_image_features(runner):
    model = tiny_showo(w_clip_vit=True, clip_feature_size=24)
    ids = torch.tensor([[MMU, SOI, *[-200] * 9, EOI, 117, 3, 4, 5]])
    features, mask = torch.randn(1, 9, 24), OmniMask.from_ids(ids, model.vocabulary)
    transformer = runner(model, mask)
    parts = [transformer.extend(ids[:, :13], image_features=features), transformer.extend(ids[:, 13:])]
    same(torch.cat(parts, dim=1), model.hidden_states(ids, mask, image_features=features))


@pytest.mark.parametrize("runner", [PlainPhi, ModulePhi])
def test_autocast(model, runner):
    mask = OmniMask.from_ids(ANSWERING, model.vocabulary)
    transformer, whole = runner(model, mask), model.hidden_states(ANSWERING, mask)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [transformer.extend(part) for part in ANSWERING.split([20, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1).float(), whole, atol=0.15, rtol=0)


class Doubled(nn.Linear):
    """A layer of another class in the place of a linear one, as adapters and quantised layers are."""

    def forward(self, x):
        return 2 * super().forward(x)


def add_hook(showo):
    showo.model.layers[0].mlp.fc1.register_forward_hook(lambda module, args, output: 2 * output)


def replace_forward(showo):
    fc1 = showo.model.layers[0].mlp.fc1
    plain = fc1.forward
    fc1.forward = lambda x: 2 * plain(x)


def replace_layer(showo):
    fc1 = showo.model.layers[0].mlp.fc1
    doubled = Doubled(fc1.in_features, fc1.out_features)
    doubled.load_state_dict(fc1.state_dict())
    showo.model.layers[0].mlp.fc1 = doubled


@pytest.mark.parametrize("change", [add_hook, replace_forward, replace_layer])
def test_what_modules_do_beyond_their_weights_is_done(model, change):
    changed = tiny_showo()
    change(changed.showo)
    mask = OmniMask.from_ids(ANSWERING, model.vocabulary)
    hidden = incremental(changed, mask).extend(ANSWERING)
    same(hidden, changed.hidden_states(ANSWERING, mask))
    assert not torch.allclose(hidden, model.hidden_states(ANSWERING, mask), atol=1e-3)


@pytest.mark.slow
def test_choice_of_the_runner(model):
    mask = OmniMask.from_ids(ANSWERING, model.vocabulary)
    assert isinstance(incremental(model, mask), PlainPhi)
    assert isinstance(incremental(tiny_showo(attn_implementation="eager"), mask), ModulePhi)
    compiled = tiny_showo()
    compiled.showo.model.compile()
    assert isinstance(incremental(compiled, mask), ModulePhi)


def linear_flops(run) -> int:
    """Counted multiplications and additions of the linear layers; torch's counter does not know addmm_ by itself."""

    def addmm_(total_shape, a_shape, b_shape, **_):
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        run()
    return sum(n for name, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))


def test_only_what_is_needed_is_computed(model):
    """Multiplications of the linear layers: the first layer once for equal rows, the last for needed positions only."""
    ids, block = DRAWING[:2, :9], DRAWING[:1, 9:]
    mask = OmniMask.from_ids(torch.cat([ids, block.repeat(2, 1)], dim=1), model.vocabulary)
    transformer = PlainPhi(model, mask)
    transformer.extend(ids)
    counted = linear_flops(lambda: transformer.extend(block, needed=torch.tensor([[1, 2, 3]])))
    layer = model.showo.model.layers[0]
    sizes = {name: module.weight.numel() for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    dense, key_value = sizes.pop("self_attn.dense"), sizes.pop("self_attn.k_proj") + sizes.pop("self_attn.v_proj")
    own = sum(sizes.values())  # query and MLP
    length, num_middle = N + 2, len(model.showo.model.layers) - 2
    first, last = length * (key_value + own + 2 * dense), 2 * (length * key_value + 3 * (own + dense))
    assert counted == 2 * (first + num_middle * 2 * length * (key_value + own + dense) + last)


def test_the_first_layer_computes_each_token_once(model):
    """With `ids_recur`, of a picture of which three tokens become known: the projections of three positions."""
    ids, block = DRAWING[:2, :9], torch.tensor([[SOI, *[MASK] * N, EOI]])
    mask = OmniMask.from_ids(torch.cat([ids, block.repeat(2, 1)], dim=1), model.vocabulary)
    runners = [PlainPhi(model, mask, ids_recur=recur) for recur in (False, True)]
    known = block.clone()
    known[0, [2, 5, 6]] = torch.tensor([OFFSET + 1, OFFSET + 9, OFFSET + 20])
    for runner in runners:
        runner.extend(ids)
        runner.extend(block)
        runner.forget(N + 2)
    same(*(runner.extend(known) for runner in runners))
    for runner in runners:
        runner.forget(N + 2)
    known[0, [1, 2, 3, 4]] = torch.tensor([OFFSET + 9, OFFSET + 2, OFFSET + 3, OFFSET + 4])  # 2, 3, 4 are new
    plain, memo = (linear_flops(lambda runner=runner: runner.extend(known)) for runner in runners)
    layer = model.showo.model.layers[0]
    sizes = {name: module.weight.numel() for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    del sizes["self_attn.dense"]
    assert plain - memo == 2 * (N + 2 - 3) * sum(sizes.values())


@pytest.mark.parametrize("needed", [None, torch.tensor([[0, 2, 3], [1, 2, 4]])])
def test_rewritten_positions(model, needed):
    """Other tokens at some positions: the others keep the keys and values they had, the new ones are seen."""
    ids, blocks = torch.cat([DRAWING[:2, :9], DRAWING[1:, :9]]), DRAWING[:2, 9:]
    whole = torch.cat([ids, blocks.repeat(2, 1)], dim=1)
    mask = OmniMask.from_ids(whole, model.vocabulary)
    transformer = PlainPhi(model, mask)
    transformer.extend(whole)
    at = torch.tensor([[10, 12, 13, 20, 25], [9, 11, 12, 13, 26]])
    same_ids = blocks.gather(1, at - 9)
    rows = torch.arange(4)[:, None]
    expected = model.hidden_states(whole, mask)[rows, at.repeat(2, 1)]
    picked = slice(None) if needed is None else (rows, needed.repeat(2, 1))
    same(transformer.rewrite(same_ids, at, needed), expected[picked])  # nothing new: nothing changes
    everything = torch.arange(9, 9 + N + 2).expand(2, -1)
    other = blocks.roll(3, 1)
    all_new = torch.cat([ids, other.repeat(2, 1)], dim=1)
    transformer.rewrite(other, everything)
    same(transformer.rewrite(other, everything), model.hidden_states(all_new, mask)[:, 9:])
    kept = [layer.keys.clone() for layer in transformer.layers]
    hidden = transformer.rewrite(same_ids, at)
    assert not torch.allclose(hidden, model.hidden_states(all_new, mask)[rows, at.repeat(2, 1)], atol=1e-3)
    for layer, before in zip(transformer.layers, kept, strict=True):
        changed = (layer.keys != before).flatten(2).any(-1)
        assert changed.sum() <= 4 * at.shape[1] and not changed[:, :9].any()
