"""Policy gradients: advantages and loss by hand, and the rows against what was sampled."""

import json
import math

import pytest
import torch
from PIL import Image

from common.errors import UserError
from tests.training.test_preference import write_base
from tests.training.tiny import CAPTIONS, NUM_TOKENS, arguments, make_task
from training.data.flows import open_flows
from training.loss import log_probs_of
from training.tasks.policy import group_advantages, policy_loss

OFF = {f"training.batch_size_{flow}": 0 for flow in ("t2i", "lm", "mmu")}


def brightness(prompts, images) -> list[float]:
    """A reward that any image has: its mean, from 0 to 1."""
    return [image.convert("L").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) / 255 for image in images]


def policy(world, **changes) -> dict:
    """Overrides of the tiny world's configuration."""
    prompts = {
        f"dataset.params.{split}_prompts": f"{world}/train-{{000000..000001}}.tar" for split in ("train", "eval")
    }
    given = {"task": "policy", "policy.reward": "tests.training.test_policy:brightness"}
    sizes = {"policy.group_size": 3, "policy.timesteps": 4, "policy.steps": 2, "training.batch_size_prompts": 2}
    return OFF | prompts | given | sizes | {"experiment.init_from": write_base(world)} | changes


def prepared(world, **changes):
    task = make_task(arguments(world, None, policy(world, **changes)))
    flows = open_flows(task.readers("train"), task.reading(0, 1))
    task.load()
    model = task.make_model(None)
    task.prepare(model)
    return task, model.eval(), {name: next(flow) for name, flow in flows.items()}


# ---- by hand ----


def test_advantages_are_within_a_group_and_one_without_variance_is_dropped():
    scores = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.03]])
    advantages, kept = group_advantages(scores, min_std=0.02)
    assert kept.tolist() == [True, False, False]
    assert advantages.tolist() == [[-1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert group_advantages(scores, min_std=0.0)[1].tolist() == [True, False, True]


def test_the_loss_of_four_rows_by_hand():
    """Ratios 1.5, 1.5, 0.5 and 0.5 with both signs of the advantage: of each the smaller term, as PPO has it."""
    half, more = math.log(0.5), math.log(1.5)
    old = torch.tensor([-3.0, -1.0, -2.0, -2.0, -1.0])
    log_probs = (old + torch.tensor([more, more - 1, 1.0, half, half])).requires_grad_()
    rows, advantages = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    out = policy_loss(log_probs, old=old, rows=rows, advantages=advantages, count=4, clip=(0.9, 1.2))
    # 1.5 is clipped to 1.2 where that is less to gain; -1.5 stays; 0.5 stays; -0.5 becomes -0.9
    assert out.loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.9) / 4)
    (slopes,) = torch.autograd.grad(out.loss, log_probs)
    assert slopes.tolist() == pytest.approx([0, 1.5 / 4, 1.5 / 4, -0.5 / 4, 0])
    assert (out.statistics["clipped"], out.statistics["ratios"]) == (4, 4)


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    log_probs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    settings = {"rows": torch.tensor([0, 0, 1]), "advantages": torch.tensor([2.0, -1.0]), "clip": (0.9, 1.2)}
    out = policy_loss(log_probs, old=log_probs.detach(), count=4, **settings)
    assert out.loss.item() == pytest.approx(-(2 - 1) / 4)
    assert torch.autograd.grad(out.loss, log_probs)[0].tolist() == pytest.approx([-0.5, -0.5, 0.25])


def test_the_distance_to_the_reference_by_hand():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    settings = {"rows": torch.tensor([0, 0]), "advantages": torch.zeros(1), "clip": (0.9, 1.2), "count": 1}
    out = policy_loss(log_probs, old=log_probs.detach(), kl=2.0, reference=torch.tensor([-1.0, -1.0]), **settings)
    assert out.loss.item() == pytest.approx(2 * (math.e - 2) / 2)
    assert torch.autograd.grad(out.loss, log_probs)[0].tolist() == pytest.approx([0, 1 - math.e])


# ---- sampling and rows ----


@pytest.mark.parametrize("packing", [False, True])
def test_the_rows_have_the_probabilities_that_were_sampled_from(world, packing):
    task, model, samples = prepared(world, **{"dataset.packing": packing, "policy.kl": 0.1})
    batch = task.make_batch(samples)
    assert batch.rows == {"prompts": 2 * 3 * 2}, "two prompts, three images, two steps"
    assert batch.sums["images"] == 6 and batch.sums["groups"] == 2 and batch.sums["dropped"] == 0
    old, rows = (batch.objective.function.keywords[name] for name in ("old", "rows"))
    first = batch.input_ids.shape[1] - NUM_TOKENS - 1
    logits = model(batch.input_ids, batch.attention_mask).logits
    offset = task.builder.noise.image_offset
    positions = batch.objective.index - rows * batch.input_ids.shape[1]
    assert ((positions >= first) & (positions < first + NUM_TOKENS)).all()
    codes = logits[rows, positions, offset : offset + 64].log_softmax(-1)
    now = codes.gather(1, batch.objective.targets[:, None] - offset)[:, 0]
    torch.testing.assert_close(now, old, rtol=1e-4, atol=1e-5)
    assert (batch.input_ids[rows, positions] == task.builder.noise.mask_token_id).all(), "targets are unknown"
    outcome = task.outcome(model, batch)
    advantages = batch.objective.function.keywords["advantages"]
    ratio = torch.zeros(len(advantages)).index_add(0, rows, now - old).exp()
    torch.testing.assert_close(
        outcome.losses["policy"], -(ratio * advantages).sum().detach() / 12, rtol=1e-3, atol=1e-5
    )
    assert outcome.sums["kl"] == pytest.approx(0, abs=1e-6), "the model is still its reference"
    gradient = torch.autograd.grad(outcome.loss, model.showo.get_input_embeddings().weight)[0]
    assert gradient.abs().sum() > 0


def test_a_step_makes_the_better_images_likelier_than_the_worse(world):
    task, model, samples = prepared(world, **{"policy.steps": None})
    torch.manual_seed(1)
    batch = task.make_batch(samples)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task.outcome(model, batch).loss.backward()
    optimizer.step()
    old, rows, advantages = (batch.objective.function.keywords[name] for name in ("old", "rows", "advantages"))
    gained = log_probs_of(model, batch.objective, codes_only=True, **batch.inputs()) - old
    gains = torch.zeros(len(advantages)).index_add(0, rows, gained)
    assert (gains * advantages).sum() > 0


def test_groups_without_variance_take_no_rows_but_a_batch_of_none_still_has_a_loss(world, monkeypatch):
    task, model, samples = prepared(world, **{"policy.steps": 1})
    scores = iter([[1.0, 1.0, 1.0, 0.0, 1.0, 2.0], [1.0] * 6])
    monkeypatch.setattr(task, "reward", lambda *_: next(scores))
    batch = task.make_batch(samples)
    assert batch.rows == {"prompts": 3} and batch.sums["dropped"] == 1
    assert batch.objective.function.keywords["advantages"].tolist() == pytest.approx([-1, 0, 1])
    assert batch.objective.function.keywords["count"] == 6, "dropped ones count"
    batch = task.make_batch(samples)
    outcome = task.outcome(model, batch)
    outcome.loss.backward()
    assert outcome.loss == 0 and batch.sums["dropped"] == 2
    assert all(parameter.grad.abs().sum() == 0 for parameter in model.parameters())


def test_weights_in_shards_cannot_be_sampled_from(world):
    task, model, samples = prepared(world)
    model.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(0)))  # as ZeRO-3 leaves them
    with pytest.raises(UserError, match="launch it with DDP or ZeRO-2"):
        task.make_batch(samples)


# ---- prompts and mistakes ----


@pytest.mark.parametrize("form", ["tar", "jsonl", "txt"])
def test_prompts_are_captions_of_shards_records_or_lines(world, tmp_path, form):
    given = {"tar": f"{world}/train-000000.tar", "jsonl": tmp_path / "p.jsonl", "txt": tmp_path / "p.txt"}
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": text, "n": 3}) for text in CAPTIONS[::2]))
    (tmp_path / "p.txt").write_text("\n".join(CAPTIONS[::2]))
    task = make_task(arguments(world, None, policy(world, **{"dataset.params.train_prompts": given[form]})))
    (flow,) = open_flows(task.readers("train"), task.reading(0, 1)).values()
    samples = [sample for _ in range(6) for sample in next(flow)]
    assert {sample["text"] for sample in samples} <= set(CAPTIONS[::2])
    assert {sample["record"].get("n") for sample in samples} == {3 if form == "jsonl" else None}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"policy.reward": "no_such:thing"}, "policy.reward=no_such:thing cannot be imported"),
        (
            {"policy.reward": "http://127.0.0.1:9/", "policy.reward_retries": 0},
            "policy.reward=http://127.0.0.1:9/ is not",
        ),
        ({"policy.timesteps": 17}, "policy.timesteps is 17; an image has 16 tokens"),
        ({"policy.steps": 5}, "policy.steps is 5; there are policy.timesteps=4"),
        ({"dataset.params.train_prompts": None}, "dataset.params.train_prompts is not set"),
        ({"training.batch_size_lm": 1}, "training.batch_size_lm is not 0, but task=policy reads its own data alone"),
    ],
)
def test_mistakes(world, changes, part):
    with pytest.raises(UserError) as error:
        make_task(arguments(world, None, policy(world, **changes)))
    assert part in str(error.value)
