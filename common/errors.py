"""Errors that a user can cause and fix, and how a script reports them."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """An error that the user can fix; a ValueError, as which programs that use the parts in Python may catch it.

    The message is one line: the setting, what was given, what is allowed and how to fix it. For our own mistakes there
    are `assert` and ordinary exceptions, which keep their traceback.
    """

    def __str__(self) -> str:
        return " ".join(shown(super().__str__()).split())  # quoted messages of libraries may span lines


def run_cli(main: Callable[[list[str]], None]) -> None:
    """Calls `main` with the command-line arguments; a `UserError` becomes one line on stderr and exit code 2.

    So does an `OSError`, with its path: a disk that fills, a folder that must not be read. Ctrl-C gives exit code 130,
    as shells expect, and one line with the message of the `KeyboardInterrupt`, if it has one. Any other exception keeps
    its traceback. A terminal that goes away, as after ``| head``, does not end a command.
    """
    keep_terminal()
    interrupts: list[str] = []

    def interrupt(*_) -> None:
        interrupts.append("")
        raise KeyboardInterrupt

    try:
        with suppress(ValueError):  # another thread than the main one
            signal.signal(signal.SIGINT, interrupt)
        main(sys.argv[1:])
    except Exception as error:
        if interrupts:  # libraries that were being loaded take Ctrl-C for an error of theirs
            _end("interrupted", 130)
        if (cause := _users_cause(error)) is None:
            raise
        line = f"error: {cause}"
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # the report of torch's launcher repeats it
            with suppress(OSError):
                Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
        _end(line, 2)
    except KeyboardInterrupt as error:
        _end("; ".join(("interrupted", *map(str, error.args))), 130)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _users_cause(error: Exception) -> str | None:
    """What a user can do something about, in one line; None for our own mistakes."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory; give smaller files, sizes or batches"
    if any(shown(word).encode() != os.fsencode(word) for word in sys.argv):
        return f"an argument is no UTF-8, which a library here does not take ({first_line(error)})"
    return None


def _end(line: str, code: int) -> NoReturn:
    sys.stdout.flush()  # so that earlier output precedes the error, also through a pipe
    print(line, file=sys.stderr)
    raise SystemExit(code) from None


def shown(name: str | Path) -> str:
    """A path, name or message as text that can be printed and stored; bytes that are no UTF-8 become ``\\xe9``."""
    try:
        data = str(name).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # halves of pairs, as JSON may hold them
        data = str(name).encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def first_line(error: Exception, line: int = 0) -> str:
    """What a library's error says in its first line, or in another; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[line][:400]


def describe_os_error(error: OSError) -> str:
    """The file and what is wrong with it, in one line."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{shown(error.filename)}: {reason}" if error.filename else reason


class LastingStream:
    """A text stream whose reader may go away, or whose disk may fill: what cannot be written is dropped.

    Long work goes on when its terminal closes. Signs that the terminal does not know are written as escapes.
    """

    def __init__(self, stream):
        self.stream = stream
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # what waits in the buffer goes nowhere, also when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def keep_terminal() -> None:
    """Makes standard output and error lasting streams, see `LastingStream`; closed ones become the null device."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        setattr(sys, name, stream if isinstance(stream, LastingStream) else LastingStream(stream))
