"""Moved to tools/export.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

print("training/export.py is now tools/export.py", file=sys.stderr)
runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools/export.py"), run_name="__main__")
