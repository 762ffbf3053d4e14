"""Nothing but `models/backbones.py` names a family of language models, so a further one is one record there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"Phi|PHI|\bphi|[Ll]lama|LLAMA|[Mm]istral|[Qq]wen|[Ss]mol[Ll][Mm]")
ROOMS = ("models", "training", "llava", "common", "evaluation", "benchmarks")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + sorted(ROOT.glob("*.py"))
DECLARED = ROOT / "models/backbones.py"


@pytest.mark.parametrize("path", [p for p in FILES if p != DECLARED], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_family_is_named_elsewhere(path):
    named = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if NAME.search(line)]
    assert not named
