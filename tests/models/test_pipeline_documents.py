"""Documents through the pipeline: strings and images in, strings and images out."""

import pytest
import torch
from PIL import Image

from common.errors import UserError
from models import CLIPVisionTower, ShowoPipeline
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import RESOLUTION, clip_showo, tiny_vq, write_clip
from tests.training.tiny import CAPTIONS, picture

FAST = {"timesteps": 2, "max_new_tokens": 3, "generator": 0}


@pytest.fixture(scope="module")
def pipeline():
    return ShowoPipeline(tiny_showo(), tiny_vq(), prompting())


@pytest.fixture(scope="module")
def images():
    return [picture(caption).resize((RESOLUTION, RESOLUTION)) for caption in CAPTIONS[:2]]


def same(one, other) -> bool:
    return one.tobytes() == other.tobytes() if isinstance(one, Image.Image) else one == other


def test_a_plan_says_what_comes(pipeline, images):
    made = pipeline.generate(["w1 w2", images[0], "w3"], plan=["image", "text"], **FAST)
    assert [type(one) for one in made] == [Image.Image, str]
    assert made[0].size == (RESOLUTION, RESOLUTION)


def test_several_documents_are_each_as_alone(pipeline, images):
    documents = [["w1 w2"], [images[0], "w3"], [images[1]]]
    together = pipeline.generate(documents, plan=["image"], **FAST | {"generator": [5, 6, 7]})
    for number, document in enumerate(documents):
        (alone,) = pipeline.generate(document, plan=["image"], **FAST | {"generator": [5 + number]})
        assert same(together[number][0], alone)
    in_parts = pipeline.generate(documents, plan=["image"], batch_size=2, **FAST | {"generator": [5, 6, 7]})
    assert all(same(one[0], other[0]) for one, other in zip(together, in_parts, strict=True))


def test_without_a_plan_the_model_decides_and_ends(pipeline):
    made = pipeline.generate(["w1"], max_images=2, **FAST)
    assert all(isinstance(one, Image.Image | str) for one in made)
    assert sum(isinstance(one, Image.Image) for one in made) <= 2


def test_edits(pipeline, images):
    both = pipeline.edit(images, "w4 w5", **FAST)
    (document,) = pipeline.generate([[images[1], "w4 w5"]], plan=["image"], null="text", **FAST | {"generator": [1]})
    assert len(both) == 2 and same(both[1], document[0])
    with_two = pipeline.edit(images[0], "w4", text_guidance_scale=2.0, image_guidance_scale=1.5, **FAST)
    assert len(with_two) == 1


def test_scales_that_are_none_are_not_given(pipeline, images):
    one, other = (
        pipeline.edit(images[0], "w4", guidance_scale=9.0, **more, **FAST)[0]
        for more in ({}, {"text_guidance_scale": None, "image_guidance_scale": None})
    )
    assert same(one, other) and not same(one, pipeline.edit(images[0], "w4", guidance_scale=0.0, **FAST)[0])


def test_stories(pipeline):
    story = pipeline.tell("w1 w2", num_images=2, **FAST)
    assert [type(one) for one in story] == [str, Image.Image, str, Image.Image] and story[0] == "w1 w2"
    assert len(pipeline.tell(["w1", "w2"], num_images=1, **FAST)) == 2


def test_a_question_about_several_images(pipeline, images):
    together = pipeline.answer([images, images[0]], ["w1?", "w2"], max_new_tokens=4)
    assert [len(answers) for answers in together] == [2, 2]
    rows = pipeline._question_rows([images], ["w2"])["input_ids"]
    ids = pipeline.encode(images) + pipeline.model.vocabulary.image_offset
    document = [*({"image_ids": one} for one in ids), {"text": pipeline.question_format.prompt("w2")}]
    assert torch.equal(rows, pipeline.prompting(([document], True), "mixed_gen").input_ids)


def test_more_images_than_the_model_has_positions_for_are_refused(pipeline, images):
    message = "the 120 images and the question 'w1' take .* is more than the 1024 .* or ask about fewer images"
    with pytest.raises(UserError, match=message):
        pipeline.answer([images * 60], "w1")


def test_words_and_codes_are_passed_on_as_they_come(pipeline):
    seen = []
    made = pipeline.generate(["w1"], plan=["text", "image"], on_new=lambda *new: seen.append(new), **FAST)
    words = "".join(value for _, segment, value in seen if segment == 0)
    assert words.strip() == made[0] and [segment for _, segment, _ in seen][-2:] == [1, 1]
    assert all(isinstance(value, torch.Tensor) for _, segment, value in seen if segment == 1)


@pytest.mark.parametrize(
    ("document", "settings", "message"),
    [
        ([], {}, "document 0 is []; give a list of texts and images"),
        ("w1", {}, "document 0 is 'w1'; give a list"),
        (["w1 <|soi|>"], {}, "contains the special token <|soi|>"),
        (["w1 " * 3000], {}, "but the model knows"),
        (["w1"], {"plan": ["image"] * 150}, "at least 2704 with what is to come, but the model knows 1024 positions"),
        (["w1"], {"plan": ["video"]}, "plan holds 'video', expected text or image"),
    ],
)
def test_what_cannot_be_is_refused(pipeline, document, settings, message):
    with pytest.raises(ValueError) as refused:
        pipeline.generate(document, **settings)
    assert message in str(refused.value)


def test_clip_models_answer_about_several_images_and_generate_no_documents(images, tmp_path):
    tower = CLIPVisionTower(write_clip(tmp_path / "clip"))
    pipeline = ShowoPipeline(clip_showo(), tiny_vq(), prompting(), clip=tower)
    (answers,) = pipeline.answer([images], ["w1?"], max_new_tokens=3)
    assert len(answers) == 1
    with pytest.raises(UserError, match="documents need a model that sees images as codes"):
        pipeline.edit(images[0], "w1")
