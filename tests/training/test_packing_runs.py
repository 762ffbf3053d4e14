"""`dataset.packing`: a run with it learns what a run without it learns, in fewer positions (spec §3, §5)."""

import pytest
import torch

from common.errors import UserError
from llava import encode_conversation, encode_plain
from models.images import preprocess
from tests.training.tiny import (
    CAPTIONS,
    MAX_TEXT,
    NUM_TOKENS,
    config_of,
    make_builder,
    make_model,
    make_prompting,
    make_trainer,
    make_vq_model,
    metrics_of,
    picture,
)
from tests.training.tiny import train as run
from tests.training.tiny_sources import turns, write_clip
from training.understanding import ClipVitUnderstanding, VqUnderstanding

ROW = MAX_TEXT + NUM_TOKENS + 3
PACKED = {"dataset.packing": True}
LOSSES = ("step_loss_t2i", "step_loss_lm", "step_loss_mmu")


def pictures(count: int) -> list[dict]:
    return [{"image": preprocess(picture(caption), 32), "text": caption} for caption in CAPTIONS[:count]]


def conversations(understanding, encode, rounds: int, tokenizer) -> list[dict]:
    """mmu items of LLaVA for either branch."""
    made = []
    for caption in CAPTIONS[3:6]:
        seen = {"image": preprocess(picture(caption), 32)}
        if understanding.image_processor is not None:
            seen = {"pixel_values": understanding.tower.preprocess([picture(caption)])[0]}
        made.append(encode(turns(caption, rounds), tokenizer) | seen)
    return made


def losses_and_gradients(world, kind: str, overrides: dict):
    """Losses, statistics and gradients of one batch of all flows, and the batch."""
    clip = {"model.showo.w_clip_vit": True, "model.clip_vit_name": world / "clip"}
    branch = {
        "captions": {},
        "llava": {"dataset.und_type": "llava_pretrain"},
        "clip": {"dataset.und_type": "llava_pretrain"} | clip,
        "clip tuning": {"dataset.und_type": "llava_tuning", "dataset.preprocessing.max_seq_length": 256} | clip,
    }[kind]
    torch.manual_seed(0)
    training = {"training.label_smoothing": 0.1, "training.und_mask_ratio": 0.3}
    config = config_of(world, overrides=branch | training | overrides)
    understanding = ClipVitUnderstanding(config) if "clip" in kind else VqUnderstanding(config)
    model, prompting = make_model(config), make_prompting(config)
    understanding.open()
    understanding.attach(model, torch.device("cpu"))
    model.requires_grad_(True)
    builder = make_builder(config, model, make_vq_model(), prompting, understanding, torch.device("cpu"))
    encode, rounds = (encode_conversation, 2) if kind == "clip tuning" else (encode_plain, 1)
    mmu = pictures(3) if kind == "captions" else conversations(understanding, encode, rounds, prompting.tokenizer)
    torch.manual_seed(1)
    batch = builder({"t2i": pictures(4), "lm": ["a few words", " ".join(CAPTIONS[:9])], "mmu": mmu})
    out = model(**batch.forward_arguments())
    out.loss.backward()
    losses = torch.stack([out.loss, out.loss_t2i, out.loss_lm, out.loss_mmu]).detach()
    return (losses, out.statistics, [p.grad for p in model.parameters()]), batch


@pytest.fixture(scope="module")
def clip_world(world):
    write_clip(world / "clip")
    return world


@pytest.mark.parametrize("length", [None, "shortest"])
@pytest.mark.parametrize("kind", ["captions", "llava", "clip", "clip tuning"])
def test_a_batch_gives_the_same_losses_and_gradients(clip_world, kind, length):
    expected, batch = losses_and_gradients(clip_world, kind, {})
    row = batch.input_ids.shape[1]
    settings = PACKED | {"dataset.packing_length": row if length else None}
    found, packed = losses_and_gradients(clip_world, kind, settings)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(packed.input_ids, batch.input_ids) and torch.equal(packed.labels, batch.labels)
    assert batch.num_positions == batch.input_ids.numel() and packed.num_used == batch.num_used
    assert packed.num_used <= packed.num_positions <= batch.num_positions
    if not length:
        assert packed.num_positions < min(1.2 * packed.num_used, batch.num_positions)


# ---- runs ----


@pytest.mark.slow
def test_a_run_learns_the_same_and_tells_how_much_padding_is_gone(world, tmp_path):
    held_out = {"dataset.params.eval_t2i_shards_path_or_url": world / "train-000000.tar", "experiment.eval_every": 3}
    for name, packing in (("plain", {}), ("packed", PACKED)):
        run(world, tmp_path / name, held_out | packing | {"training.gradient_accumulation_steps": 2})
    plain, packed = (metrics_of(tmp_path / name) for name in ("plain", "packed"))
    for before, after in zip(plain, packed, strict=True):
        assert before.keys() == after.keys() - {"padding_share_unpacked"}
        for name in before.keys() - {"padding_share"}:
            assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-5), name
        if "lr" in before:
            assert after["padding_share_unpacked"] == pytest.approx(before["padding_share"])
            assert after["padding_share"] < 0.8 * before["padding_share"]
    assert any("eval_loss_t2i" in line for line in packed)
    assert (tmp_path / "packed/images").is_dir(), "samples are drawn as ever"


# ---- mistakes ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset.packing": True, "compile": True}, "dataset.packing with compile=true .* give flex_attention"),
        ({"dataset.packing_length": 500}, "dataset.packing_length has no effect without dataset.packing=true"),
        ({"dataset.packing": True, "dataset.packing_length": 0}, "dataset.packing_length is 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(world, settings, message):
    with pytest.raises(UserError, match=message):
        config_of(world, overrides=settings)


def test_rows_that_are_too_short_for_a_sample_are_refused(world, tmp_path):
    with pytest.raises(UserError, match=f"packing_length is {ROW - 1}, but a sample may have {ROW} positions"):
        make_trainer(world, tmp_path, PACKED | {"dataset.packing_length": ROW - 1})
