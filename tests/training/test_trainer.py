"""Runs of the trainer from end to end on a tiny world: learning, stopping, continuing, showing."""

import json
import math
import os
import shutil
import subprocess
import time
from itertools import product
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest
import torch
from PIL import Image

from common.errors import UserError
from models import Showo
from tests.training import tiny
from tests.training.tiny import arguments, make_trainer, metrics_of, same, steps_of, weights
from tests.training.tiny import train as run
from tests.training.tiny_sources import clip_settings
from training.checkpointing import checkpoints
from training.guards import only_run_in
from training.metrics import StepMetrics

ACCUMULATION, CHECKPOINTING = {"training.gradient_accumulation_steps": 2}, {"model.gradient_checkpointing": True}
PANELS = ("generated-images", "original-images-v-s-reconstructed-images-v-s-predicted-images")


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, average and metrics of two runs are equal to the last bit."""
    a, b = checkpoints(one)[-1], checkpoints(other)[-1]
    assert a.name == b.name and same(weights(a), weights(b))
    first, second = (torch.load(folder / "average.pt", weights_only=True) for folder in (a, b))
    assert first["updates"] == second["updates"] and same(first["shadow"], second["shadow"])
    first, second = (torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in (a, b))
    assert all(same(state, second[key]) for key, state in first.items())
    assert metrics_of(one) == metrics_of(other)
    assert (a / "metadata.json").read_text() == (b / "metadata.json").read_text()


# ---- one whole run, looked at from several sides ----


def test_a_run_leaves_checkpoints_config_images_and_the_final_model(finished):
    trainer, output_dir = finished
    assert [folder.name for folder in checkpoints(output_dir)] == ["checkpoint-3", "checkpoint-6"]
    assert "max_train_steps: 6" in (output_dir / "config.yaml").read_text()
    for folder in (output_dir, output_dir / "checkpoint-6" / "unwrapped_model"):
        assert same(dict(Showo.from_pretrained(str(folder)).named_parameters()), trainer.average.shadow)
    assert trainer.state.streams["t2i"].batches == 6
    assert sorted(path.name for path in (output_dir / "images").iterdir()) == [f"{p}-00000006.png" for p in PANELS]
    for file in (output_dir / "images").iterdir():
        sheet = Image.open(file).convert("RGB")
        assert min(sheet.size) > 100 and len(sheet.getcolors(sheet.width * sheet.height)) > 20


def test_the_published_names_are_logged(finished):
    trainer, output_dir = finished
    steps = [line for line in metrics_of(output_dir, timing=True) if "lr" in line]
    names = {"step", "step_loss_t2i", "step_loss_lm", "step_loss_mmu", "lr", "avg_masking_rate", "padding_share"}
    names |= {"accuracy/t2i", "accuracy/lm", "accuracy/mmu", "memory_gib"}
    names |= {"samples/sec/gpu", "tokens/sec/gpu", "data_time", "batch_time"}
    buckets = {f"loss_t2i_by_mask_ratio/{low}" for low in ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")}
    norms = {f"grad_norm/{name}" for name, _ in trainer.model.named_parameters()}
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert set().union(*steps) & buckets
    for line in steps:
        assert line.keys() - buckets == names | (norms if line["step"] in (3, 6) else set())
        assert 4 < line["step_loss_t2i"] < 8 and 0 < line["avg_masking_rate"] <= 1
        assert 0 <= line["data_time"] < line["batch_time"]
        assert line["samples/sec/gpu"] == pytest.approx(7 / line["batch_time"])
        assert all(0 <= line[name] < 1 for name in norms & line.keys())
    assert steps[2]["grad_norm/showo.lm_head.bias"] > 0
    cosine = [1e-3 * (1 + math.cos(math.pi * i / 4)) for i in range(1, 5)]
    assert [line["lr"] for line in steps] == pytest.approx([1e-3, 2e-3, *cosine]), "the rate of the step to come"


def test_no_path_of_this_machine_is_saved_beyond_the_given_one(world, tmp_path, monkeypatch):
    shutil.copytree(world / "llm", tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    settings = {"model.showo.llm_model_path": "llm", "training.max_train_steps": 1, "training.batch_size_mmu": 0}
    run(world, tmp_path / "out", settings)
    content = (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path) not in content and json.loads(content)["llm_model_path"] == "llm"
    shutil.rmtree(tmp_path / "llm")
    assert Showo.from_pretrained(str(tmp_path / "out")).config.llm_config["hidden_size"] == 32


# ---- learning ----


@pytest.mark.slow
def test_it_learns_one_batch_by_heart(world, tmp_path):
    settings = {"optimizer.params.learning_rate": 1e-2, "training.max_train_steps": 60}
    settings |= {"training.min_masking_rate": 0.5, "training.cond_dropout_prob": 0, "training.overfit_one_batch": True}
    trainer = make_trainer(world, tmp_path, settings)

    def losses_after(steps: int) -> dict[str, float]:
        for _ in range(steps):
            trainer.metrics = StepMetrics()
            trainer.step()
        return trainer.summary(trainer.progress())

    first, last = losses_after(1), losses_after(40)
    for name in ("step_loss_t2i", "step_loss_lm", "step_loss_mmu"):
        assert first[name] > 5 and last[name] < 2.5, (name, first[name], last[name])


@pytest.mark.slow
def test_packing_learns_the_same_and_tells_how_much_padding_is_gone(world, tmp_path, finished):
    held_out = {"dataset.params.eval_t2i_shards_path_or_url": world / "train-000000.tar", "experiment.eval_every": 3}
    run(world, tmp_path, held_out | {"dataset.packing": True, "experiment.generate_every": 6})
    for before, after in zip(steps_of(finished[1]), steps_of(tmp_path), strict=True):
        assert after["padding_share_unpacked"] == pytest.approx(before["padding_share"])
        assert after["padding_share"] < 0.8 * before.pop("padding_share")
        assert {name: after[name] for name in before} == pytest.approx(before, rel=1e-3, abs=1e-5)
    assert "eval_loss_t2i" in after and (tmp_path / "images").is_dir(), "evaluation and samples are as ever"


def test_the_rate_follows_optimiser_steps_under_accumulation(world, tmp_path):
    trainer = make_trainer(world, tmp_path / "out", {"training.gradient_accumulation_steps": 2})
    moved = []
    for _ in range(3):
        before = trainer.model.showo.lm_head.bias.detach().clone()
        trainer.step()
        moved.append(not torch.equal(before, trainer.model.showo.lm_head.bias))
    assert moved == [False, True, True], "the first rate of the warm-up is 0"
    assert trainer.schedule.get_last_lr()[0] == pytest.approx(1e-3 * (1 + math.cos(math.pi / 4)))
    assert [flow.batches for flow in trainer.flows.values()] == [6, 6, 6]
    assert trainer.average.updates == trainer.state.global_step == 3
    assert trainer.metrics.sums["batches"] == 6 and trainer.metrics.sums["samples"] == 6 * 7


def test_accumulating_equals_one_large_batch(world, tmp_path):
    """Two batches of the t2i flow, whose rows have equally many supervised positions, or one of twice the size."""
    settings = {f"training.batch_size_{name}": 0 for name in ("lm", "mmu")}
    settings |= {"training.predict_all_tokens": True, "training.cond_dropout_prob": 0}
    gradients = []
    for accumulation, batch_size in ((2, 2), (1, 4)):
        sizes = {"training.gradient_accumulation_steps": accumulation, "training.batch_size_t2i": batch_size}
        trainer = make_trainer(world, tmp_path, settings | sizes | {"experiment.log_grad_norm_every": 1})
        trainer.task.builder.noise.schedule = lambda t: torch.full_like(t, 1.0)  # all masked: no matter which draws
        trainer.step()
        gradients.append(torch.stack(list(trainer.gradient_norms.values())))
    torch.testing.assert_close(*gradients)


def test_shared_bits_are_of_embeddings_that_are_trained(world, tmp_path):
    trainer = make_trainer(world, tmp_path, {"training.share_code_bits": True})
    assert len(trainer.optimizer.param_groups) == 3
    trainer.model.requires_grad_(False)
    with pytest.raises(UserError, match="share_code_bits changes embeddings, which this run does not train"):
        trainer.task.extend_optimizer(trainer.optimizer, trainer.model)


# ---- stopping and continuing ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("train", {}),
        ("train", ACCUMULATION | {"training.max_grad_norm": 1.0, "dataset.params.num_workers": 2}),
        ("train", CHECKPOINTING | {"training.mixed_precision": "bf16", "training.und_mask_ratio": 0.4}),
        ("train", {"experiment.log_every": 2, "training.share_code_bits": True}),  # the stop is between two log lines
        ("train", ACCUMULATION | CHECKPOINTING | {"dataset.packing": True}),
        ("train", {"model.showo.w_clip_vit": True, "training.max_train_steps": 6, "training.ema_decay": 0.9}),
        ("tokenizer", ACCUMULATION | {"dataset.params.num_workers": 2, "experiment.log_every": 2}),
    ],
    ids=[
        "plain",
        "accumulation-clipping-workers",
        "bf16-checkpointing",
        "log-every-2-shared-bits",
        "packing",
        "clip",
        "tokenizer",
    ],
)
def test_a_continued_run_equals_an_uninterrupted_one_to_the_last_bit(world, tmp_path, monkeypatch, name, settings):
    monkeypatch.setattr("training.data.sources.CHUNK", 7)
    settings = (clip_settings(world) if "model.showo.w_clip_vit" in settings else {}) | settings
    settings |= {"experiment.generate_every": 6, "experiment.save_every": 4}
    run(world, tmp_path / "whole", settings, name)
    assert [folder.name for folder in checkpoints(tmp_path / "whole")][-1] == "checkpoint-6", "the last step has one"
    stopped = make_trainer(world, tmp_path / "parts", settings | {"experiment.save_every": 99}, name)
    tiny.stop_in_step(stopped, 3)
    stopped.train()
    assert [folder.name for folder in checkpoints(tmp_path / "parts")] == ["checkpoint-3"]
    assert not (tmp_path / "parts" / "model.safetensors").exists(), "only a finished run has a final model"
    torch.manual_seed(99)
    run(world, tmp_path / "parts", settings, name)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def has_ended(output_dir: Path) -> bool:
    """Whether no process holds the folder's lock any more."""
    try:
        with only_run_in(output_dir):
            return True
    except UserError:
        return False


def wait_until(holds, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not holds():
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)


ENDLESS = {"training.max_train_steps": 100000, "experiment.save_every": 100000, "dataset.params.num_workers": 1}
LAUNCHED = [("torchrun", SIGTERM), *product(("1_cpu", "2_cpu_ddp"), (SIGTERM, SIGUSR1, SIGINT))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("", SIGTERM), *(pytest.param(*launched, marks=pytest.mark.multiprocess) for launched in LAUNCHED)],
)
def test_a_signal_finishes_the_step_and_saves(world, tmp_path, launcher, number):
    """A launcher hands SIGTERM on to several processes; else the training notices that it is gone.

    Of two processes started by torchrun one gets the signal, and tells the other.
    """
    out, known = tmp_path / "out", {"": (), "torchrun": tiny.TORCHRUN}
    command = known[launcher] if launcher in known else tiny.accelerate_launch(launcher)
    process = tiny.start_script("training/train.py", arguments(world, out, ENDLESS), tmp_path, command)
    wait_until(lambda: (out / "metrics.jsonl").exists() or process.poll() is not None, process)
    assert (out / "metrics.jsonl").exists(), process.communicate()[0]
    target = process.pid
    if launcher == "torchrun":
        target = subprocess.run(["pgrep", "-P", str(target)], capture_output=True, text=True).stdout.split()[-1]
    os.kill(int(target), number)
    output, _ = process.communicate(timeout=120)
    assert launcher not in known or process.returncode == 0, output
    wait_until(lambda: has_ended(out), process)
    (folder,) = checkpoints(out)
    saved = json.loads((folder / "metadata.json").read_text())
    assert folder.name == f"checkpoint-{saved['global_step']}" and metrics_of(out)[-1]["step"] == saved["global_step"]
    assert len(list(folder.glob("random_states_*.pkl"))) == saved["num_processes"]


@pytest.mark.slow
def test_the_script_runs_from_anywhere_under_accelerate_launch(world, tmp_path):
    given = arguments(world, Path("runs/out"), {"training.max_train_steps": 2})
    output = tiny.finish(tiny.start_script("training/train.py", given, tmp_path, tiny.accelerate_launch("1_cpu")))
    assert Showo.from_pretrained(str(tmp_path / "runs/out")).config.num_vq_tokens == 16
    assert "CLIPImageProcessor" not in output and "Traceback" not in output


# ---- other settings that must work ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"training.noise_type": "random_replace", "training.label_smoothing": 0.1},
        {"training.mask_contiguous_region_prob": 0.5, "training.predict_all_tokens": True},
        {"training.batch_size_t2i": 0},
        {"training.batch_size_lm": 0, "training.batch_size_mmu": 0, "training.ema_decay": None},
        {"attn_implementation": "eager", "training.mixed_precision": "bf16", "lr_scheduler.scheduler": "linear"},
    ],
    ids=["random-replace", "contiguous", "no-t2i", "t2i-only", "eager-bf16"],
)
def test_settings_run_and_log_finite_losses(world, tmp_path, settings):
    every = {"experiment.save_every": 2, "experiment.generate_every": 2, "training.max_train_steps": 2}
    run(world, tmp_path, settings | every)
    losses = [v for line in steps_of(tmp_path) for k, v in line.items() if k.startswith("step_loss")]
    assert losses and all(0 < loss < math.inf for loss in losses)
    assert Showo.from_pretrained(str(tmp_path)) is not None
