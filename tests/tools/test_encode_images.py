"""Shards of image codes: the codes that training would compute, whole shards, and no work done twice."""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from common.config import TrainingConfig
from common.errors import UserError
from common.files import REPOSITORY
from models.images import preprocess
from tests.tools.sets import read_set
from tests.training.tiny import (
    CAPTIONS,
    CODEBOOK_SIZE,
    NUM_TOKENS,
    RESOLUTION,
    image_bytes,
    make_vq_model,
    picture,
    sample,
    write_shard,
)
from tools.encode_images import ImageEncoder, main
from tools.encoding_records import Encoding, Plan
from training.batches import flow_readers
from training.data.flows import check_tokenizer
from training.data.image_text import ImageTransform
from training.data.shards import check_codes, read_shard

FITS = {"resolution": RESOLUTION, "num_vq_tokens": NUM_TOKENS, "codebook_size": CODEBOOK_SIZE}


@pytest.fixture
def world(tmp_path) -> Path:
    """Three shards of four images, one of them larger and not square, and a tokenizer."""
    make_vq_model().save_pretrained(tmp_path / "magvitv2")
    for index in range(3):
        samples = [sample(text) | {"json": b"{}"} for text in CAPTIONS[index::3]]
        large = image_bytes(picture(CAPTIONS[index]).resize((70, 50)), "JPEG")
        samples[1] = {"jpg": large, "txt": CAPTIONS[index].encode(), "json": b"{}"}
        write_shard(tmp_path / f"in-{index:06d}.tar", samples)
    return tmp_path


def encode(world: Path, **settings) -> None:
    main(arguments(world, **settings))


def arguments(world: Path, **settings) -> list[str]:
    values = {"shards": world / "in-{000000..000002}.tar", "output": world / "out" / "codes", "device": "cpu"}
    values |= {"vq_model_name": world / "magvitv2", "resolution": RESOLUTION, "num_workers": 2} | settings
    return [f"{key}={value}" for key, value in values.items()]


def run(world: Path, **settings) -> tuple[list[dict], dict]:
    encode(world, **settings)
    return read_set(world / "out" / "codes")


def codes_of(raw: dict) -> np.ndarray:
    return np.load(io.BytesIO(raw["codes.npy"]))


def sources(world: Path) -> list[dict]:
    return [raw for index in range(3) for raw in read_shard(str(world / f"in-{index:06d}.tar"))]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_codes_are_those_of_each_image_by_itself(world, batch_size):
    samples, manifest = run(world, batch_size=batch_size)
    vq_model, kept = make_vq_model(), ("txt", "json", "__key__")
    for raw, source in zip(samples, sources(world), strict=True):
        pixels = preprocess(Image.open(io.BytesIO(source.get("png") or source["jpg"])), RESOLUTION)
        assert codes_of(raw).dtype == np.uint16
        assert codes_of(raw).tolist() == vq_model.get_code(pixels[None])[0].tolist()
        assert [raw[key] for key in kept] == [source[key] for key in kept] and not {"png", "jpg"} & raw.keys()
    assert (FITS | {"skipped": {}}).items() <= manifest.items() and manifest["tokenizer"] == str(world / "magvitv2")
    # The flows take them, unless their manifest contradicts the run.
    check_codes([str(path) for path in (world / "out").glob("*.tar")], FITS)
    item = ImageTransform(RESOLUTION, NUM_TOKENS, CODEBOOK_SIZE).of(samples[0], None)
    assert item["codes"].tolist() == codes_of(samples[0]).tolist()


def test_a_latent_near_zero_gets_the_sign_that_it_has_alone():
    """A sum in another order may flip it: such images are encoded once more by themselves."""
    vq_model, pixels, calls = make_vq_model(), torch.rand(6, 3, RESOLUTION, RESOLUTION) * 2 - 1, []
    with torch.no_grad():
        latents = vq_model.encode(pixels[:1])
        vq_model.encoder.quant_conv.bias -= latents[0, :, 1, 2]  # now 0 but for rounding
    alone = torch.cat([vq_model.get_code(one[None]) for one in pixels])
    vq_model.encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    assert ImageEncoder(vq_model)(pixels).tolist() == alone.tolist()
    assert calls[0] == 6 and set(calls[1:]) == {1} and len(calls) < 6  # a few, not all


def test_images_can_stay_beside_their_codes(world):
    samples, manifest = run(world, keep_images=True)
    images = [[raw.get("png") or raw["jpg"] for raw in raws] for raws in (samples, sources(world))]
    assert images[0] == images[1] and manifest["keep_images"]
    # What holds codes already gets new ones.
    encode(world, shards=world / "out" / "codes-*.tar", output=world / "again" / "codes", resolution=16)
    raw = next(read_shard(str(world / "again" / "codes-000000.tar")))
    assert codes_of(raw).shape == (4,) and "png" not in raw


def test_bad_data_is_left_out_counted_and_told(world, capsys):
    good = sample(CAPTIONS[0])
    write_shard(world / "in-000001.tar", [good, good | {"png": good["png"][:-40]}, {"txt": b"no image"}, good])
    shard = world / "in-000002.tar"
    shard.write_bytes(shard.read_bytes()[: 512 * 9])
    samples, manifest = run(world)
    assert manifest["skipped"] == {"unreadable_image": 1, "malformed_item": 1, "truncated_shard": 1}
    whole, damaged, cut = (entry["samples"] for entry in manifest["shards"])
    assert (whole, damaged) == (4, 2) and 1 <= cut < 4 and all("codes.npy" in raw for raw in samples)
    told = capsys.readouterr().out
    assert "skipped 3 of" in told and "1 unreadable_image (such as image in-000001-001" in told
    write_shard(world / "bad-000000.tar", [{"png": b"x", "txt": b"y"}])
    with pytest.raises(UserError, match="not one image in .* can be read"):
        encode(world, shards=world / "bad-000000.tar", output=world / "bad" / "codes")
    assert not list((world / "bad").iterdir())


# ---- no work twice ----


def times(world: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted((world / "out").glob("*.tar"))]


def test_finished_shards_are_not_made_again(world, capsys):
    _, manifest = run(world)
    before = times(world)
    assert run(world)[1] == manifest and times(world) == before
    (world / "out" / "codes-000001.tar").write_bytes(b"damaged")
    assert run(world)[1] == manifest
    assert [new == old for new, old in zip(times(world), before, strict=True)] == [True, False, True]
    write_shard(world / "in-000003.tar", [sample(CAPTIONS[0])])  # the data set has grown
    before = times(world)
    assert run(world, shards=world / "in-*.tar")[1]["samples"] == 13
    assert times(world)[:3] == before
    assert "13 samples in 4 shards" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_killed_continues_where_it_stopped(world):
    for index in range(3):
        write_shard(world / f"in-{index:06d}.tar", [sample(text) for text in CAPTIONS * 40])
    out, command = world / "out", [sys.executable, "tools/encode_images.py", *arguments(world, batch_size=2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, env=environment) as process:
        while not (out / ".codes.parts" / "000000.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (out / "codes-manifest.json").exists()
    assert all(list(read_shard(str(path))) for path in out.glob("*.tar"))  # whole, each of them
    before = times(world)[0]
    samples, _ = run(world, batch_size=2)
    assert len(samples) == 3 * 480 and all("codes.npy" in raw for raw in samples)
    assert times(world)[0] == before


def test_the_last_of_several_processes_writes_the_manifest(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    encode(world)
    assert [path.name for path in (world / "out").glob("codes-*")] == ["codes-000001.tar"]
    monkeypatch.setenv("RANK", "0")
    assert len(run(world)[0]) == 12


def test_records_that_are_none_are_named_and_other_files_passed_over(tmp_path):
    encoding = Encoding("vq", "0", 32, 16, 64, False)
    plan = Plan(["a.tar"], tmp_path / "codes", encoding)
    plan.parts.mkdir()
    (plan.parts / "0a.json").write_text("{}")
    assert plan.records() == {}
    (plan.parts / "000000.json").write_text(json.dumps(asdict(encoding) | {"file": "x", "samples": 1, "sha256": ""}))
    with pytest.raises(UserError, match="field 'source' is missing"):
        plan.records()


@pytest.mark.slow
def test_other_codes_are_not_overwritten_unless_told(world):
    run(world)
    for index in range(3):
        write_shard(world / f"other-{index:06d}.tar", [sample(CAPTIONS[index])])
    make_vq_model(code_bits=7).save_pretrained(world / "other")  # another tokenizer
    for settings, message in (
        ({"resolution": 16}, r"shards are there already \(resolution=32, num_vq_tokens=16\); choose another"),
        ({"shards": world / "other-*.tar"}, "000.tar was made from another in-000000.tar than .*other-000000.tar"),
        ({"shards": world / "in-000000.tar"}, "of more sources than these"),
        ({"vq_model_name": world / "other"}, "codebook_size=64"),
    ):
        with pytest.raises(UserError, match=message):
            encode(world, **settings)
    for shards, count, files in (("other-*.tar", 3, 3), ("in-000000.tar", 4, 1)):  # the surplus shards are gone
        samples, manifest = run(world, shards=world / shards, vq_model_name=world / "other", overwrite=True)
        assert (len(samples), len(manifest["shards"]), manifest["codebook_size"]) == (count, files, 128)
    (world / "out" / "codes-manifest.json").unlink()
    with pytest.raises(UserError, match="other shards are there already; choose another output"):
        encode(world)


def test_shards_of_somebody_else_are_not_replaced(world):
    run(world)
    (world / "out" / "codes-000009.tar").write_bytes(b"theirs")
    for settings in ({}, {"resolution": 16, "overwrite": True}, {"shards": world / "in-000000.tar", "overwrite": True}):
        with pytest.raises(UserError, match="other shards are there already; .* no manifest lists .*codes-000009.tar"):
            encode(world, **settings)
    assert (world / "out" / "codes-000009.tar").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": "no-*.tar"}, "shards: 1 of 1 files do not exist"),
        ({"shards": "pipe:cat x.tar"}, "is not a file; download the shards first"),
        ({"output": "in"}, "would replace the very shards that are read"),
        ({"output": "out/"}, "is a folder; add how"),
        ({"vq_model_name": "none"}, "does not exist"),
        ({"resolution": 33}, "resolution=33 must be a multiple of 8"),
        ({"resolution": 0, "batch_size": 0}, "resolution is 0; .*batch_size is 0"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"device": "mars"}, "device=mars cannot be used"),
        ({"batchsize": 3}, "unknown key batchsize; the nearest known key is batch_size"),
    ],
)
def test_mistakes_are_named(world, monkeypatch, settings, message):
    monkeypatch.chdir(world)
    with pytest.raises(UserError, match=message):
        encode(world, **settings)


def test_a_run_refuses_codes_of_another_tokenizer(world):
    """The trainer compares the manifest's checksum with its own image tokenizer."""
    run(world)
    config = OmegaConf.structured(TrainingConfig)
    config.training.update({"batch_size_t2i": 1, "batch_size_lm": 0, "batch_size_mmu": 0})
    config.dataset.params.train_t2i_shards_path_or_url = str(world / "out" / "codes-000000.tar")
    vq_model, readers = make_vq_model(), flow_readers(config, "train")
    check_tokenizer(readers, vq_model)
    with torch.no_grad():
        next(vq_model.encoder.parameters()).add_(0.01)
    with pytest.raises(UserError, match="made with another image tokenizer than model.vq_model names"):
        check_tokenizer(readers, vq_model)
