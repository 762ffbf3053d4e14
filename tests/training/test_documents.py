"""The mixed flow: documents to losses (docs/mixed.md)."""

import json
import random

import pytest
import torch

from tests.models.test_documents import EDIT, STORY, build, every_other, image, random_document, text
from tests.parity.goldens import tiny_showo
from tests.tiny_llms import tiny_showo as showo_of
from tests.training import tiny
from tests.training.tiny import CAPTIONS
from training.batches import mixed_rows
from training.data.documents import document_length
from training.loss import Objective, document_targets
from training.packing import Packing

OFFSET, IGNORED = 128, -100


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


def objective_of(rows, **settings) -> Objective:
    found = zip(("mixed", "mixed_text"), document_targets(rows.labels, OFFSET), strict=True)
    return Objective.from_targets({name: (0, targets) for name, targets in found}, **settings)


def losses_of(model, documents, noise=every_other, **settings) -> dict[str, torch.Tensor]:
    rows = build()((documents, noise), "mixed")
    objective = objective_of(rows, position_ids=rows.position_ids, **settings)
    return model(rows.input_ids, rows.attention_mask, objective).losses


def sums_of(model, documents) -> dict[str, float]:
    """Sums over the targets in place of means."""
    rows = build()((documents, every_other), "mixed")
    objective = objective_of(rows, position_ids=rows.position_ids)
    losses = model(rows.input_ids, rows.attention_mask, objective).losses
    return {name: losses[name].item() * count for name, count in objective.counts.items()}


def test_one_pass_gives_the_losses_of_a_row_for_each_image(model):
    """With clean history, each image and text is learned as it would be in a document that ends with it."""
    fixed = lambda segment: segment | {"loss": False}  # noqa: E731
    t1, i1, t2, i2, t3 = STORY
    apart = [
        [t1, i1],
        [*map(fixed, (t1, i1)), t2, i2],
        [*map(fixed, (t1, i1, t2, i2)), t3],
    ]
    whole = sums_of(model, [STORY])
    assert whole["mixed"] == pytest.approx(sum(sums_of(model, [part])["mixed"] for part in apart), rel=1e-5)
    # of texts without decisions, which each row makes at its end, too
    rows = build()(([STORY], every_other), "mixed")
    log_probabilities = logits_of(model, rows).log_softmax(-1)
    for part in apart[1:]:
        own = build()(([part], every_other), "mixed")
        theirs = logits_of(model, own).log_softmax(-1)
        word = 3 if part is apart[1] else 4
        place, there = rows.input_ids[0].tolist().index(word), own.input_ids[0].tolist().index(word)
        torch.testing.assert_close(log_probabilities[place - 1, word], theirs[there - 1, word])


def logits_of(model, rows) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.hidden_states(rows.input_ids, rows.attention_mask, position_ids=rows.position_ids)
        return model.get_output_embeddings()(hidden)[0]


def test_a_text_and_an_image_give_the_t2i_loss_of_the_masked_codes(model):
    prompt, codes = build(), image(1)["image_ids"]
    masked = every_other(codes[None])
    today = prompt((["w1 w2"], masked.input_ids, masked.labels), "t2i")
    labels = today.labels.masked_fill(today.labels < OFFSET, IGNORED)  # today's row counts <soi> and <eoi>, too
    objective = Objective.from_labels(labels, (1, 0, 0), prompt.max_text_len)
    expected = model(today.input_ids, today.attention_mask, objective).losses["t2i"]
    found = losses_of(model, [[text(1, 2), image(1)]])["mixed"]
    torch.testing.assert_close(found, expected)


def test_an_image_a_question_and_an_answer_give_the_mmu_loss_of_the_same_ids(model):
    document = [image(1, loss=False), text(1, 2, loss=False), text(3, 4)]
    rows = build()(([document], every_other), "mixed")
    assert rows.labels[rows.labels != IGNORED].tolist() == [3, 4, 117, 117, 117], "and how it ends"
    expected = model(rows.input_ids, rows.attention_mask, Objective.from_labels(rows.labels, (0, 0, 1), 0)).losses
    torch.testing.assert_close(losses_of(model, [document])["mixed_text"], expected["mmu"])


def test_what_is_not_learned_gives_no_gradient(model):
    given = [segment | {"loss": False} for segment in STORY]
    losses = losses_of(model, [given])
    assert {name: loss.item() for name, loss in losses.items()} == {"mixed": 0.0, "mixed_text": 0.0}
    losses = losses_of(model, [EDIT])
    rows = build()(([EDIT], every_other), "mixed")
    count = (rows.input_ids == 119).sum()
    assert count == 2 and losses["mixed"] > 0, "an image that is not learned has no masked copy"


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_packed_documents_have_the_same_losses(family):
    model = tiny_showo() if family == "phi" else showo_of("llama")
    documents = [STORY, EDIT, [text(1, 2, 3)], [image(5), image(6)]]
    rows = build()((documents, every_other), "mixed")
    is_used = rows.input_ids != 118
    length = int(is_used.sum(1).max())
    packing = Packing.from_mask(is_used, rows.attention_mask, 2 * length, rows.position_ids)
    plain = objective_of(rows, position_ids=rows.position_ids)
    packed = objective_of(rows, packing=packing)
    with torch.no_grad():
        found, expected = (model(rows.input_ids, rows.attention_mask, one).losses for one in (packed, plain))
    torch.testing.assert_close(found, expected)
    assert packing.num_positions < rows.input_ids.numel()


@pytest.mark.parametrize("history", ["clean", "masked"])
def test_the_data_know_how_long_a_row_will_be(history):
    """`document_length`, by which documents are cut, counts what the row builder builds."""
    rng = random.Random(0)
    for _ in range(30):
        document = random_document(rng)
        lengths = [len(part["text"].split()) if "text" in part else len(part["image_ids"]) for part in document]
        row = build(history=history)(([document], every_other), "mixed").input_ids
        assert document_length(document, lengths, history == "clean") == row.shape[1]


# ---- the flow ----


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A folder with images and a jsonl of documents: stories, and edits."""
    folder = tmp_path_factory.mktemp("documents")
    lines = []
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.png").write_bytes(tiny.image_bytes(tiny.picture(caption)))
    for number, caption in enumerate(CAPTIONS):
        other = (number + 1) % len(CAPTIONS)
        story = [{"text": caption}, {"image": f"{number}.png"}, {"text": CAPTIONS[other]}, {"image": f"{other}.png"}]
        edit = [{"image": f"{number}.png", "loss": False}, {"text": "next", "loss": False}, {"image": f"{other}.png"}]
        lines += [json.dumps({"segments": story}), json.dumps({"segments": edit})]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def mixed_config(world, documents, **more):
    settings = {"dataset.params.train_mixed_shards_path_or_url": str(documents / "train.jsonl")}
    settings |= {"training.batch_size_mixed": 3, "training.batch_size_t2i": 2, "experiment.eval_batches": 1}
    settings |= {"dataset.params.eval_mixed_shards_path_or_url": str(documents / "train.jsonl")}
    return settings | more


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_with_documents(world, documents, packing):
    config = tiny.config_of(world, overrides=mixed_config(world, documents) | {"dataset.packing": packing})
    model = tiny.make_model(config)
    builder = tiny.make_builder(config, model)
    flows = tiny.build_flows(config, tokenizer=builder.prompting.tokenizer)
    batch = builder({name: next(iter(flow)) for name, flow in flows.items()})
    assert batch.rows == {"t2i": 2, "lm": 1, "mmu": 2, "mixed": 3}
    out = model(**batch.forward_arguments())
    assert all(out.losses[name] > 3 for name in ("t2i", "lm", "mmu", "mixed", "mixed_text"))
    weights = {"t2i": 1.0, "lm": 0.1, "mmu": 1.0, "mixed": 1.0, "mixed_text": 0.2}
    torch.testing.assert_close(out.loss.detach(), sum(weights[name] * out.losses[name] for name in weights))


@pytest.mark.parametrize("number", [0, 1])
def test_a_document_that_was_cut_is_not_learned_to_end_there(world, number):
    """Its last segment, a text or an image, as `training/data/documents.py` marks it."""
    config = tiny.config_of(world)
    builder = tiny.make_builder(config, tiny.make_model(config))
    segments = [{"text": CAPTIONS[0], "loss": True}, tiny.items(CAPTIONS[:1])[0] | {"loss": True}]
    del segments[1]["text"]
    segments = segments[: number + 1]
    cut = [*segments[:-1], segments[-1] | {"is_cut": True}]
    whole, cut = (mixed_rows([{"segments": one}], builder)[0].labels[0] for one in (segments, cut))
    assert (whole[-2:] != IGNORED).all() and (cut[-2:] == IGNORED).all() and (cut != IGNORED).any()


def test_a_run_learns_documents(world, documents, tmp_path):
    more = {"training.max_train_steps": 4, "experiment.generate_every": 2, "experiment.eval_every": 4}
    tiny.train(world, tmp_path, mixed_config(world, documents) | more)
    last = tiny.steps_of(tmp_path)[-1]
    assert {"step_loss_mixed", "step_loss_mixed_text", "accuracy/mixed"} <= last.keys()
    evaluated = [line for line in tiny.metrics_of(tmp_path) if "eval_loss_mixed" in line]
    assert evaluated and evaluated[-1]["eval_loss_mixed_text"] > 0
