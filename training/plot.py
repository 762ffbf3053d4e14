"""Moved to tools/plot.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

print("training/plot.py is now tools/plot.py", file=sys.stderr)
runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools/plot.py"), run_name="__main__")
