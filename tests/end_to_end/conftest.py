"""Tiny checkpoints in the published layout and images, written once for all scripts' tests."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import write_checkpoints


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> dict[str, Path]:
    """`demo` and `demo_clip` are YAMLs; the folders of the checkpoints and `pictures` are beside them."""
    root = tmp_path_factory.mktemp("tiny")
    found = write_checkpoints(root)
    found["pictures"] = root / "pictures"
    found["pictures"].mkdir()
    for number, name in enumerate(("b.png", "a.jpg", "c.png")):
        colours = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((48, 40)).save(found["pictures"] / name)
    found["image"] = found["pictures"] / "c.png"
    found["mask"] = root / "mask.png"
    mask = Image.new("L", (48, 40))
    mask.paste(255, (24, 0, 48, 40))
    mask.save(found["mask"])
    return found
