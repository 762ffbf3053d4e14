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
from tests.training.test_checkpointing import pickles
from tests.training.tiny import config_of, make_trainer, metrics_of, poison, same, steps_of, weights
from tests.training.tiny import train as run
from training import guards
from training.checkpointing import check_same_config, checkpoints, describe_decay, disk_errors_as_user_errors
from training.guards import FiniteLosses, StopSignals, check_output_dir, only_run_in
from training.processes import ProcessGroup

STEPS = "training.max_train_steps"


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of a finished run, to do with as one likes."""
    return shutil.copytree(finished[1], tmp_path / "out")


def assert_weights(model, folder) -> None:
    assert same(model.state_dict(), Showo.from_pretrained(str(folder)).state_dict())


# ---- the output folder ----


def test_an_output_folder_that_cannot_be_written_is_refused(world, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="experiment.output_dir=.*file/out is not a folder .*give another"):
        make_trainer(world, tmp_path / "file" / "out")
    check_output_dir(tmp_path / "not" / "yet" / "there")
    assert not (tmp_path / "not").exists()


THEIRS = ["config.yaml", "metrics.jsonl", "config.json", "model.safetensors", "model-00001-of-00002.safetensors"]
THEIRS += ["images/holiday.png", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", THEIRS)
def test_somebody_elses_folder_is_refused_before_anything_is_written(world, tmp_path, name):
    """For example a base checkpoint that is given as `output_dir`."""
    for file in (name, "tokenizer.json", "notes.txt", ".lock"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("theirs")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"output_dir=.*/{name.split('/')[0]}.* was not written by this command"):
        make_trainer(world, tmp_path, {"experiment.resume_from_checkpoint": False})
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / name).read_text() == "theirs"


@pytest.mark.parametrize("sign", [".course.json", "checkpoint-0/config.json", "checkpoint-5/metadata.json", None])
def test_the_folder_of_a_run_of_ours_or_of_the_published_code_is_taken(tmp_path, sign):
    for name in ("notes.txt", "train.log", ".DS_Store", *([sign, "config.yaml", "metrics.jsonl"] if sign else [])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    check_output_dir(tmp_path)
    link = tmp_path.with_name("link")
    link.symlink_to(tmp_path)
    check_output_dir(link)
    link.unlink()


@pytest.mark.slow
def test_a_run_that_failed_before_its_first_checkpoint_can_be_started_again(world, tmp_path):
    trainer = make_trainer(world, tmp_path / "out")
    trainer.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    (tmp_path / "out/.lock").unlink()
    run(world, tmp_path / "out", {STEPS: 1})


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_a_third_has_nothing_to_do(world, finished, copied):
    with only_run_in(copied), pytest.raises(UserError, match="another run is writing to"):
        run(world, copied)
    trainer = make_trainer(world, copied)  # the lock ends with its run
    trainer.step = lambda: pytest.fail("the run had ended")
    trainer.train()
    assert metrics_of(copied) == metrics_of(finished[1]) and same(weights(copied), weights(finished[1]))


@pytest.mark.slow
def test_a_disk_that_is_full_says_so_wherever_it_is_noticed(world, tmp_path):
    """Here at a line of metrics.jsonl."""
    trainer = make_trainer(world, tmp_path / "out")
    step = trainer.step

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    trainer.step = lambda: (trainer.state.global_step == 4 and setattr(trainer.tracker, "log", full), step())[1]
    with pytest.raises(UserError, match="No space left.*last good checkpoint is .*checkpoint-3. Make room"):
        trainer.train()


def test_other_failures_keep_their_traceback(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors_as_user_errors(tmp_path):
        open("/nowhere/at/all")


def test_a_folder_that_not_all_machines_share_is_refused(world, tmp_path, monkeypatch):
    trainer = make_trainer(world, tmp_path / "out")
    trainer.process_group.any = lambda missing: True  # as another machine says
    with pytest.raises(UserError, match="is not the same folder for all processes; give one that all machines share"):
        trainer.train()
    process_group = ProcessGroup(trainer.accelerator)
    process_group.check_same("checkpoint-4", "they differ")
    process_group.group = object()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda all_, own, group: all_.__setitem__(0, own))
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
        ([(SIGINT, 0), (SIGUSR1, 5)], True, True, False),  # a job scheduler's, which asks for the same
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


def test_the_final_model_is_put_in_place_whole(world, copied, monkeypatch):
    before = (copied / "model.safetensors").read_bytes()
    trainer = make_trainer(world, copied)

    def half(folder, **_):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.model, "save_pretrained", half)
        trainer.train()
    assert (copied / "model.safetensors").read_bytes() == before
    run(world, copied)
    assert (copied / "model.safetensors").read_bytes() == before
    assert not list(copied.glob(".incomplete*"))


# ---- a configuration that changed ----


def test_a_changed_configuration_is_refused_unless_it_is_accepted(world, copied):
    changes = {"optimizer.params.learning_rate": 0.5}
    with pytest.raises(UserError, match=r": optimizer.params.learning_rate 0.002 → 0.5\. .*accept_config_changes=true"):
        make_trainer(world, copied, changes)
    make_trainer(world, copied, changes | {"experiment.accept_config_changes": True}).resume()


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {"experiment.max_train_examples_t2i": 5}, "experiment.max_train_examples_t2i None → 5"),
        ({}, {"mask_schedule.params.power": 2}, "mask_schedule.params {} → {'power': 2}"),
        ({"mask_schedule.params.power": 2}, {}, "mask_schedule.params {'power': 2} → {}"),
        (
            {},
            {"dataset.params.num_workers": 3, "training.mmu_coeff": 2, "experiment.log_every": 2},
            "dataset.params.num_workers 0 → 3; training.mmu_coeff 1.0 → 2.0",
        ),
        ({}, {"dataset.params.max_skipped_fraction": 0.5, "experiment.save_every": 77}, ""),
    ],
)
def test_a_change_counts_if_it_changes_what_is_learnt(world, tmp_path, before, now, told):
    OmegaConf.save(config_of(world, overrides=before), tmp_path / "config.yaml")
    with pytest.raises(UserError) if told else nullcontext() as error:
        check_same_config(tmp_path, config_of(world, overrides=now))
    assert not told or f": {told}. Undo the changes" in str(error.value)


def test_another_number_of_workers_begins_the_data_anew_if_it_is_accepted(world, copied, capsys):
    accepted = {"dataset.params.num_workers": 2, "experiment.accept_config_changes": True}
    trainer = make_trainer(world, copied, accepted)
    trainer.resume()
    told = capsys.readouterr().out
    assert "lm: the checkpoint was made with 1 loader workers, dataset.params.num_workers is 2" in told
    assert told.count("Its data starts again") == 3
    assert trainer.state.global_step == 6 and all(flow.batches == 0 for flow in trainer.flows.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told", "first", "rates"),
    [
        ({STEPS: 8}, "now decays over 8 steps, not 6; lr_scheduler.params.num_train", 0.25, [0.067, 0]),
        (
            {STEPS: 8, "lr_scheduler.params.num_training_steps": 6},
            "still decays over 6 steps and stays at its last value",
            0,
            [0, 0],
        ),
        ({STEPS: 4}, "max_train_steps 6 → 4: the learning rate now decays over 4 steps", None, []),
    ],
)
def test_a_run_may_get_more_steps_or_fewer(world, finished, copied, capsys, settings, told, first, rates):
    own = {"experiment.init_from": finished[1]}  # without effect, since there are checkpoints
    trainer = make_trainer(world, copied, settings | own)
    used, step = [], trainer.step
    trainer.step = lambda: (used.append(trainer.optimizer.param_groups[0]["lr"]), step())[1]
    trainer.train()
    output = capsys.readouterr().out
    assert "checkpoint-6, step 6" in output and told in output and not (copied / "abandoned-1").exists()
    assert trainer.state.global_step == max(6, settings[STEPS])
    assert [line["lr"] / 2e-3 for line in steps_of(copied)[6:]] == pytest.approx(rates, abs=1e-3)
    assert not rates or used[0] / 2e-3 == pytest.approx(first, abs=1e-3), "the new schedule holds from the first step"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, None),
        ({"lr_scheduler.params.num_training_steps": 3}, "now decays over 3 steps, not 6"),  # the key alone
        ({STEPS: 8, "lr_scheduler.scheduler": "constant"}, None),
    ],
)
def test_a_change_of_the_decay_is_told(world, finished, settings, told):
    found = describe_decay(checkpoints(finished[1])[-1], config_of(world, overrides=settings))
    assert found is None if told is None else told in found


# ---- stages ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "source"),
    [
        ("experiment.init_from", ""),
        ("experiment.init_from", "checkpoint-6"),
        ("experiment.init_from", "checkpoint-6/unwrapped_model"),
        ("model.showo.pretrained_model_path", ""),
    ],
)
def test_a_stage_starts_from_the_weights_of_the_one_before(world, tmp_path, finished, setting, source):
    trainer = make_trainer(world, tmp_path / "next", {setting: finished[1] / source})
    assert trainer.start is None and trainer.state.global_step == 0
    assert_weights(trainer.model, finished[1])


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 4])
def test_a_checkpoint_of_weights_goes_on_with_them_and_the_rate_of_its_step(world, tmp_path, finished, step):
    """Copied from the stage before as `checkpoint-0`, or published; the configuration may be another."""
    folder, whole = tmp_path / f"checkpoint-{step}", finished[1] / "checkpoint-6"
    if step:
        shutil.copytree(whole / "unwrapped_model", folder / "unwrapped_model")
        (folder / "metadata.json").write_text(json.dumps({"global_step": step}))
    else:
        shutil.copytree(whole, folder)
    trainer = make_trainer(world, tmp_path, {"optimizer.params.learning_rate": 1e-3})
    trainer.resume()
    assert trainer.state.global_step == step and not trainer.optimizer.state_dict()["state"]
    rate = steps_of(finished[1])[step - 1]["lr"] / 2 if step else 0
    assert trainer.schedule.get_last_lr()[0] == pytest.approx(rate)
    assert_weights(trainer.model, finished[1])
    trainer.train()
    after = [n for n in (3, 6) if n > step]
    assert [folder.name for folder in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (step, *after)]


# ---- losses that are no numbers ----


@pytest.mark.slow
def test_a_batch_with_a_nan_loss_is_named_and_not_learnt_from(world, tmp_path):
    trainer = make_trainer(world, tmp_path)
    told = poison(trainer, {2, 3})
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.finite.dropped == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(flow.batches == 8 for flow in trainer.flows.values())
    assert len(told) == 2
    assert told[0].startswith("step 2: batch dropped, loss of mmu is not finite; samples: t2i: train-")
    assert steps_of(tmp_path)[-1]["nonfinite_batches"] == 2
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert run(world, tmp_path).finite.dropped == 2, "a continued run goes on counting"


def test_gradients_that_are_no_numbers_are_named_and_change_nothing(world, tmp_path):
    settings = {"training.max_grad_norm": 1.0, "lr_scheduler.params.warmup_steps": 0, "training.ema_decay": None}
    trainer = make_trainer(world, tmp_path / "out", settings)
    told, factors = [], iter([1.0, float("inf"), 1.0])
    trainer.model.showo.lm_head.bias.register_hook(lambda gradient: gradient * next(factors))
    trainer.finite.report = told.append
    trainer.step()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step()
    assert same(before, dict(trainer.model.named_parameters()))
    assert trainer.state.global_step == 2 and trainer.finite.dropped == 1
    assert told[0].startswith("step 2: gradients dropped, their norm is not finite; samples: t2i: train-")
    trainer.step()
    assert not any(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_too_many_dropped_batches_end_the_run():
    told, nan, one = [], torch.tensor(float("nan")), torch.tensor(1.0)
    guard = FiniteLosses(lambda bad: True, 1, told.append)
    assert not guard.accept({"t2i": one}, ["t2i: a"], 1), "all processes drop what one must drop"
    assert told == ["step 1: batch dropped, on another process"]
    with pytest.raises(UserError, match="2 batches had a NaN or infinite loss or gradient.*max_nonfinite_batches=1"):
        guard.accept_gradients(nan, ["t2i: a"], 2)
    assert FiniteLosses(lambda bad: bad, None, print).accept({"t2i": nan}, [], 1), "without a limit nothing is checked"


# ---- settings that must do what they say ----


@pytest.mark.slow
def test_overfit_one_batch_sees_one_batch(world, tmp_path):
    settings = {"training.overfit_one_batch": True, "experiment.accept_config_changes": True}
    trainer = make_trainer(world, tmp_path / "out", settings)
    first, second = trainer.step(), trainer.step()
    assert first.keys == second.keys and torch.equal(first.codes, second.codes)
    trainer.save()
    continued = make_trainer(world, tmp_path / "out", settings)
    continued.resume()
    assert continued.step().keys == first.keys, "the same one in a continued run"
    ordinary = make_trainer(world, tmp_path / "other")
    assert ordinary.step().keys != ordinary.step().keys


def test_the_rate_stays_where_no_optimiser_step_was_taken(world, tmp_path, monkeypatch):
    """As fp16 does while its scale is sought."""
    trainer = make_trainer(world, tmp_path)
    rates = []
    for skipped in (True, False, True, False):
        monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
        trainer.step()
        rates.append(trainer.schedule.get_last_lr()[0])
    assert rates == pytest.approx([0, 1e-3, 1e-3, 2e-3])


def test_skipped_samples_of_all_processes_are_logged(world, tmp_path):
    trainer = make_trainer(world, tmp_path)
    trainer.flows["t2i"].counters.skip("unreadable_image", "a.png")
    trainer.flows["lm"].counters.skip("truncated_shard", "b.parquet", 40)
    trainer.sum_over_processes = lambda values: values * 2
    expected = {"data/skipped/t2i/unreadable_image": 2, "data/skipped/lm/truncated_shard": 80}
    assert trainer.skipped_data() == expected


@pytest.mark.slow
def test_max_grad_norm_is_the_norm_that_gradients_are_cut_to(world, tmp_path):
    totals = []
    for limit in (None, 0.01):
        settings = {"training.max_grad_norm": limit, "experiment.log_grad_norm_every": 1}
        trainer = make_trainer(world, tmp_path, settings)
        trainer.step()
        sizes = {name: p.numel() for name, p in trainer.model.named_parameters()}
        norms = [sizes[name.removeprefix("grad_norm/")] * norm for name, norm in trainer.gradient_norms.items()]
        totals.append(torch.stack(norms).norm().item())
    assert totals[0] > 0.1 and totals[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_mixed_precision_is_what_the_layers_compute_in(world, tmp_path, precision, dtype):
    trainer, seen = make_trainer(world, tmp_path, {"training.mixed_precision": precision}), set()
    layer = trainer.model.showo.model.layers[0].mlp.fc1
    layer.register_forward_hook(lambda module, given, result: seen.add(result.dtype))
    trainer.step()
    assert seen == {dtype} and layer.weight.dtype == torch.float32


def test_scale_lr_multiplies_the_rate_by_the_rows_of_a_step(world, tmp_path):
    settings = {"optimizer.params.scale_lr": True, "training.gradient_accumulation_steps": 2}
    trainer = make_trainer(world, tmp_path, settings)
    assert trainer.optimizer.param_groups[0]["initial_lr"] == pytest.approx(2e-3 * (4 + 1 + 2) * 2)


@pytest.mark.slow
def test_held_out_losses_are_the_same_every_time_and_disturb_nothing(world, tmp_path, finished):
    shards = {"t2i": "train-000001.tar", "mmu": "train-000001.tar", "lm": "texts.parquet"}
    held_out = {f"dataset.params.eval_{flow}_shards_path_or_url": world / file for flow, file in shards.items()}
    held_out |= {"experiment.eval_every": 2, "experiment.eval_batches": 2, "training.eval_mask_ratios": "[0.25,0.75]"}
    run(world, tmp_path / "out", held_out)
    evaluated, plain = metrics_of(tmp_path / "out"), metrics_of(finished[1])
    lines = [line for line in evaluated if "eval_loss_lm" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    losses = {"eval_loss_t2i/mask_0.25", "eval_loss_t2i/mask_0.75", "eval_loss_lm", "eval_loss_mmu"}
    assert losses < set(lines[0]) and all(0 < lines[0][name] < 10 for name in losses)
    assert lines[-1]["eval_loss_mmu"] < lines[0]["eval_loss_mmu"]
    trained = [{key: value for key, value in line.items() if not key.startswith("eval_")} for line in evaluated]
    assert trained == plain, "training must not notice that it is evaluated"
    trainer = make_trainer(world, tmp_path / "again", held_out)
    assert trainer.evaluate() == trainer.evaluate()


# ---- checkpoints that do not serve ----


def test_an_incomplete_checkpoint_is_refused(world, tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    with pytest.raises(UserError, match=r"metadata\.json does not exist"):
        make_trainer(world, tmp_path)
    (folder / "metadata.json").write_text('{"global_step": 4}')
    with pytest.raises(UserError, match="checkpoint-4 is incomplete .*remove it or copy it again"):
        make_trainer(world, tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(world, tmp_path, copied):
    shutil.copytree(world / "llm", tmp_path / "llm")
    settings = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(settings | {"hidden_size": 16, "intermediate_size": 32}))
    changes = {"model.showo.llm_model_path": tmp_path / "llm", "experiment.accept_config_changes": True}
    with pytest.raises(UserError, match="checkpoint-6 cannot be continued from"):
        run(world, copied, changes | {"training.max_train_steps": 7})


@pytest.mark.slow
@pytest.mark.parametrize("content", ["pickle", "[]", "{}", '{"global_step": 6, "model": [1]}', ""])
def test_whatever_is_in_a_file_of_a_run_it_goes_on_or_ends_in_one_line(world, tmp_path, copied, content):
    """A malicious pickle, or JSON of another kind, in the place of each file; nothing is executed."""
    executed = tmp_path / "executed"
    data = pickles(executed)["inside-True"] if content == "pickle" else content.encode()
    shutil.rmtree(copied / "checkpoint-3")
    files = [file for file in copied.rglob("*") if file.is_file() and file.suffix != ".png"]
    assert {"metadata.json", "streams_0.json", "random_states_0.pkl", "metrics.jsonl"} <= {file.name for file in files}
    for index, file in enumerate(files):
        folder = shutil.copytree(copied, tmp_path / str(index))
        (folder / file.relative_to(copied)).write_bytes(data)
        try:
            AcceleratorState._reset_state(True)
            trainer = make_trainer(world, folder, {STEPS: 7, "experiment.save_every": 99})
            trainer.train()
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), file
        assert not executed.exists(), file
