"""Moved to examples/emoji_world/make.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

print("training/data/emoji_world.py is now examples/emoji_world/make.py", file=sys.stderr)
runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples/emoji_world/make.py"), run_name="__main__")
