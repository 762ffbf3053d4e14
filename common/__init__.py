"""What all entry points share: configuration, tracking, errors. Imports neither models nor training."""

import os
import signal
import sys
from pathlib import Path


def _end_in_one_word(*_) -> None:
    """Ctrl-C while a script still loads its libraries, which take it for an error of theirs."""
    os.write(2, b"interrupted\n")
    os._exit(130)


_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if _script.suffix == ".py" and "site-packages" not in _script.parts:
    if _script.resolve().is_relative_to(Path(__file__).resolve().parents[1]):  # ours, not a program that uses us
        signal.signal(signal.SIGINT, _end_in_one_word)  # until `run_cli`
