"""Distillation of few steps: segments and targets by hand, and rows against the teacher's own trajectory."""

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from tests.training.test_policy import OFF
from tests.training.test_preference import write_base
from tests.training.tiny import NUM_TOKENS, arguments, make_task
from training.data.flows import open_flows
from training.tasks.distillation import segment_end, segment_targets


def distillation(world, **changes) -> dict:
    """Overrides of the tiny world's configuration."""
    shards = f"{world}/train-{{000000..000001}}.tar"
    prompts = {f"dataset.params.{split}_prompts": shards for split in ("train", "eval")}
    sizes = {"distillation.timesteps": 4, "distillation.segments": "[4,2,1]", "training.batch_size_prompts": 2}
    given = {"task": "distillation", "experiment.init_from": write_base(world), "distillation.points": 2}
    return OFF | prompts | sizes | given | changes


def prepared(world, **changes):
    task = make_task(arguments(world, None, distillation(world, **changes)))
    flows = open_flows(task.readers("train"), task.reading(0, 1))
    task.load()
    model = task.make_model(None)
    task.prepare(model)
    return task, model.eval(), {name: next(flow) for name, flow in flows.items()}


@pytest.mark.parametrize(
    ("timesteps", "segments", "ends"),
    [
        (8, 4, [2, 2, 4, 4, 6, 6, 8, 8]),
        (8, 1, [8] * 8),
        (4, 4, [1, 2, 3, 4]),
        (5, 2, [2, 2, 5, 5, 5]),
        (7, 3, [2, 2, 4, 4, 7, 7, 7]),
    ],
)
def test_each_point_learns_the_end_of_its_segment(timesteps, segments, ends):
    assert [segment_end(point, timesteps, segments) for point in range(timesteps)] == ends
    assert len(set(ends)) == segments


def test_targets_are_what_became_known_between_the_point_and_the_end():
    known = torch.tensor([[99, 3, 99, 99]])
    reached = torch.tensor([[5, 3, 99, 0]])
    assert segment_targets(known, reached, mask_id=99, offset=10).tolist() == [[15, -100, -100, 10]]


@pytest.mark.parametrize("packing", [False, True])
def test_the_student_learns_the_teachers_codes_without_guidance(world, packing):
    task, model, samples = prepared(world, **{"dataset.packing": packing, "distillation.points": None})
    states = []
    sample = task.sample
    task.sample = lambda texts: states.append(sample(texts)) or states[-1]
    batch = task.make_batch(samples, num_segments=2)
    ids = batch.input_ids[:, -NUM_TOKENS - 1 : -1].view(4, 2, NUM_TOKENS)
    mask_id, offset = task.builder.noise.mask_token_id, task.builder.noise.image_offset
    before = torch.where(states[0] == mask_id, mask_id, states[0] + offset)  # (5, 2, N)
    order = [[point for point in range(4) if torch.equal(before[point], row)][0] for row in ids]
    assert sorted(order) == [0, 1, 2, 3] and batch.rows == {"prompts": 8}
    assert (states[0][0] == mask_id).all() and (states[0][4] != mask_id).all()
    logits = model(batch.input_ids, batch.attention_mask).logits[:, -NUM_TOKENS - 1 : -1].view(4, 2, NUM_TOKENS, -1)
    losses = []
    for point, of_point in zip(order, logits, strict=True):
        end = 2 if point < 2 else 4
        learned = (before[point] == mask_id) & (before[end] != mask_id)
        assert learned.any()
        losses.append(F.cross_entropy(of_point[learned], before[end][learned], reduction="none"))
    outcome = task.outcome(model, batch)
    torch.testing.assert_close(outcome.loss, torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)
    assert outcome.losses.keys() == {"distillation"}


def test_segments_become_fewer_in_the_course_of_the_run(world):
    task, _, _ = prepared(world)
    task.config.training.max_train_steps, found = 6, []
    for task.step in range(8):
        found.append(task.num_segments)
    assert found == [4, 4, 2, 2, 1, 1, 1, 1]


def test_it_learns_to_be_the_teacher(world):
    """One batch by heart: the loss of the teacher's codes falls, and the teacher does not change."""
    task, model, samples = prepared(world)
    batch, before = task.make_batch(samples), {k: v.clone() for k, v in task.teacher.copy.state_dict().items()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(15):
        losses.append(task.outcome(model, batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.teacher.copy.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"distillation.timesteps": 17}, "distillation.timesteps is 17; an image has 16 tokens"),
        ({"distillation.segments": "[8]"}, "distillation.segments is [8]; give one number or more, each at most"),
        ({"distillation.segments": "[]"}, "distillation.segments is []; give one number or more"),
        ({"distillation.points": 5}, "distillation.points is 5; there are 4 timesteps"),
        ({"training.batch_size_t2i": 1}, "training.batch_size_t2i is not 0, but task=distillation reads its own data"),
    ],
)
def test_mistakes(world, changes, part):
    with pytest.raises(UserError) as error:
        make_task(arguments(world, None, distillation(world, **changes)))
    assert part in str(error.value)
