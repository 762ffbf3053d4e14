"""Moved to tools/make_shards.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

print("training/data/make_shards.py is now tools/make_shards.py", file=sys.stderr)
runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/make_shards.py"), run_name="__main__")
