"""The exact reward of the scene world: what the reader sees in an image against what its caption claims.

training/train.py config=configs/showo_tiny_policy.yaml policy.reward=examples.scenes.reward:claims
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image

from common.errors import UserError
from examples.scenes.benchmark import rate_claims
from examples.scenes.reader import Reader
from examples.scenes.world import SIDES

reader = cache(Reader)  # by side in pixels


def claims(prompts: Sequence[str], images: Sequence[Image.Image], records: Sequence[dict]) -> list[float]:
    """From 0 to 1: the share of right parts (number, icons, colours, sizes, places, relations, ground, all together).

    Args:
        images: of 64, 96 or 128 pixels per side.
        records: with the `claims` of each prompt, as the shards of `captions` and `layouts` have them.

    Raises:
        UserError: an image of another size, or a prompt without claims.
    """
    scores, by_side = [0.0] * len(images), defaultdict(list)
    for number, (prompt, image, record) in enumerate(zip(prompts, images, records, strict=True)):
        if "claims" not in record:
            raise UserError(f"the prompt {prompt!r:.60} has no claims; give prompts of examples/scenes/make.py")
        if image.size not in ((side, side) for side in SIDES):
            raise UserError(f"an image has {image.size} pixels; scenes have {', '.join(map(str, SIDES))} per side")
        by_side[image.width].append(number)
    for side, numbers in by_side.items():
        scenes = reader(side).read(np.stack([np.asarray(images[number].convert("RGB")) for number in numbers]))
        for number, scene in zip(numbers, scenes, strict=True):
            rated = rate_claims(records[number]["claims"], scene)
            scores[number] = sum(rated.values()) / len(rated)
    return scores
