"""The benchmark of both loops runs at any size, reports in full, and fails when tokens differ."""

import json

import pytest
import torch

from benchmarks import generation, limits
from models.backbones import BACKBONES

pytestmark = pytest.mark.slow  # they measure the machine
TINY = "--hidden 32 --layers 2 --heads 2 --tokens 16 --timesteps 3 --new-tokens 20".split()


def results_of(capsys, *flags: str) -> dict:
    """The results of a run that ends well; its last line says where they come from."""
    assert generation.main([*TINY, *flags]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"machine", "torch", "date", "commit", "settings", "results"} <= set(report)
    return report["results"]


def test_both_loops_give_the_published_tokens(capsys):
    results = results_of(capsys)
    assert list(results) == ["image", "answer"]
    for result in results.values():
        assert result["same_tokens"] is True
        assert result["ratio"] == pytest.approx(result["published_s"] / result["ours_s"])
        assert result["share_of_limit"] == pytest.approx(result["limit_s"] / result["ours_s"]) and result["limit_s"] > 0


@pytest.mark.parametrize("family", BACKBONES)
def test_every_language_model(capsys, family):
    result = results_of(capsys, "--heads", "4", "--kv-heads", "2", "--llm", family)["answer"]
    assert result["generate_ratio"] == pytest.approx(result["generate_s"] / result["ours_s"])


def test_one_loop_and_several_images(capsys):
    assert list(results_of(capsys, "--loops", "image", "--batch", "3", "--repeats", "2")) == ["image"]


def test_questions_about_one_image(capsys):
    result = results_of(capsys, "--loops", "answer", "--questions", "3")["questions"]
    assert result["same_tokens"] is True and result["ratio"] == result["one_by_one_s"] / result["ours_s"]


def test_the_limit_grows_with_the_work(monkeypatch):
    monkeypatch.setattr(limits, "measure", lambda *_: limits.Rates(flops=1e9, bytes=1e9))

    def seconds(*flags: str) -> dict[str, float]:
        args = generation.parse([*TINY, *flags])
        model = generation.make_model(args)
        return generation.limit(model, args, generation.make_prompts(model, args), torch.float32)

    one, two, unguided = seconds(), seconds("--batch", "2"), seconds("--guidance", "0")
    assert two["image"] == pytest.approx(2 * one["image"]) and two["answer"] == one["answer"]
    # 2 rows, 2 layers of 12 * 32**2 weights: three steps of 18 positions that see 23 of text and each other, and the
    # head at 16 positions over 8192 codes; the text, half of whose pairs see each other
    step = 2 * (2 * 2 * 18 * 12 * 32**2 + 4 * 2 * 18 * 41 * 32) + 2 * 16 * 32 * 8192
    text = 2 * (2 * 2 * 23 * 12 * 32**2 + 4 * 23 * 23 * 32)
    assert one["image"] == pytest.approx((3 * step + text) / 1e9)
    assert unguided["image"] < one["image"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_further_precisions(capsys, dtype):
    results = results_of(capsys, "--dtype", dtype)
    assert list(results)[2:] == [f"image {dtype}", f"answer {dtype}"]
    assert all(result["ours_s"] > 0 for result in results.values())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--resolution 256", ("fp32", False, 256)),
        ("--resolution 512 --compile", ("fp32", True, 1024)),
        ("--device cuda", ("bf16", True, 256)),
        ("--device cuda --no-compile --dtype fp32", ("fp32", False, 256)),
    ],
)
def test_a_gpu_also_runs_bf16_and_compiled(flags, expected):
    args = generation.parse(flags.split())
    assert (args.dtype, args.compile, args.tokens) == expected


def test_other_tokens_are_a_failure(capsys):
    results = {"image": {"same_tokens": True}, "answer": {"same_tokens": False}, "image bf16": {"ours_s": 1.0}}
    assert generation.exit_code(results) == 1
    assert capsys.readouterr().err == "answer: the tokens differ from the published ones\n"
    assert generation.exit_code({"image": results["image"]}) == 0
