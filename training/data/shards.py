"""WebDataset shards as raw samples, and the manifests beside them (spec §15).

A raw sample is a dictionary: ``__key__``, ``__url__``, and the undecoded members by suffix (``jpg``, ``txt``, …).
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
import webdataset
from webdataset.tariterators import group_by_keys

from common.errors import UserError
from common.files import is_hidden, read_json
from models.images import DEFAULT, ImageOptions
from training.data.paths import is_address
from training.data.sources import MALFORMED_ITEM, MISSING_FILE, TRUNCATED_SHARD, Skipped, mixed

CODES = "codes.npy"
BLOCK = 512
END = bytes(BLOCK)
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by magic number
LARGEST = 2**30  # bytes of a member; what a header promises is never allocated on trust
LARGEST_HEADER = 2**20  # of members that describe others
PIECE = 2**24  # bytes read at once
REGULAR, LONG_NAME, PAX, PAX_GLOBAL, SPARSE = (b"0", b"\0", b"7"), b"L", b"x", b"g", b"S"


def read_shards(urls: list[str], buffer_size: int, promised: dict[str, int], seed: int) -> Iterator[dict | Skipped]:
    """Samples of shards that are sampled with replacement, shuffled in a buffer; endless.

    Args:
        promised: number of samples of the shards whose manifest tells; for others, the mean of the intact shards read
            so far is assumed.

    Raises:
        UserError: every shard was read, and none of them holds a sample.
    """
    shards = webdataset.ResampledShards(urls, seed=seed, worker_seed=lambda: 0, deterministic=True)
    return mixed(_in_turn((shard["url"] for shard in shards), set(urls), promised), buffer_size, random.Random(seed))


def _in_turn(drawn: Iterable[str], urls: set[str], promised: dict[str, int]) -> Iterator[dict | Skipped]:
    whole: list[int] = [0, 0]  # shards, samples
    empty: set[str] = set()
    for url in drawn:
        mean = round(whole[1] / whole[0]) if whole[0] else 0
        read, is_whole = 0, True
        for sample in read_shard(url, promised.get(url, mean)):
            if isinstance(sample, Skipped):
                is_whole &= sample.kind == MALFORMED_ITEM
            read += 1
            yield sample
        if is_whole:
            whole = [whole[0] + 1, whole[1] + read]
        if not read:
            empty.add(url)
            if empty == urls:
                raise UserError(f"there is not a single sample in {len(urls)} shards (such as {url})")


def read_shard(url: str, expected: int = 0) -> Iterator[dict | Skipped]:
    """The samples of one shard in order, then one `Skipped` if it could not be read to its end.

    A sample that is cut off comes with the members read so far.

    Args:
        expected: number of samples it should have, to count lost ones; 0 if unknown.
    """
    problems: list[Skipped] = []
    read = 0

    def note(error: Exception) -> bool:
        problems.append(Skipped(MALFORMED_ITEM, f"{url}: {error.args[0]}"))
        return True  # the first of two members with one name is kept

    for sample in group_by_keys(_members(url, problems), handler=note):
        yield sample
        read += 1
    for problem in problems:
        lost = 1 if problem.kind == MALFORMED_ITEM else max(1, expected - read)
        yield Skipped(problem.kind, problem.detail, lost)


def _members(url: str, problems: list[Skipped]) -> Iterator[dict]:
    """Names and contents. webdataset's own reader ends at a damaged header as if the archive ended there."""
    stream = None
    try:
        if not is_address(url) and not stat.S_ISREG(os.stat(url).st_mode):
            raise OSError("it is no regular file")  # a pipe, at which a run would wait
        stream = io.BufferedReader(_Raw(webdataset.gopen(url))) if is_address(url) else open(url, "rb", 2**20)
        head = stream.peek(8)
        unpack = next((of_form for magic, of_form in COMPRESSED.items() if head.startswith(magic)), None)
        for name, content in tar_members(unpack(stream) if unpack else stream):
            if not any(map(is_hidden, name.split("/"))) and not re.match(r"__[^/]*__($|/)", name):
                yield {"fname": name, "data": content, "__url__": url}
    except FileNotFoundError:
        problems.append(Skipped(MISSING_FILE, url))
    except Exception as error:  # tar, gzip and the file system each raise their own
        problems.append(Skipped(TRUNCATED_SHARD, f"{url}: {error}"))
    finally:
        if stream is not None:
            with suppress(OSError):  # of a pipe that was not read to its end
                stream.close()


class _Raw(io.RawIOBase):
    """What webdataset opens, which can only be read, for a buffer around it."""

    def __init__(self, stream):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        super().close()
        self.stream.close()


class ShardUnits:
    """Shards that are read once per epoch, in order; for held-out data."""

    samples = None

    def __init__(self, urls: list[str], promised: dict[str, int]):
        self.urls, self.promised = urls, promised

    def __len__(self) -> int:
        return len(self.urls)

    def read(self, index: int, rng: random.Random) -> Iterator[dict | Skipped]:
        return read_shard(self.urls[index], self.promised.get(self.urls[index], 0))


def members_of(raw: dict, wanted: tuple[str, ...]) -> str:
    """What a sample of a shard consists of and what is looked for, for messages."""
    found = [name for name in raw if not name.startswith("__")]
    return f"its members are {', '.join(found[:8]) or 'none'}; read are {', '.join(wanted)}"


# ---- tar archives ----


def tar_members(archive: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files of an uncompressed archive, with names of any length (ustar, GNU, pax).

    Python's tarfile, and webdataset with it, take as long for the headers of a sample as PIL for its 256² jpeg.

    Raises:
        tarfile.ReadError: a header is damaged, or the archive ends before its end mark.
    """
    described = {}  # by the previous member: values that do not fit into a header
    try:
        while (header := _read(archive, BLOCK)) != END:
            _check(header)
            kind = header[156:157]
            size = int(described.get("size") or _number(header[124:136]))
            most = LARGEST if kind in REGULAR else LARGEST_HEADER
            if not 0 <= size <= most:
                raise tarfile.ReadError(f"a member of {size:,} bytes; at most {most:,} are read")
            content = _read(archive, -(-size // BLOCK) * BLOCK)[:size]
            if kind in REGULAR:
                name = described.get("path") or _name(header)
                if not name.endswith("/"):
                    yield name, content
            elif kind == SPARSE:
                raise tarfile.ReadError("it holds sparse files")
            if kind == PAX:
                described |= _pax_records(content)
            elif kind == LONG_NAME:
                described["path"] = _text(content)
            elif kind != PAX_GLOBAL:
                described = {}
    except ValueError:
        raise tarfile.ReadError("damaged header") from None


def _read(archive: BinaryIO, size: int) -> bytes:
    pieces, missing = [], size
    while missing and (piece := archive.read(min(missing, PIECE))):
        pieces.append(piece)
        missing -= len(piece)
    if missing:
        raise tarfile.ReadError("cut short")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check(header: bytes) -> None:
    """Raises `ValueError` unless the checksum is right, which counts its own bytes as blanks."""
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != int(header[148:156].strip(b" \0"), 8):
        raise ValueError("checksum")


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # beyond 8 GiB, as GNU tar writes it
        return int.from_bytes(field[1:])
    return int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), header[345:500]
    is_posix = header[257:263] == b"ustar\0"  # GNU has other things at the place of the prefix
    return f"{_text(prefix)}/{name}" if is_posix and prefix[0] else name


def _pax_records(content: bytes) -> dict[str, str]:
    """``{length} {key}={value}\\n`` over and over."""
    found, place = {}, 0
    while content[place : place + 1].strip(b"\0"):
        blank = content.index(b" ", place)
        length = int(content[place:blank])
        if not 0 < length <= len(content) - place:
            raise ValueError("length")
        key, _, value = content[blank + 1 : place + length].rstrip(b"\n").partition(b"=")
        found[_text(key)] = value.decode("utf-8", "surrogateescape")
        place += length
    return found


# ---- manifests ----


def manifests(urls: list[str]) -> dict[str, dict]:
    """Manifest file → content, of all shards that have one beside them (``a/train-000003.tar``:
    ``a/train-manifest.json``).

    Raises:
        UserError: a manifest is no valid JSON.
    """
    files = {re.sub(r"-?\d*\.(tar|tgz|tar\.gz)$", "-manifest.json", url) for url in urls}
    return {file: read_json(file) for file in sorted(files - set(urls)) if Path(file).is_file()}


def promised_samples(urls: list[str]) -> dict[str, int]:
    """Shard → how many samples it holds, where a manifest says so."""
    found = {}
    for file, manifest in manifests(urls).items():
        entries = manifest.get("shards")
        for entry in entries if isinstance(entries, list) else ():  # another tool's manifest may say something else
            samples = entry.get("samples") if isinstance(entry, dict) else None
            if isinstance(samples, int) and 0 <= samples < 2**31:
                found[os.path.join(os.path.dirname(file), str(entry.get("file")))] = samples
    return found


def check_codes(urls: list[str], expected: dict[str, int], refused: str = "") -> None:
    """Checks that shards of codes, as far as their manifests tell, match the run.

    Args:
        expected: manifest key → value in this run.
        refused: why this flow cannot use codes, if it cannot; images beside the codes are used then.

    Raises:
        UserError: they do not match.
    """
    for file, manifest in manifests(urls).items():
        if "num_vq_tokens" not in manifest:
            continue
        manifest = with_images(manifest, expected.get("background"))
        if refused and manifest.get("keep_images"):
            continue
        if refused:
            raise UserError(f"{file}: these shards hold codes; {refused}")
        wrong = [f"{k} {manifest.get(k)}, here {value}" for k, value in expected.items() if manifest.get(k) != value]
        if wrong:
            raise UserError(
                f"{file}: these codes were made for {'; '.join(wrong)}; encode the images again with "
                "tools/encode_images.py for this resolution and tokenizer"
            )


def with_images(manifest: dict, background: str | None) -> dict:
    """A manifest of codes with the settings of images, which earlier releases did not have.

    They turned nothing and dropped alpha. Codes of images without alpha are the same on every background, so such
    codes are also taken for those of the default one, if that is the `background` that is asked for.
    """
    earlier = ImageOptions(background=background if background == DEFAULT.background else None)
    return asdict(earlier) | manifest


def tokenizer_sha256(vq_model: torch.nn.Module) -> str:
    """Checksum of the weights that codes depend on, which excludes the decoder's."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(vq_model.state_dict().items()):
        if not name.startswith("decoder."):
            checksum.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return checksum.hexdigest()
