"""Losses of `Objective` and the chunked cross-entropy of the vocabulary head against the whole head (spec §5)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import OmniMask
from models.modeling_showo import ShowoOutput
from tests.parity.goldens import tiny_showo
from training import loss as module
from training.loss import LogProbObjective, Objective, linear_cross_entropy, log_probs_of

POSITIONS, HIDDEN, VOCABULARY = 37, 12, 50


@pytest.fixture(params=[1, 7 * VOCABULARY, 2**25], ids=["chunks of 1", "chunks of 7", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", request.param)


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
    head, hidden, labels, weights = inputs(bias)
    logits = head(hidden)
    expected = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    total, losses, predicted = linear_cross_entropy(head, hidden, labels, weights, label_smoothing, predict=True)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, (expected * weights).sum(), atol=1e-5, rtol=1e-5)
    assert torch.equal(predicted, logits.argmax(-1)) and not losses.requires_grad
    found, wanted = gradients(total, head, hidden), gradients((expected * weights).sum(), head, hidden)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_part_of_the_head_is_a_vocabulary_of_its_own(chunk, bias):
    head, hidden, _, weights = inputs(bias)
    rows, labels = slice(10, 30), torch.arange(POSITIONS) % 20
    expected = F.cross_entropy(head(hidden)[:, rows], labels, reduction="none")
    total, losses, _ = linear_cross_entropy(head, hidden, labels, weights, rows=rows)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    found, wanted = gradients(total, head, hidden), gradients((expected * weights).sum(), head, hidden)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_only_what_is_trained_gets_a_gradient():
    """As where the projector alone is trained."""
    head, hidden, labels, weights = inputs()
    head.requires_grad_(False)
    linear_cross_entropy(head, hidden, labels, weights)[0].backward()
    assert hidden.grad is not None and head.weight.grad is None
    with torch.no_grad():
        total, _, predicted = linear_cross_entropy(head, hidden, labels, weights)
    assert not total.requires_grad and predicted is None


def test_gradients_add_up_over_steps_but_a_second_backward_pass_is_refused():
    head, hidden, labels, weights = inputs()
    for _ in range(2):
        total = linear_cross_entropy(head, hidden, labels, weights)[0]
        total.backward(retain_graph=True)
    once = torch.autograd.grad(linear_cross_entropy(head, hidden, labels, weights)[0], head.weight)[0]
    torch.testing.assert_close(head.weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="once only"):
        total.backward()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_products_are_in_bf16_and_the_rest_in_fp32(chunk, autocast):
    head, hidden, labels, weights = inputs()
    given = hidden if autocast else hidden.bfloat16()
    head = head if autocast else head.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = head(given)
        expected = F.cross_entropy(logits.float(), labels, reduction="none")
        total, losses, _ = linear_cross_entropy(head, given, labels, weights)
    assert logits.dtype == torch.bfloat16 and losses.dtype == total.dtype == torch.float32
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    found, wanted = gradients(total, head, hidden), gradients((expected * weights).sum(), head, hidden)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch):
    shapes, linear = [], F.linear
    monkeypatch.setattr(module, "MAX_LOGITS", 5 * VOCABULARY)
    monkeypatch.setattr(module.F, "linear", lambda x, *rest: shapes.append(len(x)) or linear(x, *rest))
    head, hidden, labels, weights = inputs()
    linear_cross_entropy(head, hidden, labels, weights)[0].backward()
    assert shapes == [5] * 7 + [2], "and none are computed a second time for the backward pass"


def test_a_head_that_is_no_linear_layer_is_refused():
    """Its weight alone would give another loss: an adapter around it adds to its outputs."""
    head, hidden, labels, weights = inputs()
    with pytest.raises(ValueError, match="a vocabulary head that is an nn.Linear, got Sequential"):
        linear_cross_entropy(nn.Sequential(head), hidden, labels, weights)


def test_statistics_count_right_predictions_and_means_of_rows():
    """Two t2i rows, of which one has nothing to predict but `<soi>`, which does not count; one mmu row."""
    labels = torch.full((3, 31), -100)
    labels[:2, 13] = 119
    labels[0, 14:17] = torch.tensor([128, 129, 130])
    labels[2, 21:24] = torch.tensor([5, 6, 7])
    ids = labels.clamp(min=0)
    model = tiny_showo()
    mask = OmniMask.lm(3, 31)
    with torch.no_grad():
        log_probabilities = model(ids, mask).logits.log_softmax(-1)
        found = model(ids, mask, Objective.from_labels(labels, (2, 0, 1), 12, statistics=True)).statistics
    likeliest = log_probabilities.argmax(-1)
    assert found.keys() == {"correct_t2i", "supervised_t2i", "correct_mmu", "supervised_mmu", "row_loss_t2i"}
    assert (found["supervised_t2i"], found["supervised_mmu"]) == (3, 3)
    assert found["correct_t2i"] == (likeliest[0, 14:17] == labels[0, 14:17]).sum()
    assert found["correct_mmu"] == (likeliest[2, 20:23] == labels[2, 21:24]).sum()
    first = log_probabilities[0, 13:17].gather(1, labels[0, 13:17, None]).mean()
    torch.testing.assert_close(found["row_loss_t2i"], -torch.stack([first, log_probabilities[1, 13, 119]]))


def test_what_labels_supervise():
    labels = torch.full((3, 8), -100)
    labels[0] = torch.arange(8)  # t2i: unshifted, from max_seq_length + 1 on
    labels[1, :3] = torch.tensor([10, 11, 12])  # lm: shifted, its first label is nobody's
    labels[2, 6:] = torch.tensor([20, 21])
    found = Objective.from_labels(labels, (1, 1, 1), max_seq_length=4)
    assert found.counts == {"t2i": 3, "lm": 2, "mmu": 2}
    assert found.index.tolist() == [5, 6, 7, 8, 9, 21, 22]
    assert found.targets.tolist() == [5, 6, 7, 11, 12, 20, 21]
    torch.testing.assert_close(found.position_weights((1, 0.1, 2)), torch.tensor([1 / 3] * 3 + [0.05] * 2 + [1.0] * 2))
    empty = Objective.from_labels(labels[2:], (0, 0, 1), max_seq_length=4)
    assert empty.counts == {"t2i": 0, "lm": 0, "mmu": 2} and empty.position_weights((1, 1, 1)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("codes_only", [False, True])
def test_any_function_of_log_probabilities_has_its_own_gradient(chunk, codes_only):
    """Against the logits of the whole head and torch's own differentiation."""
    model, mask = tiny_showo(), OmniMask.lm(2, 6)
    ids, targets = torch.arange(12).view(2, 6), torch.full((2, 6), -100)
    targets[0, 2:5], targets[1, 1:3] = torch.tensor([130, 128, 140]), torch.tensor([191, 131])

    def function(log_probs):
        """A product, so that the gradient of each depends on the others."""
        loss = -log_probs[:3].sum() * log_probs[3:].exp().sum()
        return ShowoOutput(loss=loss, losses={"it": loss})

    objective = LogProbObjective.of(Objective.from_targets({"it": (0, targets)}), function, codes_only)
    logits = model(ids, mask).logits
    logits = logits[..., 128:192] if codes_only else logits
    at = targets >= 0
    picked = logits[at].log_softmax(-1).gather(1, (targets[at] - (128 if codes_only else 0))[:, None])[:, 0]
    torch.testing.assert_close(log_probs_of(model, objective, codes_only, input_ids=ids, attention_mask=mask), picked)
    out = model(ids, mask, objective)
    torch.testing.assert_close(out.loss, function(picked).loss)
    assert not out.losses["it"].requires_grad
    parameters = list(model.parameters())
    found, wanted = (torch.autograd.grad(loss, parameters) for loss in (2 * out.loss, 2 * function(picked).loss))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_anew_for_each_batch():
    """Rows per task and supervised positions change from batch to batch; only the layers are compiled."""
    graphs, model = [], tiny_showo().train()
    torch._dynamo.reset()
    forward = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for supervised, rows in ((5, (2, 1, 1)), (3, (1, 2, 1)), (7, (1, 0, 3)), (2, (0, 4, 0))):
        labels = torch.full((4, 31), -100)
        labels[:, 31 - supervised :] = 5
        objective = Objective.from_labels(
            labels, rows, 12, coefficients={"t2i": 1.0, "lm": 0.1, "mmu": 1.0}, statistics=True
        )
        forward(labels.clamp(min=0), OmniMask.lm(4, 31), objective).loss.backward()
    assert len(graphs) == 1
