"""Approximate ways to draw: off they change nothing, on they do what they say (docs/performance.md)."""

import pytest
import torch

from models import DrawingOptions, ShowoPipeline
from models.drawing_options import halton_order
from models.image_block import ImageBlock
from models.incremental import PlainPhi
from models.sampling import maskgit_step
from tests.models.test_generation import LONG, MASK, NUM_CODES, PLAIN, N, plain_t2i, seeded, t2i_rows
from tests.parity.goldens import facts, prompting, tensors, tiny_showo
from tests.tiny import tiny_vq

TEXTS = ["w1 w2", "", LONG]


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


def draw(model, options=None, known=None, **settings):
    ids, uncond_ids = t2i_rows(TEXTS, known)
    settings = {"guidance_scale": 3.0, "timesteps": 8} | settings
    return model.t2i_generate(ids, uncond_ids, generator=seeded(0), options=options, **settings)


@pytest.mark.parametrize(
    "options",
    [
        DrawingOptions(),
        DrawingOptions(refresh_every=1, guidance_start=0.0, guidance_stop=1.0, order="confidence"),
        DrawingOptions(refresh_every=1, guidance_stop=0.99),  # a step at 7/8 is the last
    ],
)
@pytest.mark.parametrize("case", [0, 1])
def test_neutral_values_draw_the_published_tokens(model, options, case):
    settings = facts()["generate"][case]
    ids, uncond_ids = (
        prompting()((texts, torch.full((len(texts), N), MASK)), "t2i_gen").input_ids
        for texts in (facts()["t2i_texts"], [""] * len(facts()["t2i_texts"]))
    )
    codes = model.t2i_generate(
        ids,
        uncond_ids,
        generator=seeded(settings["seed"]),
        options=options,
        **{key: settings[key] for key in ("guidance_scale", "timesteps", "temperature")},
    )
    assert torch.equal(codes, tensors()[f"generate.{case}.tokens"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"guidance_start": -0.1}, "guidance_start"),
        ({"guidance_stop": 1.1}, "guidance_stop"),
        ({"guidance_start": 0.6, "guidance_stop": 0.5}, "0.6 and 0.5"),
        ({"order": "random"}, "order is 'random', expected confidence or halton"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        DrawingOptions(**values)


# ---- keys and values kept ----


def recorded(monkeypatch, model, options, **settings) -> list[tuple[str, torch.Tensor]]:
    """What ran in each step: ("extend", ids) or ("rewrite", positions)."""
    calls = []
    for name, argument in (("extend", 0), ("rewrite", 1)):
        method = getattr(PlainPhi, name)

        def spy(self, *args, _method=method, _name=name, _argument=argument, **kwargs):
            calls.append((_name, args[_argument].clone()))
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(PlainPhi, name, spy)
    draw(model, options, **settings)
    return calls


def test_only_what_was_unknown_at_the_last_refresh_runs(monkeypatch, model):
    steps = []
    calls = recorded(
        monkeypatch, model, DrawingOptions(refresh_every=3), callback=lambda _, codes: steps.append(codes.clone())
    )
    assert [name for name, _ in calls] == ["extend", "rewrite", "rewrite"] * 2 + ["extend", "rewrite"]
    texts = int(calls[1][1][0, 0])  # the place of <soi>
    assert calls[1][1].tolist() == [[texts + i for i in range(N + 2)]] * 3  # nothing was known at first
    counts = [positions.shape[1] for name, positions in calls if name == "rewrite"]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0]
    for name, positions in calls:
        assert name == "extend" or (positions[:, 0] == texts).all() and (positions[:, -1] == texts + N + 1).all()


@pytest.mark.parametrize("known_share", [0.0, 0.5])
def test_a_step_between_sees_new_tokens_in_place(model, known_share):
    """Its logits equal those of a whole pass in which the settled tokens have the keys and values of the refresh: with
    all tokens unknown at the refresh that is the exact pass; with some known they differ, but little."""
    known = torch.randint(0, NUM_CODES, (3, N), generator=seeded(1))
    settled = torch.rand(3, N, generator=seeded(2)) < known_share
    codes = known.masked_fill(~settled, MASK)
    ids, uncond_ids = t2i_rows(TEXTS)
    with torch.no_grad():
        exact, kept = (ImageBlock(model, torch.cat([ids, uncond_ids]), 3, 2.0, every) for every in (1, 9))
        for block in (exact, kept):
            block.code_logits(codes, block.positions(0, codes == MASK))
        later = torch.where(torch.rand(3, N, generator=seeded(3)) < 0.5, known, codes)
        results = []
        for block in (exact, kept):
            positions = block.positions(1, later == MASK)
            results.append((positions, block.code_logits(later, positions).clone()))
    unknown = (later == MASK).gather(1, results[0][0])
    count = int(unknown.sum(1).min())
    pairs = [logits[(later == MASK).gather(1, positions)] for positions, logits in results]
    assert pairs[0].shape == pairs[1].shape and count > 0
    if known_share == 0:
        torch.testing.assert_close(*pairs, atol=2e-4, rtol=1e-4)
    else:
        assert not torch.allclose(*pairs, atol=1e-3)
        assert torch.nn.functional.cosine_similarity(*pairs).min() > 0.9


def test_rows_with_different_numbers_of_known_codes(model):
    known = torch.randint(0, NUM_CODES, (3, N), generator=seeded(1))
    known[0, :3], known[1, ::2], known[2] = -1, -1, -1
    for every in (1, 2, 4):
        codes = draw(model, DrawingOptions(refresh_every=every), known)
        assert torch.equal(codes[known >= 0], known[known >= 0])
        assert 0 <= int(codes.min()) and int(codes.max()) < NUM_CODES


def test_kept_keys_need_the_plain_runner():
    eager = tiny_showo(attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        draw(eager, DrawingOptions(refresh_every=2))


# ---- guidance in a part of the steps ----


def test_guidance_outside_its_steps_is_none(model):
    for options in (DrawingOptions(guidance_stop=0.0), DrawingOptions(guidance_start=0.95)):
        assert torch.equal(draw(model, options), draw(model, guidance_scale=0.0))
    assert not torch.equal(draw(model), draw(model, guidance_scale=0.0))


@pytest.mark.parametrize("span", [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_guidance_in_a_part_of_the_steps(model, span):
    """Against whole rows, guided or not, step by step: the plain loop started anew from what is known."""
    ids, uncond_ids = t2i_rows(TEXTS)
    expected = plain_t2i(
        model,
        ids,
        uncond_ids,
        generator=seeded(0),
        **PLAIN | {"timesteps": 8, "guidance_scale": [3.0 * (span[0] <= k / 8 < span[1]) for k in range(8)]},
    )
    codes = draw(model, DrawingOptions(guidance_start=span[0], guidance_stop=span[1]))
    assert torch.equal(codes, expected[-1])


# ---- the order of Halton ----


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


def test_halton_needs_a_square():
    with pytest.raises(ValueError, match="square pictures, not 15"):
        halton_order(15)


def test_a_step_in_a_given_order():
    image_ids = torch.full((2, N), MASK)
    image_ids[1, 4] = 7
    order = halton_order(N)
    sampled, remaining = maskgit_step(
        torch.randn(2, N, NUM_CODES), image_ids, MASK, mask_ratio=torch.tensor(0.5), temperature=5.0, order=order
    )
    assert remaining[0].tolist() == (order >= 8).tolist()  # the last half stays masked
    last = order.masked_fill(image_ids[1] != MASK, -1).argsort(descending=True)[:8]
    assert set(remaining[1].nonzero()[:, 0].tolist()) == set(last.tolist()) and sampled[1, 4] == 7


def test_halton_fixes_the_same_positions_for_every_seed(model):
    ids, uncond_ids = t2i_rows(TEXTS)

    def masks(seed: int, order: str) -> list:
        seen = []
        model.t2i_generate(
            ids,
            uncond_ids,
            guidance_scale=3.0,
            timesteps=6,
            generator=seeded(seed),
            callback=lambda _, codes: seen.append(codes.clone()),
            options=DrawingOptions(order=order),
        )
        return [(a == b) for a, b in zip(seen, seen[1:], strict=False)]

    stays = [torch.stack(masks(seed, "halton")) for seed in (1, 2)]
    fixed = [halton_order(N) < number for number in range(N + 1)]
    for run in stays:
        for step in run:
            assert any((step[0] | ~places).all() and places.any() for places in fixed)  # the first so many stay
    codes = model.t2i_generate(
        ids, uncond_ids, timesteps=6, generator=seeded(1), options=DrawingOptions(order="halton")
    )
    assert codes.shape == (3, N) and int(codes.max()) < NUM_CODES


# ---- through the pipeline ----


@pytest.mark.parametrize(
    "options",
    [DrawingOptions(refresh_every=3), DrawingOptions(guidance_stop=0.5), DrawingOptions(order="halton")],
)
def test_the_pipeline_passes_them_on(model, options):
    pipeline = ShowoPipeline(model, tiny_vq(), prompting())
    settings = {"timesteps": 6, "guidance_scale": 3.0}

    def pictures(**more):
        drawn = pipeline.text_to_image(["w1 w2", "w3"], generator=seeded(3), **settings, **more)
        image = drawn[0]
        white = image.convert("L").point(lambda _: 255)
        white.paste(0, (0, 0, image.width // 2, image.height))
        drawn += pipeline.inpaint(image, white, "w4", generator=seeded(3), **settings, **more)
        return [picture.tobytes() for picture in drawn]

    exact = pictures()
    assert pictures(options=DrawingOptions()) == exact
    assert pictures(options=options) != exact
