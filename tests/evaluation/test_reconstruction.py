"""What the image tokenizer loses: figures by hand, of the tiny model, and of a folder that changes."""

import numpy as np
import pytest

from tests.evaluation.official import noise, save_image


def test_figures_by_hand(evaluation):
    """Greys 100 and 200 restored as 110 and 200; two of 64 codes, equally often.

    rFID of the mean grey: means 150 and 155, variances 5000 and 4050: 25 + 9050 − 2 · √(5000 · 4050) = 75.
    """
    folder, answers = evaluation.folder / "reconstruction", {}
    items = evaluation.prepared("reconstruction").items
    for item, (grey, codes) in zip(items, ((110, [0, 0]), (200, [63, 63])), strict=True):
        answers[item.key] = f"images/{item.facts['file']}.png"
        save_image(folder / answers[item.key], grey)
        np.save(folder / f"images/{item.facts['file']}.npy", np.array(codes, dtype=np.int32))
    (folder / "codebook.json").write_text('{"codebook_size": 64}')
    figures = evaluation.answer("reconstruction", answers)
    ssim = (2 * 100 * 110 + (0.01 * 255) ** 2) / (100**2 + 110**2 + (0.01 * 255) ** 2)
    assert figures["PSNR"] == pytest.approx((20 * np.log10(255 / 10) + 100) / 2)
    assert figures["SSIM x 100"] == pytest.approx(50 * (1 + ssim), rel=1e-4)
    assert figures["codes used"] == 2 and figures["perplexity"] == 2
    assert figures["codebook use, %"] == pytest.approx(100 / 32)
    assert figures["rFID"] == pytest.approx(75, rel=1e-4)


@pytest.mark.slow
def test_a_folder_that_changed(evaluation, tmp_path):
    """What is there stays with its image when others come or one changes; another folder is refused."""
    images = tmp_path / "images"
    settings = ["reconstruction_fid=false", "batch_size=1", f"reconstruction_images={images}"]
    save_image(images / "b.png", 40)
    save_image(images / "c.png", 200)
    found = evaluation.run("reconstruction", *settings)["reconstruction"]["figures"]
    assert "rFID" not in found and 1 <= found["codes used"]["value"] <= 32
    files = list((evaluation.folder / "reconstruction/images").glob("*.npy"))
    assert len(files) == 2 and np.load(files[0]).shape == (16,)
    save_image(images / "a.png", 120)
    save_image(images / "c.png", noise(3))
    grown = evaluation.run("reconstruction", *settings)["reconstruction"]["figures"]
    asked = evaluation.lines("reconstruction/answers-000.jsonl")[2:]
    assert [line["image"] for line in asked] == ["a.png", "c.png"]
    assert grown == evaluation.inside("anew").run("reconstruction", *settings)["reconstruction"]["figures"]
    save_image(tmp_path / "other/b.png", 41)
    settings[-1] = f"reconstruction_images={tmp_path / 'other'}"
    evaluation.refuses("reconstruction_images=.*images, now it is .*other", "reconstruction", *settings)
