"""Runs of the tasks that change a trained Show-o, on the tiny world: learning, stopping, continuing, two processes."""

from itertools import count

import pytest
import torch

from common.errors import UserError
from tests.training import test_policy, tiny
from tests.training.test_distillation import distillation
from tests.training.test_policy import policy
from tests.training.test_preference import preference
from tests.training.test_reconstruction import reconstruction
from tests.training.test_several_processes import losses_of, weights
from tests.training.test_several_processes import run as launch
from tests.training.test_trainer import assert_same_run
from tests.training.tiny import make_trainer, metrics_of, steps_of
from tests.training.tiny import train as run
from training.checkpointing import checkpoints
from training.data.flows import open_flows

EVALUATION = {"experiment.eval_every": 3, "experiment.eval_batches": 2}
ACCUMULATION = EVALUATION | {"training.gradient_accumulation_steps": 2}
BF16 = {"training.mixed_precision": "bf16", "model.gradient_checkpointing": True}
RUNS = {
    "reconstruction": (reconstruction, ACCUMULATION | {"reconstruction.condition": "blurred"}),
    "preference": (preference, ACCUMULATION),
    "policy": (policy, ACCUMULATION | {"policy.kl": 0.1, "dataset.packing": True}),
    "distillation": (
        distillation,
        EVALUATION | {"training.mixed_precision": "bf16", "model.gradient_checkpointing": True},
    ),
}

LOSSES = {
    "reconstruction": ("step_loss_reconstruction", "step_loss_mmu"),
    "preference": ("step_loss_image_pairs", "step_loss_answer_pairs", "margin/image_pairs"),
    "policy": ("step_loss_policy", "reward", "kl"),
    "distillation": ("step_loss_distillation", "accuracy/distillation"),
}

EVALUATED = {
    "reconstruction": {"eval_loss_reconstruction", "eval_accuracy/reconstruction"},
    "preference": {"eval_loss_image_pairs", "eval_accuracy/answer_pairs", "eval_margin/answer_pairs"},
    "policy": {"eval_reward"},
    "distillation": {"eval_loss_distillation", "eval_accuracy/distillation"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_continued_run_equals_an_uninterrupted_one_to_the_last_bit(world, tmp_path, name):
    make, changes = RUNS[name]
    settings = make(world, **changes) | {"experiment.generate_every": 6, "experiment.save_every": 4}
    run(world, tmp_path / "whole", settings)
    stopped = make_trainer(world, tmp_path / "parts", settings | {"experiment.save_every": 99})
    tiny.stop_in_step(stopped, 3)
    stopped.train()
    assert [folder.name for folder in checkpoints(tmp_path / "parts")] == ["checkpoint-3"]
    torch.manual_seed(99)
    run(world, tmp_path / "parts", settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    lines = steps_of(tmp_path / "whole")
    assert len(lines) == 6 and all(torch.tensor(list(line.values())).isfinite().all() for line in lines)
    evaluated = {key for line in metrics_of(tmp_path / "whole") for key in line if key.startswith("eval")}
    assert evaluated >= EVALUATED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["preference", "policy", "distillation"])
def test_an_adapter_learns_from_the_model_under_it(world, tmp_path, name):
    make, changes = RUNS[name]
    lora = {"training.trainable": "lora", "lora.rank": 2, "training.ema_decay": None, "training.max_train_steps": 2}
    trainer = run(world, tmp_path, make(world, **changes | lora | {"experiment.save_every": 2}))
    assert (trainer.task.teacher if name == "distillation" else trainer.task.reference).copy is None
    assert len(steps_of(tmp_path)) == 2
    learned = [parameter for name, parameter in trainer.model.named_parameters() if "lora_B" in name]
    assert learned and all(parameter.abs().sum() > 0 for parameter in learned)


@pytest.mark.slow
def test_a_reward_that_fails_on_the_way_ends_the_run_and_loses_nothing(world, tmp_path, monkeypatch):
    settings = policy(world) | {"experiment.save_every": 2, "training.max_train_steps": 4}
    run(world, tmp_path / "whole", settings)
    calls, reward = count(1), test_policy.brightness
    monkeypatch.setattr(test_policy, "brightness", lambda *given: reward(*given) if next(calls) < 4 else [])
    trainer = make_trainer(world, tmp_path / "parts", settings)
    with pytest.raises(UserError, match=r"policy.reward=\S+:brightness gave \[\], expected 6 finite numbers"):
        trainer.train()
    assert [folder.name for folder in checkpoints(tmp_path / "parts")] == ["checkpoint-2"]
    monkeypatch.undo()
    run(world, tmp_path / "parts", settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture(scope="module")
def batches(world, tmp_path_factory):
    """Eight batches of every flow, from which nothing is drawn that two processes would draw otherwise."""
    samples = tiny.items(tiny.CAPTIONS)
    dealt = {
        "reconstruction": [[samples[(3 * n + i) % 12] for i in range(2)] for n in range(8)],
        "mmu": [[samples[(5 * n + i) % 12] for i in range(2)] for n in range(8)],
    }
    for make in (preference, policy):
        task = tiny.make_task(tiny.arguments(world, None, make(world)))
        for name, flow in open_flows(task.readers("train"), task.reading(0, 1)).items():
            dealt[name] = [list(next(flow)) for _ in range(8)]
    file = tmp_path_factory.mktemp("batches") / "batches.pt"
    torch.save(dealt, file)
    return file


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_learns_from_the_same_global_batch(world, tmp_path, batches, name):
    make, changes = RUNS[name]
    still = make(world, **changes) | {"training.min_masking_rate": 1.0}
    still |= {"policy.steps": None} if name == "policy" else {}
    still |= {"distillation.points": None, "training.mixed_precision": "no"} if name == "distillation" else {}
    losses = LOSSES[name]
    found = []
    for processes in (1, 2):
        settings = still | {"training.gradient_accumulation_steps": 2 // processes}
        launch("ddp", world, tmp_path / str(processes), settings, processes=processes, TEST_BATCHES=batches)
        found.append((losses_of(tmp_path / str(processes), losses=losses), weights(tmp_path / str(processes))))
    (one, first), (two, second) = found
    assert one == pytest.approx(two, rel=1e-5, abs=1e-7)  # the policy's loss is a sum around 0
    # Adam makes steps of rounding where a gradient is 0, as that of the bias of keys.
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)
