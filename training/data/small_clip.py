"""Moved to tools/small_clip.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

print("training/data/small_clip.py is now tools/small_clip.py", file=sys.stderr)
runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/small_clip.py"), run_name="__main__")
