"""The head's loss in chunks against the whole: losses, gradients, predictions, memory (SPEC §5)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import head_loss as module
from models.head_loss import Supervised, head_loss

POSITIONS, HIDDEN, VOCABULARY = 37, 12, 50


@pytest.fixture(params=[1, 7 * VOCABULARY, 2**25], ids=["chunks of 1", "chunks of 7", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", request.param)


def inputs(bias: bool = True):
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    hidden = torch.randn(POSITIONS, HIDDEN, requires_grad=True)
    return head, hidden, torch.randint(0, VOCABULARY, (POSITIONS,)), torch.rand(POSITIONS)


def gradients(total, head, hidden):
    return torch.autograd.grad(3 * total, [hidden, *head.parameters()])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_the_whole_heads(chunk, bias, label_smoothing):
    head, hidden, labels, factors = inputs(bias)
    logits = head(hidden)
    expected = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    total, losses, predicted = head_loss(head, hidden, labels, factors, label_smoothing=label_smoothing, predict=True)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, (expected * factors).sum(), atol=1e-5, rtol=1e-5)
    assert torch.equal(predicted, logits.argmax(-1)) and not losses.requires_grad
    found, wanted = gradients(total, head, hidden), gradients((expected * factors).sum(), head, hidden)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_only_what_is_trained_gets_a_gradient():
    """As where the projector alone is trained."""
    head, hidden, labels, factors = inputs()
    head.requires_grad_(False)
    head_loss(head, hidden, labels, factors)[0].backward()
    assert hidden.grad is not None and head.weight.grad is None
    with torch.no_grad():
        total, _, predicted = head_loss(head, hidden, labels, factors)
    assert not total.requires_grad and predicted is None


def test_a_second_backward_pass_is_refused():
    head, hidden, labels, factors = inputs()
    total, _, _ = head_loss(head, hidden, labels, factors)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        total.backward()


def test_gradients_add_up_over_steps():
    head, hidden, labels, factors = inputs()
    for _ in range(2):
        head_loss(head, hidden, labels, factors)[0].backward()
    torch.testing.assert_close(
        head.weight.grad, 2 * gradients(head_loss(head, hidden, labels, factors)[0], head, hidden)[1] / 3
    )


def test_autocast_runs_the_products_in_bf16_and_the_rest_in_fp32(chunk):
    head, hidden, labels, factors = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        expected = F.cross_entropy(logits.float(), labels, reduction="none")
        total, losses, _ = head_loss(head, hidden, labels, factors)
    assert logits.dtype == torch.bfloat16 and losses.dtype == total.dtype == torch.float32
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    found, wanted = gradients(total, head, hidden), gradients((expected * factors).sum(), head, hidden)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_bf16_weights(chunk):
    head, hidden, labels, factors = inputs()
    head.bfloat16()
    total, losses, _ = head_loss(head, hidden.bfloat16(), labels, factors)
    expected = F.cross_entropy(head(hidden.bfloat16()).float(), labels, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    total.backward()
    assert head.weight.grad.dtype == torch.bfloat16


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch):
    shapes, linear = [], F.linear
    monkeypatch.setattr(module, "CHUNK", 5 * VOCABULARY)
    monkeypatch.setattr(module.F, "linear", lambda x, *rest: shapes.append(len(x)) or linear(x, *rest))
    head, hidden, labels, factors = inputs()
    head_loss(head, hidden, labels, factors)[0].backward()
    assert shapes == [5] * 7 + [2], "and none are computed a second time for the backward pass"


def test_what_labels_supervise():
    labels = torch.full((3, 8), -100)
    labels[0] = torch.arange(8)  # t2i: unshifted, from max_seq_length + 1 on
    labels[1, :3] = torch.tensor([10, 11, 12])  # lm: shifted, its first label is nobody's
    labels[2, 6:] = torch.tensor([20, 21])
    found = Supervised.of(labels, (1, 1, 1), max_seq_length=4)
    assert found.counts == (3, 2, 2)
    assert found.index.tolist() == [5, 6, 7, 8, 9, 21, 22]
    assert found.labels.tolist() == [5, 6, 7, 11, 12, 20, 21]
    torch.testing.assert_close(found.factors((1, 0.1, 2)), torch.tensor([1 / 3] * 3 + [0.05] * 2 + [1.0] * 2))
    empty = Supervised.of(labels[2:], (0, 0, 1), max_seq_length=4)
    assert empty.counts == (0, 0, 2) and empty.factors((1, 1, 1)).tolist() == [0.5, 0.5]
