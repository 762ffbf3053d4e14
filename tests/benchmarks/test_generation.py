"""The benchmark of both loops runs at any size, reports in full, and fails when tokens differ."""

import json

import pytest

from benchmarks import generation

TINY = "--hidden 32 --layers 2 --heads 2 --tokens 16 --timesteps 3 --new-tokens 20".split()


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_both_loops_give_the_published_tokens(capsys):
    assert generation.main(TINY) == 0
    report = last_line(capsys)
    assert {"machine", "torch", "date", "commit", "settings", "results"} <= set(report)
    assert list(report["results"]) == ["drawing", "answering"]
    for result in report["results"].values():
        assert result["same_tokens"] is True
        assert result["ratio"] == pytest.approx(result["published_s"] / result["ours_s"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_further_precisions(capsys, dtype):
    assert generation.main([*TINY, "--dtype", dtype]) == 0
    results = last_line(capsys)["results"]
    assert list(results)[2:] == [f"drawing {dtype}", f"answering {dtype}"]
    assert all(result["ours_s"] > 0 for result in results.values())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("fp32", False)),
        (["--compile"], ("fp32", True)),
        (["--device", "cuda"], ("bf16", True)),
        (["--device", "cuda", "--no-compile", "--dtype", "fp32"], ("fp32", False)),
    ],
)
def test_a_gpu_also_runs_bf16_and_compiled(flags, expected):
    args = generation.parse(flags)
    assert (args.dtype, args.compile) == expected


def test_other_tokens_are_a_failure(capsys):
    results = {"drawing": {"same_tokens": True}, "answering": {"same_tokens": False}, "drawing bf16": {"ours_s": 1.0}}
    assert generation.exit_code(results) == 1
    assert capsys.readouterr().err == "answering: the tokens differ from the published ones\n"
    assert generation.exit_code({"drawing": results["drawing"]}) == 0
