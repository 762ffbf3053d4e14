"""What pays on CPUs changes no token, and leaves alone what it does not serve."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.generation import cpu
from models.generation.cpu import GreedyHead, SkinnyLinear
from tests.parity.goldens import tiny_showo

V, H = 5000, 96
GREEDY = {"max_new_tokens": 40, "top_k": 1}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def make_head(seed: int = 0, bias: bool = True, num_tokens: int = V) -> SkinnyLinear:
    torch.manual_seed(seed)
    head = nn.Linear(H, num_tokens, bias=bias)
    head.__class__ = SkinnyLinear
    return head


def greedy(head: nn.Module) -> GreedyHead:
    """That of a Showo with this head."""
    return GreedyHead(SimpleNamespace(showo=SimpleNamespace(get_output_embeddings=lambda: head)))


# ---- linear layers ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, H), (1, 7, H), (4, 8, H), (3, H), (1, H), (2, 40, H), (0, H)])
@pytest.mark.parametrize("num_outputs", [64, 50])
def test_products(monkeypatch, shape, num_outputs, bias):
    """One row in blocks where they divide, a few, many; all numbers of rows count as few here."""
    monkeypatch.setattr(cpu, "FEW_ROWS", range(1, 33))
    linear, x = make_head(bias=bias, num_tokens=num_outputs), torch.randn(shape)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias), atol=1e-5, rtol=1e-5)


def test_what_is_not_served_runs_as_it_is(monkeypatch):
    """Gradients, autocast, other dtypes, weights of another kind; hooks and names stay."""
    monkeypatch.setattr(cpu, "skinny_product", lambda *args: pytest.fail("must not be used"))
    monkeypatch.setattr(cpu, "FEW_ROWS", range(1, 33))
    linear, x = make_head(), torch.randn(2, H)
    with torch.enable_grad():
        linear(x).sum().backward()
    assert linear.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    copy.deepcopy(linear).bfloat16()(x.bfloat16())
    linear.weight = type("Other", (nn.Parameter,), {})(linear.weight)
    linear(x)


def test_enable_keeps_names_and_hooks():
    model, other = tiny_showo(), tiny_showo()
    seen = []
    model.showo.get_decoder().layers[0].mlp.fc1.register_forward_hook(lambda *args: seen.append(1))
    cpu.enable(model)
    assert list(model.state_dict()) == list(other.state_dict())
    ids = torch.randint(0, 100, (1, 9))
    torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=1e-5, rtol=1e-5)
    assert seen


# ---- the greedy head ----


def assert_same(head: nn.Linear, hidden: torch.Tensor) -> None:
    """Equal ids; the whole head is taken in float64, so that float32 rounding decides nothing."""
    bias = None if head.bias is None else head.bias.double()
    logits = nn.functional.linear(hidden.double(), head.weight.double(), bias)
    quick = greedy(head)
    quick.quantize()
    assert torch.equal(quick.argmax(hidden), logits.argmax(1))


@pytest.mark.parametrize("num_rows", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_random_heads(num_rows, bias):
    """Rows and hidden states of very different sizes among them."""
    head = make_head(bias=bias)
    head.weight[::3] *= 1e-4
    head.weight[5] *= 300
    head.weight[8] = 0
    for outlier in (1, 200):
        hidden = 3 * torch.randn(20, num_rows, H)
        hidden[..., 3] *= outlier
        for rows in hidden:
            assert_same(head, rows)


@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4])
def test_many_tokens_closer_than_eight_bits_can_tell(difference):
    head = make_head()
    torch.manual_seed(1)
    head.weight[100:400] = head.weight[7] + difference * torch.randn(300, H)
    head.bias[100:400] = head.bias[7]
    for _ in range(20):
        assert_same(head, head.weight[7:8] * 20 + 0.1 * torch.randn(1, H))


@pytest.fixture
def small_heads(monkeypatch):
    monkeypatch.setattr(GreedyHead, "MIN_WEIGHTS", 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda head, other: head.weight.copy_(other.weight),
        lambda head, other: head.weight.data.copy_(other.weight),
        lambda head, other: head.load_state_dict(other.state_dict()),
        lambda head, other: setattr(head.weight, "data", head.weight.data.flip(0)),
        lambda head, other: head.bias.data.__setitem__(77, 1e3),
    ],
    ids=["optimizer", "data", "load", "swap", "bias"],
)
def test_changed_weights_are_noticed(small_heads, change):
    """Also by the ways that leave no trace on the parameter, as sharded optimizers do it."""
    head, other = make_head(), make_head(seed=1)
    quick, hidden = greedy(head), torch.randn(1, 1, H)
    list(quick.chooser(99)(hidden))
    change(head, other)
    assert next(quick.chooser(99)(hidden)) == head(hidden).argmax(-1)[:, 0]


def test_where_a_plain_product_is_better(small_heads):
    quick, hidden = greedy(make_head()), torch.randn(1, 1, H)
    assert quick.serves(hidden)
    assert not quick.serves(torch.randn(64, 1, H))
    assert not quick.serves(hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not quick.serves(hidden)
    quick.head.register_forward_hook(lambda module, args, output: -output)
    assert not quick.serves(hidden)
    odd = nn.Linear(36, V)  # torch's 8-bit product reads past rows of this length
    odd.__class__ = SkinnyLinear
    assert not greedy(odd).serves(torch.randn(1, 1, 36))


def test_the_head_of_the_moment_counts(small_heads):
    """As when an adapter replaces it."""
    model, expected, ids = tiny_showo(), tiny_showo(), torch.randint(0, 100, (1, 9))
    cpu.enable(model)
    model.mmu_generate(ids, **GREEDY)
    head = nn.Linear(64, 193)
    model.showo.set_output_embeddings(head)
    expected.showo.set_output_embeddings(head)
    assert torch.equal(model.mmu_generate(ids, **GREEDY), expected.mmu_generate(ids, **GREEDY))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_answers_are_the_same(small_heads, monkeypatch, num_rows):
    model, ids = tiny_showo(), torch.randint(0, 100, (num_rows, 9))
    expected = model.mmu_generate(ids, **GREEDY)
    cpu.enable(model)
    calls, argmax = [], GreedyHead.argmax
    monkeypatch.setattr(GreedyHead, "argmax", lambda self, hidden: (calls.append(1), argmax(self, hidden))[1])
    assert torch.equal(model.mmu_generate(ids, **GREEDY), expected) and calls
