"""Which parameters are decayed, how the rate moves, and the average of the weights (spec §14)."""

import math

import pytest
import torch
from torch import nn

from models import Showo, ShowoConfig
from tests.training.tiny import config_of
from training.optimization import WeightAverage, gradient_norms, make_optimizer, make_schedule, parameter_groups


def tiny_showo(**settings) -> Showo:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    llm = {"model_type": "phi", "vocab_size": 20, **sizes}
    vocabulary = {"vocab_size": 20 + 10 + 8 + 1, "llm_vocab_size": 20, "codebook_size": 8}
    return Showo(ShowoConfig(llm_config=llm, num_vq_tokens=4, **vocabulary, **settings))


def test_decay_goes_by_name_so_phis_norms_and_embeddings_are_decayed():
    model = tiny_showo(w_clip_vit=True)
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


def test_the_published_names_without_decay():
    names = [
        "a.bias",
        "a.layer_norm.weight",
        "mlm_ln.weight",
        "embeddings.weight",
        "word_embeddings.weight",
        "a.weight",
    ]
    named = [(name, nn.Parameter(torch.zeros(1))) for name in names]
    decayed, kept = parameter_groups(named, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(named[-1][1])]
    assert [id(p) for p in kept["params"]] == [id(p) for _, p in named[:-1]]


def test_frozen_parameters_are_left_out():
    model = tiny_showo(w_clip_vit=True)
    model.showo.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert [len(group["params"]) for group in groups] == [2, 2]


def test_the_optimizer_has_the_configured_numbers(world):
    keys = {"learning_rate": 3e-4, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.2, "epsilon": 1e-6}
    overrides = {f"optimizer.params.{key}": value for key, value in keys.items()}
    optimizer = make_optimizer(tiny_showo(), config_of(world, overrides=overrides))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)


def rates(world, steps: int, **overrides) -> list[float]:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
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


def test_a_schedule_shorter_than_its_warm_up_ends_with_it(world):
    settings = {"lr_scheduler.params.warmup_steps": 4, "lr_scheduler.params.num_training_steps": 2}
    assert max(rates(world, 9, **settings)) == 1.0


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


def test_swapping_twice_restores_both_and_once_exchanges_them():
    model = tiny_showo()
    average = WeightAverage(model, 0.9)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    average.update(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    shadow = {n: p.clone() for n, p in average.shadow.items()}
    average.swap(model)
    assert all(torch.equal(p, shadow[n]) for n, p in model.named_parameters())
    average.swap(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, shadow[n]) for n, p in average.shadow.items())


def test_weights_of_lower_precision_do_not_round_the_average():
    """As DeepSpeed's are with bf16."""
    model = nn.Linear(4, 4).to(torch.bfloat16)
    average = WeightAverage(model, 0.999)
    average.shadow = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    shadow = {name: tensor.clone() for name, tensor in average.shadow.items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with average.applied_to(model):
            assert torch.equal(model.weight, shadow["weight"].to(torch.bfloat16))
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        assert all(torch.equal(tensor, shadow[name]) for name, tensor in average.shadow.items())


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
    assert other.updates == 1
    assert all(torch.equal(other.shadow[name], average.shadow[name]) for name in average.shadow)
    average.restart(model)
    assert average.updates == 0 and torch.equal(average.shadow["weight"], model.weight)
    model.weight.data.add_(1)
    assert not torch.equal(average.shadow["weight"], model.weight), "a copy, not the weights themselves"


def test_gradient_norms_are_l2_over_the_number_of_elements():
    model = nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert {name: value.item() for name, value in gradient_norms(model).items()} == {"grad_norm/weight": 1.25}


@pytest.mark.parametrize(("clipping", "factor"), [(0.0, 1.0), (20.0, 1.0), (1.0, 0.1)])
def test_gradients_yet_to_be_unscaled_and_clipped_are_measured_as_they_will_be(clipping, factor):
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.tensor([[24.0, 0.0], [0.0, 0.0]]), torch.tensor([0.0, 32.0])
    norms = gradient_norms(model, clipping, loss_scale=4.0)  # 6 and 8, together 10
    expected = {"grad_norm/weight": 6 / 4 * factor, "grad_norm/bias": 8 / 2 * factor}
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(expected)
