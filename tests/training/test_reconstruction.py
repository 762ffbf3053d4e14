"""Reconstruction alignment: rows, conditions and the loss of each against what the model says of them one by one."""

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from llava import question_prompt_vit, question_prompt_vq
from tests.training.tiny import CAPTIONS, NUM_TOKENS, arguments, items, make_task
from tests.training.tiny_sources import NUM_FEATURES, clip_settings
from training.data.image_text import CAPTION_INSTRUCTIONS

SHARDS = "dataset.params.{}_reconstruction_shards_path_or_url"


def reconstruction(world, **changes) -> dict:
    """Overrides of the tiny world's configuration."""
    images = {SHARDS.format(split): f"{world}/train-{{000000..000001}}.tar" for split in ("train", "eval")}
    return images | {"task": "reconstruction", "training.batch_size_t2i": 0, "training.batch_size_lm": 0} | changes


def prepared(world, **changes):
    """A task with its model, as the trainer makes them ready."""
    task = make_task(arguments(world, None, reconstruction(world, **changes)))
    task.load()
    model = task.make_model(None)
    task.choose_trainable(model)
    task.prepare(model)
    return task, model.eval()


def clip(world) -> dict:
    return clip_settings(world, "llava_tuning") | {"reconstruction.condition": "clip"}


@pytest.mark.parametrize("condition", ["small", "blurred"])
def test_a_row_is_a_question_whose_answer_is_the_image(world, condition):
    task, _ = prepared(world, **{"reconstruction.condition": condition, "training.min_masking_rate": 0.5})
    torch.manual_seed(0)
    samples, encode, asked = items(CAPTIONS[:3]), task.builder.encode, set()
    batch = task.make_batch({"reconstruction": samples})
    pixels = torch.stack([sample["image"] for sample in samples])
    codes, copy = encode(pixels), F.avg_pool2d(pixels, 2)
    if condition == "blurred":
        copy = F.interpolate(copy, size=(32, 32), mode="bicubic").clamp(-1, 1)
    seen = encode(copy)
    assert seen.shape[1] == {"small": 4, "blurred": 16}[condition]
    prompting, vocabulary = task.prompting, task.builder.prompting.vocabulary
    questions = {
        tuple([*prompting.text_ids(question_prompt_vq(text)), prompting.eos_id]) for text in CAPTION_INSTRUCTIONS
    }
    for row, labels, ids, condition_ids in zip(batch.input_ids, batch.labels, codes, seen, strict=True):
        row, labels = row[row != vocabulary.pad_id].tolist(), labels[row != vocabulary.pad_id]
        first = len(row) - NUM_TOKENS - 1
        start = 2 + len(condition_ids) + 1
        assert row[:start] == [vocabulary.mmu_id, vocabulary.soi_id, *condition_ids.tolist(), vocabulary.eoi_id]
        asked.add(tuple(row[start : first - 1]))
        assert row[first - 1] == vocabulary.soi_id and row[-1] == vocabulary.eoi_id
        shown, wanted = torch.tensor(row[first:-1]), labels[first:-1]
        hidden = shown == shown.max()  # the mask token is the last id
        assert torch.equal(shown[~hidden], ids[~hidden]) and hidden.sum() >= NUM_TOKENS / 2
        assert torch.equal(wanted[hidden], ids[hidden])
        assert (labels != -100).sum() == hidden.sum(), "nothing else is learned"
    assert asked <= questions and len(asked) > 1


@pytest.mark.parametrize("packing", [False, True])
def test_its_loss_is_the_cross_entropy_of_the_masked_codes_beside_that_of_answers(world, packing):
    task, model = prepared(world, **{"dataset.packing": packing, "training.reconstruction_coeff": 2.0})
    torch.manual_seed(0)
    samples = items(CAPTIONS)
    batch = task.make_batch({"reconstruction": samples[:3], "mmu": samples[3:5]})
    assert batch.rows == {"t2i": 0, "lm": 0, "mmu": 2, "mixed": 0, "reconstruction": 3}
    logits = model(batch.input_ids, batch.attention_mask).logits
    labels = batch.labels[2:]
    expected = F.cross_entropy(logits[2:][labels != -100], labels[labels != -100])
    outcome = task.outcome(model, batch)
    torch.testing.assert_close(outcome.losses["reconstruction"], expected)
    torch.testing.assert_close(outcome.loss, 2 * expected + outcome.losses["mmu"])
    assert outcome.losses.keys() == {"reconstruction", "mmu"}


def test_codes_see_each_other_and_the_condition_but_the_condition_not_them(world):
    task, _ = prepared(world)
    batch = task.make_batch({"reconstruction": items(CAPTIONS[:1])})
    allowed, last = batch.attention_mask.dense()[0, 0], batch.input_ids.shape[1] - 1
    codes, condition = slice(last - NUM_TOKENS - 1, last + 1), slice(1, 7)
    assert allowed[codes, codes].all() and allowed[codes, : last + 1].all()
    assert allowed[condition, condition].all() and not allowed[condition, 7:].any()


def test_clip_features_of_the_same_pixels_are_the_condition(world):
    task, model = prepared(world, **clip(world))
    samples = items(CAPTIONS[:2])
    batch = task.make_batch({"reconstruction": samples})
    assert ((batch.input_ids == -200).sum(1) == NUM_FEATURES).all()
    assert batch.image_features.shape == (2, NUM_FEATURES, 16)
    assert not torch.allclose(batch.image_features[0], batch.image_features[1])
    question = torch.tensor(task.prompting.text_ids(question_prompt_vit(CAPTION_INSTRUCTIONS[0]))[:3])
    assert torch.equal(batch.input_ids[0, NUM_FEATURES + 3 : NUM_FEATURES + 6], question)
    task.outcome(model, batch).loss.backward()
    assert model.mm_projector[0].weight.grad.abs().sum() > 0, "the projector learns from it"


@pytest.mark.parametrize("condition", ["small", "blurred", "clip"])
def test_the_longest_row_is_known_and_must_fit_into_a_packed_one(world, condition):
    changes = clip(world) if condition == "clip" else {"reconstruction.condition": condition}
    task, _ = prepared(world, **changes | {"dataset.packing": True})
    task.questions = [max(task.questions, key=len)]
    assert task.make_batch({"reconstruction": items(CAPTIONS[:1])}).input_ids.shape[1] == task.longest_row
    few = max(task.longest_row - 1, task.builder.row_length)
    if few < task.longest_row:
        with pytest.raises(UserError, match=f"packing_length is {few}, but a sample may have {task.longest_row}"):
            prepared(world, **changes | {"dataset.packing": True, "dataset.packing_length": few})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"reconstruction.condition": "clip"}, "reconstruction.condition is clip, but model.showo.w_clip_vit is false"),
        ({"reconstruction.factor": 3}, "reconstruction.factor is 3; it must divide the 4 codes along a side"),
        ({SHARDS.format("train"): "/nowhere.tar"}, "1 of 1 files do not exist: /nowhere.tar"),
        ({"training.batch_size_reconstruction": 0, "training.batch_size_mmu": 0}, "batch_size_reconstruction are all"),
    ],
)
def test_mistakes(world, changes, part):
    with pytest.raises(UserError) as error:
        make_task(arguments(world, None, reconstruction(world, **changes)))
    assert part in str(error.value)
