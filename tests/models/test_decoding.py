"""Prompts read once for what they begin with in common, and guesses that change no token (SPEC §8)."""

import pytest
import torch

from models import OmniMask
from models.decoding import PromptLookup, Prompts
from models.incremental import PlainPhi
from tests.parity.goldens import tiny_showo

PAD, SOI, EOI, MMU, OFFSET, N = 118, 119, 120, 124, 128, 16
IMAGE = [SOI, *range(OFFSET, OFFSET + N), EOI]
OTHER = [SOI, *range(OFFSET + 1, OFFSET + N + 1), EOI]
FEATURES = 5
SEEN = [SOI, *[-200] * FEATURES, EOI]


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


@pytest.fixture(scope="module")
def clip_model():
    return tiny_showo(w_clip_vit=True, clip_feature_size=24)


def padded(prompts: list[list[int]]) -> torch.Tensor:
    length = max(map(len, prompts))
    return torch.tensor([prompt + [PAD] * (length - len(prompt)) for prompt in prompts])


def count_positions(monkeypatch) -> list[tuple[int, int]]:
    """(rows, positions) of every piece that is run from here on."""
    pieces = []
    extend = PlainPhi.extend

    def counted(self, input_ids, **settings):
        pieces.append(tuple(input_ids.shape))
        return extend(self, input_ids, **settings)

    monkeypatch.setattr(PlainPhi, "extend", counted)
    return pieces


QUESTIONS = [[117, 3, 4, 5], [117, 3, 9], [117, 3, 4, 5, 6, 7]]
COMMON = {
    "one picture": ([[MMU, *IMAGE, *question] for question in QUESTIONS], 1 + len(IMAGE) + 2),
    "other pictures": ([[MMU, *image, 117, 3] for image in (IMAGE, OTHER)], 0),
    "two pictures, the first in common": ([[MMU, *IMAGE, *image, 117, 3] for image in (IMAGE, OTHER)], 1 + len(IMAGE)),
    "a system prompt in common": ([[MMU, 20, 21, *image, 117] for image in (IMAGE, OTHER)], 0),  # it sees the picture
    "text": ([[117, 3, 4, 5, 6], [117, 3, 4, 8]], 3),
    "the same": ([[MMU, *IMAGE, 117, 3]] * 3, 1 + len(IMAGE) + 1),  # the last id gives the hidden state
    "one begins the other": ([[MMU, *IMAGE, 117], [MMU, *IMAGE, 117, 3]], 1 + len(IMAGE)),
    "one row": ([[MMU, *IMAGE, 117, 3]], 0),
}


@pytest.mark.parametrize("case", COMMON)
def test_the_common_beginning(model, case):
    prompts, shared = COMMON[case]
    assert Prompts.of(padded(prompts), model.vocabulary, 4).shared == shared


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", COMMON)
def test_answers_are_those_of_single_rows(case, implementation):
    """Also where rows share nothing; `eager` goes through transformers' modules."""
    model = tiny_showo(attn_implementation=implementation)
    prompts = COMMON[case][0]
    alone = [model.mmu_generate(torch.tensor([prompt]), max_new_tokens=8, top_k=1)[0].tolist() for prompt in prompts]
    assert model.mmu_generate(padded(prompts), max_new_tokens=8, top_k=1).tolist() == alone


def test_a_picture_is_computed_once_for_all_questions(model, monkeypatch):
    pieces = count_positions(monkeypatch)
    model.mmu_generate(padded(COMMON["one picture"][0]), max_new_tokens=3, top_k=1)
    assert pieces == [(1, 1 + len(IMAGE) + 2), (3, 4), (3, 1), (3, 1)]


@pytest.mark.parametrize("same", [True, False])
def test_features_are_shared_only_if_they_are_the_same(clip_model, same):
    prompts = [[MMU, 20, 21, *SEEN, *question] for question in QUESTIONS]
    features = torch.randn(3, FEATURES, 24, generator=torch.Generator().manual_seed(0))
    features = features[:1].repeat(3, 1, 1) if same else features
    rows = Prompts.of(padded(prompts), clip_model.vocabulary, 4, features)
    assert rows.shared == (3 + len(SEEN) + 2 if same else 0)
    answers = clip_model.mmu_generate(padded(prompts), image_features=features, max_new_tokens=6, top_k=1)
    for prompt, picture, answer in zip(prompts, features, answers, strict=True):
        ids = torch.tensor([prompt])
        alone = clip_model.mmu_generate(ids, image_features=picture[None], max_new_tokens=6, top_k=1)
        assert torch.equal(alone[0], answer)


def test_a_picture_behind_the_common_beginning_is_not_shared(clip_model):
    prompts = [[MMU, *SEEN, *SEEN, 117], [MMU, *SEEN, 117, 5, *SEEN, 117]]
    features = torch.randn(4, FEATURES, 24, generator=torch.Generator().manual_seed(0))
    features[2] = features[0]
    answers = clip_model.mmu_generate(padded(prompts), image_features=features, max_new_tokens=5, top_k=1)
    for index, prompt in enumerate(prompts):
        own, ids = features[2 * index : 2 * index + 2], torch.tensor([prompt])
        alone = clip_model.mmu_generate(ids, image_features=own, max_new_tokens=5, top_k=1)
        assert torch.equal(alone[0], answers[index])


def test_a_mask_of_ones_own(model):
    """The prompts are taken as they are."""
    ids = torch.tensor([[117, *range(3, 20)]])
    mask = OmniMask.lm(1, ids.shape[1])
    expected = model.mmu_generate(ids, max_new_tokens=6, top_k=1)
    assert torch.equal(model.mmu_generate(ids, attention_mask=mask, max_new_tokens=6, top_k=1), expected)


# ---- guesses ----


def test_a_guess_goes_on_as_last_time():
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3], 15)
    assert lookup.guess(10) == [5, 6, 2]  # behind the later "2 3"; three at first
    assert lookup.guess(2) == [5, 6] and lookup.guess(0) == []
    lookup.add(4)  # "2 3 4" stood there once
    assert lookup.guess(10) == [9, 2, 3]
    lookup.add(77)
    assert lookup.guess(10) == []


def test_guesses_grow_with_success_and_shrink_with_failure():
    lookup = PromptLookup([1, 2, *range(10, 40), 1, 2], 8)
    lengths = []
    for right in (3, 6, 8, 8, 2, 0):
        lengths.append(len(lookup.guess(100)))
        lookup.learn(lengths[-1], right)
    assert lengths == [3, 6, 8, 8, 8, 2] and len(lookup.guess(100)) == 1
    lookup.learn(0, 0)  # no guess was made: nothing is learnt
    assert len(lookup.guess(100)) == 1


SETTINGS = [{"top_k": 1}, {"temperature": 0.05}, {"top_k": 2, "temperature": 0.3}]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_guesses_change_no_token(settings, implementation, monkeypatch):
    """Greedy and drawn: every draw is made at the same point of the generator."""
    model = tiny_showo(attn_implementation=implementation)
    pieces = count_positions(monkeypatch)
    prompt = torch.tensor([[MMU, *IMAGE, 117, *[3, 4, 5] * 4]])

    def answer(**more):
        pieces.clear()
        generator = torch.Generator().manual_seed(1)
        ids = model.mmu_generate(prompt, max_new_tokens=60, generator=generator, **settings, **more)
        return ids, generator.get_state(), len(pieces)

    (plain, state, passes), (guessed, state_2, passes_2) = answer(max_draft=0), answer()
    assert torch.equal(plain, guessed) and torch.equal(state, state_2)
    if implementation == "sdpa" and settings == {"top_k": 1}:
        assert passes == 60 and passes_2 < 50  # this model repeats itself soon
        assert max(n for _, n in pieces) > 3


def test_guesses_stop_at_the_end_token_and_stream_one_by_one(model):
    prompt = torch.tensor([[MMU, *IMAGE, 117, 3, 4]])
    whole = model.mmu_generate(prompt, max_new_tokens=40, top_k=1)[0].tolist()
    stop = whole[30]
    seen = []
    ids = model.mmu_generate(prompt, max_new_tokens=40, top_k=1, eot_token=stop, callback=seen.append)
    assert ids[0].tolist() == whole[: whole.index(stop) + 1] == [int(token) for token in seen]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_guesses_never_pass_the_end(model, count):
    prompt = torch.tensor([[117, *[3, 4, 5] * 6]])
    whole = model.mmu_generate(prompt, max_new_tokens=40, top_k=1, max_draft=0)
    assert torch.equal(model.mmu_generate(prompt, max_new_tokens=count, top_k=1), whole[:, :count])


def test_no_guesses_in_half_precision(monkeypatch):
    """Unless they are asked for: how a product is rounded depends on the number of its rows there."""
    model = tiny_showo().bfloat16()
    pieces = count_positions(monkeypatch)
    prompt = torch.tensor([[117, *[3, 4, 5] * 6]])
    model.mmu_generate(prompt, max_new_tokens=30, top_k=1)
    assert len(pieces) == 30
    pieces.clear()
    model.mmu_generate(prompt, max_new_tokens=30, top_k=1, max_draft=4)
    assert len(pieces) < 30
