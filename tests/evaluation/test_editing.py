"""Edits by instruction: figures by hand, every form of the triples, what is refused, a run of the tiny model."""

import io
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torchmetrics")

SIDE = 32  # of the tiny model


def image(left: int, right: int) -> Image.Image:
    """Two greys, half and half."""
    pixels = np.full((SIDE, SIDE, 3), left, np.uint8)
    pixels[:, SIDE // 2 :] = right
    return Image.fromarray(pixels)


@pytest.fixture
def triples(tmp_path):
    """A grey image whose right half becomes white."""
    image(100, 100).save(tmp_path / "before.png")
    image(100, 250).save(tmp_path / "after.png")
    (tmp_path / "mask.png").unlink(missing_ok=True)
    return tmp_path


def write(folder, **more) -> list[str]:
    record = {"before": "before.png", "instruction": "make the right white", "after": "after.png"} | more
    (folder / "edits.jsonl").write_text(json.dumps(record) + "\n")
    return [f"editing_triples={folder / 'edits.jsonl'}"]


def answered(evaluation, edited: Image.Image, restored: Image.Image, *settings: str) -> dict[str, float]:
    """Figures of images that a test chooses."""
    folder = evaluation.folder / "editing"
    for place, one in (("images", edited), ("reconstructions", restored)):
        (folder / place).mkdir(parents=True)
        one.save(folder / place / "00000.png")
    return evaluation.answer("editing", {"0: make the right white": "images/00000.png"}, *settings)


def decibel(difference: float) -> float:
    return 20 * np.log10(255 / difference)


def test_figures_by_hand(evaluation, triples):
    """The region is the right half and a column beside it."""
    found = answered(evaluation, image(110, 245), image(100, 250), *write(triples))
    assert found["PSNR outside"] == pytest.approx(decibel(10))
    assert found["PSNR inside"] == pytest.approx(decibel(np.sqrt((16 * 5**2 + 10**2) / 17)))
    assert found["PSNR outside: reconstruction"] == found["PSNR inside: reconstruction"] == 100
    assert found["SSIM outside x 100"] < 100 == pytest.approx(found["SSIM outside x 100: reconstruction"])
    assert found["CLIP-I x 100"] <= 100 and found["CLIP-I x 100: reconstruction"] == pytest.approx(100)


def test_an_edit_that_does_nothing_is_perfect_outside_only(evaluation, triples):
    found = answered(evaluation, image(100, 100), image(100, 250), *write(triples), "editing_clip=false")
    assert found["PSNR outside"] == 100 and found["PSNR inside"] == pytest.approx(decibel(150 * np.sqrt(16 / 17)))
    assert "CLIP-I x 100" not in found


def test_a_mask_says_what_changes(evaluation, triples):
    """White on the left: there the images agree, and all of the right half counts as outside."""
    image(255, 0).save(triples / "mask.png")
    given = write(triples, mask="mask.png")
    found = answered(evaluation, image(100, 130), image(100, 250), *given, "editing_clip=false")
    assert found["PSNR outside"] == pytest.approx(decibel(30)) and found["PSNR inside"] == 100


@pytest.mark.slow
def test_the_tiny_model_edits_triples_of_every_form(evaluation, triples):
    """A csv with other names, and a parquet file with the images in it, give the images that the jsonl gives."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pairs, instruction = [("before", "after"), ("after", "before")], "make the right white"
    lines = [{"before": f"{a}.png", "instruction": instruction, "after": f"{b}.png"} for a, b in pairs]
    (triples / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [f"{a}.png,{instruction},{b}.png\n" for a, b in pairs]
    (triples / "edits.csv").write_text("".join(["input_image,edit_prompt,edited_image\n", *rows]))
    columns = zip(("before", "after"), zip(*pairs, strict=True), strict=True)
    table = {key: [{"bytes": (triples / f"{name}.png").read_bytes()} for name in names] for key, names in columns}
    parquet.write_table(pyarrow.table(table | {"instruction": [instruction] * 2}), triples / "edits.parquet")
    made = []
    for suffix in ("jsonl", "csv", "parquet"):
        run = evaluation.inside(suffix)
        run.run("editing", f"editing_triples={triples / 'edits'}.{suffix}", "editing_clip=false")
        made.append((run.folder / "editing/images/00000.png").read_bytes())
        assert (run.folder / "editing/best_worst.png").is_file()
    assert made[0] == made[1] == made[2] and Image.open(io.BytesIO(made[0])).size == (SIDE, SIDE)


def test_refusals(evaluation, triples):
    evaluation.refuses("editing_triples is not given", "editing")
    evaluation.refuses("names gone.png", "editing", *write(triples, after="gone.png"))
    evaluation.refuses("editing needs images", "editing", *write(triples, after=[1, 2, 3]))
    record = {"segments": [{"image": "before.png", "loss": False}, {"text": "a"}]}
    (triples / "edits.jsonl").write_text(json.dumps(record))
    evaluation.refuses("no triple of an image, an instruction", "editing", f"editing_triples={triples / 'edits.jsonl'}")
