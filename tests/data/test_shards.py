"""Shards as raw samples: whole ones, broken ones, and what their manifests say."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import tarfile
from itertools import islice

import pytest

from common.errors import UserError
from tests.training.tiny import CAPTIONS, sample, write_shard
from training.data.image_text import Captions, ImageTextSample, ImageTransform
from training.data.shards import ShardUnits, check_codes, manifests, promised_samples, read_shard, read_shards
from training.data.sources import Skipped

SAMPLES = [sample(text) for text in CAPTIONS[:4]]
KEYS = [f"train-000000-{i:03d}" for i in range(4)]


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "train-000000.tar", SAMPLES)


def read(path, expected: int = 0) -> tuple[list[str], list[tuple[str, int]]]:
    """Keys of the samples; kinds and numbers of the lost ones."""
    raws = list(read_shard(str(path), expected))
    return keys(raws), lost(raws)


def keys(raws) -> list[str]:
    return [raw["__key__"] for raw in raws if not isinstance(raw, Skipped)]


def lost(raws) -> list[tuple[str, int]]:
    return [(raw.kind, raw.count) for raw in raws if isinstance(raw, Skipped)]


def write_tar(path, *members: tuple[str, bytes | None], **settings):
    """An archive of any members, folders being those without content."""
    with tarfile.open(path, "w", **settings) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if content is None else (tarfile.REGTYPE, len(content))
            archive.addfile(info, io.BytesIO(content or b""))
    return str(path)


def member(path, index: int, suffix: str) -> int:
    """Place of a member's header in a shard."""
    return path.read_bytes().index(f"{path.stem}-{index:03d}.{suffix}".encode())


def cut(path, index: int, suffix: str, further: int) -> None:
    """Cuts a shard `further` bytes into a member."""
    path.write_bytes(path.read_bytes()[: member(path, index, suffix) + further])


def test_shards_are_drawn_endlessly_in_an_order_of_the_seed(tmp_path):
    urls = [str(write_shard(tmp_path / f"{i}.tar", [sample(text) for text in CAPTIONS[i::2]])) for i in range(2)]

    def drawn(seed, buffer_size=4):
        return keys(islice(read_shards(urls, buffer_size, {}, seed), 60))

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == len(CAPTIONS)
    unmixed = drawn(1, buffer_size=0)
    runs = [unmixed[i : i + 6] for i in range(0, 60, 6)]  # six samples in each shard
    assert all(run == sorted(run) for run in runs) and drawn(1) != unmixed


def test_a_whole_shard_gives_its_samples_undecoded(tmp_path, shard):
    raws = list(read_shard(str(shard)))
    assert keys(raws) == KEYS and {raw["__url__"] for raw in raws} == {str(shard)}
    assert raws[0]["png"] == SAMPLES[0]["png"] and raws[0]["txt"] == SAMPLES[0]["txt"]
    other = write_shard(tmp_path / "b.tar", SAMPLES[:2])
    units = ShardUnits([str(shard), str(other)], {})
    assert len(units) == 2 and units.samples is None
    assert keys(units.read(1, random.Random(0))) == ["b-000", "b-001"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_are_read_whatever_wrote_the_archive(tmp_path, form):
    names = ["sub/short.txt", f"{'d' * 90}/{'ä' if form != tarfile.USTAR_FORMAT else 'a'}{'n' * 70}.txt"]
    names += [] if form == tarfile.USTAR_FORMAT else [f"{'n' * 300}.txt"]
    members = [("sub", None), *((name, name.encode()) for name in names)]
    raws = list(read_shard(write_tar(tmp_path / "a.tar", *members, format=form, pax_headers={"comment": "of all"})))
    assert [raw["__key__"] + ".txt" for raw in raws] == [raw["txt"].decode() for raw in raws] == names


def test_two_members_of_one_name_keep_the_first(tmp_path):
    path = write_tar(tmp_path / "a.tar", ("x.txt", b"first"), ("x.txt", b"second"), ("y.txt", b"third"))
    *raws, bad = read_shard(path)
    assert [raw["txt"] for raw in raws] == [b"first", b"third"] and bad.kind == "malformed_item"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_shards_are_read_compressed_and_through_pipes(tmp_path, shard, pack):
    packed = pack(shard.read_bytes())
    for name in ("a.tgz", "a.tar.gz"):
        (tmp_path / name).write_bytes(packed)
        assert read(tmp_path / name) == (KEYS, []) == read(f"pipe:cat {tmp_path}/{name}")
    (tmp_path / "a.tgz").write_bytes(packed[: len(packed) // 2])
    assert read(tmp_path / "a.tgz")[1] == [("truncated_shard", 1)]
    assert read("pipe:cat /nowhere.tar 2>/dev/null")[1] == [("truncated_shard", 1)]


@pytest.mark.parametrize(
    ("index", "suffix", "further", "whole"),
    [
        (2, "png", 600, 2),  # in an image
        (2, "png", 100, 2),  # in a header
        (2, "png", 0, 2),  # before a member
        (3, "txt", 1024, 4),  # before the end mark
        (1, "txt", 100, 2),  # in two: the sample comes without its text
    ],
)
def test_a_half_written_shard_gives_its_whole_samples_and_counts_once(shard, index, suffix, further, whole):
    cut(shard, index, suffix, further)
    *raws, lost = read_shard(str(shard))
    assert keys(raws) == KEYS[:whole] and ("txt" in raws[-1]) == (suffix == "png" or whole == 4)
    assert lost.kind == "truncated_shard" and str(shard) in lost.detail and lost.count == 1


@pytest.mark.parametrize("place", [0, 124, 148])  # name, size, checksum
def test_a_damaged_header_is_not_taken_for_the_end(shard, place):
    data, start = bytearray(shard.read_bytes()), member(shard, 1, "png") + place
    data[start : start + 3] = b"\xff\xff\xff"
    shard.write_bytes(bytes(data))
    assert read(shard) == (KEYS[:1], [("truncated_shard", 1)])


@pytest.mark.parametrize("content", [b"", b"\x00" * 300, random.Random(0).randbytes(4096), b"<html>no shard</html>"])
def test_what_is_no_shard_counts_once(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    assert read(tmp_path / "a.tar") == ([], [("truncated_shard", 1)])
    (gone,) = read_shard(str(tmp_path / "gone.tar"))
    assert (gone.kind, gone.detail, gone.count) == ("missing_file", str(tmp_path / "gone.tar"), 1)
    os.mkfifo(tmp_path / "pipe.tar")
    assert read(tmp_path / "pipe.tar") == ([], [("truncated_shard", 1)])


def test_hidden_members_are_passed_over(tmp_path):
    """tar on macOS puts a file ``._NAME`` before each."""
    names = [
        f"{folder}/{index:04d}.{suffix}"
        for folder in ("data", "./a")
        for index in range(2)
        for suffix in ("png", "TXT")
    ]
    members = [one for name in names for one in ((name.replace("/0", "/._0"), b"mac"), (name, name.encode()))]
    members += [
        ("__MACOSX/data/0.png", b"mac"),
        (".cache/0.png", b"x"),
        ("x.partial/0.png", b"x"),
        ("data/.x/0.png", b""),
    ]
    raws = list(read_shard(write_tar(tmp_path / "a.tar", *members)))
    assert keys(raws) == ["data/0000", "data/0001", "./a/0000", "./a/0001"]
    assert all(raw.keys() == {"__key__", "__url__", "png", "txt"} for raw in raws)


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A header that promises any size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(text: bytes) -> bytes:
    return header("p", len(text), b"x") + text + bytes(-len(text) % 512)


LINK = header("b.txt", 1) + b"y".ljust(512, b"\0")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("a.txt", 10**18) + LINK, "a member of 1,000,000,000,000,000,000 bytes; at most 1,073,741,824 are read"),
        (header("a.txt", 2**30) + LINK, "cut short"),
        (pax(b"20 size=99999999999\n") + LINK, "a member of 99,999,999,999 bytes"),
        (pax(b"12 size=-51\n") + LINK, "a member of -51 bytes"),
        (pax(b"0 " * 1000) + LINK, "damaged header"),
        (pax(b"99999999999 a=b\n") + LINK, "damaged header"),
        (header("p", 2**21, b"x") + bytes(2**21), "a member of 2,097,152 bytes; at most 1,048,576 are read"),
        (header("p", 2**40, b"L") + LINK, "a member of 1,099,511,627,776 bytes"),
    ],
)
def test_what_a_header_promises_is_not_taken_on_trust(tmp_path, content, message, pack):
    (tmp_path / "a.tar").write_bytes(pack(content))
    *raws, lost = read_shard(str(tmp_path / "a.tar"))
    assert not raws and lost.kind == "truncated_shard" and message in lost.detail


def test_shards_without_a_sample_are_an_error_not_an_endless_loop(tmp_path):
    urls = [
        write_tar(tmp_path / f"{index}.tar", *members) for index, members in enumerate([(), [("._a.txt", b"x")]] * 3)
    ]
    with pytest.raises(UserError, match="there is not a single sample in 6 shards"):
        next(read_shards(urls, 100, {}, 0))
    urls.append(str(write_shard(tmp_path / "good.tar", SAMPLES)))
    assert len(list(islice(read_shards(urls, 0, {}, 0), 20))) == 20


def test_nothing_in_a_shard_is_executed(tmp_path):
    class Pickled:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    content = pickle.dumps(Pickled())
    names = [
        f"a.{suffix}"
        for suffix in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "codes.npy", "json", "txt", "png")
    ]
    (raw,) = read_shard(write_tar(tmp_path / "a.tar", *((name, content) for name in names)))
    images = ImageTransform(32, 16, 64)
    for call in (images.of, Captions(), ImageTextSample(images, Captions())):
        with pytest.raises(Skipped):
            call(raw, random.Random(0))
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_has_lost_what_its_manifest_promises_beyond_what_was_read(shard):
    urls = write_manifest(shard, shards=[{"file": shard.name, "samples": 4}, {"other": "tool"}])
    promised = promised_samples(urls)
    assert promised == {str(shard): 4} and read(shard, 4) == (KEYS, [])
    cut(shard, 1, "png", 600)
    for raws in (islice(read_shards(urls, 0, promised, 5), 2), ShardUnits(urls, promised).read(0, random.Random(0))):
        assert lost(raws) == [("truncated_shard", 3)]


def test_without_a_manifest_a_damaged_shard_should_have_held_what_whole_ones_held(tmp_path):
    files = [write_shard(tmp_path / f"{index}.tar", [sample(text) for text in CAPTIONS]) for index in range(6)]
    cut(files[0], 2, "png", 600)
    files[1].unlink()
    raws = list(islice(read_shards(list(map(str, files)), 0, {}, 3), 600))
    whole = next(i for i, raw in enumerate(raws) if not isinstance(raw, Skipped) and raw["__url__"] > str(files[1]))
    assert set(lost(raws[whole:])) == {("truncated_shard", 10), ("missing_file", 12)}
    assert {raw["__url__"] for raw in raws if not isinstance(raw, Skipped)} == {str(f) for f in files if f != files[1]}


# ---- manifests ----


EXPECTED = {"resolution": 32, "num_vq_tokens": 16, "codebook_size": 64}


def write_manifest(shard, **content):
    (shard.parent / "train-manifest.json").write_text(json.dumps({"shards": [], "samples": 4} | content))
    return [str(shard)]


def test_manifests_are_beside_their_shards(shard):
    assert manifests([str(shard)]) == {}
    urls = write_manifest(shard)
    assert list(manifests([*urls, *urls])) == [str(shard.parent / "train-manifest.json")]
    (shard.parent / "train-manifest.json").write_text("{")
    for content in ("{", "[" * 50_000, "[]", "\0"):
        (shard.parent / "train-manifest.json").write_text(content)
        with pytest.raises(UserError, match="train-manifest.json (is no valid JSON|holds a list)"):
            manifests(urls)


def test_samples_that_a_manifest_promises_beyond_reason_are_not_counted(shard):
    entries = [{"file": shard.name, "samples": samples} for samples in (10**30, -1, "4", True, None)]
    assert promised_samples(write_manifest(shard, shards=[*entries, 7])).get(str(shard), 0) <= 1


def test_codes_for_another_model_are_refused(shard):
    flipped = "codes cannot be mirrored"
    check_codes(write_manifest(shard), EXPECTED, flipped)  # these hold images
    check_codes(write_manifest(shard, **EXPECTED), EXPECTED)
    check_codes(write_manifest(shard, keep_images=True, **EXPECTED), EXPECTED, flipped)
    with pytest.raises(UserError, match=f"hold codes; {flipped}"):
        check_codes(write_manifest(shard, **EXPECTED), EXPECTED, flipped)
    with pytest.raises(UserError, match=r"made for resolution 64, here 32; num_vq_tokens 64, here 16; encode"):
        check_codes(write_manifest(shard, resolution=64, num_vq_tokens=64, codebook_size=64), EXPECTED)
    for background, matches in (("white", True), (None, True), ("black", False)):  # of before there were such settings
        wanted = EXPECTED | {"exif": "ignore", "background": background}
        if matches:
            check_codes(write_manifest(shard, **EXPECTED), wanted)
            continue
        with pytest.raises(UserError, match="made for background None, here black"):
            check_codes(write_manifest(shard, **EXPECTED), wanted)
