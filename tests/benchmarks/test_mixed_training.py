"""What a step of documents costs: the same images and texts in all ways, and each way with its rows."""

import pytest

from benchmarks import mixed_training
from benchmarks.mixed_training import FLOWS, KINDS, make_builder, make_samples, measure, parse

SMALL = ["--hidden=32", "--layers=1", "--heads=2", "--tokens=16", "--words=4", "--images=2", "--steps=1"]


def test_all_ways_have_the_same_images_and_texts():
    args = parse(SMALL)
    builder, config = make_builder(KINDS[0], args)
    flows, mixed = (make_samples(k, args, builder.prompting.tokenizer, config.codebook_size) for k in (FLOWS, "mixed"))
    segments = [segment for one in mixed["mixed"] for segment in one["segments"]]
    texts = [segment["text"] for segment in segments if "text" in segment]
    codes = [segment["codes"].tolist() for segment in segments if "codes" in segment]
    assert len(texts) == len(codes) == 4 and texts == flows["lm"] == [one["text"] for one in flows["t2i"]]
    assert codes == [one["codes"].tolist() for one in flows["t2i"]] == [one["codes"].tolist() for one in flows["mmu"]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_takes_its_step(kind, monkeypatch):
    """The clean history has each learned image twice, but the last; packed rows are nearly full."""
    monkeypatch.setattr(mixed_training.report, "peak_memory", lambda device: 1.0)
    found = measure(kind, parse(SMALL))
    assert all(
        loss > 0 for name, loss in found["losses"].items() if (name in ("mixed", "mixed_text")) != (FLOWS in kind)
    )
    assert found["used"] <= found["positions"] and (kind != FLOWS or found["used"] < found["positions"])
    if "mixed" in kind:
        images = 2 * 2 + (2 if "clean" in kind else 0)
        assert images * 18 < found["used"] < images * 18 + 2 * (3 + 2 * 8)
