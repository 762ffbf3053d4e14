"""The example images: small, readable, masks that fit, and a source for each."""

from pathlib import Path

import pytest

from models.images import load_image, preprocess

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "mmu_validation", ROOT / "inpainting_validation"]
IMAGES = sorted(path for folder in FOLDERS for path in folder.rglob("*.[jp][pn]g"))
MASKS = [path for path in IMAGES if path.stem.endswith("_mask")]  # of the photographs


def test_there_are_enough_and_they_are_small():
    assert len(list(FOLDERS[0].glob("*.jpg"))) >= 4 and len(MASKS) >= 2
    assert sum(path.stat().st_size for folder in FOLDERS for path in folder.iterdir()) < 1_500_000


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_can_be_read_and_has_its_source(path):
    assert preprocess(load_image(path), 64).std() > 0.05  # something is on it
    folder = next(folder for folder in FOLDERS if folder in path.parents)
    sources, name = (folder / "SOURCES.md").read_text(), str(path.relative_to(folder))
    assert f"`{name}`" in sources or path in MASKS and "*_mask.png" in sources


@pytest.mark.parametrize("path", MASKS, ids=lambda path: path.stem)
def test_masks_fit_their_images_and_are_black_and_white(path):
    mask = load_image(path).convert("L")
    assert mask.size == load_image(path.with_name(path.name.replace("_mask.png", ".jpg"))).size == (512, 512)
    assert {value for _, value in mask.getcolors()} == {0, 255}
    assert 0.1 < preprocess(mask, 512, normalize=False).mean() < 0.7
