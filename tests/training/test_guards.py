"""What protects a run: folders, locks, signals, configurations, and losses that are no numbers."""

import errno
import json
import os
import shutil
import signal
from contextlib import nullcontext
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf

from common.errors import UserError
from models import Showo
from tests.training import tiny
from tests.training.tiny import config_of, metrics_of
from training import guards
from training.checkpointing import check_same_config, checkpoints
from training.guards import FiniteLosses, StopSignals, check_writable, full_disk_as_user_error, only_run_in
from training.processes import ProcessGroup
from training.trainer import Trainer


def make_trainer(world, output_dir, overrides=None) -> Trainer:
    return tiny.make_trainer(world, output_dir, {"experiment.generate_every": 99} | (overrides or {}))


def run(world, output_dir, overrides=None) -> Trainer:
    trainer = make_trainer(world, output_dir, overrides)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run") / "out"
    AcceleratorState._reset_state(True)
    run(world, output_dir)
    return output_dir


def assert_weights(model, folder) -> None:
    given = Showo.from_pretrained(str(folder)).state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())


# ---- the output folder ----


def test_an_output_folder_that_cannot_be_written_is_refused(world, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output_dir .*file/out cannot be written to.*give another folder"):
        make_trainer(world, tmp_path / "file" / "out")
    check_writable(tmp_path / "not" / "yet" / "there")
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(world, tmp_path, finished):
    shutil.copytree(finished, tmp_path / "out")
    before = metrics_of(tmp_path / "out")
    with only_run_in(tmp_path / "out"):
        with pytest.raises(UserError, match="another run is writing to"):
            run(world, tmp_path / "out")
    assert metrics_of(tmp_path / "out") == before
    run(world, tmp_path / "out")  # the lock ends with its run


@pytest.mark.slow
@pytest.mark.parametrize("where", ["model.safetensors", "metrics.jsonl"])
def test_a_disk_that_is_full_says_so_wherever_it_is_noticed(world, tmp_path, monkeypatch, where):
    trainer = make_trainer(world, tmp_path / "out")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", where)

    def fill_the_disk():
        target = (trainer.model, "save_pretrained") if where == "model.safetensors" else (trainer.tracker, "log")
        monkeypatch.setattr(*target, full)

    step = trainer.step
    trainer.step = lambda: (trainer.state.global_step == 4 and fill_the_disk(), step())[1]
    with pytest.raises(UserError, match="No space left.*last good checkpoint is .*checkpoint-3. Make room") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob(".incomplete*"))


def test_other_failures_keep_their_traceback():
    with pytest.raises(FileNotFoundError):
        with full_disk_as_user_error(str):
            open("/nowhere/at/all")


def test_a_folder_that_not_all_machines_share_is_refused(world, tmp_path):
    trainer = make_trainer(world, tmp_path / "out")
    trainer.process_group.any = lambda missing: True  # as another machine says
    with pytest.raises(UserError, match="is not the same folder for all processes; give one that all machines share"):
        trainer.train()
    process_group = ProcessGroup(trainer.accelerator)
    process_group.check_same("checkpoint-4", "they differ")
    process_group.group = object()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        patch.setattr(torch.distributed, "all_gather_object", lambda values, value, group: values.__setitem__(0, value))
        with pytest.raises(UserError, match="they differ"):
            process_group.check_same("checkpoint-4", "they differ")


# ---- signals ----


@pytest.mark.parametrize(
    ("arrive", "torchs_launcher", "interrupted", "left"),
    [
        ([(SIGTERM, 0), (SIGTERM, 5)], True, False, False),
        ([(SIGUSR1, 0), (SIGINT, 5)], False, True, False),
        ([(SIGINT, 0), (SIGINT, 0.9)], False, True, False),  # one Ctrl-C, from the terminal and from a launcher
        ([(SIGINT, 0), (SIGINT, 0.9), (SIGINT, 1.1)], False, True, True),
        ([(SIGINT, 0), (SIGTERM, 5)], False, True, False),  # the launcher of one process has ended
        ([(SIGINT, 0), (SIGTERM, 5)], True, True, True),  # a second Ctrl-C, as torch's launcher passes it on
    ],
)
def test_the_first_signal_asks_to_stop_and_a_second_ctrl_c_leaves(
    monkeypatch, capfd, arrive, torchs_launcher, interrupted, left
):
    before, codes = [signal.getsignal(number) for number in StopSignals.numbers], []
    monkeypatch.setattr(os, "_exit", codes.append)
    if torchs_launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopSignals(lambda: "checkpoint-4 is there") as stop:
        for number, at in arrive:
            assert not codes
            monkeypatch.setattr(guards.time, "monotonic", lambda at=at: at)
            os.kill(os.getpid(), number)
            assert stop.requested
    assert [signal.getsignal(number) for number in StopSignals.numbers] == before
    assert codes == [130] * left
    told = capfd.readouterr().err.split("\n")
    assert sum("finishing this step and saving" in line for line in told) == interrupted
    assert ("interrupted; checkpoint-4 is there" in told) == left
    with pytest.raises(KeyboardInterrupt, match="checkpoint-4 is there") if interrupted else nullcontext():
        stop.exit_if_interrupted()


# ---- the final model ----


def test_the_final_model_is_put_in_place_whole(world, tmp_path, finished, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    trainer = make_trainer(world, tmp_path / "out")

    def half(folder, **_):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "save_pretrained", half)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    run(world, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert not list((tmp_path / "out").glob(".incomplete*"))


@pytest.mark.slow
def test_the_last_step_has_a_checkpoint_whatever_save_every_is(world, tmp_path):
    settings = {"training.max_train_steps": 3, "experiment.save_every": 2}
    run(world, tmp_path / "out", settings)
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    again = make_trainer(world, tmp_path / "out", settings)
    again.step = lambda: pytest.fail("the run had ended")
    again.train()


# ---- a configuration that changed ----


def test_a_changed_configuration_is_refused_with_the_changes_listed(world, tmp_path, finished):
    shutil.copytree(finished, tmp_path / "out")
    changes = {"optimizer.params.learning_rate": 0.5, "training.mmu_coeff": 2.0, "experiment.log_every": 2}
    listed = (
        r": optimizer.params.learning_rate 0.002 → 0.5; training.mmu_coeff 1.0 → 2.0\. .*accept_config_changes=true"
    )
    with pytest.raises(UserError, match=listed):
        make_trainer(world, tmp_path / "out", changes)
    make_trainer(world, tmp_path / "out", changes | {"experiment.accept_config_changes": True}).resume()


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {"experiment.max_train_examples_t2i": 5}, "experiment.max_train_examples_t2i None → 5"),
        ({}, {"mask_schedule.params.power": 2}, "mask_schedule.params {} → {'power': 2}"),
        ({"mask_schedule.params.power": 2}, {}, "mask_schedule.params {'power': 2} → {}"),
        ({}, {"dataset.params.num_workers": 3}, "dataset.params.num_workers 0 → 3"),
        ({}, {"dataset.params.max_skipped_fraction": 0.5, "experiment.save_every": 77}, ""),
    ],
)
def test_a_change_counts_if_it_changes_what_is_learnt(world, tmp_path, before, now, told):
    OmegaConf.save(config_of(world, overrides=before), tmp_path / "config.yaml")
    with pytest.raises(UserError) if told else nullcontext() as error:
        check_same_config(tmp_path, config_of(world, overrides=now))
    assert not told or f": {told}. Undo the changes" in str(error.value)


def test_another_number_of_workers_begins_the_data_anew_if_it_is_accepted(world, tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path / "out")
    accepted = {"dataset.params.num_workers": 2, "experiment.accept_config_changes": True}
    trainer = make_trainer(world, tmp_path / "out", accepted)
    trainer.resume()
    told = capsys.readouterr().out
    assert "lm: the checkpoint was made with 1 loader workers, dataset.params.num_workers is 2" in told
    assert told.count("Its data starts again") == 3
    assert trainer.state.global_step == 6 and all(flow.batches == 0 for flow in trainer.flows.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told", "rates"),
    [
        ({"training.max_train_steps": 8}, "now decays over 8 steps, not 6; lr_scheduler.params.num_train", [0.067, 0]),
        (
            {"training.max_train_steps": 8, "lr_scheduler.params.num_training_steps": 6},
            "still decays over 6 steps and stays at its last value",
            [0, 0],
        ),
        ({"training.max_train_steps": 4}, "max_train_steps 6 → 4: the learning rate now decays over 4 steps", []),
    ],
)
def test_a_run_may_get_more_steps_or_fewer(world, tmp_path, finished, capsys, settings, told, rates):
    shutil.copytree(finished, tmp_path / "out")
    own = {"experiment.init_from": finished}  # without effect, since there are checkpoints
    trainer = make_trainer(world, tmp_path / "out", settings | own)
    used, step = [], trainer.step
    trainer.step = lambda: (used.append(trainer.optimizer.param_groups[0]["lr"]), step())[1]
    trainer.train()
    output = capsys.readouterr().out
    assert "checkpoint-6, step 6" in output and told in output and not (tmp_path / "out/abandoned-1").exists()
    assert trainer.state.global_step == max(6, settings["training.max_train_steps"])
    found = [line["lr"] / 2e-3 for line in metrics_of(tmp_path / "out")[6:]]
    assert found == pytest.approx(rates, abs=1e-3)
    first = {8: 0.25, 6: 0}.get(settings.get("lr_scheduler.params.num_training_steps", 8))
    assert not rates or used[0] / 2e-3 == pytest.approx(first, abs=1e-3), "the new schedule holds from the first step"


# ---- stages ----


@pytest.mark.slow
@pytest.mark.parametrize("source", ["", "checkpoint-6", "checkpoint-6/unwrapped_model"])
def test_a_stage_starts_from_the_weights_of_the_one_before(world, tmp_path, finished, source):
    trainer = make_trainer(world, tmp_path / "next", {"experiment.init_from": finished / source})
    assert trainer.start is None and trainer.state.global_step == 0
    assert_weights(trainer.model, finished)


@pytest.mark.slow
def test_checkpoint_0_copied_into_place_starts_a_stage_at_step_0(world, tmp_path, finished):
    shutil.copytree(finished / "checkpoint-6", tmp_path / "out" / "checkpoint-0")
    changes = {"optimizer.params.learning_rate": 1e-3}  # another stage has another configuration
    trainer = make_trainer(world, tmp_path / "out", changes)
    trainer.resume()
    assert trainer.state.global_step == 0 and not trainer.optimizer.state_dict()["state"]
    assert_weights(trainer.model, finished)
    trainer.train()
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["checkpoint-0", "checkpoint-3", "checkpoint-6"]


def test_a_published_checkpoint_goes_on_with_its_weights_and_the_rate_of_its_step(world, tmp_path, finished):
    published = tmp_path / "out" / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-6" / "unwrapped_model", published / "unwrapped_model")
    (published / "metadata.json").write_text('{"global_step": 4}')
    trainer = make_trainer(world, tmp_path / "out")
    trainer.resume()
    rates = [line["lr"] for line in metrics_of(finished) if "lr" in line]
    assert trainer.state.global_step == 4 and trainer.schedule.get_last_lr()[0] == pytest.approx(rates[3])
    trainer.train()
    assert trainer.state.global_step == 6


# ---- losses that are no numbers ----


def poison(trainer: Trainer, steps: set[int]) -> list[str]:
    """Makes the model's losses NaN at some calls; returns a list that gets what is reported."""
    forward, calls, said = trainer.forward, [], []

    def poisoned(**arguments):
        out = forward(**arguments)
        calls.append(1)
        if len(calls) in steps:
            out.losses["mmu"] = out.losses["mmu"] * float("nan")
        return out

    trainer.forward, trainer.finite.report = poisoned, said.append
    return said


def test_a_batch_with_a_nan_loss_is_named_and_not_learnt_from(world, tmp_path):
    trainer = make_trainer(world, tmp_path / "out")
    said = poison(trainer, {3, 4})
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.finite.dropped == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(flow.batches == 8 for flow in trainer.flows.values())
    assert len(said) == 2 and said[0].startswith(
        "step 3: batch dropped, loss of mmu is not finite; samples: t2i: train-"
    )
    assert [
        line["nonfinite_batches"] for line in metrics_of(tmp_path / "out") if "lr" in line and line["step"] == 6
    ] == [2]


def with_infinite_gradients(trainer: Trainer, steps: set[int]) -> list[str]:
    """Makes a gradient infinite at some steps; returns a list that gets what is reported."""
    calls, said = [], []

    def poisoned(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) in steps else gradient

    trainer.model.showo.lm_head.bias.register_hook(poisoned)
    trainer.finite.report = said.append
    return said


def test_gradients_that_are_no_numbers_are_named_and_change_nothing(world, tmp_path):
    settings = {"training.max_grad_norm": 1.0, "lr_scheduler.params.warmup_steps": 0, "training.ema_decay": None}
    trainer = make_trainer(world, tmp_path / "out", settings)
    said = with_infinite_gradients(trainer, {2})
    trainer.step()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.state.global_step == 2 and trainer.finite.dropped == 1
    assert said[0].startswith("step 2: gradients dropped, their norm is not finite; samples: t2i: train-")
    trainer.step()
    assert not any(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_too_many_dropped_batches_end_the_run():
    said, nan, one = [], torch.tensor(float("nan")), torch.tensor(1.0)
    guard = FiniteLosses(lambda bad: True, 1, said.append)
    assert not guard.accept({"t2i": one}, ["t2i: a"], 1), "all processes drop what one must drop"
    assert said == ["step 1: batch dropped, on another process"]
    with pytest.raises(UserError, match="2 batches had a NaN or infinite loss or gradient.*max_nonfinite_batches=1"):
        guard.accept_gradients(nan, ["t2i: a"], 2)
    assert FiniteLosses(lambda bad: bad, None, print).accept({"t2i": nan}, [], 1), "without a limit nothing is checked"


@pytest.mark.slow
def test_a_continued_run_goes_on_counting_dropped_batches(world, tmp_path):
    settings = {"training.max_train_steps": 4, "experiment.save_every": 2}
    first = make_trainer(world, tmp_path / "out", settings)
    poison(first, {2})
    first.train()
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    assert run(world, tmp_path / "out", settings).finite.dropped == 1


# ---- settings that must do what they say ----


@pytest.mark.slow
def test_overfit_one_batch_sees_one_batch(world, tmp_path):
    trainer = make_trainer(world, tmp_path / "out", {"training.overfit_one_batch": True})
    first, second = trainer.step(), trainer.step()
    assert first.texts == second.texts and torch.equal(first.codes, second.codes)
    assert first.keys == second.keys
    trainer.save()
    settings = {"training.overfit_one_batch": True, "experiment.accept_config_changes": True}
    continued = make_trainer(world, tmp_path / "out", settings)
    continued.resume()
    assert continued.step().keys == first.keys, "the same one in a continued run"
    ordinary = make_trainer(world, tmp_path / "other")
    assert ordinary.step().keys != ordinary.step().keys


def test_the_rate_stays_where_no_optimiser_step_was_taken(world, tmp_path, monkeypatch):
    """As fp16 does while its scale is sought."""
    trainer = make_trainer(world, tmp_path / "out")
    rates = []
    for skipped in (True, False, True, False):
        monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
        trainer.step()
        rates.append(trainer.schedule.get_last_lr()[0])
    assert rates == pytest.approx([0, 1e-3, 1e-3, 2e-3])


def test_skipped_samples_of_all_processes_are_logged(world, tmp_path):
    trainer = make_trainer(world, tmp_path / "out")
    trainer.flows["t2i"].counters.skip("unreadable_image", "a.png")
    trainer.flows["lm"].counters.skip("truncated_shard", "b.parquet", 40)
    trainer.sum_over_processes = lambda values: values * 2
    assert trainer.skipped_data() == {
        "data/skipped/t2i/unreadable_image": 2,
        "data/skipped/lm/truncated_shard": 80,
    }


@pytest.mark.slow
def test_max_grad_norm_is_the_norm_that_gradients_are_cut_to(world, tmp_path):
    totals = []
    for limit in (None, 0.01):
        settings = {"training.max_grad_norm": limit, "experiment.log_grad_norm_every": 1}
        trainer = make_trainer(world, tmp_path / "out", settings)
        trainer.step()
        sizes = {name: p.numel() for name, p in trainer.model.named_parameters()}
        norms = [sizes[name.removeprefix("grad_norm/")] * norm for name, norm in trainer.gradient_norms.items()]
        totals.append(torch.stack(norms).norm().item())
    assert totals[0] > 0.1 and totals[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_mixed_precision_is_what_the_layers_compute_in(world, tmp_path, precision, dtype):
    trainer, seen = make_trainer(world, tmp_path / "out", {"training.mixed_precision": precision}), set()
    layer = trainer.model.showo.model.layers[0].mlp.fc1
    layer.register_forward_hook(lambda module, given, result: seen.add(result.dtype))
    trainer.step()
    assert seen == {dtype} and layer.weight.dtype == torch.float32


def test_scale_lr_multiplies_the_rate_by_the_rows_of_a_step(world, tmp_path):
    settings = {"optimizer.params.scale_lr": True, "training.gradient_accumulation_steps": 2}
    trainer = make_trainer(world, tmp_path / "out", settings)
    assert trainer.optimizer.param_groups[0]["initial_lr"] == pytest.approx(2e-3 * (4 + 1 + 2) * 2)


@pytest.mark.slow
def test_held_out_losses_are_the_same_every_time_and_disturb_nothing(world, tmp_path):
    shards = str(world / "train-000001.tar")
    held_out = {f"dataset.params.eval_{flow}_shards_path_or_url": shards for flow in ("t2i", "mmu")}
    held_out["dataset.params.eval_lm_shards_path_or_url"] = str(world / "texts.parquet")
    held_out |= {"experiment.eval_every": 2, "experiment.eval_batches": 2, "training.eval_mask_ratios": "[0.25,0.75]"}
    run(world, tmp_path / "with", held_out)
    run(world, tmp_path / "without")
    lines = [line for line in metrics_of(tmp_path / "with") if "eval_loss_lm" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    losses = {"eval_loss_t2i/mask_0.25", "eval_loss_t2i/mask_0.75", "eval_loss_lm", "eval_loss_mmu"}
    assert losses < set(lines[0]) and all(0 < lines[0][name] < 10 for name in losses)
    assert lines[-1]["eval_loss_mmu"] < lines[0]["eval_loss_mmu"]
    evaluated, plain = (metrics_of(tmp_path / name) for name in ("with", "without"))
    assert "eval" not in str(plain)
    trained = [{key: value for key, value in line.items() if not key.startswith("eval_")} for line in evaluated]
    assert trained == plain, "training must not notice that it is evaluated"
    trainer = make_trainer(world, tmp_path / "again", held_out)
    twice = [trainer.evaluate() for _ in range(2)]
    assert twice[0] == twice[1]


# ---- checkpoints and launches that do not serve ----


def test_an_incomplete_checkpoint_is_refused(world, tmp_path):
    folder = tmp_path / "out" / "checkpoint-4"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"metadata\.json is missing"):
        make_trainer(world, tmp_path / "out")
    (folder / "metadata.json").write_text('{"global_step": 4}')
    with pytest.raises(UserError, match="checkpoint-4 is incomplete .*remove it or copy it again"):
        make_trainer(world, tmp_path / "out")


def test_a_checkpoint_of_another_shape_is_refused(world, tmp_path, finished):
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(world / "llm", tmp_path / "llm")
    settings = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(settings | {"hidden_size": 16, "intermediate_size": 32}))
    changes = {"model.showo.llm_model_path": tmp_path / "llm", "experiment.accept_config_changes": True}
    with pytest.raises(UserError, match="checkpoint-6 cannot be continued from") as error:
        run(world, tmp_path / "out", changes | {"training.max_train_steps": 7})
    assert "\n" not in str(error.value)


def test_a_launch_with_deepspeed_needs_it_installed(world, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("training.processes.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="asks for DeepSpeed, which is not installed: pip install"):
        make_trainer(world, tmp_path / "out")
    assert not (tmp_path / "out").exists()
