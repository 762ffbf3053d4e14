"""Three flows become one batch: rows in order, one length, each with its labels and mask (spec §2, §5)."""

import pytest
import torch

from models import OmniMask
from tests.training import tiny
from tests.training.tiny import CAPTIONS, MAX_TEXT, NUM_TOKENS, items
from training.batches import FLOWS

LENGTH = MAX_TEXT + 1 + NUM_TOKENS + 2


@pytest.fixture(scope="module")
def model(world):
    return tiny.make_model(tiny.config_of(world))


def make(world, model, **training):
    return tiny.make_builder(
        tiny.config_of(world, overrides={f"training.{key}": value for key, value in training.items()}), model
    )


@pytest.fixture
def builder(world, model):
    return make(world, model, cond_dropout_prob=0.0)


THREE = {"t2i": items(CAPTIONS[:3]), "lm": ["some words", "more of them"], "mmu": items(CAPTIONS[5:6])}


def test_rows_come_in_the_order_t2i_lm_mmu_whatever_the_order_of_the_flows(builder):
    batch = builder(dict(reversed(THREE.items())))
    vocabulary = builder.prompting.vocabulary
    assert batch.rows == {"t2i": 3, "lm": 2, "mmu": 1, "mixed": 0}
    assert batch.input_ids.shape == batch.labels.shape == (6, LENGTH)
    assert (batch.input_ids[:3] == vocabulary.t2i_id).any(1).all()
    assert batch.input_ids[3:5, 0].tolist() == [builder.prompting.bos_id] * 2
    assert batch.input_ids[5, :2].tolist() == [vocabulary.mmu_id, vocabulary.soi_id]
    assert batch.texts == CAPTIONS[:3]
    assert torch.equal(batch.pixels, torch.stack([item["image"] for item in THREE["t2i"]]))
    assert batch.image_features is None


def test_image_ids_are_the_tokenizers_codes_behind_the_text_ids(builder):
    vq_model = tiny.make_vq_model()
    batch = builder(THREE)
    codes = vq_model.get_code(batch.pixels) + builder.noise.image_offset  # (3, N)
    image = slice(MAX_TEXT + 2, MAX_TEXT + 2 + NUM_TOKENS)
    ids, labels = batch.input_ids[:3, image], batch.labels[:3, image]
    hidden = ids == builder.noise.mask_token_id
    assert hidden.any(1).all()
    assert torch.equal(ids[~hidden], codes[~hidden]) and torch.equal(labels[hidden], codes[hidden])
    assert (labels[~hidden] == -100).all()
    mmu = vq_model.get_code(THREE["mmu"][0]["image"][None]) + builder.noise.image_offset
    assert torch.equal(batch.input_ids[5:, 2 : 2 + NUM_TOKENS], mmu)


def test_the_mask_of_each_row_is_the_one_its_ids_ask_for(builder, model):
    batch = builder(THREE)
    expected = OmniMask.from_ids(batch.input_ids, model.vocabulary).dense()
    assert torch.equal(batch.attention_mask.dense(), expected)


@pytest.mark.parametrize("flows", [("t2i",), ("lm",), ("mmu",), ("lm", "mmu"), ("t2i", "mmu")])
def test_absent_flows_have_no_rows_and_no_loss(builder, model, flows):
    batch = builder({name: THREE[name] for name in flows})
    assert batch.rows == {name: len(THREE[name]) if name in flows else 0 for name in FLOWS}
    assert (batch.mask_prob is None) == ("t2i" not in flows)
    with torch.no_grad():
        out = model(**batch.forward_arguments())
    for name in FLOWS:
        loss = out.losses[name].item()
        assert loss > 4 if name in flows else loss == 0


def test_a_batch_gives_each_flow_the_loss_it_has_alone(builder, model):
    def losses_of(*names):
        torch.manual_seed(4)
        with torch.no_grad():
            return model(**builder({name: THREE[name] for name in names}).forward_arguments()).losses

    alone = {name: losses_of(name)[name] for name in THREE}
    together = losses_of(*THREE)
    torch.testing.assert_close({name: together[name] for name in THREE}, alone)


@pytest.mark.parametrize("length", [None, LENGTH])
def test_a_packed_batch_has_the_same_losses_in_fewer_positions(world, model, length):
    config = tiny.config_of(world, overrides={"dataset.packing": True, "dataset.packing_length": length})
    torch.manual_seed(4)
    plain = make(world, model)(THREE)
    torch.manual_seed(4)
    packed = tiny.make_builder(config, model)(THREE)
    with torch.no_grad():
        expected, found = (model(**batch.forward_arguments()) for batch in (plain, packed))
    torch.testing.assert_close(found.losses | found.statistics, expected.losses | expected.statistics)
    assert torch.equal(packed.input_ids, plain.input_ids) and torch.equal(packed.labels, plain.labels)
    assert plain.num_positions == plain.input_ids.numel() and packed.num_used == plain.num_used
    assert packed.num_used <= packed.num_positions <= (plain.num_positions if length else 1.2 * packed.num_used)


def test_texts_are_dropped_with_the_configured_probability(world, model):
    for prob in (0.0, 1.0):
        batch = make(world, model, cond_dropout_prob=prob)({"t2i": THREE["t2i"]})
        lengths = (batch.input_ids[:, : MAX_TEXT + 1] != model.vocabulary.pad_id).sum(1)
        assert (lengths == 3).all() if prob else (lengths > 3).all(), "<t2i> bos eos"


def test_a_run_hands_its_masking_settings_on(world, model):
    settings = {"noise_type": "random_replace", "min_masking_rate": 0.5, "mask_contiguous_region_prob": 0.25}
    noise = make(world, model, **settings, mask_schedule="pow2").noise
    assert (noise.noise_type, noise.min_masking_rate, noise.contiguous_region_prob) == tuple(settings.values())
    assert noise.schedule(torch.tensor(0.5)).item() == pytest.approx(0.75)
    everywhere = make(world, model, predict_all_tokens=True)({"t2i": THREE["t2i"]})
    assert (everywhere.labels[:, MAX_TEXT + 1 :] != -100).all()


def test_understanding_sees_all_of_the_picture_unless_told_otherwise(world, model):
    mask = model.vocabulary.mask_token_id
    rows = make(world, model)({"mmu": items(CAPTIONS)})
    assert not (rows.input_ids == mask).any()
    hidden = make(world, model, und_mask_ratio=0.5)({"mmu": items(CAPTIONS * 6)})
    share = (hidden.input_ids[:, 2 : 2 + NUM_TOKENS] == mask).float().mean(1)
    assert 0.15 < share.mean() < 0.35, "from nothing up to half"
    assert share.max() < 0.85 and share.min() < 0.1
    assert not (hidden.labels == mask).any()
    assert torch.equal(hidden.labels[: len(CAPTIONS)], rows.labels), "what is learnt stays the same"


def test_codes_stand_in_for_pixels(builder):
    vq_model = tiny.make_vq_model()
    pictures = items(CAPTIONS[:3])
    codes = vq_model.get_code(torch.stack([item["image"] for item in pictures]))
    encoded = [{"codes": row, "text": item["text"]} for row, item in zip(codes, pictures, strict=True)]
    for mixed in (encoded, [pictures[0], encoded[1], pictures[2]]):
        torch.manual_seed(5)
        expected = builder({"t2i": pictures, "mmu": pictures})
        torch.manual_seed(5)
        batch = builder({"t2i": mixed, "mmu": mixed})
        assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.codes, codes) and batch.pixels is None


def test_samples_are_named_by_their_key_else_by_their_text(builder):
    named = [item | {"key": f"shard-{n}"} for n, item in enumerate(items(CAPTIONS[:2]))]
    text = "a text that is rather long, so that it is cut somewhere"
    batch = builder({"t2i": named, "lm": [text], "mmu": THREE["mmu"]})
    assert batch.keys == ["t2i: shard-0", "t2i: shard-1", f"lm: {text[:40]!r}", f"mmu: {CAPTIONS[5]!r}"]
