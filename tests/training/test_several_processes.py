"""DDP, DeepSpeed ZeRO-2 and FSDP2 with two processes on the CPU: the same losses as one, and exact continuation."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from common.files import REPOSITORY
from models import Showo
from tests.training import tiny
from tests.training.tiny import accelerate_launch, same, steps_of, weights
from tests.training.tiny_sources import write_llm_weights

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

WORKER = REPOSITORY / "tests/training/worker.py"
KINDS = ("ddp", "zero2", "fsdp2")
ALL_KINDS = (*KINDS, "zero3")  # which has no moving average
SETTINGS = {
    "device": None,
    "training.gradient_accumulation_steps": 2,
    "training.max_train_steps": 4,
    "training.max_grad_norm": 1.0,
    "experiment.save_every": 2,
    "experiment.log_grad_norm_every": 2,
    "dataset.params.num_workers": 1,
    "model.gradient_checkpointing": True,
}


def launcher(kind: str, processes: int) -> list[str]:
    if kind.startswith("zero"):
        options = f"--num_processes {processes} --zero_stage {kind[-1]} --zero3_save_16bit_model true"
        return [*accelerate_launch("2_cpu_deepspeed_zero2"), *options.split()]
    if kind == "ddp" and processes < 3:
        return [sys.executable] if processes == 1 else accelerate_launch("2_cpu_ddp")
    return [*tiny.TORCHRUN[:-1], str(processes)]


def environment(kind: str) -> dict[str, str]:
    """What `accelerate launch` would set for the kind."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
    kept["OMP_NUM_THREADS"] = "1"
    if not kind.startswith("zero"):
        kept["ACCELERATE_USE_CPU"] = "true"
    if kind == "fsdp2":
        settings = yaml.safe_load((REPOSITORY / "accelerate_configs/8_gpus_fsdp2.yaml").read_text())["fsdp_config"]
        kept |= {key.upper(): str(value).lower() for key, value in settings.items()}
        kept |= {name.upper(): settings[name] for name in ("fsdp_auto_wrap_policy", "fsdp_state_dict_type")}
        kept |= {"ACCELERATE_USE_FSDP": "true", "TEST_FSDP2": "1"}
    return kept


def start(command: list[str], world: Path, output_dir: Path, overrides: dict, env: dict) -> subprocess.CompletedProcess:
    command = [*command, *tiny.arguments(world, output_dir, SETTINGS | overrides)]
    return subprocess.run(command, cwd=output_dir.parent, env=env, capture_output=True, text=True, timeout=500)


def run(kind: str, world: Path, output_dir: Path, overrides: dict | None = None, *, processes: int = 2, **extra) -> str:
    """Trains to the end; returns what was printed."""
    settings = ({"training.ema_decay": None} if kind == "zero3" else {}) | (overrides or {})
    env = environment(kind) | {key: str(value) for key, value in extra.items()}
    done = start([*launcher(kind, processes), str(WORKER)], world, output_dir, settings, env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


LOSSES = ("step_loss_t2i", "step_loss_lm", "step_loss_mmu")


def losses_of(output_dir: Path, *more: str, losses: tuple[str, ...] = LOSSES) -> np.ndarray:
    """(steps, names): the losses and the rate, and perhaps more, of each of the four steps."""
    names = (*losses, "lr", *more)
    lines = steps_of(output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    return np.array([[line[name] for name in names] for line in lines])


DRAWN = {"experiment.generate_every": 2}


def killed(whole: Path, parts: Path) -> Path:
    """A copy of a run as if it had been killed after step 2."""
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-4")
    (parts / "model.safetensors").unlink()
    return parts


@pytest.fixture(scope="module")
def whole_runs(world, tmp_path_factory):
    """Kind and number of processes → a whole run, made when first asked for."""

    @cache
    def make(kind: str, processes: int) -> Path:
        folder = tmp_path_factory.mktemp(kind) / "whole"
        run(kind, world, folder, DRAWN, processes=processes)
        return folder

    return lambda kind, processes=2: make(kind, processes)


@pytest.fixture(scope="module")
def moved_runs(world, tmp_path_factory, whole_runs):
    """Kind, numbers of processes before and after step 2 → the run's folder and what it printed."""

    @cache
    def make(kind: str, before: int, after: int) -> tuple[Path, str]:
        parts = killed(whole_runs(kind, before), tmp_path_factory.mktemp(kind) / "parts")
        return parts, run(kind, world, parts, DRAWN, processes=after)

    return make


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_continued_run_is_the_uninterrupted_one_to_the_last_bit(world, tmp_path, whole_runs, kind):
    whole = whole_runs(kind)
    parts = killed(whole, tmp_path / "parts")
    assert "checkpoint-2, step 2" in run(kind, world, parts, DRAWN)
    assert len(list((whole / "images").glob("generated-images-*.png"))) == 2
    assert Showo.from_pretrained(str(whole)).config.num_vq_tokens == 16
    for name in ("", "checkpoint-4/unwrapped_model"):
        assert same(weights(whole / name), weights(parts / name)), name
    files = [folder / "checkpoint-4/average.pt" for folder in (whole, parts)]
    assert [file.is_file() for file in files] == [kind != "zero3"] * 2
    if kind != "zero3":
        assert same(*(torch.load(file, weights_only=True)["shadow"] for file in files))
    assert tiny.metrics_of(whole) == tiny.metrics_of(parts)
    for name in ("streams_0.json", "streams_1.json"):
        assert (whole / "checkpoint-4" / name).read_text() == (parts / "checkpoint-4" / name).read_text()


@pytest.mark.parametrize("kind", ("zero2", "zero3", "fsdp2"))
def test_every_kind_is_the_same_training(whole_runs, kind):
    folders = whole_runs("ddp"), whole_runs(kind)
    expected, found = (losses_of(folder, "accuracy/t2i") for folder in folders)
    assert found == pytest.approx(expected, rel=1e-4)
    norms = [[line for line in tiny.metrics_of(folder) if "grad_norm" in str(line)] for folder in folders]
    assert len(norms[0]) == 2
    for ours, theirs in zip(*norms, strict=True):
        # Some gradients are rounding alone: softmax does not see what the keys' norm adds where they are not rotated.
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-9)
    if kind == "zero3":
        return  # its weights are the model's own, those of the others the average
    expected, found = map(weights, folders)
    for name, tensor in expected.items():
        # Of a gradient that is rounding alone AdamW makes steps.
        atol = 1e-4 if name.endswith("k_layernorm.bias") else 1e-5
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_packed_rows_are_the_same_training(world, tmp_path, whole_runs, kind):
    run(kind, world, tmp_path / "packed", {"dataset.packing": True})
    names = ("accuracy/t2i", "padding_share")
    plain, packed = losses_of(whole_runs(kind), *names), losses_of(tmp_path / "packed", *names)
    assert packed[:, :5] == pytest.approx(plain[:, :5], rel=1e-3)
    assert (packed[:, 5] < plain[:, 5]).all()
    unpacked = [line["padding_share_unpacked"] for line in steps_of(tmp_path / "packed")]
    assert unpacked == pytest.approx(plain[:, 5])


@pytest.fixture(scope="module")
def llama(world, tmp_path_factory):
    """The settings of a Llama whose heads share keys and values, and whose head is its embedding."""
    folder = tmp_path_factory.mktemp("llama") / "llm"
    tiny.write_llm(folder, world / "corpus.txt", family="llama", num_attention_heads=4, num_key_value_heads=2)
    write_llm_weights(folder, tied=True)
    start = {"model.showo.load_from_showo": False, "model.showo.llm_model_path": folder}
    return start | {"training.ema_decay": None}


@pytest.mark.parametrize("trainable", ["all", "new"])
def test_another_family_is_the_same_training_in_every_kind(world, llama, tmp_path, trainable):
    settings = llama | {"training.trainable": trainable, "dataset.packing": trainable == "all"}
    given = weights(llama["model.showo.llm_model_path"])
    matrix = "model.embed_tokens.weight"
    for kind in KINDS:
        run(kind, world, tmp_path / kind, settings)
        assert losses_of(tmp_path / kind) == pytest.approx(losses_of(tmp_path / "ddp"), rel=1e-4)
        trained = weights(tmp_path / kind)
        head = {"showo.lm_head.weight"}  # FSDP2 writes a tied matrix twice
        assert {f"showo.{name}" for name in given} == set(trained) - head
        changed = {n for n, old in given.items() if not torch.equal(trained[f"showo.{n}"][: len(old)], old.float())}
        assert changed == ({matrix} if trainable == "new" else set(given))
        if trainable == "new":
            old, new = (tensor[: tiny.LLM_VOCAB_SIZE].float() for tensor in (given[matrix], trained[f"showo.{matrix}"]))
            assert torch.equal(old, new), "to the last bit"


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Eight batches of every flow."""
    samples = tiny.items(tiny.CAPTIONS)
    dealt = {
        "t2i": [[samples[(3 * n + i) % 12] for i in range(4)] for n in range(8)],
        "lm": [[f"text number {n}: {tiny.CAPTIONS[n]}"] for n in range(8)],
        "mmu": [[samples[(5 * n + i) % 12] for i in range(2)] for n in range(8)],
    }
    file = tmp_path_factory.mktemp("batches") / "batches.pt"
    torch.save(dealt, file)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns_from_the_same_global_batch(world, tmp_path, batches, kind):
    """Nothing is drawn: all image tokens are masked and no text is dropped."""
    still = {"training.min_masking_rate": 1.0, "training.cond_dropout_prob": 0.0}
    run("ddp", world, tmp_path / "one", still, processes=1, TEST_BATCHES=batches)
    run(kind, world, tmp_path / "two", still | {"training.gradient_accumulation_steps": 1}, TEST_BATCHES=batches)
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "two"), rel=1e-5)
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    found = {name: found[name] for name in expected}  # FSDP2 writes a tied matrix twice
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


LORA = {"training.trainable": "lora"}


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_two_processes_train_the_adapter_that_one_trains(world, tmp_path, batches, base):
    settings = {"training.min_masking_rate": 1.0, "training.cond_dropout_prob": 0.0, "lora.base": base} | LORA
    for name, processes, accumulated in (("one", 1, 2), ("two", 2, 1)):
        given = settings | {"training.gradient_accumulation_steps": accumulated}
        run("ddp", world, tmp_path / name, given, processes=processes, TEST_BATCHES=batches)
    rel = 1e-5 if base == "fp32" else 1e-4  # what is not quantised is rounded to bf16
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "two"), rel=rel)
    if base == "nf4":
        return  # of gradients that are rounding alone AdamW makes steps
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_an_adapter_of_two_processes_is_continued_by_two_to_the_last_bit_and_by_one(world, tmp_path):
    run("ddp", world, tmp_path / "whole", LORA)
    for processes in (2, 1):
        parts = shutil.copytree(tmp_path / "whole", tmp_path / str(processes))
        shutil.rmtree(parts / "checkpoint-4")
        run("ddp", world, parts, LORA, processes=processes)
        assert len(losses_of(parts)) == 4
    files = [tmp_path / name / "checkpoint-4/trained.safetensors" for name in ("whole", "2")]
    assert same(*map(load_file, files))
    assert tiny.metrics_of(tmp_path / "whole") == tiny.metrics_of(tmp_path / "2")


@pytest.mark.parametrize("kind", ["zero2", "fsdp2"])
def test_adapters_are_refused_where_weights_are_sharded(world, tmp_path, kind):
    done = start([*launcher(kind, 2), str(WORKER)], world, tmp_path / "out", LORA, environment(kind))
    assert done.returncode != 0 and "training.trainable=lora does not work with DeepSpeed or FSDP2" in done.stderr


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [*((kind, *numbers) for kind in KINDS for numbers in ((2, 1), (1, 2), (2, 4))), ("zero3", 2, 1)],
)
def test_another_number_of_processes_keeps_weights_optimiser_and_schedule(whole_runs, moved_runs, kind, before, after):
    """Whether the moments went on the losses tell, too: the last ones would be 0.3 % away from those of DDP if not."""
    parts, output = moved_runs(kind, before, after)
    assert f"was written by {before} processes, now there are {after}: weights, optimiser and schedule" in output
    assert "the counts of NaN batches and skipped samples start again" in output
    assert (losses_of(parts)[:, 3] == losses_of(whole_runs(kind, before))[:, 3]).all(), "the same rates"
    assert losses_of(parts) == pytest.approx(losses_of(moved_runs("ddp", before, after)[0]), rel=1e-4)
    if kind == "ddp":
        state = torch.load(parts / "checkpoint-4/optimizer.bin", weights_only=True)["state"]
        assert {int(s["step"]) for s in state.values()} == {4}, "the moments went on, they did not begin anew"


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_loss_of_one_process_is_dropped_by_all_and_none_waits(world, tmp_path, kind):
    """At the second of two accumulated batches, when gradients are about to be exchanged."""
    run(kind, world, tmp_path / "out", TEST_NAN="1:4")
    lines = steps_of(tmp_path / "out")
    assert [line.get("nonfinite_batches") for line in lines] == [None, 1, 1, 1]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    read = [json.loads((tmp_path / f"out/checkpoint-4/streams_{n}.json").read_text()) for n in range(2)]
    assert [streams["mmu"]["batches"] for streams in read] == [9, 9], "eight to learn from, and the dropped one"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())


def test_processes_join_without_being_told_that_these_are_cpus(world, tmp_path, whole_runs):
    done = start([*launcher("ddp", 2), str(WORKER)], world, tmp_path / "out", {}, environment("zero2"))
    assert done.returncode == 0, done.stderr
    assert same(weights(whole_runs("ddp")), weights(tmp_path / "out")), "they must learn together"
    assert json.loads((tmp_path / "out/checkpoint-4/metadata.json").read_text())["num_processes"] == 2


def test_a_launch_that_falls_apart_into_single_runs_is_refused(world, tmp_path):
    settings = {"distributed_type": "MULTI_CPU", "num_processes": 2, "num_machines": 1, "machine_rank": 0}
    file = tmp_path / "multi_cpu.yaml"
    file.write_text(yaml.safe_dump(settings | {"compute_environment": "LOCAL_MACHINE", "use_cpu": True}))
    launch = [tiny.ACCELERATE, "launch", "--config_file", str(file), str(WORKER)]
    done = start(launch, world, tmp_path / "out", {}, environment("zero2"))
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert "error: several processes were launched, but each runs alone" in done.stderr


@pytest.mark.parametrize(("name", "options"), [("1_cpu", ["--quiet"]), ("2_cpu_ddp", [])], ids=["1", "2"])
def test_what_a_launcher_prints_ends_in_the_users_mistake(world, tmp_path, name, options):
    command = [*accelerate_launch(name), *options, str(REPOSITORY / "training/train.py")]
    done = start(command, world, tmp_path / "out", {"training.modle": 1}, environment("ddp"))
    assert done.returncode == 1 and ("Traceback" in done.stderr) == (not options)
    assert "error: " in (last := done.stderr.rstrip("=\n").splitlines()[-1]) and "training.modle" in last
