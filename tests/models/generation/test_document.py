"""`document_generate` against a loop that recomputes everything (`benchmarks/documents.py`)."""

import pytest
import torch

from benchmarks import documents
from models import SamplingParameters, get_mask_schedule
from models.generation.document import guidance_groups
from tests import plain_sampling
from tests.parity.goldens import prompting, tiny_showo
from tests.plain_sampling import OPTIONS
from tests.tiny_llms import tiny_showo as showo_of

N, NUM_CODES = 16, 64


def image(seed: int) -> list[int]:
    return torch.randint(NUM_CODES, (N,), generator=torch.Generator().manual_seed(seed)).tolist()


DOCUMENTS = {
    "turns of a conversation": [("image", image(7)), ("text", [1, 117, 2, 3, 117, 117, 4])],
    "a text": [("text", [1, 2, 3])],
    "an image and an instruction": [("image", image(1)), ("text", [4, 5])],
    "two images": [("image", image(2)), ("image", image(3))],
    "a story": [("text", [6]), ("image", image(4)), ("text", [7, 8, 9]), ("image", image(5)), ("text", [10, 11])],
}
SCALES = {
    "none": {},
    "against nothing": {"guidance_scale": 2.0},
    "against the images": {"guidance_scale": 2.0, "null": "text"},
    "two scales": {"text_guidance_scale": 3.0, "image_guidance_scale": 1.5},
}


def weights_of(scales: dict) -> dict[str, float]:
    groups, weights = guidance_groups(
        scales.get("guidance_scale", 0.0),
        scales.get("null", "all"),
        scales.get("text_guidance_scale"),
        scales.get("image_guidance_scale"),
    )
    return dict(zip(groups, weights, strict=True))


def compare(model, given: list, bos_id: int, eos_id: int, scales: dict, open_text=False, **settings) -> list:
    """The segments of a batch of documents, ours and recomputed; each document has a generator of its own."""
    settings = {"timesteps": 4, "temperature": 1.0, "max_new_tokens": 6, "top_k": 5} | settings
    rows = [documents.row_ids(model, parts, bos_id, eos_id, open_text) for parts in given]
    longest = max(map(len, rows))
    pad = model.vocabulary.pad_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    generators = [torch.Generator().manual_seed(number) for number in range(len(given))]
    made = model.document_generate(ids, bos_id=bos_id, eos_id=eos_id, generator=generators, **scales, **settings)
    made = [[(s.kind, s.ids if s.kind == "text" else s.codes.tolist()) for s in segments] for segments in made]
    for number, parts in enumerate(given):
        expected = documents.document_generate(
            model,
            parts,
            bos_id=bos_id,
            eos_id=eos_id,
            open_text=open_text,
            weights=weights_of(scales),
            generator=torch.Generator().manual_seed(number),
            **settings,
        )
        assert made[number] == expected, f"document {number}"
    return made


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("plan", [None, ["image"], ["text", "image", "image", "text"]], ids=str)
def test_a_batch_of_different_documents_is_each_recomputed(model, plan, scales):
    build = prompting()
    made = compare(model, list(DOCUMENTS.values()), build.bos_id, build.eos_id, scales, plan=plan, max_images=2)
    if plan is not None:
        assert [[kind for kind, _ in segments] for segments in made] == [plan] * len(DOCUMENTS)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_other_language_models(family):
    """Their beginning and end of text differ, and keys of several heads are shared."""
    model = showo_of(family)
    compare(model, list(DOCUMENTS.values())[1:], 2, 3, SCALES["two scales"], max_images=2)


@pytest.mark.parametrize("plan", [None, ["text"], ["text", "image"]], ids=str)
def test_a_text_that_the_prompt_begins_goes_on(model, plan):
    build = prompting()
    given = [DOCUMENTS["a text"], DOCUMENTS["an image and an instruction"], [("image", image(6)), ("text", [])]]
    made = compare(model, given, build.bos_id, build.eos_id, {}, open_text=True, plan=plan, max_images=1)
    assert all(segments[0][0] == "text" for segments in made)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sampling_options_of_images_are_their_plain_rules(model, options):
    """Two guidance scales and a ramp: each group's logits go from the conditional ones to their own weight."""
    v, build, sampling, timesteps = model.vocabulary, prompting(), SamplingParameters(**options), 6
    ends = {"bos_id": build.bos_id, "eos_id": build.eos_id}
    parts = DOCUMENTS["an image and an instruction"]
    views = {"nothing": parts, "text": documents.without_texts(parts), "all": documents.nothing_before(parts)}

    def logits_at(step: int, codes: list) -> torch.Tensor:
        ids = [v.mask_token_id - v.image_offset if code is None else code for code in codes[0]]
        blocks = {}
        for name, seen in views.items():
            row = documents.row_ids(model, [*seen, ("image", ids)], **ends)
            blocks[name] = documents.logits_of(model, row)[-N - 1 : -1, v.image_offset : v.image_offset + NUM_CODES]
        weights = weights_of(SCALES["two scales"])
        guided = sum(weight * blocks[name] for name, weight in weights.items())
        share = ((step + 1) / timesteps) ** sampling.guidance_ramp * (sampling.guidance_start <= step / timesteps)
        return (blocks["nothing"] + share * (guided - blocks["nothing"]))[None]

    expected = plain_sampling.generate(
        logits_at,
        [[None] * N],
        sampling,
        timesteps=timesteps,
        temperature=2.0,
        schedule=lambda t: float(get_mask_schedule("cosine")(torch.tensor(t))),
        generator=torch.Generator().manual_seed(1),
    )
    rows = torch.tensor([documents.row_ids(model, parts, **ends)])
    settings = {"timesteps": timesteps, "temperature": 2.0, "plan": ["image"], **ends, **SCALES["two scales"]}
    generators = [torch.Generator().manual_seed(1)]
    ((made,),) = model.document_generate(rows, sampling=sampling, generator=generators, **settings)
    assert made.codes.tolist() == expected[-1][0]


def test_partial_refreshes_of_documents(model):
    """Some documents of a batch have an image: each is the one that it has alone."""
    build, given = prompting(), list(DOCUMENTS.values())
    rows = [documents.row_ids(model, parts, build.bos_id, build.eos_id) for parts in given]
    longest = max(map(len, rows))

    def images(numbers: list[int], **options) -> list[list[int]]:
        ids = torch.tensor(
            [rows[number] + [model.vocabulary.pad_id] * (longest - len(rows[number])) for number in numbers]
        )
        made = model.document_generate(
            ids,
            bos_id=build.bos_id,
            eos_id=build.eos_id,
            max_images=1,
            max_new_tokens=3,
            top_k=None,
            timesteps=8,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(number) for number in numbers],
            sampling=SamplingParameters(**options),
        )
        return [[segment.codes.tolist() for segment in segments if segment.kind == "image"] for segments in made]

    numbers, options = list(range(len(given))), {"refresh_every": 4, "refresh_share": 0.3}
    together = images(numbers, **options)
    assert 0 < sum(map(bool, together)) < len(given), "the test needs documents with and without an image"
    assert together == [images([number], **options)[0] for number in numbers]
    assert together != images(numbers) == images(numbers, **options, refresh_warmup=1.0)


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens():
    model, build = tiny_showo(), prompting()
    model.compile_steps()
    compare(model, list(DOCUMENTS.values())[2:], build.bos_id, build.eos_id, SCALES["two scales"], max_images=1)


def test_values_as_they_come(model):
    """The callback sees each new token, and the codes of an image after each step."""
    seen, build = [], prompting()
    rows = torch.tensor([documents.row_ids(model, DOCUMENTS["a text"], build.bos_id, build.eos_id)])
    (made,) = model.document_generate(
        rows,
        bos_id=build.bos_id,
        eos_id=build.eos_id,
        plan=["image", "text"],
        timesteps=3,
        max_new_tokens=2,
        callback=lambda *values: seen.append(values),
    )
    assert [(document, segment) for document, segment, _ in seen] == [(0, 0)] * 3 + [(0, 1)] * len(made[1].ids)
    assert torch.equal(seen[2][2], made[0].codes) and [token for *_, token in seen[3:]] == made[1].ids


def test_a_full_context_ends_a_document_and_keeps_what_is_made(caplog):
    model, build = showo_of("phi", max_position_embeddings=48), prompting()
    rows = torch.tensor([documents.row_ids(model, [("text", [1, 2, 3])], build.bos_id, build.eos_id)])
    settings = {"bos_id": build.bos_id, "eos_id": build.eos_id, "timesteps": 2, "plan": ["image"] * 4}
    (made,) = model.document_generate(rows, **settings)
    assert [segment.kind for segment in made] == ["image"] * 2, "6 + 2 * 18 positions of 48"
    assert "1 of 1 documents ended early: the model knows 48 positions" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": ["picture"]}, "plan holds 'picture', expected text or image"),
        ({"plan": ["text", "text"]}, "plan holds a text after a text"),
        ({"null": "images"}, "null is 'images', expected text or all"),
        ({"text_guidance_scale": 2.0}, "go together; give both or none"),
        ({"guidance_scale": 1.0, "text_guidance_scale": 2.0, "image_guidance_scale": 1.0}, "drop one"),
        ({"timesteps": 0}, "timesteps is 0, expected at least 1"),
        ({"input_ids": torch.tensor([[123, 5, 117]])}, "token 5 at position 1 has no place in a document"),
        ({"input_ids": torch.tensor([[123, 117, 1]]), "plan": ["image"]}, "needs a plan that begins with text"),
    ],
)
def test_what_does_not_fit_is_refused(model, settings, message):
    build = prompting()
    given = {"input_ids": torch.tensor([[123, 117, 1, 117]])} | settings
    with pytest.raises(ValueError, match=message):
        model.document_generate(given.pop("input_ids"), bos_id=build.bos_id, eos_id=build.eos_id, **given)
