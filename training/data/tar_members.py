"""Reads the members of a tar archive in order: regular files only, with names of any length (ustar, GNU, pax).

Python's tarfile takes as long for the headers of a sample as PIL for its 256² jpeg.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 512
END = bytes(BLOCK)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # magic numbers of compressed files
REGULAR, LONG_NAME, PAX, PAX_GLOBAL, SPARSE = (b"0", b"\0", b"7"), b"L", b"x", b"g", b"S"


def members(archive: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files of an uncompressed archive.

    Raises:
        tarfile.ReadError: a header is damaged, or the archive ends before its end mark.
    """
    described = {}  # by the previous member: values that do not fit into a header
    while (header := _read(archive, BLOCK)) != END:
        _check(header)
        kind = header[156:157]
        size = int(described.get("size") or _number(header[124:136]))
        content = _read(archive, -(-size // BLOCK) * BLOCK)[:size]
        if kind in REGULAR:
            name = described.get("path") or _name(header)
            if not name.endswith("/"):
                yield name, content
        elif kind == SPARSE:
            raise tarfile.ReadError("it holds sparse files")
        if kind == PAX:
            described |= _records(content)
        elif kind == LONG_NAME:
            described["path"] = _text(content)
        elif kind != PAX_GLOBAL:
            described = {}


def is_compressed(beginning: bytes) -> bool:
    return beginning.startswith(COMPRESSED)


def _read(archive: BinaryIO, size: int) -> bytes:
    data = archive.read(size)
    if len(data) < size:
        raise tarfile.ReadError("cut short")
    return data


def _check(header: bytes) -> None:
    try:
        expected = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        raise tarfile.ReadError("damaged header") from None
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected:
        raise tarfile.ReadError("damaged header")


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # beyond 8 GiB, as GNU tar writes it
        return int.from_bytes(field[1:])
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise tarfile.ReadError("damaged header") from None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), header[345:500]
    is_posix = header[257:263] == b"ustar\0"  # GNU has other things at the place of the prefix
    return f"{_text(prefix)}/{name}" if is_posix and prefix[0] else name


def _records(content: bytes) -> dict[str, str]:
    """``{length} {key}={value}\\n`` over and over."""
    found = {}
    try:
        while content.strip(b"\0"):
            length = int(content[: content.index(b" ")])
            key, _, value = content[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
            found[_text(key)] = value.decode("utf-8", "surrogateescape")
            content = content[max(length, 1) :]
    except ValueError:
        raise tarfile.ReadError("damaged header") from None
    return found
