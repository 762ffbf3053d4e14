"""`mmu_generate` against the published loop; prompts that share a prefix; drafts that change no token (spec §8)."""

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import published
from models import OmniMask
from models.generation import cpu
from models.generation import runner as runner_module
from models.generation.runner import BUCKET, Runner
from models.generation.text import MAX_DRAFT, PromptLookup, Prompts
from models.vocabulary import IMAGE_FEATURE_ID
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny_llms import FAMILIES
from tests.tiny_llms import tiny_showo as showo_of

PAD, SOI, EOI, MMU, OFFSET, NUM_CODES, N, CLIP_SIZE = 118, 119, 120, 124, 128, 64, 16, 24


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def greedy(model, prompts, count: int, **settings) -> torch.Tensor:
    ids = prompts if isinstance(prompts, torch.Tensor) else torch.tensor(prompts)
    return model.mmu_generate(ids, max_new_tokens=count, top_k=1, **settings)


def padded(prompts: list[list[int]], side: str) -> torch.Tensor:
    length = max(map(len, prompts)) + 1  # one more than anybody needs
    pads = [[PAD] * (length - len(prompt)) for prompt in prompts]
    rows = [pad + prompt if side == "left" else prompt + pad for pad, prompt in zip(pads, prompts, strict=True)]
    return torch.tensor(rows)


def plain_answer(model, prompt, num_tokens, stops=(), features=None):
    """The published loop of a single row."""
    settings = {"max_new_tokens": num_tokens, "eot_token": stops, "image_features": features}
    return published.mmu_generate(model, torch.tensor([prompt]), **settings)[0].tolist()


@pytest.fixture(scope="module")
def answers(model):
    return [plain_answer(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_batch_are_those_of_its_rows(family, implementation, side):
    """Prompts of different lengths and kinds, with none, one and two images; plain, and with what pays on CPUs."""
    model = showo_of(family, attn_implementation=implementation, tie_word_embeddings=family in ("llama", "qwen2"))
    answers = [plain_answer(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(answers)  # otherwise this would show little
    ids = padded(PROMPTS, side)
    before = ids.clone()
    assert greedy(model, ids, 8).tolist() == answers
    assert torch.equal(ids, before)
    cpu.enable(model)
    assert greedy(model, ids, 8).tolist() == answers
    assert [greedy(model, [prompt], 8)[0].tolist() for prompt in PROMPTS] == answers


@pytest.mark.slow
def test_compiled_once_for_all_prompts(model, answers):
    """One graph for a token, one for a draft; prompts of another length need no other."""
    compiled = tiny_showo()
    compiled.compile_steps()
    counters.clear()
    repeating = [[117, *[3, 4, 5] * 6]]
    assert torch.equal(greedy(compiled, repeating, 20), greedy(model, repeating, 20))
    graphs = counters["stats"]["unique_graphs"]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        if len(prompt) + 12 + MAX_DRAFT <= BUCKET:  # not the one with two images
            assert greedy(compiled, [prompt], 12).tolist() == [answer]
    assert counters["stats"]["unique_graphs"] == graphs == 2


def test_rows_stop_by_themselves(model, answers):
    stops = [answers[0][3], answers[1][6], answers[2][1]]
    expected = [plain_answer(model, prompt, 12, stops) for prompt in PROMPTS]
    new_ids = greedy(model, padded(PROMPTS, "left"), 12, eot_token=stops)
    longest = max(map(len, expected))
    assert len({len(row) for row in expected}) > 2  # they really stop at different times
    assert new_ids.tolist() == [row + [PAD] * (longest - len(row)) for row in expected]


def test_all_stopped_ends_the_loop(model, answers):
    stop = answers[0][2]
    expected = plain_answer(model, PROMPTS[0], 12, [stop])
    for eot_token in (stop, [stop], (1, stop), torch.tensor([stop]), torch.tensor(stop)):
        seen = []
        new_ids = greedy(model, PROMPTS[:1], 12, eot_token=eot_token, callback=seen.append)
        assert new_ids.tolist() == [expected] and len(seen) == len(expected) < 12


def test_the_cache_is_released_however_an_answer_ends(model, answers, monkeypatch):
    """At the end token, in the callback, and in inference mode, whose tensors no other mode may write to."""
    monkeypatch.setattr(runner_module, "compiled_decoder", lambda device_type: runner_module.run_decoder)
    static = tiny_showo()
    static.step_caches = {}
    with torch.inference_mode():
        greedy(static, PROMPTS[:1], 12, eot_token=answers[0][2])
    assert len(static.step_caches) == 1
    assert greedy(static, PROMPTS[:1], 12).tolist() == answers[:1]
    with pytest.raises(ZeroDivisionError):
        greedy(static, PROMPTS[:1], 12, callback=lambda token: 1 // 0)
    assert len(static.step_caches) == 1


def test_frozen_parts_stay_in_evaluation_mode():
    model = tiny_showo().train()
    model.showo.get_decoder().layers[0].eval()
    model.mmu_generate(torch.tensor(PROMPTS[:1]), max_new_tokens=1)
    modes = [layer.training for layer in model.showo.get_decoder().layers]
    assert model.training and modes == [False] + [True] * (len(modes) - 1)


def test_a_prompt_of_padding_is_refused(model):
    with pytest.raises(ValueError, match="prompt 1 holds no token"):
        model.mmu_generate(torch.tensor([[117, 3], [PAD, PAD]]), max_new_tokens=2)


def test_few_tokens(model, answers):
    for count in (0, 1):
        new_ids = greedy(model, padded(PROMPTS, "left"), count)
        assert new_ids.tolist() == [row[:count] for row in answers] and new_ids.dtype == torch.int64


def test_sampling_uses_the_generator(model):
    ids = padded(PROMPTS, "left")
    first, again, other = (model.mmu_generate(ids, max_new_tokens=6, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- image features ----


def feature_prompt(num_features: int, text: list[int], system: tuple[int, ...] = ()) -> list[int]:
    return [MMU, *system, SOI, *[IMAGE_FEATURE_ID] * num_features, EOI, *text]


TWO_IMAGES = [MMU, *(feature_prompt(9, [])[1:] * 2), 3, 4]
WITH_FEATURES = {
    "one image each": [feature_prompt(9, [3, 4, 5]), feature_prompt(9, [6], (50, 51)), feature_prompt(9, [7, 8, 9])],
    "two, none, one": [TWO_IMAGES, [117, 50, 51], feature_prompt(9, [6, 7])],
    "after the common prefix": [TWO_IMAGES, [*feature_prompt(9, [117, 5]), *feature_prompt(9, [117])[1:]]],
    "the same for all": [feature_prompt(9, question, (20, 21)) for question in ([117, 3, 4], [117, 3], [117, 3, 9])],
    "others in the same places": [feature_prompt(9, question, (20, 21)) for question in ([117, 3, 4], [117, 3, 9])],
}


@pytest.mark.parametrize("case", WITH_FEATURES)
def test_answers_from_features(clip_model, case):
    """Those of single rows; features that all rows share are encoded once, with the text that is the same."""
    prompts = WITH_FEATURES[case]
    counts = [prompt.count(IMAGE_FEATURE_ID) // 9 for prompt in prompts]
    features = torch.randn(sum(counts), 9, CLIP_SIZE, generator=seeded(4))
    if case == "the same for all":
        features[:] = features[0]
    elif case == "after the common prefix":
        features[2] = features[0]
    rows = Prompts(padded(prompts, "right"), None, clip_model.vocabulary, features)
    assert rows.shared == (3 + 11 + 1 if case == "the same for all" else 0)
    own = [part if len(part) else None for part in features.split(counts)]
    expected = [plain_answer(clip_model, prompt, 6, features=f) for prompt, f in zip(prompts, own, strict=True)]
    for side in ("left", "right"):
        assert greedy(clip_model, padded(prompts, side), 6, image_features=features).tolist() == expected
    assert greedy(clip_model, padded(prompts, "left"), 6, image_features=-features).tolist() != expected


# ---- a common prefix ----


IMAGE = [SOI, *range(OFFSET, OFFSET + N), EOI]
OTHER = [SOI, *range(OFFSET + 1, OFFSET + N + 1), EOI]


def recorded(monkeypatch) -> list[tuple[int, int]]:
    """(rows, positions) of every pass through the decoder from here on."""
    passes, run = [], Runner._run

    def counted(self, run_decoder, embeds, positions):
        passes.append(tuple(embeds.shape[:2]))
        return run(self, run_decoder, embeds, positions)

    monkeypatch.setattr(Runner, "_run", counted)
    return passes


QUESTIONS = [[117, 3, 4, 5], [117, 3, 9], [117, 3, 4, 5, 6, 7]]
COMMON = {
    "one image": ([[MMU, *IMAGE, *question] for question in QUESTIONS], 1 + len(IMAGE) + 2),
    "other images": ([[MMU, *image, 117, 3] for image in (IMAGE, OTHER)], 0),
    "two images, the first in common": ([[MMU, *IMAGE, *image, 117, 3] for image in (IMAGE, OTHER)], 1 + len(IMAGE)),
    "a system prompt in common": ([[MMU, 20, 21, *image, 117] for image in (IMAGE, OTHER)], 0),  # it sees the image
    "text": ([[117, 3, 4, 5, 6], [117, 3, 4, 8]], 3),
    "the same": ([[MMU, *IMAGE, 117, 3]] * 3, 1 + len(IMAGE) + 1),  # the last id gives the hidden state
    "one begins the other": ([[MMU, *IMAGE, 117], [MMU, *IMAGE, 117, 3]], 1 + len(IMAGE)),
    "one row": ([[MMU, *IMAGE, 117, 3]], 0),
}


@pytest.mark.parametrize("case", COMMON)
def test_the_common_prefix(model, case):
    """Answers are those of single rows, also where rows share nothing."""
    prompts, shared = COMMON[case]
    assert Prompts(padded(prompts, "right"), None, model.vocabulary).shared == shared
    alone = [greedy(model, [prompt], 8)[0].tolist() for prompt in prompts]
    assert greedy(model, padded(prompts, "right"), 8).tolist() == alone


def test_an_image_is_encoded_once_for_all_questions(model, monkeypatch):
    passes = recorded(monkeypatch)
    greedy(model, padded(COMMON["one image"][0], "right"), 3)
    assert passes == [(1, 1 + len(IMAGE) + 2), (3, 4), (3, 1), (3, 1)]


def test_a_mask_of_ones_own(model):
    """Right-padded prompts are taken as they are, as `UniversalPrompting` makes them."""
    image_ids = torch.randint(OFFSET, OFFSET + NUM_CODES, (2, N), generator=seeded(1))
    rows = prompting()((image_ids, ["w1 w2 w3", "w4"]), "mmu_gen")
    ids, causal = rows.input_ids, OmniMask.lm(*rows.input_ids.shape)
    expected = greedy(model, ids, 6)
    assert torch.equal(greedy(model, ids, 6, attention_mask=rows.attention_mask), expected)
    assert not torch.equal(greedy(model, ids, 6, attention_mask=causal), expected)
    with pytest.raises(ValueError, match="must be padded on the right"):
        greedy(model, ids.flip(1), 6, attention_mask=rows.attention_mask)


# ---- drafts ----


def test_a_draft_repeats_the_last_occurrence():
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3], 15)
    assert lookup.draft(10) == [5, 6, 2]  # after the later "2 3"; three at first
    assert lookup.draft(2) == [5, 6] and lookup.draft(0) == []
    lookup.add(4)  # "2 3 4" occurred once
    assert lookup.draft(10) == [9, 2, 3]
    lookup.add(77)
    assert lookup.draft(10) == []
    # image features have no id that a step could embed
    assert PromptLookup([7, 8, 119, IMAGE_FEATURE_ID, IMAGE_FEATURE_ID, 9, 7, 8], 15).draft(10) == [119]


def test_drafts_grow_when_accepted_and_shrink_when_not():
    lookup = PromptLookup([1, 2, *range(10, 40), 1, 2], 8)
    lengths = []
    for accepted in (3, 6, 8, 8, 2, 0):
        lengths.append(len(lookup.draft(100)))
        lookup.adapt(lengths[-1], accepted)
    assert lengths == [3, 6, 8, 8, 8, 2] and len(lookup.draft(100)) == 1
    lookup.adapt(0, 0)  # there was no draft: nothing changes
    assert len(lookup.draft(100)) == 1


SETTINGS = [{"top_k": 1}, {"temperature": 0.05}, {"top_k": 2, "temperature": 0.3}]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_drafts_change_no_token(settings, implementation, monkeypatch):
    """Greedy and sampled: every random number is drawn at the same point of the generator."""
    model = tiny_showo(attn_implementation=implementation)
    passes = recorded(monkeypatch)
    prompt = torch.tensor([[MMU, *IMAGE, 117, *[3, 4, 5] * 4]])

    def answer(**more):
        passes.clear()
        generator = torch.Generator().manual_seed(1)
        ids = model.mmu_generate(prompt, max_new_tokens=60, generator=generator, **settings, **more)
        return ids, generator.get_state(), len(passes)

    (plain, state, count), (drafted, state_2, count_2) = answer(max_draft=0), answer()
    assert torch.equal(plain, drafted) and torch.equal(state, state_2)
    if settings == {"top_k": 1}:
        assert count == 60 and count_2 < 50  # this model repeats itself soon
        assert max(n for _, n in passes) > 3


def test_drafts_end_where_the_answer_ends(model):
    """At the end token and at the last token that was asked for; tokens are streamed one by one."""
    prompt, seen = [[MMU, *IMAGE, 117, 3, 4]], []
    whole = greedy(model, prompt, 40, max_draft=0)[0].tolist()
    ids = greedy(model, prompt, 40, eot_token=whole[30], callback=seen.append)
    assert ids[0].tolist() == whole[: whole.index(whole[30]) + 1] == [int(token) for token in seen]
    for count in (1, 2, 35):
        assert greedy(model, prompt, count)[0].tolist() == whole[:count]


def test_no_drafts_in_half_precision(monkeypatch):
    """Unless they are asked for: how a product is rounded depends on the number of its rows there."""
    model = tiny_showo().bfloat16()
    passes = recorded(monkeypatch)
    greedy(model, [[117, *[3, 4, 5] * 6]], 30)
    assert len(passes) == 30
    passes.clear()
    greedy(model, [[117, *[3, 4, 5] * 6]], 30, max_draft=4)
    assert len(passes) < 30
