"""Both generation loops against plain ones that recompute everything at every step (SPEC §7, §8)."""

import inspect

import pytest
import torch

from models import Showo, ShowoConfig, get_mask_schedule
from models.vocabulary import IMAGE_FEATURE_ID
from tests.parity.goldens import fill_, prompting, tiny_showo

PAD, SOI, EOI, MMU, OFFSET, NUM_CODES, MASK, N = 118, 119, 120, 124, 128, 64, 192, 16
CLIP_SIZE = 24


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


@pytest.fixture(scope="module")
def clip_model():
    return tiny_showo(w_clip_vit=True, clip_feature_size=CLIP_SIZE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- drawing ----


def t2i_rows(texts: list[str], known: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and unconditional rows; `known` (B, N) codes, −1 where unknown."""
    image_ids = torch.full((len(texts), N), MASK)
    if known is not None:
        image_ids = torch.where(known < 0, MASK, known + OFFSET)
    build = prompting()
    unknown = torch.full_like(image_ids, MASK)
    return build((texts, image_ids), "t2i_gen").input_ids, build(([""] * len(texts), unknown), "t2i_gen").input_ids


@torch.no_grad()
def plain_t2i(model, ids, uncond_ids, *, guidance_scale, timesteps, temperature, schedule, generator):
    """SPEC §7 as written: whole rows, the whole head, nothing kept between steps; guidance may be a list of steps."""
    ids, history, guidance = ids.clone(), [], guidance_scale
    for k in range(timesteps):
        guidance_scale = guidance[k] if isinstance(guidance, list) else guidance
        logits = model(ids).logits[:, -(N + 1) : -1, OFFSET : OFFSET + NUM_CODES]
        if guidance_scale > 0:
            uncond = torch.cat([uncond_ids[:, : -(N + 2)], ids[:, -(N + 2) :]], dim=1)
            uncond_logits = model(uncond).logits[:, -(N + 1) : -1, OFFSET : OFFSET + NUM_CODES]
            logits = (1 + guidance_scale) * logits - guidance_scale * uncond_logits
        probabilities = logits.softmax(-1)
        draw = torch.multinomial(probabilities.reshape(-1, NUM_CODES), 1, generator=generator).view(len(ids), N)
        image_ids = ids[:, -(N + 1) : -1]
        unknown = image_ids == MASK
        sampled = torch.where(unknown, draw, image_ids - OFFSET)
        history.append(sampled)
        ratio = torch.tensor((k + 1) / timesteps)
        number = (N * get_mask_schedule(schedule)(ratio)).floor().expand(len(ids), 1)
        number = torch.max(torch.ones(1), torch.min(unknown.sum(1, keepdim=True) - 1, number)).long()
        temperature = temperature * (1 - (k + 1) / timesteps)
        chosen = probabilities.gather(-1, sampled[..., None])[..., 0]
        chosen = chosen.masked_fill(~unknown, torch.finfo(torch.float32).max)
        uniform = torch.zeros_like(chosen).uniform_(0, 1, generator=generator)
        gumbel = -torch.log((-torch.log(uniform.clamp(1e-20))).clamp(1e-20))
        confidence = torch.log(chosen.clamp(1e-20)) + temperature * gumbel
        masked = confidence < confidence.sort(dim=1).values.gather(1, number)
        ids[:, -(N + 1) : -1] = torch.where(masked, MASK, sampled + OFFSET)
    return history


def compare_drawings(model, texts, known=None, seed=0, **settings):
    ids, uncond_ids = t2i_rows(texts, known)
    expected = plain_t2i(model, ids, uncond_ids, generator=seeded(seed), **settings)
    steps = []
    settings["noise_schedule"] = settings.pop("schedule")
    before = ids.clone()
    codes = model.t2i_generate(
        ids,
        uncond_ids if settings["guidance_scale"] > 0 else None,
        generator=seeded(seed),
        callback=lambda step, drawn: steps.append((step, drawn.clone())),
        **settings,
    )
    assert codes.shape == (len(texts), N) and 0 <= int(codes.min()) and int(codes.max()) < NUM_CODES
    assert torch.equal(codes, expected[-1])
    assert torch.equal(ids, before)  # the caller's ids are not written to
    assert [step for step, _ in steps] == list(range(settings["timesteps"]))
    for (_, ours), plain in zip(steps, expected, strict=True):
        assert torch.equal(ours, plain)
    return codes


LONG = " ".join(f"w{n}" for n in range(30))
PLAIN = {"guidance_scale": 0.0, "timesteps": 5, "temperature": 1.0, "schedule": "cosine"}


@pytest.mark.parametrize(
    "texts",
    [["w1 w2"], [""], [LONG], ["w1 w2", "", LONG], ["w5 w6", "w7", "w8 w9 w10", "w11 w12 w13 w14 w15"]],
    ids=["one", "empty", "full", "all", "different pads"],
)
@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_drawing_equals_the_plain_loop_for_all_pads(model, texts, guidance_scale):
    compare_drawings(model, texts, **PLAIN | {"guidance_scale": guidance_scale})


@pytest.mark.parametrize(
    "settings",
    [
        {"timesteps": 1},
        {"timesteps": 2, "schedule": "linear"},
        {"timesteps": 18, "guidance_scale": 1.75, "temperature": 4.5},
        {"timesteps": 6, "schedule": "sigmoid", "temperature": 0.0},
        {"timesteps": 20, "schedule": "pow2", "guidance_scale": 5.0},
    ],
)
def test_drawing_equals_the_plain_loop_for_all_settings(model, settings):
    compare_drawings(model, ["w3 w4", "w5"], seed=7, **PLAIN | settings)


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_known_codes_stay(model, guidance_scale, share):
    known = torch.randint(0, NUM_CODES, (3, N), generator=seeded(1))
    unknown = torch.rand(3, N, generator=seeded(2)) < share
    codes = compare_drawings(
        model, ["w1", "", "w2 w3"], known.masked_fill(unknown, -1), **PLAIN | {"guidance_scale": guidance_scale}
    )
    assert torch.equal(codes[~unknown], known[~unknown]) and not torch.equal(codes, known)


def test_schedule_as_a_function(model):
    ids, _ = t2i_rows(["w1"])
    by_name = model.t2i_generate(ids, timesteps=4, noise_schedule="pow2", generator=seeded(3))
    by_function = model.t2i_generate(ids, timesteps=4, noise_schedule=lambda t: 1 - t**2, generator=seeded(3))
    assert torch.equal(by_name, by_function)


def test_eager_draws_the_same(model):
    ids, uncond_ids = t2i_rows(["w1 w2", "", LONG])
    settings = {"guidance_scale": 2.0, "timesteps": 6}
    eager = tiny_showo(attn_implementation="eager")
    codes = [m.t2i_generate(ids, uncond_ids, generator=seeded(5), **settings) for m in (model, eager)]
    assert torch.equal(*codes)


def test_the_guidance_rows_image_part_is_ignored(model):
    ids, uncond_ids = t2i_rows(["w1 w2"])
    spoiled = uncond_ids.clone()
    spoiled[:, -(N + 1) : -1] = OFFSET + 3
    first, second = (
        model.t2i_generate(ids, u, guidance_scale=3.0, timesteps=4, generator=seeded(6)) for u in (uncond_ids, spoiled)
    )
    assert torch.equal(first, second)


def test_one_generator_serves_consecutive_batches(model):
    ids, _ = t2i_rows(["w1", "w2"])
    generator = seeded(8)
    first, second = (model.t2i_generate(ids, timesteps=3, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, model.t2i_generate(ids, timesteps=3, generator=seeded(8)))


def test_the_text_is_computed_once_and_only_what_is_needed(model):
    ids, uncond_ids = t2i_rows(["w1", "w2 w3"])
    shapes = []
    first = model.showo.model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    try:
        model.t2i_generate(ids, uncond_ids, guidance_scale=1.0, timesteps=3)
    finally:
        hook.remove()
    longest_text = 5  # <t2i> bos w2 w3 eos; the pads that all rows share are dropped
    assert shapes == [(4, longest_text + N + 2)] + [(4, N + 2)] * 2


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (lambda ids: ids, {"timesteps": 0}, "timesteps is 0"),
        (lambda ids: ids, {"guidance_scale": 1.0}, "needs uncond_input_ids"),
        (
            lambda ids: ids,
            {"guidance_scale": 1.0, "uncond_input_ids": torch.zeros(1, 31).long()},
            "needs uncond_input_ids",
        ),
        (lambda ids: ids, {"noise_schedule": "spiral"}, "unknown mask schedule 'spiral'"),
        (lambda ids: ids[:, :12], {}, "<soi>"),
        (lambda ids: torch.cat([ids[:1], ids[1:].roll(-1, 1)]), {}, "<soi> at one common position"),
        (lambda ids: ids[:, :-1], {}, "end in <eoi>"),
        (lambda ids: torch.cat([ids, ids[:, :1]], 1), {}, "end in <eoi>"),
        (lambda ids: ids.where(ids != MASK, 3), {}, "image ids"),  # codes without their offset
    ],
)
def test_rows_and_settings_that_cannot_be_drawn(model, spoil, settings, message):
    ids, _ = t2i_rows(["w1", "w2"])
    with pytest.raises(ValueError, match=message):
        model.t2i_generate(spoil(ids), **{"timesteps": 2} | settings)


# ---- answering ----


def image_block(seed: int) -> list[int]:
    codes = torch.randint(0, NUM_CODES, (N,), generator=seeded(seed)) + OFFSET
    return [SOI, *codes.tolist(), EOI]


PROMPTS = [
    [MMU, *image_block(1), 117, 3, 4, 5, 6],
    [MMU, *image_block(2), 117, 9],
    [MMU, 20, 21, 22, *image_block(3), 117, 30, 31],  # a system prompt
    [MMU, *image_block(4), *image_block(5), 117, 40, 41, 42],  # two images
    [117, 50, 51, 52, 53],  # no image at all
]


def padded(prompts: list[list[int]], side: str) -> torch.Tensor:
    length = max(map(len, prompts)) + 1  # one more than anybody needs
    pads = [[PAD] * (length - len(prompt)) for prompt in prompts]
    rows = [pad + prompt if side == "left" else prompt + pad for pad, prompt in zip(pads, prompts, strict=True)]
    return torch.tensor(rows)


@torch.no_grad()
def plain_answer(model, prompt, num_tokens, stops=(), features=None):
    """Greedy, one row, unpadded, everything recomputed for every token."""
    ids = torch.tensor([prompt])
    new_ids = []
    while len(new_ids) < num_tokens:
        token = int(model(ids, image_features=features).logits[0, -1].argmax())
        new_ids.append(token)
        if token in stops:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return new_ids


@pytest.fixture(scope="module")
def answers(model):
    return [plain_answer(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_answer_equals_the_plain_loop(model, answers, row):
    assert model.mmu_generate(torch.tensor([PROMPTS[row]]), max_new_tokens=12, top_k=1).tolist() == [answers[row]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_answers_of_a_batch_are_those_of_its_rows(answers, side, implementation):
    """Prompts of different lengths and kinds, with none, one and two images."""
    model = tiny_showo(attn_implementation=implementation)
    ids = padded(PROMPTS, side)
    before = ids.clone()
    assert model.mmu_generate(ids, max_new_tokens=12, top_k=1).tolist() == answers
    assert torch.equal(ids, before)


def test_the_answers_differ(answers):
    """Otherwise the tests above would show little."""
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_rows_stop_by_themselves(model, answers):
    stops = [answers[0][3], answers[1][6], answers[2][1]]
    expected = [plain_answer(model, prompt, 12, stops) for prompt in PROMPTS]
    new_ids = model.mmu_generate(padded(PROMPTS, "left"), max_new_tokens=12, top_k=1, eot_token=stops)
    longest = max(map(len, expected))
    assert len({len(row) for row in expected}) > 2  # they really stop at different times
    assert new_ids.tolist() == [row + [PAD] * (longest - len(row)) for row in expected]


@pytest.mark.parametrize("eot_token", ["int", "list", "tuple", "tensor", "scalar tensor"])
def test_all_stopped_ends_the_loop(model, answers, eot_token):
    stop = answers[0][2]
    eot = {"int": stop, "list": [stop], "tuple": (1, stop)}.get(eot_token, torch.tensor([stop]))
    eot = eot[0] if eot_token == "scalar tensor" else eot
    expected = plain_answer(model, PROMPTS[0], 12, [stop])
    seen = []
    new_ids = model.mmu_generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=12, top_k=1, eot_token=eot, callback=seen.append
    )
    assert new_ids.tolist() == [expected] and len(seen) == len(expected) < 12


def test_streaming_shows_every_token_as_it_comes(model, answers):
    seen = []
    stop = answers[1][4]
    new_ids = model.mmu_generate(
        padded(PROMPTS, "left"), max_new_tokens=7, top_k=1, eot_token=stop, callback=lambda t: seen.append(t.clone())
    )
    assert torch.equal(torch.stack(seen, 1), new_ids)


@pytest.mark.parametrize("max_new_tokens", [0, 1])
def test_few_tokens(model, answers, max_new_tokens):
    new_ids = model.mmu_generate(padded(PROMPTS, "left"), max_new_tokens=max_new_tokens, top_k=1)
    assert new_ids.tolist() == [row[:max_new_tokens] for row in answers]
    assert new_ids.dtype == torch.int64


def test_each_token_costs_one_position(model):
    shapes = []
    first = model.showo.model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    try:
        model.mmu_generate(padded(PROMPTS[:2], "right"), max_new_tokens=4, top_k=1)
    finally:
        hook.remove()
    assert shapes == [(2, len(PROMPTS[0]))] + [(2, 1)] * 3  # padding beyond the longest is not computed


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 10, "top_p": 0.8, "temperature": 2.0}],
)
@torch.no_grad()
def test_sampling_follows_the_settings(model, settings):
    """The first token of many copies of a prompt has the distribution of the settings (see test_sampling)."""
    copies = 3000
    logits = model(torch.tensor(PROMPTS[:1])).logits[0, -1] / settings.get("temperature", 1.0)
    order = logits.argsort(descending=True)[: settings.get("top_k")]
    probabilities = logits[order].softmax(0)
    reached = probabilities.cumsum(0) - probabilities >= settings.get("top_p", 2.0)
    order, probabilities = order[~reached], probabilities[~reached]
    expected = torch.zeros(193).scatter(0, order, probabilities / probabilities.sum())
    ids = torch.tensor(PROMPTS[:1]).repeat(copies, 1)
    tokens = model.mmu_generate(ids, max_new_tokens=1, generator=seeded(1), **settings)[:, 0]
    frequency = tokens.bincount(minlength=193) / copies
    assert not frequency[expected == 0].any()
    torch.testing.assert_close(frequency, expected, atol=0.035, rtol=0)


def test_sampling_uses_the_generator(model):
    ids = padded(PROMPTS, "left")
    first, again, other = (model.mmu_generate(ids, max_new_tokens=6, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("settings", [{"top_p": 0.0}, {"top_k": 0}, {"temperature": -1.0}])
def test_sampling_settings_out_of_range(model, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        model.mmu_generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2, **settings)


# ---- answering from image features ----


def feature_prompt(num_features: int, text: list[int], system: tuple[int, ...] = ()) -> list[int]:
    return [MMU, *system, SOI, *[IMAGE_FEATURE_ID] * num_features, EOI, *text]


def test_answers_from_features_batched(clip_model):
    features = torch.randn(3, 9, CLIP_SIZE, generator=seeded(4))
    prompts = [feature_prompt(9, [3, 4, 5]), feature_prompt(9, [6], (50, 51)), feature_prompt(9, [7, 8, 9, 10, 11])]
    expected = [plain_answer(clip_model, p, 8, features=f[None]) for p, f in zip(prompts, features, strict=True)]
    for side in ("left", "right"):
        new_ids = clip_model.mmu_generate(padded(prompts, side), image_features=features, max_new_tokens=8, top_k=1)
        assert new_ids.tolist() == expected
    swapped = clip_model.mmu_generate(
        padded(prompts, "left"), image_features=features.flip(0), max_new_tokens=8, top_k=1
    )
    assert swapped.tolist() != expected


def test_rows_with_and_without_features(clip_model):
    features = torch.randn(3, 9, CLIP_SIZE, generator=seeded(4))
    two_images = [MMU, *(feature_prompt(9, [])[1:] * 2), 3, 4]
    prompts = [two_images, [117, 50, 51], feature_prompt(9, [6, 7])]
    own = [features[:2], None, features[2:]]
    expected = [plain_answer(clip_model, p, 6, features=f) for p, f in zip(prompts, own, strict=True)]
    new_ids = clip_model.mmu_generate(padded(prompts, "right"), image_features=features, max_new_tokens=6, top_k=1)
    assert new_ids.tolist() == expected


def test_missing_features_are_refused(clip_model):
    with pytest.raises(ValueError, match="room for 9 image features .* got 0"):
        clip_model.mmu_generate(torch.tensor([feature_prompt(9, [3])]), max_new_tokens=2)


# ---- the state of the model ----


def test_nothing_is_left_behind(model):
    """No gradient graph, no change of mode."""
    assert not model.training
    ids, _ = t2i_rows(["w1"])
    assert not model.t2i_generate(ids, timesteps=2).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert inspect.signature(model.t2i_generate).parameters["guidance_scale"].default == 0.0


def test_generation_in_the_middle_of_training(model, answers):
    """Activation checkpointing in training mode silently drops a cache; drawing and answering must not suffer."""
    training = tiny_showo().train()
    getattr(training, "activation_checkpointing_enable", training.gradient_checkpointing_enable)()
    ids, uncond_ids = t2i_rows(["w1 w2", ""])
    codes = [
        m.t2i_generate(ids, uncond_ids, guidance_scale=2.0, timesteps=4, generator=seeded(5)) for m in (model, training)
    ]
    assert torch.equal(*codes)
    assert training.mmu_generate(padded(PROMPTS, "left"), max_new_tokens=12, top_k=1).tolist() == answers
    assert training.training


def test_half_precision(model):
    """bf16 weights and bf16 autocast both draw and answer."""
    ids, uncond_ids = t2i_rows(["w1 w2", ""])
    for context, m in ((torch.autocast("cpu", torch.bfloat16), model), (torch.no_grad(), tiny_showo().bfloat16())):
        with context:
            codes = m.t2i_generate(ids, uncond_ids, guidance_scale=2.0, timesteps=3)
            assert 0 <= int(codes.min()) <= int(codes.max()) < NUM_CODES
            assert m.mmu_generate(padded(PROMPTS, "left"), max_new_tokens=3, top_k=1).shape == (5, 3)


def test_tied_embeddings():
    llm = {"model_type": "phi", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm |= {"intermediate_size": 48, "tie_word_embeddings": True}
    sizes = {"vocab_size": 193, "llm_vocab_size": 118, "codebook_size": 64, "num_vq_tokens": 16}
    model = fill_(Showo(ShowoConfig(llm_config=llm, **sizes))).eval()
    compare_drawings(model, ["w1 w2", ""], **PLAIN | {"guidance_scale": 1.0})
    assert model.mmu_generate(torch.tensor(PROMPTS[:1]), max_new_tokens=5, top_k=1).tolist() == [
        plain_answer(model, PROMPTS[0], 5)
    ]
