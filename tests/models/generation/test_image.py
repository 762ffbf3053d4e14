"""`t2i_generate` against the published loop, which recomputes everything at every step (spec §7)."""

import math

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import published
from models import SamplingParameters, ShowoPipeline, get_mask_schedule
from models.generation import cpu
from models.generation.image import Denoiser
from models.generation.runner import Runner
from models.omni_attention import OmniMask
from tests import plain_sampling
from tests.parity.goldens import prompting, tiny_showo
from tests.plain_sampling import OPTIONS
from tests.tiny import tiny_vq
from tests.tiny_llms import FAMILIES
from tests.tiny_llms import tiny_showo as showo_of

PAD, OFFSET, NUM_CODES, MASK, N = 118, 128, 64, 192, 16
LONG = " ".join(f"w{n}" for n in range(30))
TEXTS = ["w1 w2", "", LONG]
PLAIN = {"guidance_scale": 0.0, "timesteps": 5, "temperature": 1.0, "noise_schedule": "cosine"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def t2i_rows(texts: list[str], known: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and unconditional rows; `known` (B, N) codes, −1 where unknown."""
    image_ids = torch.full((len(texts), N), MASK)
    if known is not None:
        image_ids = torch.where(known < 0, MASK, known + OFFSET)
    build, unknown = prompting(), torch.full_like(image_ids, MASK)
    return build((texts, image_ids), "t2i_gen").input_ids, build(([""] * len(texts), unknown), "t2i_gen").input_ids


def compare(model, texts, known=None, seed=0, sampling=None, scales=None, **settings):
    """Codes of every step, ours and published; `scales`: the published guidance of each step."""
    settings = PLAIN | settings
    ids, uncond_ids = t2i_rows(texts, known)
    before, expected, steps = ids.clone(), [], []
    theirs = settings | {"noise_schedule": get_mask_schedule(settings["noise_schedule"])}
    theirs |= {"guidance_scale": scales or settings["guidance_scale"], "generator": seeded(seed)}
    published.t2i_generate(
        model, ids, uncond_ids, callback=lambda step, codes: expected.append((step, codes.tolist())), **theirs
    )
    codes = model.t2i_generate(
        ids,
        uncond_ids if settings["guidance_scale"] > 0 else None,
        generator=seeded(seed),
        callback=lambda step, codes: steps.append((step, codes.tolist())),
        sampling=sampling,
        **settings,
    )
    assert steps == expected and len(steps) == settings["timesteps"] and codes.tolist() == steps[-1][1]
    assert codes.shape == (len(texts), N) and 0 <= int(codes.min()) and int(codes.max()) < NUM_CODES
    assert torch.equal(ids, before)  # the caller's ids are not written to
    return codes


@pytest.mark.parametrize("texts", [["w1 w2"], [""], [LONG], TEXTS, ["w5 w6", "w7", "w8 w9 w10", "w11 w12 w13 w14 w15"]])
@pytest.mark.parametrize("guidance_scale", [-1.0, 0.0, 3.0])  # negative guidance is none
def test_published_tokens_for_all_paddings(model, texts, guidance_scale):
    compare(model, texts, guidance_scale=guidance_scale)


@pytest.mark.parametrize(
    "settings",
    [
        {"timesteps": 1},
        {"timesteps": 2, "noise_schedule": "linear"},
        {"timesteps": 18, "guidance_scale": 1.75, "temperature": 4.5},
        {"timesteps": 6, "noise_schedule": "sigmoid", "temperature": 0.0},
        {"timesteps": 20, "noise_schedule": "pow2", "guidance_scale": 5.0},
    ],
)
def test_published_tokens_for_all_settings(model, settings):
    compare(model, ["w3 w4", "w5"], seed=7, **settings)


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_known_codes_stay(model, guidance_scale, share):
    known = torch.randint(0, NUM_CODES, (3, N), generator=seeded(1))
    unknown = torch.rand(3, N, generator=seeded(2)) < share
    codes = compare(model, ["w1", "", "w2 w3"], known.masked_fill(unknown, -1), guidance_scale=guidance_scale)
    assert torch.equal(codes[~unknown], known[~unknown]) and not torch.equal(codes, known)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_published_tokens_for_every_language_model(family, implementation):
    """Guidance, different text lengths, grouped keys and values, tied and untied heads without bias."""
    model = showo_of(family, attn_implementation=implementation, tie_word_embeddings=family in ("llama", "qwen2"))
    compare(model, TEXTS, guidance_scale=2.0)
    cpu.enable(model)
    compare(model, TEXTS, guidance_scale=2.0)


def test_what_unconditional_rows_and_masks_are_used_for(model):
    """The image part of unconditional rows is ignored; the rows' own mask changes nothing, another one does."""
    ids, uncond_ids = t2i_rows(TEXTS)
    other = uncond_ids.clone()
    other[:, -(N + 1) : -1] = OFFSET + 3
    mask, causal = OmniMask.from_ids(torch.cat([ids, other]), model.vocabulary), OmniMask.lm(6, ids.shape[1])
    settings = {"guidance_scale": 2.0, "timesteps": 4}
    expected, ignored, given, changed = (
        model.t2i_generate(ids, rows, attention_mask=mask, generator=seeded(6), **settings)
        for rows, mask in ((uncond_ids, None), (other, None), (uncond_ids, mask), (uncond_ids, causal))
    )
    assert torch.equal(expected, ignored) and torch.equal(expected, given) and not torch.equal(expected, changed)


def test_the_text_is_encoded_once():
    """<t2i> bos w2 w3 eos: the pads that all rows share are dropped."""
    model, shapes = tiny_showo(), []  # (rows, positions) of each pass through the first layer
    model.showo.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    model.t2i_generate(*t2i_rows(["w1", "w2 w3"]), guidance_scale=1.0, timesteps=3)
    assert shapes == [(4, 5 + N + 2)] + [(4, N + 2)] * 2


FEWER = torch.zeros(1, 31).long()


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (torch.clone, {"timesteps": 0}, "timesteps is 0"),
        (torch.clone, {"guidance_scale": 1.0}, "needs uncond_input_ids"),
        (torch.clone, {"guidance_scale": 1.0, "uncond_input_ids": FEWER}, "needs uncond_input_ids"),
        (torch.clone, {"attention_mask": OmniMask.lm(1, 31)}, "attention_mask has 1 rows, but there are 2"),
        (lambda ids: ids[:, :12], {}, "<soi>"),
        (lambda ids: torch.cat([ids[:1], ids[1:].roll(-1, 1)]), {}, "<soi> at one common position"),
        (lambda ids: ids[:, :-1], {}, "end in <eoi>"),
        (lambda ids: ids.where(ids != MASK, 3), {}, "image ids"),  # codes without their offset
    ],
)
def test_rows_and_settings_that_are_refused(model, spoil, settings, message):
    ids, _ = t2i_rows(["w1", "w2"])
    with pytest.raises(ValueError, match=message):
        model.t2i_generate(spoil(ids), **{"timesteps": 2} | settings)


def test_the_state_of_the_model_stays():
    """No graph, no change of mode; in training mode activation checkpointing would drop the cache."""
    training, ids = tiny_showo().train(), t2i_rows(["w1 w2", ""])
    getattr(training, "activation_checkpointing_enable", training.gradient_checkpointing_enable)()
    settings = {"guidance_scale": 2.0, "timesteps": 4}
    codes = [m.t2i_generate(*ids, generator=seeded(5), **settings) for m in (tiny_showo(), training)]
    assert torch.equal(*codes) and not codes[1].requires_grad and training.training


@pytest.mark.parametrize("family", ["phi", "qwen2"])
def test_half_precision(family):
    for autocast in (True, False):
        model = showo_of(family) if autocast else showo_of(family).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            codes = model.t2i_generate(*t2i_rows(["w1 w2", ""]), guidance_scale=2.0, timesteps=3)
        assert 0 <= int(codes.min()) <= int(codes.max()) < NUM_CODES


# ---- compiled ----


@pytest.mark.slow
def test_compiled_once_for_all_steps_and_prompts():
    """Counted by torch: after the first image nothing is compiled again; the tokens are the published ones."""
    model = tiny_showo()
    model.compile_steps()
    counters.clear()
    compare(model, ["w1 w2"], guidance_scale=3.0, timesteps=4)
    graphs = counters["stats"]["unique_graphs"]
    for seed, (texts, scale) in enumerate(([["w3"], 3.0], [["w4 w5 w6"], 5.0], [["w1 w2 w3 w4 w5"], 1.5])):
        compare(model, texts, seed=seed, guidance_scale=scale, timesteps=3 + seed)
    assert counters["stats"]["unique_graphs"] == graphs == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_partial_refreshes(model):
    """They run whole buckets of positions; here that is all of them, so the tokens are the published ones."""
    compiled = tiny_showo()
    compiled.compile_steps()
    sampling = SamplingParameters(refresh_every=4, refresh_share=0.1)
    compare(compiled, TEXTS, guidance_scale=3.0, timesteps=6, sampling=sampling)
    assert not torch.equal(generate(model, sampling), generate(model))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_on_a_gpu(dtype):
    """Logits of eager and of replayed steps, more of them than CUDA graphs need to warm up."""
    eager, compiled = (tiny_showo().to("cuda", dtype) for _ in range(2))
    compiled.compile_steps()
    rows = torch.cat(t2i_rows(["w1 w2", LONG])).cuda()
    mask, codes = OmniMask.from_ids(rows, eager.vocabulary), torch.full((2, N), MASK, device="cuda")
    bound = 1e-3 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        denoisers = [Denoiser.of_rows(m, rows, mask, 2, 2.0, 4, SamplingParameters()) for m in (eager, compiled)]
        for step in range(4):
            (expected, _), (logits, _) = (denoiser(step, codes) for denoiser in denoisers)
            torch.testing.assert_close(logits, expected, atol=bound, rtol=bound)
            codes[:, step] = step


# ---- ways that are not published ----


def generate(model, sampling=None, known=None, **settings):
    ids, uncond_ids = t2i_rows(TEXTS, known)
    settings = {"guidance_scale": 3.0, "timesteps": 8} | settings
    return model.t2i_generate(ids, uncond_ids, generator=seeded(0), sampling=sampling, **settings)


NEUTRAL = {
    "no rate": {"remask_rate": 0.0},
    "no step": {"remask_rate": 1.0, "remask_stop": 0.0},
    "all codes": {"top_k": NUM_CODES, "top_p": 1.0},
    "one scale": {"logit_scale": 1.0, "guidance_ramp": 0.0},
    "all steps are the warm-up": {"refresh_every": 3, "refresh_share": 0.1, "refresh_warmup": 1.0},
    "every step is a refresh": {"refresh_share": 0.1},
}


@pytest.mark.parametrize("sampling", NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_options_give_the_published_tokens(model, sampling):
    compare(model, TEXTS, guidance_scale=3.0, timesteps=6, sampling=SamplingParameters(**sampling))


@pytest.mark.parametrize("known_share", [0.0, 0.4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_is_its_plain_rule(model, options, known_share):
    """From nothing and from partly known images, whose known codes stay; the tokens are not the published ones."""
    known = torch.randint(0, NUM_CODES, (3, N), generator=seeded(1))
    is_known = torch.rand(3, N, generator=seeded(2)) < known_share
    ids, uncond_ids = t2i_rows(TEXTS, known.masked_fill(~is_known, -1))
    sampling, timesteps, found, exact = SamplingParameters(**options), 7, [], []
    soi = ids.shape[1] - N - 2

    def logits_at(step: int, codes: list) -> torch.Tensor:
        share = ((step + 1) / timesteps) ** sampling.guidance_ramp
        scale = 3.0 * share * (sampling.guidance_start <= step / timesteps)
        rows = torch.cat([ids, uncond_ids])
        mask = OmniMask.from_ids(rows, model.vocabulary).dense()
        block = [[MASK if code is None else code + OFFSET for code in row] for row in codes]
        rows[:, soi + 1 : -1] = torch.tensor(block).repeat(2, 1)
        with torch.no_grad():
            logits = published.all_logits(model, rows, mask)[:, soi + 1 : -1, OFFSET : OFFSET + NUM_CODES]
        cond, uncond = logits.chunk(2)
        return (1 + scale) * cond - scale * uncond

    given = [
        [code if keep else None for code, keep in zip(*row, strict=True)]
        for row in zip(known.tolist(), is_known.tolist(), strict=True)
    ]
    expected = plain_sampling.generate(
        logits_at,
        given,
        sampling,
        timesteps=timesteps,
        temperature=2.0,
        schedule=lambda t: float(get_mask_schedule("cosine")(torch.tensor(t))),
        generator=seeded(3),
    )
    settings = {"guidance_scale": 3.0, "timesteps": timesteps, "temperature": 2.0}
    for options, steps in ((sampling, found), (None, exact)):
        model.t2i_generate(
            ids,
            uncond_ids,
            generator=seeded(3),
            sampling=options,
            callback=lambda step, codes, steps=steps: steps.append(codes.tolist()),
            **settings,
        )
    assert found == expected and found[-1] != exact[-1]
    assert torch.equal(torch.tensor(found[-1])[is_known], known[is_known])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_a_generator_each_an_image_does_not_depend_on_the_others(model, options):
    ids, uncond_ids = t2i_rows(TEXTS)
    settings = {"guidance_scale": 2.0, "timesteps": 6, "sampling": SamplingParameters(**options)}
    together = model.t2i_generate(ids, uncond_ids, generator=[seeded(number) for number in range(3)], **settings)
    for number in range(3):
        row = slice(number, number + 1)
        alone = model.t2i_generate(ids[row], uncond_ids[row], generator=[seeded(number)], **settings)
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("remask_rate", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_which_positions_run_between_refreshes(model, monkeypatch, share, remask_rate):
    """Those whose token changed since they last ran, and the least sure unknown ones; the others keep their logits."""
    ran, seen, step, call = [], [], Runner.step, Denoiser.__call__
    monkeypatch.setattr(Runner, "step", lambda self, ids, at: (ran.append(at), step(self, ids, at))[1])

    def called(self, step, codes):
        logits, positions = call(self, step, codes)
        seen.append((codes.clone(), logits, positions))
        return logits, positions

    monkeypatch.setattr(Denoiser, "__call__", called)
    options = {"refresh_every": 3, "refresh_share": share, "refresh_warmup": 0.3, "remask_rate": remask_rate}
    generate(model, SamplingParameters(**options), timesteps=12, temperature=0.5)
    ran.insert(0, slice(None))  # the first is a prefill
    assert [isinstance(at, slice) for at in ran] == [True] * 4 + [False, False, True] * 2 + [False, False]
    ran_ids, sureness, kept = torch.zeros(3, N).long(), torch.zeros(3, N), torch.zeros(3, N, NUM_CODES)
    for at, (codes, logits, positions) in zip(ran, seen, strict=True):
        first = None if isinstance(at, slice) else int(at[0, 0])
        unknown = codes == MASK
        now = kept.scatter(1, positions[..., None].expand_as(logits), logits)
        most = 0
        for row in range(3):
            runs = set(range(N)) if first is None else set((at[row, 1:-1] - first - 1).tolist())
            if first is not None:
                wanted = {i for i in range(N) if ran_ids[row, i] != codes[row, i]}
                rest = sorted((i for i in range(N) if unknown[row, i]), key=lambda i: float(sureness[row, i]))
                wanted |= set(rest[: math.ceil(share * len(rest))])
                assert wanted <= runs
                most = max(most, len(wanted))
            for i in range(N):
                if i in runs:
                    ran_ids[row, i] = codes[row, i]
                elif unknown[row, i]:
                    assert torch.equal(now[row, i], kept[row, i])
        if first is not None:
            assert at.shape[1] == most + 2  # with <soi> and <eoi>; rows with fewer are filled up
        kept = now
        sureness = now.amax(-1)


@pytest.mark.parametrize("family", ["phi", "llama"])
@pytest.mark.parametrize("known_share", [0.0, 0.5])
def test_a_partial_refresh_sees_new_tokens_in_place(family, known_share):
    """With all tokens unknown at the refresh it is the exact pass; with some known it differs, but little."""
    model = showo_of(family)
    known = torch.randint(0, NUM_CODES, (3, N), generator=seeded(1))
    settled = torch.rand(3, N, generator=seeded(2)) < known_share
    codes = known.masked_fill(~settled, MASK)
    later = torch.where(torch.rand(3, N, generator=seeded(3)) < 0.5, known, codes)
    rows = torch.cat(t2i_rows(TEXTS))
    mask, found = OmniMask.from_ids(rows, model.vocabulary), []
    with torch.no_grad():
        for every in (1, 9):
            denoiser = Denoiser.of_rows(model, rows, mask, 3, 2.0, 2, SamplingParameters(refresh_every=every))
            denoiser(0, codes)
            logits, positions = denoiser(1, later)
            found.append(logits[(later == MASK).gather(1, positions)])
    assert found[0].shape == found[1].shape and len(found[0])
    if known_share == 0:
        torch.testing.assert_close(*found, atol=2e-4, rtol=1e-4)
    else:
        assert not torch.allclose(*found, atol=1e-3)
        assert torch.nn.functional.cosine_similarity(*found).min() > 0.9


def test_partial_refreshes_of_rows_with_different_numbers_of_known_codes(model):
    known = torch.randint(0, NUM_CODES, (3, N), generator=seeded(1))
    known[0, :3], known[1, ::2], known[2] = -1, -1, -1
    for every in (1, 2, 4):
        codes = generate(model, SamplingParameters(refresh_every=every), known)
        assert torch.equal(codes[known >= 0], known[known >= 0])
        assert 0 <= int(codes.min()) and int(codes.max()) < NUM_CODES


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.0, 0.0), (0.95, 1.0)])
def test_guidance_in_a_part_of_the_steps(model, start, stop):
    """The last two spans hold no step, so nothing is guided."""
    scales = [3.0 * (start <= k / 8 < stop) for k in range(8)]
    sampling = SamplingParameters(guidance_start=start, guidance_stop=stop)
    compare(model, TEXTS, sampling=sampling, scales=scales, timesteps=8, guidance_scale=3.0)


@pytest.mark.parametrize(
    "setting", [{"refresh_every": 3}, {"guidance_stop": 0.5}, *OPTIONS.values()], ids=lambda one: " ".join(one)
)
def test_the_pipeline_passes_them_on(model, setting):
    pipeline = ShowoPipeline(model, tiny_vq(), prompting())
    settings = {"timesteps": 6, "guidance_scale": 3.0}

    def images(**more):
        made = pipeline.text_to_image(["w1 w2", "w3"], generator=seeded(3), **settings, **more)
        white = made[0].convert("L").point(lambda _: 255)
        white.paste(0, (0, 0, white.width // 2, white.height))
        made += pipeline.inpaint(made[0], white, "w4", generator=seeded(3), **settings, **more)
        made += pipeline.extrapolate(made[0], ["left"], ["w5"], generator=seeded(3), **settings, **more)
        return [image.tobytes() for image in made]

    exact = images()
    assert images(sampling=SamplingParameters()) == exact
    assert images(sampling=SamplingParameters(**setting)) != exact
