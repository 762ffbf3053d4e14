"""Errors that a user can cause and fix, and how a script reports them."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix.

    The message is one line: the setting, what was given, what is allowed and how to fix it. For our own mistakes there
    are `assert` and ordinary exceptions, which keep their traceback.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # quoted messages of libraries may span lines


def run_cli(main: Callable[[list[str]], None]) -> None:
    """Calls `main` with the command-line arguments; a `UserError` becomes one line on stderr and exit code 2.

    Ctrl-C gives exit code 130, as shells expect, and one line with the message of the `KeyboardInterrupt`, if it has
    one. Any other exception keeps its traceback.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stdout.flush()  # so that earlier output precedes the error, also through a pipe
        print(f"error: {error}", file=sys.stderr)
        _tell_launcher(f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:
        print("; ".join(("interrupted", *map(str, interrupt.args))), file=sys.stderr)
        raise SystemExit(130) from None


def _tell_launcher(message: str) -> None:
    """Lets the report with which torch's launcher of several processes ends repeat the message."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
