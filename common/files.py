"""Files at the border: which ones count, how they are read, and how results are written without losing anything.

Reading: only regular files, of bounded size, in a known encoding; hidden files are nobody's data. Writing: beside the
goal and then renamed, and only over what a command of this project wrote itself. Every error names file and remedy.
"""

import io
import json
import os
import re
import shutil
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError, describe_os_error, shown

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_TEXT = 2**31  # bytes of a file that is read into memory at once
MAX_JSON = 2**30
MAX_LINE = 2**26
MAX_DEPTH = 200  # of nested JSON
JUNK = ("__MACOSX", "lost+found")
RUST = "(os error "  # in the messages of tokenizers and safetensors, whose errors are no `OSError`
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
BYTE_ORDER_MARK = "\ufeff"
ENCODINGS = {  # by the byte order mark that a file begins with; the longer marks first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


# ---- paths ----


def expand(path: str | Path) -> Path:
    """The path with `~` replaced by the home folder; `UserError` if there is no such user, or it cannot be a path."""
    if "\0" in str(path):
        raise UserError(f"{shown(path)!r} cannot be a path: it holds a NUL")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{shown(path)}: there is no such home folder; write the path out") from None


def resolve_path(path: str | Path) -> Path:
    """Looks a relative path up in the current folder, then in the repository; returned as it is if neither has it."""
    path = expand(path)
    return REPOSITORY / path if not path.exists() and (REPOSITORY / path).exists() else path


def real_path(path: str | Path) -> Path:
    """`Path.resolve`, which fails at a link to itself before Python 3.13."""
    return Path(os.path.realpath(path))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is nobody's data: hidden, a system's own, or left by a killed command."""
    return (name.startswith(".") and name not in (".", "..")) or name in JUNK or name.endswith(".partial")


def visible_files(folder: str | Path) -> list[Path]:
    """All regular files at any depth, sorted, without hidden ones. Links are followed, each folder is visited once."""
    files, waiting, visited = [], deque([Path(folder)]), set()
    while waiting:
        place = waiting.popleft()
        identity = os.stat(place)
        if (identity.st_dev, identity.st_ino) in visited:
            continue
        visited.add((identity.st_dev, identity.st_ino))
        for entry in _entries(place):
            if entry.is_dir():  # folders before links, so that a file has its own path, not that of a link
                (waiting.append if entry.is_symlink() else waiting.appendleft)(Path(entry.path))
            elif entry.is_file():
                files.append(Path(entry.path))
    return sorted(files)


def visible_in(folder: str | Path) -> list[Path]:
    """The regular files of a folder itself, sorted, without hidden ones."""
    return sorted(Path(entry.path) for entry in _entries(folder) if entry.is_file())


def visible_folders(folder: str | Path) -> list[Path]:
    """The folders of a folder, sorted, without hidden ones."""
    return sorted(Path(entry.path) for entry in _entries(folder) if entry.is_dir())


def _entries(folder: str | Path) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # A link that leads nowhere, or to itself, is neither a file nor a folder.
                if not is_hidden(entry.name) and not (entry.is_symlink() and not os.path.exists(entry.path)):
                    yield entry
    except OSError as error:
        raise UserError(f"folder {shown(folder)} cannot be read ({error.strerror}); mend its permissions") from None


# ---- reading ----


def check_file(path: str | Path, what: str | None = None, limit: int | None = None) -> Path:
    """The path of a regular file that can be read.

    Args:
        what: how the user named it, such as ``captions=x.csv``; default: the path.
        limit: most bytes.

    Raises:
        UserError: there is none; it is a folder, a pipe or a device, too large, or must not be read.
    """
    path, what = Path(path), what or shown(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = "does not exist" if missing else f"cannot be read ({getattr(error, 'strerror', error)})"
        raise UserError(f"{what} {reason}; relative paths start at the current folder") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{what} is {'a folder' if stat.S_ISDIR(found.st_mode) else 'no regular file'}; give a file")
    if limit is not None and found.st_size > limit:
        raise UserError(f"{what} has {found.st_size:,} bytes; at most {limit:,} are read; give a smaller file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{what} must not be read by this user; mend its permissions")
    return path


def decode_text(data: bytes) -> str:
    """UTF-8, or UTF-16 and UTF-32 that begin with their mark; byte order marks, also of joined files, are left out;
    `UnicodeDecodeError` if it is another encoding."""
    encoding = next((name for mark, name in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding).replace(BYTE_ORDER_MARK, "")


def read_text(path: str | Path, what: str | None = None, limit: int = MAX_TEXT) -> str:
    """The text of a file, with its line ends; `UserError` if it has none, see `check_file` and `decode_text`."""
    what, data = what or shown(path), b""
    try:
        data = check_file(path, what, limit).read_bytes()
        return decode_text(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{what} is no UTF-8 text ({error.reason} in line {line}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror or error})") from None


def is_wide(path: str | Path) -> bool:
    """Whether a file of text begins with the mark of UTF-16 or UTF-32."""
    with open(path, "rb") as file:
        return file.read(4).startswith(tuple(ENCODINGS))


def open_utf8(path: str | Path) -> BinaryIO:
    """A file of text as bytes of UTF-8: the file itself, or the text of a wide one encoded anew."""
    return io.BytesIO(_encoded_anew(path)) if is_wide(path) else open(path, "rb")


@lru_cache(maxsize=2)  # their parts are asked for one by one
def _encoded_anew(path: str | Path) -> bytes:
    return read_text(path).encode()


def parse_json(text: str | bytes, where: str, kind: type | None = None) -> Any:
    """The value of a JSON text.

    Args:
        where: file and place, for messages.
        kind: the type it must have: dict, list, …; None: any.

    Raises:
        UserError: it is no JSON, nested too deeply, or of another type.
    """
    try:
        text = decode_text(text) if isinstance(text, bytes) else text
        value = json.loads(text)
        _check_depth(value)
        if HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair could not be stored
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where} is no valid JSON ({reason}); mend or fetch it again") from None
    if kind is not None and not isinstance(value, kind):
        raise UserError(f"{where} holds {kind_of(value)}, expected {KINDS[kind]}")
    return value


def read_json(path: str | Path, what: str | None = None, kind: type | None = dict, limit: int = MAX_JSON) -> Any:
    """The JSON value in a file, of the type `kind`; `UserError` if it cannot be read, see `parse_json`."""
    what = what or shown(path)
    return parse_json(read_text(path, what, limit), what, kind)


def json_lines(path: str | Path, what: str | None = None) -> Iterator[tuple[int, bytes, dict | UserError]]:
    """(number, line, its object) of each line of a file that is not blank.

    In place of the object of a line that holds none, such as a last one that a crash has cut off, comes the error. Only
    ``\\n`` ends a line: texts may hold other signs of that kind.

    Raises:
        UserError: the file cannot be read, see `check_file`.
    """
    with open_utf8(check_file(path, what)) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            if line.strip():
                try:
                    value = parse_json(line, f"{shown(path)}: line {number}", dict)
                except UserError as error:
                    value = error
                yield number, line, value


def json_records(path: str | Path, what: str | None = None) -> Iterator[tuple[int, dict]]:
    """(number, object) of each line of a file that is not blank; `UserError` at the first that holds no object."""
    for number, _, record in json_lines(path, what):
        if isinstance(record, UserError):
            raise record
        yield number, record


def field(record: dict, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A member of a JSON object; `UserError` if there is no object, or it is missing or of another type (true is no
    number)."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    kinds += (int,) * (float in kinds)
    wanted = " or ".join(KINDS[one] for one in dict.fromkeys(kinds))
    if not isinstance(record, dict):
        raise UserError(f"{where} holds {kind_of(record)}, expected {KINDS[dict]} with the field {name!r}")
    if name not in record:
        raise UserError(f"{where}: field {name!r} is missing, expected {wanted}")
    value = record[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{where}: field {name!r} is {kind_of(value)}, expected {wanted}")
    return value


def kind_of(value: Any) -> str:
    """A JSON value in a few words, for messages: its beginning if it is short, else its type."""
    if isinstance(value, (dict, list)):
        return f"{KINDS[type(value)]} of {len(value)}"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_depth(value: Any) -> None:
    """Raises `RecursionError` for what later code could not walk through."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise RecursionError


# ---- writing ----


def make_folder(folder: str | Path) -> Path:
    """Creates a folder and its parents; `UserError` if that is impossible."""
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turns an `OSError` of writing `path` into one line; those of other files keep their own path."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)).parent != Path(path).parent:
            raise UserError(describe_os_error(error)) from None
        reason = error.strerror or error
        raise UserError(f"cannot write {shown(path)} ({reason}); make room, or give another place") from None


@contextmanager
def writing(path: str | Path, flush: bool = False) -> Iterator[Path]:
    """A path beside the goal to write to; renamed to the goal at the end, removed if anything fails.

    Args:
        flush: whether the content is on the disk before it gets its name, so that no power cut can leave half of it.

    Raises:
        UserError: the disk is full or cannot be written to, or the goal is a folder or a link. What was there stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    if path.is_symlink():
        raise UserError(f"{shown(path)} is a link, which would be replaced; remove it or give another place")
    with disk_errors(path):
        try:
            yield temporary
            if flush:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: str | Path, data: bytes, flush: bool = False) -> None:
    """Writes a file, completely or not at all; arguments and errors as of `writing`."""
    with writing(path, flush) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str, flush: bool = False) -> None:
    """Writes a file as UTF-8; names that are no UTF-8 are written with escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"), flush)


def write_json(path: str | Path, value: Any, flush: bool = False) -> None:
    """Writes a JSON file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", flush)


@contextmanager
def folder_aside(goal: Path) -> Iterator[Path]:
    """An empty folder beside `goal` to write to; at the end it is gone, with what was not moved out of it; `UserError`
    if the disk is full or cannot be written to."""
    aside = goal.with_name(f".{goal.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a command that was killed
    with disk_errors(goal):
        try:
            aside.mkdir(parents=True)
            yield aside
        except Exception as error:
            if RUST not in str(error):
                raise
            raise OSError(str(error)) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def append_lines(path: str | Path, text: str, at: int | None = None, flush: bool = False) -> None:
    """Adds lines to a file, completely or not at all, after a line end also where a crash has cut off the last one.

    Args:
        at: byte from which on they replace what is there; None: the end.
        flush: whether they are on the disk on return.

    Raises:
        OSError: with the path.
    """
    data = text.encode()
    try:
        with open(path, "a+b", buffering=0) as file:
            start = file.seek(0, os.SEEK_END) if at is None else at
            file.seek(max(start - 1, 0))
            if start and file.read(1) != b"\n":
                data = b"\n" + data
            file.truncate(start)
            try:
                while data:
                    data = data[file.write(data) :]
                if flush:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class Owned:
    """What commands of this project wrote into a folder: the one answer to "may it be replaced?".

    Each file that `record` is told of has a line in the folder's `.written.jsonl`, with its size and time. A file that
    is not there, or was changed since, is somebody else's.
    """

    RECORD = ".written.jsonl"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.file = self.folder / self.RECORD
        self.written: dict[str, list[int] | None] = {}
        self._read()

    def _read(self) -> None:
        if not os.path.lexists(self.file):
            return
        if self.file.is_symlink() or not self.file.is_file():
            raise UserError(f"{shown(self.file)} is no regular file; remove it")
        for _, _, record in json_lines(self.file):
            with suppress(UserError):  # a line that was cut off
                name = field(record, "file", str, self.RECORD)
                self.written[name] = record.get("state", [])

    def is_ours(self, name: str) -> bool:
        """Whether a file is as a command of ours wrote it; of one that `grows`, whether it is one."""
        path = self.folder / name
        if name not in self.written or "\0" in name or path.is_symlink():
            return False
        return self.written[name] in (None, _state(path))

    def names(self) -> list[str]:
        """The files that are there and ours."""
        return [name for name in self.written if self.is_ours(name)]

    def claim(self, names: Iterable[str], setting: str) -> None:
        """Makes sure that files may be written: each is ours or not there.

        Args:
            setting: the key and value that name the folder, for the message.

        Raises:
            UserError: names the first one that is somebody else's.
        """
        if there := [name for name in names if os.path.lexists(self.folder / name)]:
            self._read()  # after that look: other processes note files, then write them
        for name in there:
            if not self.is_ours(name):
                raise UserError(
                    f"{setting}: {shown(self.folder / name)} is there and was not written by this command, or was "
                    "changed since; move it away or give another folder"
                )

    def record(self, name: str, grows: bool = False) -> None:
        """Notes that a file was written; `grows`: lines are added to it later, so its state is not compared."""
        self.written[name] = None if grows else _state(self.folder / name)
        with disk_errors(self.file):
            append_lines(self.file, json.dumps({"file": name, "state": self.written[name]}) + "\n")


@contextmanager
def owned_folder(folder: str, setting: str) -> Iterator[Path]:
    """A folder aside to save to; at the end its files move into `folder`, over nothing but what commands of ours wrote.

    Args:
        setting: the key that names the folder, for messages.

    Raises:
        UserError: a file of that name is somebody else's, or the disk is full. What was there stays.
    """
    was_there = os.path.lexists(folder)
    goal = make_folder(folder)
    try:
        with folder_aside(goal) as aside:
            yield aside
            owned, names = Owned(goal), sorted(file.name for file in aside.iterdir())
            owned.claim(names, f"{setting}={folder}")
            for name in names:
                (aside / name).replace(goal / name)
                owned.record(name)
    finally:
        if not was_there:
            with suppress(OSError):
                goal.rmdir()  # if nothing came of it


def _state(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return [-1, -1]
    return [found.st_size, found.st_mtime_ns]
