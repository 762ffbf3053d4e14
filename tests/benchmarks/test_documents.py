"""The comparison of cached and recomputed documents runs at any size, reports in full, and fails when tokens differ."""

import json

import pytest

from benchmarks import documents

TINY = "--hidden 32 --layers 2 --heads 2 --tokens 16 --timesteps 2 --words 3".split()
pytestmark = pytest.mark.slow  # it measures the machine


@pytest.mark.parametrize("segments", [4, 5])
def test_both_loops_give_the_same_tokens(capsys, segments):
    assert documents.main([*TINY, f"--segments={segments}"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = report["results"]
    assert results["same_tokens"] is True and report["settings"]["segments"] == segments
    assert results["ratio"] == pytest.approx(results["recomputed_s"] / results["cached_s"])


def test_other_tokens_are_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(documents, "document_generate", lambda *given, **settings: [("text", [1])])
    assert documents.main([*TINY, "--segments=3"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["same_tokens"] is False
