"""Shards as raw samples: whole ones, broken ones, and what their manifests say."""

import gzip
import io
import json
import random
import tarfile
from collections import Counter
from itertools import islice

import pytest

from common.errors import UserError
from tests.training.tiny import CAPTIONS, sample, write_shard
from training.data.shards import ShardUnits, check_codes, manifests, promised_samples, read_shard, read_shards
from training.data.skipping import Skipped

SAMPLES = [sample(text) for text in CAPTIONS[:4]]


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "train-000000.tar", SAMPLES)


def keys(samples) -> list[str]:
    return [raw["__key__"] for raw in samples if not isinstance(raw, Skipped)]


def skipped(samples) -> list[str]:
    return [raw.kind for raw in samples if isinstance(raw, Skipped)]


def member(path, index: int, suffix: str) -> int:
    """Place of a member's header in a shard."""
    return path.read_bytes().index(f"{path.stem}-{index:03d}.{suffix}".encode())


def test_shards_are_drawn_endlessly_in_an_order_of_the_seed(tmp_path):
    urls = [
        str(write_shard(tmp_path / f"{name}.tar", [sample(text) for text in CAPTIONS[i::2]]))
        for i, name in enumerate("ab")
    ]

    def drawn(seed, buffer_size=4):
        return keys(islice(read_shards(urls, buffer_size, {}, seed), 60))

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == len(CAPTIONS)
    unmixed = drawn(1, buffer_size=0)
    runs = [unmixed[i : i + 6] for i in range(0, 60, 6)]  # six samples in each shard
    assert all(run == sorted(run) for run in runs)
    assert drawn(1) != unmixed


def test_a_whole_shard_gives_its_samples_undecoded(shard):
    read = list(read_shard(str(shard)))
    assert keys(read) == [f"train-000000-{i:03d}" for i in range(4)]
    assert read[0]["png"] == SAMPLES[0]["png"] and read[0]["txt"] == SAMPLES[0]["txt"]
    assert {raw["__url__"] for raw in read} == {str(shard)}


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.gz"])
def test_compressed_shards_are_read(tmp_path, shard, name):
    (tmp_path / name).write_bytes(gzip.compress(shard.read_bytes()))
    assert keys(read_shard(str(tmp_path / name))) == keys(read_shard(str(shard)))
    (tmp_path / name).write_bytes(gzip.compress(shard.read_bytes())[:-400])
    assert skipped(read_shard(str(tmp_path / name))) == ["truncated_shard"]


def test_shards_come_through_a_pipe(shard):
    assert keys(read_shard(f"pipe:cat {shard}")) == keys(read_shard(str(shard)))
    assert skipped(read_shard("pipe:cat /nowhere.tar 2>/dev/null")) == ["truncated_shard"]


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "before a member", "before the end mark"])
def test_a_half_written_shard_gives_its_whole_samples_and_counts_once(shard, cut):
    places = {
        "in a picture": member(shard, 2, "png") + 600,
        "in a header": member(shard, 2, "png") + 100,
        "before a member": member(shard, 2, "png"),
        "before the end mark": member(shard, 3, "txt") + 1024,
    }
    whole = 4 if cut == "before the end mark" else 2
    shard.write_bytes(shard.read_bytes()[: places[cut]])
    read = list(read_shard(str(shard)))
    assert keys(read) == [f"train-000000-{i:03d}" for i in range(whole)]
    assert skipped(read) == ["truncated_shard"] and str(shard) in read[-1].detail


def test_a_sample_that_is_cut_in_two_comes_with_what_it_has(shard):
    shard.write_bytes(shard.read_bytes()[: member(shard, 1, "txt") + 100])
    read = list(read_shard(str(shard)))
    assert keys(read) == ["train-000000-000", "train-000000-001"]
    assert "txt" not in read[1] and skipped(read) == ["truncated_shard"]


def test_a_damaged_header_is_not_taken_for_the_end(shard):
    data = bytearray(shard.read_bytes())
    data[member(shard, 1, "png") : member(shard, 1, "png") + 3] = b"\xff\xff\xff"
    shard.write_bytes(bytes(data))
    read = list(read_shard(str(shard)))
    assert keys(read) == ["train-000000-000"] and skipped(read) == ["truncated_shard"]


@pytest.mark.parametrize("content", [b"", b"\x00" * 300, random.Random(0).randbytes(4096), b"<html>no shard</html>"])
def test_what_is_no_shard_counts_once(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    assert [raw.kind for raw in read_shard(str(tmp_path / "a.tar"))] == ["truncated_shard"]


def test_a_shard_that_has_gone_counts_once(tmp_path):
    assert list(read_shard(str(tmp_path / "gone.tar"))) == [Skipped("missing_file", str(tmp_path / "gone.tar"))]


def test_two_members_of_one_name_keep_the_first(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("x.txt", b"first"), ("x.txt", b"second"), ("y.txt", b"third")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    read = list(read_shard(str(tmp_path / "a.tar")))
    assert [raw["txt"] for raw in read[:2]] == [b"first", b"third"] and skipped(read) == ["malformed_item"]


def test_broken_shards_do_not_stop_the_whole_ones(tmp_path, shard):
    (tmp_path / "noise.tar").write_bytes(b"noise" * 300)
    urls = [str(shard), str(tmp_path / "noise.tar"), str(tmp_path / "gone.tar")]
    read = list(islice(read_shards(urls, 3, {}, 5), 200))
    assert set(keys(read)) == {f"train-000000-{i:03d}" for i in range(4)}
    counts = Counter(skipped(read))
    assert counts.keys() == {"truncated_shard", "missing_file"} and min(counts.values()) > 10


def losses(samples) -> list[int]:
    return [raw.count for raw in samples if isinstance(raw, Skipped)]


def test_what_a_damaged_shard_has_lost_is_what_its_manifest_promises_beyond_what_was_read(tmp_path, shard):
    urls = write_manifest(shard, shards=[{"file": shard.name, "samples": 4}, {"other": "tool"}])
    promised = promised_samples(urls)
    assert promised == {str(shard): 4}
    assert losses(read_shard(str(shard), 4)) == []
    shard.write_bytes(shard.read_bytes()[: member(shard, 1, "png") + 600])
    assert losses(read_shard(str(shard), promised[str(shard)])) == [3]
    assert losses(read_shard(str(shard))) == [1], "nothing is known of it"
    assert losses(islice(read_shards(urls, 0, promised, 5), 4)) == [3, 3]
    assert losses(ShardUnits(urls, promised).read(0, random.Random(0))) == [3]


def test_without_a_manifest_a_damaged_shard_should_have_held_what_whole_ones_held(tmp_path):
    for index in range(6):
        write_shard(tmp_path / f"{index}.tar", [sample(text) for text in CAPTIONS])
    cut, gone = tmp_path / "0.tar", tmp_path / "1.tar"
    cut.write_bytes(cut.read_bytes()[: member(cut, 2, "png") + 600])
    gone.unlink()
    urls = [str(tmp_path / f"{index}.tar") for index in range(6)]
    read = list(islice(read_shards(urls, 0, {}, 3), 600))
    first_whole = next(i for i, raw in enumerate(read) if not isinstance(raw, Skipped) and raw["__url__"] > str(gone))
    found = {(raw.kind, raw.count) for raw in read[first_whole:] if isinstance(raw, Skipped)}
    assert found == {("truncated_shard", 10), ("missing_file", 12)}


def test_held_out_shards_come_in_order(tmp_path, shard):
    other = write_shard(tmp_path / "b.tar", SAMPLES[:2])
    units = ShardUnits([str(shard), str(other)], {})
    assert len(units) == 2 and units.samples is None
    assert keys(units.read(1, random.Random(0))) == ["b-000", "b-001"]


# ---- manifests ----


EXPECTED = {"resolution": 32, "num_vq_tokens": 16, "codebook_size": 64}


def write_manifest(shard, **content):
    (shard.parent / "train-manifest.json").write_text(json.dumps({"shards": [], "samples": 4} | content))
    return [str(shard)]


def test_manifests_lie_beside_their_shards(shard):
    assert manifests([str(shard)]) == {}
    urls = write_manifest(shard)
    assert list(manifests([*urls, *urls])) == [str(shard.parent / "train-manifest.json")]
    (shard.parent / "train-manifest.json").write_text("{")
    with pytest.raises(UserError, match="train-manifest.json is no valid manifest"):
        manifests(urls)


def test_codes_for_another_model_are_refused(shard):
    check_codes(write_manifest(shard), EXPECTED, refused="no codes here")  # these hold pictures
    check_codes(write_manifest(shard, **EXPECTED), EXPECTED)
    with pytest.raises(UserError, match=r"made for resolution 64, here 32; num_vq_tokens 64, here 16; encode"):
        check_codes(write_manifest(shard, resolution=64, num_vq_tokens=64, codebook_size=64), EXPECTED)
    with pytest.raises(UserError, match="hold codes; codes cannot be mirrored"):
        check_codes(write_manifest(shard, **EXPECTED), EXPECTED, refused="codes cannot be mirrored")
    check_codes(write_manifest(shard, keep_images=True, **EXPECTED), EXPECTED, refused="codes cannot be mirrored")
