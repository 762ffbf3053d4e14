"""Moved to tools/llava_shards.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

print("training/data/llava_shards.py is now tools/llava_shards.py", file=sys.stderr)
runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/llava_shards.py"), run_name="__main__")
