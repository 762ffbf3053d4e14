"""The exact reward of the scene world."""

import pytest
from PIL import Image

from common.errors import UserError
from examples.scenes.parts import sample
from examples.scenes.reward import claims
from examples.scenes.world import render


def test_true_images_have_the_full_score_and_others_less():
    made = [sample("captions", number, cells=8) for number in range(4)]
    images = [Image.fromarray(render(one.scenes[0])) for one in made]
    prompts, records = [one.said["caption"] for one in made], [one.said for one in made]
    assert claims(prompts, images, records) == [1.0] * 4
    wrong = claims(prompts, images[1:] + images[:1], records)
    assert all(0 <= score < 1 for score in wrong) and len(set(wrong)) > 1, "parts of it count"


@pytest.mark.parametrize(
    ("size", "record", "part"),
    [(64, {}, "'a car' has no claims; give prompts of examples"), (32, {"claims": {}}, "an image has .32, 32. pixels")],
)
def test_what_it_cannot_score(size, record, part):
    with pytest.raises(UserError, match=part):
        claims(["a car"], [Image.new("RGB", (size, size))], [record])
