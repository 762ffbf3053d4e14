"""Which parameters are decayed, how the rate moves, and the average of the weights (spec §14)."""

import math

import pytest
import torch
from torch import nn

from models.vocabulary import Vocabulary
from tests.training.tiny import config_of, same, smallest_showo
from training.optimization import (
    WeightAverage,
    gradient_norms,
    make_optimizer,
    make_schedule,
    parameter_groups,
    share_code_bits,
)


def test_decay_goes_by_name_so_phis_norms_and_embeddings_are_decayed():
    model = smallest_showo(w_clip_vit=True)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = parameter_groups(model.named_parameters(), 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    decayed = {names[id(p)] for p in decayed["params"]}
    kept = {names[id(p)] for p in kept["params"]}
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert kept == {name for name in names.values() if name.endswith("bias")}
    layer = "showo.model.layers.0"
    norms = [f"{layer}.input_layernorm.weight", f"{layer}.self_attn.q_layernorm.weight"]
    assert decayed >= {*norms, "showo.model.final_layernorm.weight", "showo.model.embed_tokens.weight"}
    model.showo.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert [len(group["params"]) for group in groups] == [2, 2], "frozen ones are left out"


def test_the_published_names_without_decay():
    names = ["a.bias", "a.layer_norm.weight", "mlm_ln.weight", "embeddings.weight", "word_embeddings.weight"]
    named = {name: nn.Parameter(torch.zeros(1)) for name in [*names, "a.weight"]}
    decayed, kept = parameter_groups(named.items(), 0.1)
    assert decayed["params"] == [named["a.weight"]]
    assert [id(p) for p in kept["params"]] == [id(named[name]) for name in names]


def test_the_optimizer_has_the_configured_numbers(world):
    keys = {"learning_rate": 3e-4, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.2, "epsilon": 1e-6}
    overrides = {f"optimizer.params.{key}": value for key, value in keys.items()}
    optimizer = make_optimizer(smallest_showo(), config_of(world, overrides=overrides))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)


def rates(world, steps: int, **overrides) -> list[float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, config_of(world, overrides=overrides))
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_warms_up_linearly_and_ends_at_zero(world):
    settings = {"training.max_train_steps": 12, "lr_scheduler.params.warmup_steps": 4}
    expected = [0, 0.25, 0.5, 0.75] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    assert rates(world, 13, **settings) == pytest.approx(expected)
    shorter = {"lr_scheduler.params.num_training_steps": 2}
    assert max(rates(world, 9, **settings | shorter)) == 1.0, "it ends with its warm-up"


@pytest.mark.parametrize(
    ("name", "last", "after"),
    [
        ("linear", 0.125, 0.0),
        ("constant", 1.0, 1.0),
        ("constant_with_warmup", 1.0, 1.0),
        ("polynomial", 0.125, 1e-7),
        ("cosine", 0.038, 0.0),
    ],
)
def test_every_schedule_decays_over_its_steps_and_then_stays(world, name, last, after):
    scheduler = {"lr_scheduler.scheduler": name, "lr_scheduler.params.warmup_steps": 4}
    found = rates(world, 40, **scheduler, **{"training.max_train_steps": 12})
    assert found[11] == pytest.approx(last, abs=1e-3) and found[12:] == pytest.approx([after] * 28, abs=1e-12)
    kept = {"training.max_train_steps": 99, "lr_scheduler.params.num_training_steps": 12}
    assert rates(world, 40, **scheduler, **kept) == found


def test_the_average_is_the_weighted_sum_of_the_past():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, decay=0.25)
    expected = 1.0
    for step, value in enumerate([3.0, -2.0, 10.0, 4.0, 5.0], start=1):
        model.weight.data.fill_(value)
        average.update(model)
        decay = min(0.25, (1 + step) / (10 + step))  # shorter memory at the beginning
        expected = decay * expected + (1 - decay) * value
        assert average.shadow["weight"].item() == pytest.approx(expected)
    assert average.updates == 5 and (1 + 1) / (10 + 1) < 0.25 < (1 + 5) / (10 + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_exchanges_weights_and_average_and_rounds_neither(dtype):
    """Weights of lower precision are those of DeepSpeed with bf16."""
    model = nn.Linear(4, 4).to(dtype)
    average = WeightAverage(model, 0.999)
    average.shadow = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    shadow = {name: tensor.clone() for name, tensor in average.shadow.items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with average.applied_to(model):
            assert same(dict(model.named_parameters()), {name: tensor.to(dtype) for name, tensor in shadow.items()})
        assert same(weights, dict(model.named_parameters())) and same(shadow, average.shadow)


def test_the_average_is_kept_in_fp32():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    average = WeightAverage(model, 0.999)
    average.updates = 10**6
    before = average.shadow["weight"].clone()
    model.weight.data.add_(1.0)
    average.update(model)
    assert average.shadow["weight"].dtype == torch.float32
    assert torch.allclose(average.shadow["weight"] - before, torch.tensor(0.001), rtol=0.02), "lost in bfloat16"


def test_the_average_survives_saving_and_can_begin_anew():
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.5)
    model.weight.data.add_(1)
    average.update(model)
    other = WeightAverage(nn.Linear(3, 2), 0.5)
    other.load_state_dict(average.state_dict())
    assert other.updates == 1 and same(average.shadow, other.shadow)
    average.restart(model)
    assert average.updates == 0 and torch.equal(average.shadow["weight"], model.weight)
    model.weight.data.add_(1)
    assert not torch.equal(average.shadow["weight"], model.weight), "a copy, not the weights themselves"


@pytest.mark.parametrize(
    ("clipping", "loss_scale", "factor"), [(None, 1.0, 1.0), (0.0, 4.0, 1 / 4), (20.0, 4.0, 1 / 4), (1.0, 4.0, 0.1 / 4)]
)
def test_gradient_norms_are_l2_over_the_number_of_elements(clipping, loss_scale, factor):
    """Gradients yet to be unscaled and clipped are measured as they will be: 6 and 8 unscaled, together 10."""
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.tensor([[0.0, 14.4], [19.2, 0.0]]), torch.tensor([0.0, 32.0])
    norms = gradient_norms(model) if clipping is None else gradient_norms(model, clipping, loss_scale)
    expected = {"grad_norm/weight": 24 / 4 * factor, "grad_norm/bias": 32 / 2 * factor}
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(expected)


def test_shared_bits_are_a_sum_of_vectors():
    """As if the rows of codes were declared as own + signs @ shared, and all of it trained."""
    vocabulary = Vocabulary(llm_vocab_size=3, codebook_size=8)
    first, rows = vocabulary.image_offset, vocabulary.image_offset + 8 + 1
    start = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor([[2.0 * (code >> bit & 1) - 1 for bit in range(3)] for code in range(8)]) / 3**0.5
    weight = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    share_code_bits(optimizer, weight, vocabulary)
    own, shared = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(3, 4))
    plain = torch.optim.AdamW([own, shared], lr=0.1, weight_decay=0.0)
    for step in range(4):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        targets = torch.randint(rows, (5,), generator=torch.Generator().manual_seed(step))
        summed = own.index_add(0, torch.arange(first, first + 8), signs @ shared)
        for one, matrix in ((optimizer, weight), (plain, summed)):
            one.zero_grad()
            nn.functional.cross_entropy(inputs @ matrix.T, targets).backward()
            one.step()
    summed = own.index_add(0, torch.arange(first, first + 8), signs @ shared)
    assert torch.allclose(weight, summed, atol=1e-6) and shared.abs().min() > 0.01
    kept = weight.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(weight, kept), "a step without gradients, as after a batch that is not finite"
