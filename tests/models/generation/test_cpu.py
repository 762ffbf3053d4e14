"""The quick head names the token that the whole head names (SPEC §8)."""

import copy

import pytest
import torch
from models.greedy_head import GreedyHead, greedy_head
from torch import nn

from models import greedy_head as module
from tests.parity.goldens import tiny_showo

V, H = 5000, 96


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def small_heads(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 1)


def make_head(seed: int = 0, num_tokens: int = V, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(H, num_tokens, bias=bias)


def assert_same(head: nn.Linear, hidden: torch.Tensor) -> None:
    """Equal ids; the whole head is taken in fp64, so that fp32 rounding decides nothing."""
    logits = nn.functional.linear(
        hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double()
    )
    assert torch.equal(GreedyHead(head).argmax(hidden), logits.argmax(1))


@pytest.mark.parametrize("num_rows", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_random_heads(num_rows, bias):
    head = make_head(bias=bias)
    for _ in range(50):
        assert_same(head, 3 * torch.randn(num_rows, H))


@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4])
def test_many_tokens_closer_than_eight_bits_can_tell(difference):
    head = make_head()
    torch.manual_seed(1)
    head.weight[100:400] = head.weight[7] + difference * torch.randn(300, H)
    head.bias[100:400] = head.bias[7]
    for _ in range(20):
        assert_same(head, head.weight[7:8] * 20 + 0.1 * torch.randn(1, H))


def test_rows_of_very_different_sizes():
    head = make_head()
    head.weight[::3] *= 1e-4
    head.weight[5] *= 300
    head.weight[8] = 0
    for _ in range(30):
        assert_same(head, torch.randn(2, H))


def test_hidden_states_with_an_outlier():
    head, hidden = make_head(), torch.randn(30, H)
    hidden[:, 3] *= 200
    for row in hidden.split(1):
        assert_same(head, row)


def test_equal_tokens_give_the_first():
    head = make_head()
    head.weight[[40, 4000, 700]], head.bias[[40, 4000, 700]] = 2 * torch.ones(H), 0.0
    assert GreedyHead(head).argmax(torch.ones(2, H)).tolist() == [40, 40]


@pytest.mark.parametrize("in_place", ["optimizer", "data", "load", "swap"])
def test_changed_weights_are_noticed(small_heads, in_place):
    """Also by the ways that leave no trace on the parameter, as sharded optimizers do it."""
    head, other = make_head(), make_head(seed=1)
    first = greedy_head(head, 1)
    assert greedy_head(head, 1) is first
    if in_place == "optimizer":
        head.weight.copy_(other.weight)
    elif in_place == "data":
        head.weight.data.copy_(other.weight)
    elif in_place == "load":
        head.load_state_dict(other.state_dict())
    else:
        head.weight.data = head.weight.data.flip(0)
    hidden = torch.randn(1, H)
    assert greedy_head(head, 1) is not first
    assert torch.equal(greedy_head(head, 1).argmax(hidden), head(hidden).argmax(1))


def test_a_changed_bias_counts(small_heads):
    head, hidden = make_head(), torch.randn(1, H)
    greedy_head(head, 1)
    head.bias.data[77] = 1e3
    assert greedy_head(head, 1).argmax(hidden).item() == 77
    head.bias.data = head.bias.data.roll(1)
    assert greedy_head(head, 1).argmax(hidden).item() == 78


def test_where_a_plain_product_is_better(small_heads):
    head = make_head()
    assert greedy_head(head, 1) is not None
    assert greedy_head(head, 64) is None
    assert greedy_head(copy.deepcopy(head).bfloat16(), 1) is None
    assert greedy_head(nn.Linear(36, V), 1) is None, "torch's 8-bit product reads past rows of this length"
    with torch.autocast("cpu", torch.bfloat16):
        assert greedy_head(head, 1) is None
    head.register_forward_hook(lambda module, args, output: -output)
    assert greedy_head(head, 1) is None


def test_small_heads_are_left_alone():
    assert greedy_head(make_head(), 1) is None


def test_copies_go_with_their_heads(small_heads):
    head = make_head()
    greedy_head(head, 1)
    kept = len(module._copies)
    del head
    assert len(module._copies) == kept - 1


@pytest.mark.parametrize("num_rows", [1, 3])
def test_answers_are_the_same(monkeypatch, num_rows):
    model = tiny_showo()
    ids = torch.randint(0, 100, (num_rows, 9))
    settings = {"max_new_tokens": 40, "top_k": 1}
    expected = model.mmu_generate(ids, **settings)
    assert model.showo.lm_head not in module._copies
    monkeypatch.setattr(module, "SMALLEST", 1)
    assert torch.equal(model.mmu_generate(ids, **settings), expected)
    assert model.showo.lm_head in module._copies
