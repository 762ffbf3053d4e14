"""Preference pairs: what is read, the rows, and the loss against hand-worked cases and the logits themselves."""

import json
import math
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from tests.training import tiny
from tests.training.tiny import CAPTIONS, NUM_TOKENS, arguments, make_task
from tests.training.tiny_sources import clip_settings
from training.data.flows import open_flows
from training.tasks.preference import preference_loss


def write_pairs(folder: Path, images: Path, count: int = 12) -> Path:
    """`pairs.jsonl`: image number n is right for caption n, the next one wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for n in range(count):
        right, wrong = (str(images / f"{(n + shift) % 12}.png") for shift in (0, 1))
        colour, place = CAPTIONS[n].split()[1], CAPTIONS[n].split()[5]
        other = "green" if colour != "green" else "red"
        records.append({"kind": "image", "caption": CAPTIONS[n], "chosen": right, "rejected": wrong})
        asked = {"kind": "answer", "image": right, "question": f"Which colour is at the {place}?"}
        records.append(asked | {"chosen": colour, "rejected": f"it is {other}"})
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def write_base(world: Path) -> Path:
    """A Show-o to begin with, made once: its weights are random, but always the same."""
    folder = world / "base"
    if not folder.is_dir():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            tiny.make_model(tiny.config_of(world)).save_pretrained(folder)
    return folder


def preference(world: Path, **changes) -> dict:
    """Overrides of the tiny world's configuration."""
    pairs = write_pairs(world / "pairs", world / "images")
    off = {f"training.batch_size_{flow}": 0 for flow in ("t2i", "lm", "mmu")}
    given = {"task": "preference", "experiment.init_from": write_base(world)}
    given |= {f"dataset.params.{split}_pairs": pairs for split in ("train", "eval")}
    sizes = {"training.batch_size_image_pairs": 2, "training.batch_size_answer_pairs": 2}
    long = {"dataset.preprocessing.max_seq_length": 64}  # questions have some 40 ids in the tiny tokenizer
    return off | given | sizes | long | changes


def prepared(world, **changes):
    """A task with its model and its first samples, as the trainer makes them ready."""
    task = make_task(arguments(world, None, preference(world, **changes)))
    flows = open_flows(task.readers("train"), task.reading(0, 1))
    task.load()
    model = task.make_model(None)
    task.choose_trainable(model)
    task.prepare(model)
    return task, model.eval(), {name: next(flow) for name, flow in flows.items()}


# ---- by hand ----


def test_the_loss_of_two_pairs_by_hand():
    """One pair of images, of 2 and 1 masked codes; one pair of answers, whose chosen one has lost by 1."""
    log_probs = torch.tensor([-1.0, -2.0, -4.0, -3.0, -1.0], requires_grad=True)
    rows = torch.tensor([0, 0, 1, 2, 3])
    reference = torch.tensor([-5.0, -4.0, -2.0, -1.0])
    counts, coefficients = {"image_pairs": 2, "answer_pairs": 2}, {"image_pairs": 1.0, "answer_pairs": 10.0}
    settings = {"rows": rows, "reference": reference, "counts": counts, "coefficients": coefficients}
    out = preference_loss(log_probs, beta=0.5, **settings)
    # images: (-3 + 5) - (-4 + 4) = 2; answers: (-3 + 2) - (-1 + 1) = -1; times beta
    images, answers = math.log(1 + math.exp(-1)), math.log(1 + math.exp(0.5))
    assert out.losses["image_pairs"].item() == pytest.approx(images)
    assert out.losses["answer_pairs"].item() == pytest.approx(answers)
    assert out.loss.item() == pytest.approx(images + 10 * answers)
    (slopes,) = torch.autograd.grad(out.loss, log_probs)
    up, down = 0.5 / (1 + math.e), 10 * 0.5 / (1 + math.exp(-0.5))
    assert slopes.tolist() == pytest.approx([-up, -up, up, -down, down]), "up with the chosen, down with the rejected"
    found = {name: value.item() for name, value in out.statistics.items()}
    assert (found["gained_image_pairs"], found["gained_answer_pairs"]) == (1, 0)
    assert (found["margin_image_pairs"], found["margin_answer_pairs"]) == pytest.approx((1.0, -0.5))


def test_a_flow_without_rows_has_no_loss():
    out = preference_loss(
        torch.tensor([-1.0, -2.0]),
        rows=torch.tensor([0, 1]),
        reference=torch.zeros(2),
        counts={"image_pairs": 0, "answer_pairs": 2},
        beta=1.0,
        coefficients={"image_pairs": 1.0, "answer_pairs": 1.0},
    )
    assert out.losses.keys() == {"answer_pairs"} and out.loss == out.losses["answer_pairs"]


# ---- rows ----


def test_both_images_of_a_pair_have_the_same_mask_and_text(world):
    task, _, samples = prepared(world)
    batch = task.make_batch(samples)
    assert batch.rows == {"image_pairs": 4, "answer_pairs": 4}
    first = batch.input_ids.shape[1] - NUM_TOKENS - 1
    ids, labels = batch.input_ids[:4, first:-1], batch.labels[:4, first:-1]
    hidden, codes = labels != -100, []
    for sample, name in ((sample, name) for name in ("image", "rejected") for sample in samples["image_pairs"]):
        pixels = sample[name] if name == "image" else (sample[name].movedim(2, 0) / 255 - 0.5) / 0.5
        codes.append(task.builder.encode(pixels[None])[0])
    codes = torch.stack(codes)
    assert torch.equal(hidden[:2], hidden[2:]) and hidden.any(1).all()
    assert (ids[hidden] == task.builder.noise.mask_token_id).all()
    assert torch.equal(ids[~hidden], codes[~hidden]) and torch.equal(labels[hidden], codes[hidden])
    assert (codes[:2] != codes[2:]).any(1).all(), "the images differ"
    assert torch.equal(batch.input_ids[:2, :first], batch.input_ids[2:4, :first])
    assert (batch.labels[:4, :first] == -100).all()


def test_answers_differ_after_the_same_image_and_question(world):
    task, _, samples = prepared(world)
    batch = task.make_batch(samples)
    chosen, rejected = batch.labels[4:].chunk(2)
    decode = task.prompting.tokenizer.decode
    said = [decode(row[row != -100]).replace("<|endoftext|>", "").strip() for row in (*chosen, *rejected)]
    assert all(text in tiny.COLOURS for text in said[:2]) and all(text.startswith("it is ") for text in said[2:])
    start = int((chosen[0] != -100).int().argmax())
    assert torch.equal(batch.input_ids[4, :start], batch.input_ids[6, :start])


@pytest.mark.parametrize("packing", [False, True])
def test_its_loss_is_that_of_the_logits_of_both_models(world, packing):
    task, model, samples = prepared(world, **{"dataset.packing": packing})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # no longer the reference
    batch = task.make_batch(samples)

    def sums(of) -> torch.Tensor:
        log_probs = of(batch.input_ids, batch.attention_mask).logits.log_softmax(-1)
        targets = torch.cat([batch.labels[:4], torch.nn.functional.pad(batch.labels[4:, 1:], (0, 1), value=-100)])
        return torch.where(targets != -100, log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0], 0).sum(1)

    gains = sums(model) - sums(task.reference.copy)
    margins = [0.2 * (gain[:2] - gain[2:]) for gain in gains.split(4)]
    expected = [-torch.nn.functional.logsigmoid(margin).mean() for margin in margins]
    outcome = task.outcome(model, batch)
    losses = [outcome.losses[name] for name in batch.rows]
    torch.testing.assert_close(losses, [loss.detach() for loss in expected], rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(outcome.loss, list(model.parameters()))
    wanted = torch.autograd.grad(sum(expected), list(model.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_at_the_beginning_the_model_is_its_reference(world):
    task, model, samples = prepared(world)
    outcome = task.outcome(model, task.make_batch(samples))
    assert [loss.item() for loss in outcome.losses.values()] == pytest.approx([math.log(2)] * 2, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in task.reference.copy.parameters())


def test_under_an_adapter_the_reference_is_the_model_itself_without_it(world):
    lora = {"training.trainable": "lora", "lora.rank": 2}
    task, model, samples = prepared(world, **lora)
    assert task.reference.copy is None
    plain, _, _ = prepared(world)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.manual_seed(0)
    batch = task.make_batch(samples)
    torch.manual_seed(0)
    expected = plain.make_batch(samples)
    found, wanted = (one.objective.function.keywords["reference"] for one in (batch, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    outcome = task.outcome(model, batch)
    assert abs(outcome.loss.item() - 2 * math.log(2)) > 1e-3, "the adapter is on again"
    outcome.loss.backward()
    with_gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradients and all("lora_" in name for name in with_gradients)


def test_answers_about_clip_features(world):
    changes = clip_settings(world, "llava_tuning") | {"training.batch_size_image_pairs": 0, "experiment.init_from": ""}
    task = make_task(arguments(world, None, preference(world, **changes | {"experiment.init_from": write_base(world)})))
    flows = open_flows(task.readers("train"), task.reading(0, 1))
    task.load()
    model = task.make_model(None)
    task.choose_trainable(model)
    task.prepare(model)
    batch = task.make_batch({name: next(flow) for name, flow in flows.items()})
    assert batch.image_features.shape[0] == 4 and batch.rows == {"image_pairs": 0, "answer_pairs": 4}
    outcome = task.outcome(model.train(), batch)
    outcome.loss.backward()
    assert model.mm_projector[0].weight.grad is not None


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"dataset.params.train_pairs": "/nowhere.jsonl"}, "1 of 1 files do not exist: /nowhere.jsonl"),
        ({"training.batch_size_mmu": 2}, "training.batch_size_mmu is not 0, but task=preference reads its own data"),
        ({"training.noise_type": "random_replace"}, "noise_type is random_replace; task=preference needs mask"),
        ({"preference.beta": 0}, "preference.beta is 0.0; it must be more than 0"),
    ],
)
def test_mistakes_in_settings(world, changes, part):
    with pytest.raises(UserError) as error:
        make_task(arguments(world, None, preference(world, **changes)))
    assert part in str(error.value)


def test_random_weights_are_no_reference(world):
    with pytest.raises(UserError, match="task=preference needs a trained Show-o to begin with"):
        prepared(world, **{"experiment.init_from": None})


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("no json", "hardly any sample can be used"),
        ('[{"kind": "image"', "cannot be read as JSON"),
        ('{"kind": "answer", "question": "?"}', "hold(s) no pair whose kind is 'image'"),
    ],
)
def test_a_file_that_holds_no_pairs(world, tmp_path, content, part):
    file = tmp_path / ("pairs.json" if content.startswith("[") else "pairs.jsonl")
    file.write_text(content)
    changes = {"dataset.params.train_pairs": file, "training.batch_size_answer_pairs": 0}
    task = make_task(arguments(world, None, preference(world, **changes)))
    with pytest.raises(UserError) as error:
        next(open_flows(task.readers("train"), task.reading(0, 1))["image_pairs"])
    assert part in str(error.value)
    assert str(file) in str(error.value)


def test_a_record_without_its_members_is_skipped_and_named(world, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"kind": "image", "caption": "a red square", "chosen": "a.png"}')
    task = make_task(arguments(world, None, preference(world, **{"dataset.params.train_pairs": file})))
    flow = open_flows(task.readers("train")[:1], task.reading(0, 1))["image_pairs"]
    with pytest.raises(UserError, match=r"needs caption, chosen, rejected, lacks \['rejected'\]"):
        next(flow)
