"""Runs of the trainer from end to end on a tiny world: learning, stopping, continuing, showing, and mistakes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.errors import UserError
from models import Showo
from tests.training.tiny import TORCHRUN, arguments, finish, make_trainer, metrics_of, start_script, write_llm
from tests.training.tiny import train as run
from training.checkpointing import checkpoints
from training.guards import only_run_in
from training.metrics import StepMetrics

ROOT = Path(__file__).resolve().parents[2]
PANELS = ("generated-images", "original-images-v-s-reconstructed-images-v-s-predicted-images")


def launch(world, output_dir, overrides=None, *, folder, launcher=()) -> subprocess.Popen:
    return start_script("training/train.py", arguments(world, output_dir, overrides), folder, launcher)


def wait_for_a_step(process: subprocess.Popen, output_dir: Path) -> None:
    deadline = time.monotonic() + 240
    while not (output_dir / "metrics.jsonl").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, average and metrics of two runs are equal to the last bit."""
    a, b = checkpoints(one)[-1], checkpoints(other)[-1]
    assert a.name == b.name
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name
    first, second = (torch.load(folder / "average.pt", weights_only=True) for folder in (a, b))
    assert first["updates"] == second["updates"]
    assert all(torch.equal(tensor, second["shadow"][name]) for name, tensor in first["shadow"].items())
    states = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in (a, b)]
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())
    assert metrics_of(one) == metrics_of(other)
    assert (a / "metadata.json").read_text() == (b / "metadata.json").read_text()


# ---- one whole run, looked at from several sides ----


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Six steps with all three flows."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    trainer = run(world, output_dir)
    return trainer, output_dir


def test_a_run_leaves_checkpoints_config_and_the_final_model(finished):
    trainer, output_dir = finished
    assert [folder.name for folder in checkpoints(output_dir)] == ["checkpoint-3", "checkpoint-6"]
    assert "max_train_steps: 6" in (output_dir / "config.yaml").read_text()
    final = Showo.from_pretrained(str(output_dir))
    saved = Showo.from_pretrained(str(output_dir / "checkpoint-6" / "unwrapped_model"))
    for name, parameter in final.named_parameters():
        assert torch.equal(parameter, trainer.average.shadow[name])
        assert torch.equal(parameter, dict(saved.named_parameters())[name])
    assert trainer.state.streams["t2i"].batches == 6


def test_the_published_names_are_logged(finished):
    _, output_dir = finished
    lines = metrics_of(output_dir, timing=True)
    steps = [line for line in lines if "lr" in line]
    names = {"step", "step_loss_t2i", "step_loss_lm", "step_loss_mmu", "lr", "avg_masking_rate", "padding_share"}
    names |= {"accuracy/t2i", "accuracy/lm", "accuracy/mmu", "memory_gib"}
    clock = {"samples/sec/gpu", "tokens/sec/gpu", "data_time", "batch_time"}
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    buckets = {f"loss_t2i_by_mask_ratio/{low}" for low in ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")}
    steps = [{key: value for key, value in line.items() if not key.startswith("grad_norm/")} for line in steps]
    assert all(set(line) - buckets == names | clock for line in steps)
    assert set().union(*steps) & buckets
    for line in steps:
        assert 4 < line["step_loss_t2i"] < 8 and 0 < line["avg_masking_rate"] <= 1
        assert 0 <= line["data_time"] < line["batch_time"]
        assert line["samples/sec/gpu"] == pytest.approx(7 / line["batch_time"])


def test_gradient_norms_are_logged_for_every_parameter(finished):
    trainer, output_dir = finished
    norms = [line for line in metrics_of(output_dir) if any(key.startswith("grad_norm/") for key in line)]
    assert [line["step"] for line in norms] == [3, 6]
    for line in norms:
        found = {key: value for key, value in line.items() if key.startswith("grad_norm/")}
        assert found.keys() == {f"grad_norm/{name}" for name, _ in trainer.model.named_parameters()}
        assert all(0 <= value < 1 for value in found.values())
        assert line["grad_norm/showo.lm_head.bias"] > 0


def test_the_rate_follows_warm_up_and_cosine(finished):
    _, output_dir = finished
    rates = [line["lr"] for line in metrics_of(output_dir) if "lr" in line]  # of the step to come
    assert rates == pytest.approx([1e-3, 2e-3] + [1e-3 * (1 + math.cos(math.pi * i / 4)) for i in range(1, 5)])


def test_both_panels_are_drawn(finished):
    _, output_dir = finished
    assert sorted(path.name for path in (output_dir / "images").iterdir()) == [f"{p}-00000006.png" for p in PANELS]
    for panel in PANELS:
        sheet = Image.open(output_dir / "images" / f"{panel}-00000006.png").convert("RGB")
        assert min(sheet.size) > 100 and len(sheet.getcolors(sheet.width * sheet.height)) > 20


def test_no_path_of_this_machine_is_saved_beyond_the_given_one(world, tmp_path, monkeypatch):
    shutil.copytree(world / "llm", tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    settings = {"model.showo.llm_model_path": "llm", "training.max_train_steps": 1, "training.batch_size_mmu": 0}
    run(world, tmp_path / "out", settings)
    content = (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path) not in content
    assert json.loads(content)["llm_model_path"] == "llm"
    shutil.rmtree(tmp_path / "llm")
    assert Showo.from_pretrained(str(tmp_path / "out")).config.llm_config["hidden_size"] == 32


# ---- learning ----


@pytest.mark.slow
def test_it_learns_one_batch_by_heart(world, tmp_path):
    settings = {
        "optimizer.params.learning_rate": 1e-2,
        "training.max_train_steps": 60,
        "training.min_masking_rate": 0.5,
    }
    settings |= {"training.cond_dropout_prob": 0, "training.overfit_one_batch": True}
    trainer = make_trainer(world, tmp_path, settings)

    def losses_after(steps: int) -> dict[str, float]:
        for _ in range(steps):
            trainer.metrics = StepMetrics()
            trainer.step()
        return trainer.summary(trainer.progress())

    first, last = losses_after(1), losses_after(40)
    for name, most in {"step_loss_t2i": 2.5, "step_loss_lm": 2.5, "step_loss_mmu": 2.5}.items():
        assert first[name] > 5 and last[name] < most, (name, first[name], last[name])


# ---- stopping and continuing ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training.gradient_accumulation_steps": 2, "training.max_grad_norm": 1.0, "dataset.params.num_workers": 2},
        {"training.mixed_precision": "bf16", "model.gradient_checkpointing": True, "training.und_mask_ratio": 0.4},
        {"experiment.log_every": 2},  # the stop is between two log lines
        {"training.gradient_accumulation_steps": 2, "model.gradient_checkpointing": True, "dataset.packing": True},
    ],
    ids=["plain", "accumulation-clipping-workers", "bf16-checkpointing", "log-every-2", "packing"],
)
def test_a_continued_run_equals_an_uninterrupted_one_to_the_last_bit(world, tmp_path, monkeypatch, settings):
    monkeypatch.setattr("training.data.sources.CHUNK", 7)
    run(world, tmp_path / "whole", settings)
    stopped = make_trainer(world, tmp_path / "parts", settings)
    step = stopped.step

    def stop_in_the_third():
        stopped.stop_signals.requested = stopped.state.global_step == 2
        return step()

    stopped.step = stop_in_the_third
    stopped.train()
    assert [folder.name for folder in checkpoints(tmp_path / "parts")] == ["checkpoint-3"]
    assert not (tmp_path / "parts" / "model.safetensors").exists(), "only a finished run has a final model"
    torch.manual_seed(99)
    run(world, tmp_path / "parts", settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


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
        trainer = make_trainer(world, tmp_path, settings | sizes)
        trainer.task.builder.noise.schedule = lambda t: torch.full_like(t, 1.0)  # all masked: no matter which draws
        trainer.config.experiment.log_grad_norm_every = 1
        trainer.step()
        gradients.append(torch.stack(list(trainer.gradient_norms.values())))
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_a_finished_run_started_again_takes_no_step(world, tmp_path, finished):
    _, output_dir = finished
    shutil.copytree(output_dir, tmp_path / "out")
    trainer = run(world, tmp_path / "out")
    assert trainer.state.global_step == 6
    assert metrics_of(tmp_path / "out") == metrics_of(output_dir)
    assert all(torch.equal(tensor, weights(output_dir)[name]) for name, tensor in weights(tmp_path / "out").items())


def test_a_run_can_begin_from_weights_and_ignore_checkpoints(world, tmp_path, finished):
    _, output_dir = finished
    start = {"model.showo.pretrained_model_path": str(output_dir), "experiment.resume_from_checkpoint": None}
    trainer = make_trainer(world, tmp_path / "out", start)
    trainer.resume()
    assert trainer.state.global_step == 0
    given = weights(output_dir)
    assert given and all(torch.equal(p, given[n]) for n, p in trainer.model.named_parameters() if n in given)


def test_signals_stop_at_the_end_of_a_step_and_are_given_back(world, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    trainer = make_trainer(world, tmp_path / "out")
    step = trainer.step

    def interrupted():
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step()

    trainer.step = interrupted
    trainer.train()
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_exits_0(world, tmp_path):
    settings = {"training.max_train_steps": 100000, "experiment.save_every": 100000, "dataset.params.num_workers": 1}
    process = launch(world, tmp_path / "out", settings, folder=tmp_path)
    wait_for_a_step(process, tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    (folder,) = checkpoints(tmp_path / "out")
    step = json.loads((folder / "metadata.json").read_text())["global_step"]
    assert folder.name == f"checkpoint-{step}" and metrics_of(tmp_path / "out")[-1]["step"] == step
    trainer = make_trainer(world, tmp_path / "out", settings)
    trainer.resume()
    trainer.step()
    assert trainer.state.global_step == step + 1


@pytest.mark.slow
def test_the_script_runs_from_anywhere_under_accelerate_launch(world, tmp_path):
    configs = ROOT / "accelerate_configs" / "1_cpu.yaml"
    accelerate = Path(sys.executable).with_name("accelerate")
    launcher = [str(accelerate), "launch", "--config_file", str(configs)]
    process = launch(world, "runs/out", {"training.max_train_steps": 2}, folder=tmp_path, launcher=launcher)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert Showo.from_pretrained(str(tmp_path / "runs/out")).config.num_vq_tokens == 16
    assert "CLIPImageProcessor" not in output and "Traceback" not in output


@pytest.mark.slow
def test_the_script_says_what_is_wrong_in_one_line_and_ends_with_2(world, tmp_path):
    process = launch(world, tmp_path / "out", {"training.batch_sise_t2i": 2}, folder=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.strip().splitlines()[-1].startswith("error: ") and "training.batch_size_t2i" in output
    assert "Traceback" not in output and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_continue_exactly_and_stop_together(world, tmp_path):
    """A signal to one of them makes both save the same step and leave."""
    settings = {"training.max_train_steps": 4, "experiment.save_every": 2}

    finish(launch(world, tmp_path / "whole", settings, folder=tmp_path, launcher=TORCHRUN))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    finish(launch(world, tmp_path / "parts", settings, folder=tmp_path, launcher=TORCHRUN))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    endless = {"training.max_train_steps": 100000, "experiment.save_every": 100000, "experiment.generate_every": 100000}
    process = launch(world, tmp_path / "out", endless, folder=tmp_path, launcher=TORCHRUN)
    wait_for_a_step(process, tmp_path / "out")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    finish(process)
    (folder,) = checkpoints(tmp_path / "out")
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {path.name for path in folder.iterdir()}


def has_ended(output_dir: Path) -> bool:
    """Whether no process holds the folder's lock any more."""
    try:
        with only_run_in(output_dir):
            return True
    except UserError:
        return False


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("launch_file", ["1_cpu", "2_cpu_ddp"])
def test_a_signal_to_the_launcher_saves_too(world, tmp_path, launch_file, number):
    """It hands SIGTERM on to several processes; else the training notices that it is gone."""
    accelerate = Path(sys.executable).with_name("accelerate")
    launcher = [str(accelerate), "launch", "--config_file", str(ROOT / f"accelerate_configs/{launch_file}.yaml")]
    endless = {"training.max_train_steps": 100000, "experiment.save_every": 100000, "experiment.generate_every": 100000}
    process = launch(world, tmp_path / "out", endless, folder=tmp_path, launcher=launcher)
    wait_for_a_step(process, tmp_path / "out")
    process.send_signal(number)
    process.communicate(timeout=120)
    deadline = time.monotonic() + 120
    while not has_ended(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.2)
    (folder,) = checkpoints(tmp_path / "out")
    assert metrics_of(tmp_path / "out")[-1]["step"] == json.loads((folder / "metadata.json").read_text())["global_step"]


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
    losses = [v for line in metrics_of(tmp_path) for k, v in line.items() if k.startswith("step_loss")]
    assert losses and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert Showo.from_pretrained(str(tmp_path)) is not None


# ---- mistakes, all found before a step is taken ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.showo.codebook_size": 128, "model.showo.vocab_size": 429}, "has 64 codes, but .*codebook_size is 128"),
        ({"dataset.preprocessing.resolution": 36}, "resolution=36 does not match .*num_vq_tokens=16: .*32 x 32 pixels"),
        ({"model.showo.num_vq_tokens": 17}, "num_vq_tokens is 17, expected a square"),
        ({"model.showo.llm_vocab_size": 291, "model.showo.vocab_size": 366}, "290 tokens, but .*llm_vocab_size is 291"),
        ({"model.showo.vocab_size": 400}, "vocab_size is 400, but .* = 365"),
        ({"model.showo.llm_model_path": "/nowhere/llm"}, "llm_model_path|/nowhere/llm"),
        ({"model.showo.load_from_showo": False}, "no file named|pytorch_model|safetensors"),
        ({"model.showo.pretrained_model_path": "/nowhere/showo"}, "/nowhere/showo"),
        ({"model.vq_model.vq_model_name": "/nowhere/vq"}, "/nowhere/vq"),
        ({"validation_prompts_file": "/nowhere.txt"}, "/nowhere.txt.*does not exist"),
        ({f"training.batch_size_{flow}": 0 for flow in ("t2i", "lm", "mmu")}, "all 0; nothing to train on"),
        ({"experiment.init_from": "/nowhere/stage"}, "/nowhere/stage"),
        ({"experiment.resume_from_checkpoint": "checkpoint-77"}, "'checkpoint-77': no such folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(world, tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as error:
        run(world, tmp_path / "out", settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_prompts_file_is_refused(world, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="is empty; write one prompt per line"):
        make_trainer(world, tmp_path, {"validation_prompts_file": str(tmp_path / "empty.txt")})


def test_a_launch_that_fell_apart_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("training.processes.Accelerator", lambda **_: type("Single", (), {"num_processes": 1}))
    with pytest.raises(UserError, match="2 processes were launched, but this one trains with 1"):
        make_trainer(world, tmp_path)


def test_weights_of_other_sizes_are_refused(world, tmp_path, finished):
    other = write_llm(tmp_path / "llm", world / "corpus.txt", 280)
    sizes = {"model.showo.llm_vocab_size": 280, "model.showo.vocab_size": 355}
    paths = {"model.showo.llm_model_path": str(other), "model.showo.pretrained_model_path": str(world / "magvitv2")}
    with pytest.raises(UserError, match="does not fit"):
        make_trainer(world, tmp_path / "out", sizes | paths)
