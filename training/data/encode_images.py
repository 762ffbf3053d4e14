"""Moved to tools/encode_images.py; this path works for one more release."""

import runpy
import sys
from pathlib import Path

print("training/data/encode_images.py is now tools/encode_images.py", file=sys.stderr)
runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/encode_images.py"), run_name="__main__")
