"""The check for a GPU at tiny sizes on a CPU, on a machine that has nothing but what the check needs."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_check

ABSENT = "deepspeed wandb webdataset omegaconf diffusers braceexpand simplejpeg resvg_py matplotlib pyarrow".split()


def run(repository, tmp_path, *flags: str) -> tuple[int, dict]:
    """(exit code, what was written)."""
    hide = tmp_path / "sitecustomize.py"  # python runs it first; the command's own processes, too
    hide.write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    command = ["benchmarks/gpu_check.py", *"--device cpu --tiny --output".split(), str(tmp_path), *flags]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    code = subprocess.run([sys.executable, *command], cwd=repository, env=environment).returncode
    [file] = tmp_path.glob("cpu-*.json")
    return code, json.loads(file.read_text())


@pytest.mark.slow
def test_every_part_runs_and_is_written(repository, tmp_path):
    code, found = run(repository, tmp_path, "--seconds", "900")
    assert {"machine", "torch", "transformers", "date", "commit"} <= set(found)
    assert code == 0 and list(found["parts"]) == list(gpu_check.PARTS)
    results = {part: one["results"] for part, one in found["parts"].items()}
    assert all(one["ended"] == "done" and one["seconds"] < one["limit_s"] for one in found["parts"].values())

    checks = [f"{what}, {way}" for way in ("sdpa", "eager") for what in ("logits", "losses", "gradient norms")]
    checks += [f"image codes, case {case}" for case in range(4)] + ["answer, case 0", "answer, case 1"]
    assert all(results["goldens"][check]["ok"] for check in checks)
    assert {result["outcome"] for name, result in results["tests"].items() if name != "pytest"} == {"skipped"}
    published = [f"published, torch.{dtype}" for dtype in ("float32", "bfloat16")]
    assert list(results["images"]) == [*published, "eager", "limit", "compiled"]
    names = [f"{way}, batch {rows}" for rows in (1, 8) for way in ("generate", "eager", "limit", "compiled")]
    assert set(results["answers"]) == {"published, batch 1", *names}
    for result in (results["images"] | results["answers"]).values():
        assert result["seconds"] > 0 and result.get("tokens_per_s", 1) > 0
    assert list(results["training"]) == ["published", "packed, sdpa"]  # FlexAttention has no backward pass on a CPU
    assert all(result["mfu"] > 0 and result["peak_mib"] > 0 for result in results["training"].values())


@pytest.mark.slow
def test_a_part_that_is_stopped_does_not_stop_the_others(repository, tmp_path):
    code, found = run(repository, tmp_path, "--seconds", "0.2", "--parts", "goldens", "images")
    assert code == 1
    assert [part["ended"] for part in found["parts"].values()] == ["stopped at its time limit"] * 2


def test_a_failed_measurement_leaves_the_others(tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"parts": {}}))
    record = gpu_check.Record(file, "images")

    def fails():
        raise RuntimeError("out of memory\nand a long explanation")

    record("published", fails)
    record("eager", lambda: {"seconds": 0.25})
    expected = {"published": {"error": "RuntimeError: out of memory"}, "eager": {"seconds": 0.25}}
    assert json.loads(file.read_text())["parts"] == {"images": {"results": expected}}
    assert "seconds 0.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ended", "result", "code"),
    [("done", {"seconds": 1.0}, 0), ("done", {"ok": True}, 0), ("done", {"ok": False}, 1)]
    + [("done", {"error": "RuntimeError: out of memory"}, 1), ("failed", {"ok": True}, 1)],
)
def test_exit_code(ended, result, code):
    assert gpu_check.exit_code({"goldens": {"ended": ended, "results": {"logits": result}}}) == code


def test_the_time_limits_add_up_to_six_minutes():
    assert sum(seconds for _, seconds in gpu_check.PARTS.values()) == gpu_check.SECONDS <= 355
