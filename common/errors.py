"""Mistakes a user can make, and how a script ends on one."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user did and can mend.

    The message is one line: which setting, what was given, what is allowed, how to mend it. What *we* did wrong is an
    `assert` or an ordinary exception with its traceback.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # library messages quoted in ours may span lines


def run_cli(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command-line arguments; turn a `UserError` into one line and exit code 2.

    Ctrl-C ends with 130, as shells expect, and everything else keeps its traceback.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stdout.flush()  # what was answered so far stands before the error, also through a pipe
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
