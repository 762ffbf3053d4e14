"""Schedules, one MaskGIT step and next-token sampling; whole loops against the published one: test_image.py."""

import math

import pytest
import torch

from models import SamplingParameters, get_mask_schedule
from models.generation import cpu, sampling
from models.generation.sampling import (
    gumbel_noise,
    halton_order,
    is_greedy,
    maskgit_step,
    position_order,
    remasked_positions,
    sample_next,
)

MASK = 1000


# ---- schedules; the published ones: tests/parity ----


def test_any_power_is_a_schedule():
    times = torch.linspace(0, 1, 41)
    torch.testing.assert_close(get_mask_schedule("pow3")(times), (1 - times**3).clamp(min=1e-6))


def test_arccos():
    """A third of the angle is left at cos 30° of the time."""
    times = torch.tensor([0.0, 0.5, 3**0.5 / 2, 1.0])
    torch.testing.assert_close(get_mask_schedule("arccos")(times), torch.tensor([1.0, 2 / 3, 1 / 3, 0.0]))


def test_sigmoid_parameters():
    """Spans of the same length give the same curve."""
    times = torch.linspace(0, 1, 9)
    found = get_mask_schedule("sigmoid", start=-1.5, end=1.5, tau=0.5)(times)
    torch.testing.assert_close(found, get_mask_schedule("sigmoid")(times))
    assert not torch.allclose(get_mask_schedule("sigmoid", start=-1.0)(times), found)


@pytest.mark.parametrize("name", ["", "cos", "Cosine", "pow", "powx", "pownan", "powinf", "root"])
def test_unknown_schedule_is_named_with_the_known_ones(name):
    with pytest.raises(
        ValueError, match=rf"unknown mask schedule '{name}'; known: cosine, linear, sigmoid, arccos, pow<k>"
    ):
        get_mask_schedule(name)


# ---- one MaskGIT step ----


@pytest.mark.parametrize("module", [sampling, cpu])
@pytest.mark.parametrize("seed", range(8))
def test_logits_at_unknown_positions_are_enough(seed, module):
    """The same codes from the same random numbers as with all logits; 50 positions are more than one chunk."""
    logits, image_ids = 3 * torch.randn(3, 50, 7), torch.randint(0, 7, (3, 50))
    unknown = torch.rand(3, 50) < (seed + 1) / 10
    image_ids[unknown] = MASK
    positions = unknown.int().argsort(dim=1, descending=True, stable=True)[:, : int(unknown.sum(1).max())]
    positions = positions.sort(1).values
    at_positions = {"positions": positions, "multinomial_at": module.multinomial_at}
    settings = {"mask_ratio": torch.tensor(0.4), "temperature": 1.0}
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    expected = maskgit_step(logits, image_ids, MASK, **settings, generator=generators[0])
    logits = logits.gather(1, positions[..., None].expand(-1, -1, 7))
    found = maskgit_step(logits, image_ids, MASK, **settings, **at_positions, generator=generators[1])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    follow = [torch.rand(4, generator=generator) for generator in generators]
    assert torch.equal(*follow)  # as many numbers were taken, so the next number of a run is the published one, too


def test_sampling_everywhere_is_torch_multinomial():
    """At the published size, bit for bit: an exponential number for every code of every position."""
    probabilities = (2 * torch.randn(1, 100, 8192)).softmax(-1)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    expected = torch.multinomial(probabilities[0], 1, generator=generators[0])[:, 0]
    ours = cpu.multinomial_at(probabilities, torch.arange(100)[None], 100, generators[1])
    assert cpu.exponential_is_log_of_uniform()  # else the test says nothing about this build
    assert torch.equal(ours[0], expected)
    assert torch.equal(*(generator.get_state() for generator in generators))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    logits = torch.randn(1, 16, 5)
    logits[0, 3] = value
    with pytest.raises(RuntimeError, match="not all finite"):
        maskgit_step(logits, torch.full((1, 16), MASK), MASK, mask_ratio=torch.tensor(0.5), temperature=1.0)


def test_number_left_masked_is_floored_in_fp32():
    """Faithful: cos(π/2 · 2/3) is just under one half in fp32, so half of 16 positions becomes 7, not 8."""
    ratio = get_mask_schedule("cosine")(torch.tensor(2 / 3))
    image_ids = torch.full((1, 16), MASK)
    _, remaining, _ = maskgit_step(torch.randn(1, 16, 40), image_ids, MASK, mask_ratio=ratio, temperature=1.0)
    assert int(remaining.sum()) == 7


def test_gumbel_noise():
    noise, again = (gumbel_noise(torch.zeros(200_000), torch.Generator().manual_seed(3)) for _ in range(2))
    assert noise.isfinite().all() and torch.equal(noise, again)
    assert abs(float(noise.mean()) - 0.5772) < 0.01 and abs(float(noise.var()) - math.pi**2 / 6) < 0.03


# ---- ways that are not published ----


@pytest.mark.parametrize(
    ("call", "values", "message"),
    [
        (SamplingParameters, {"refresh_every": 0}, "refresh_every is 0"),
        (SamplingParameters, {"guidance_start": -0.1}, "guidance_start"),
        (SamplingParameters, {"guidance_stop": 1.1}, "guidance_stop"),
        (SamplingParameters, {"guidance_start": 0.6, "guidance_stop": 0.5}, "0.6 and 0.5"),
        (
            SamplingParameters,
            {"order": "random"},
            "order is 'random', expected confidence or entropy or margin or halton or halton_roll",
        ),
        (SamplingParameters, {"top_k": 0}, "top_k is 0"),
        (SamplingParameters, {"top_p": 1.5}, "top_p is 1.5"),
        (SamplingParameters, {"logit_scale": 0.0}, "logit_scale is 0.0, expected more than 0"),
        (SamplingParameters, {"guidance_ramp": -1.0}, "guidance_ramp is -1.0"),
        (SamplingParameters, {"remask": "loop"}, "remask is 'loop', expected cap or rescale or confidence"),
        (SamplingParameters, {"remask": "rescale"}, "remask is 'rescale', but remask_rate is 0"),
        (SamplingParameters, {"remask_rate": 1.5}, "remask_rate is 1.5, expected 0 to 1"),
        (SamplingParameters, {"remask_start": 0.6, "remask_stop": 0.5}, "remask_start and remask_stop are 0.6 and 0.5"),
        (SamplingParameters, {"refresh_share": 0.0}, "refresh_share is 0.0"),
        (SamplingParameters, {"refresh_warmup": 2.0}, "refresh_warmup is 2.0"),
        (halton_order, {"num_positions": 15}, "square images, not 15"),
        (is_greedy, {"temperature": -0.1}, "temperature is -0.1"),
        (is_greedy, {"top_k": 0}, "top_k is 0"),
        (is_greedy, {"top_p": 0.0}, "top_p is 0.0"),
        (is_greedy, {"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_values_out_of_range(call, values, message):
    with pytest.raises(ValueError, match=message):
        call(**values)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32])
def test_halton_order_is_a_permutation_that_spreads(side):
    order = halton_order(side**2)
    assert sorted(order.tolist()) == list(range(side**2))
    if side >= 8:  # the first quarter has as many positions in each quadrant, within one in eight
        first = (order < side**2 // 4).view(2, side // 2, 2, side // 2).sum(dim=(1, 3)).float()
        assert (first - side**2 / 16).abs().max() <= max(1, side**2 / 128)


def test_the_first_points_of_halton():
    """(1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9) on a grid of four."""
    order = halton_order(16).view(4, 4)
    assert [order[2, 1], order[1, 2], order[3, 0], order[0, 1]] == [0, 1, 2, 3]


def test_a_step_in_a_given_order():
    image_ids, order = torch.full((2, 16), MASK), halton_order(16)
    image_ids[1, 4] = 7
    settings = {"mask_ratio": torch.tensor(0.5), "temperature": 5.0, "order": order}
    sampled, remaining, _ = maskgit_step(torch.randn(2, 16, 64), image_ids, MASK, **settings)
    assert remaining[0].tolist() == (order >= 8).tolist()  # the last half stays masked
    last = order.masked_fill(image_ids[1] != MASK, -1).argsort(descending=True)[:8]
    assert set(remaining[1].nonzero()[:, 0].tolist()) == set(last.tolist()) and sampled[1, 4] == 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"remask_rate": 0.2}, [0.2, 0.2, 0.2]),
        ({"remask_rate": 0.9}, [2 / 3] * 3),  # two of three known ones at most
        ({"remask": "rescale", "remask_rate": 0.3}, [0.2] * 3),
        ({"remask": "confidence", "remask_rate": 0.6}, [0.4 * x / 1.5 for x in (0.5, 0.25, 0.75)]),
    ],
)
def test_how_often_known_positions_are_masked_again(options, expected):
    """Of eight positions two were given, three are known and three unknown; two are to be masked after the step."""
    is_free = torch.tensor([False, False, *[True] * 6]).expand(20_000, -1)
    unknown = torch.tensor([*[False] * 5, True, True, True]).expand_as(is_free)
    probability = torch.tensor([1.0, 1.0, 0.5, 0.25, 0.75, 1.0, 1.0, 1.0]).log().neg()  # so that e^-ψ is a number above
    num_masked = torch.full((20_000, 1), 2)
    sampling = SamplingParameters(**options)
    found = remasked_positions(sampling, is_free, unknown, probability.expand(20_000, -1), num_masked)
    frequency = found.float().mean(0)
    assert not found[:, [0, 1, 5, 6, 7]].any() and int(found.sum(1).max()) <= 2
    drawn = torch.distributions.Binomial(3, torch.tensor(expected[0])).log_prob(torch.tensor(3.0)).exp()
    lost = 0 if len(set(expected)) > 1 else float(drawn) / 3  # all three were drawn, and one stays
    torch.testing.assert_close(frequency[2:5], torch.tensor(expected) - lost, atol=0.012, rtol=0)


def test_masked_again_positions_count_among_those_left_masked():
    image_ids = torch.full((1, 16), MASK)
    image_ids[0, :8] = 3
    remasked = torch.zeros(1, 16, dtype=torch.bool)
    remasked[0, [1, 4]] = True
    settings = {"mask_ratio": torch.tensor(0.4), "temperature": 0.5}
    _, remaining, probability = maskgit_step(torch.randn(1, 16, 9), image_ids, MASK, remasked=remasked, **settings)
    assert remaining[0, :8].nonzero()[:, 0].tolist() == [1, 4] and int(remaining.sum()) == 6
    assert (probability[0, :8] == 1).all() and (probability[0, 8:] < 1).all()


def test_halton_rolled_for_each_image():
    """The sequence of positions is rolled, as its authors do; each row has its own place to begin at."""
    codes, sequence = torch.full((6, 64), MASK), halton_order(64).argsort()
    ranks = position_order("halton_roll", codes, torch.Generator().manual_seed(0))
    begins = torch.randint(64, (6,), generator=torch.Generator().manual_seed(0))
    assert len(set(begins.tolist())) > 3
    for row, begin in zip(ranks, begins.tolist(), strict=True):
        assert torch.equal(row.argsort(), sequence.roll(begin))


# ---- next token ----


def brute_force(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """The distribution that `sample_next` samples, spelled out over a sorted list."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    kept = order[:top_k]
    total = sum(weights[i] for i in kept)
    probabilities, mass = torch.zeros(len(logits)), 0.0
    for i in kept:
        if top_p is not None and mass >= top_p:
            break
        probabilities[i] = weights[i]
        mass += weights[i] / total
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, None, None), (2.0, 3, None), (1.0, None, 0.7), (0.7, 4, 0.8), (1.5, 99, 0.4), (1.0, 3, 1.0)],
)
def test_distribution(temperature, top_k, top_p):
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.2, 0.0, -3.0, 1.9], [5.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.5]])
    draws = 20_000
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens = sample_next(logits.repeat_interleave(draws, 0), **settings).view(2, draws)
    for row in range(2):
        expected = brute_force(logits[row].tolist(), temperature, top_k, top_p)
        frequency = tokens[row].bincount(minlength=7) / draws
        assert not frequency[expected == 0].any()
        torch.testing.assert_close(frequency, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1},
        {"temperature": 0.0},
        {"temperature": 1e-300},
        {"top_p": 1e-6},
        {"top_p": 1e-300},
        {"top_k": 1, "temperature": 7.0},
    ],
)
def test_greedy(settings):
    logits = torch.randn(50, 30)
    assert torch.equal(sample_next(logits, **settings), logits.argmax(-1))
