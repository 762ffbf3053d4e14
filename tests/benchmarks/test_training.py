"""The benchmark of a training step: rows as they are trained on, and the same losses from every way of taking it."""

import json
import mmap

import pytest
import torch

from benchmarks import report, training
from models import OmniMask, ShowoConfig
from models.vocabulary import IGNORE_ID

LLM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VOCABULARY = {"llm_vocab_size": 90, "codebook_size": 64, "vocab_size": 165}


@pytest.fixture
def size() -> training.Size:
    return training.Size(ShowoConfig(llm_config=LLM, num_vq_tokens=16, **VOCABULARY), max_text=34)


@pytest.mark.parametrize(("rows", "counts"), [(24, (10, 4, 10)), (12, (5, 2, 5)), (3, (1, 1, 1))])
def test_rows_are_those_of_stage_2(rows, counts):
    assert training.counts_of(rows) == counts


@pytest.mark.parametrize(("name", "rows"), [("stage1", 29), ("tuning1", 13), ("tuning2", 12)])
def test_other_stages_have_their_own_rows(size, name, rows):
    stage = training.STAGES[name]
    assert training.counts_of(rows, stage) == stage.rows and sum(stage.rows) == rows
    batch = training.make_batch(size, rows, stage=stage)
    assert batch.counts == stage.rows
    fewest, most = stage.drawn
    words = (batch.ids[: stage.rows[0], : 34 + 1] != size.config.vocabulary.pad_id).sum(1) - 3
    assert ((words >= fewest) & (words <= most)).all()


def test_the_limit_counts_what_is_not_padding(monkeypatch):
    monkeypatch.setattr(training.limits, "measure", lambda *_: training.limits.Rates(1e9, 1e9))
    found = training.limit(training.parse(["--size", "tiny", "--rows", "6"]))
    size = training.sizes("tiny")
    batch, hidden = training.make_batch(size, 6), size.config.backbone_config().hidden_size
    supervised = sum(training.objective_of("ours", batch, size.config).counts.values())
    assert found["parts"]["head"] == pytest.approx(3 * 2 * supervised * hidden * 4907 / 1e9)
    assert found["parts"]["optimiser"] == pytest.approx(28 * 3_615_851 / 1e9)
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))


def test_every_supervised_position_is_one_that_a_loss_looks_at(size):
    batch, v = training.make_batch(size, 12), size.config.vocabulary
    assert batch.ids.shape == batch.labels.shape == (12, 34 + 16 + 3)
    assert torch.equal(batch.mask.dense(), OmniMask.from_ids(batch.ids, v).dense())
    t2i, lm, mmu = batch.ids.split(batch.counts)
    drawn, _, answered = (batch.labels != IGNORE_ID).split(batch.counts)
    image = slice(34 + 2, 34 + 2 + 16)
    assert (drawn[:, image] == (t2i[:, image] == v.mask_token_id)).all() and not drawn[:, : 34 + 1].any()
    words = answered.sum(1) - 2  # bos and eos
    assert ((words >= 10) & (words <= 30)).all() and not answered[:, : 16 + 3].any()
    assert (lm < v.llm_vocab_size).all() and (mmu[:, 0] == v.mmu_id).all()


def test_all_ways_give_the_same_losses_and_gradients(size):
    batch, found = training.make_batch(size, 6), {}
    for kind in training.KINDS:
        model = training.make_model(kind, size)
        loss, losses = training.losses_of(kind, model, batch, training.objective_of(kind, batch, size.config))
        loss.backward()
        losses = torch.stack(losses).detach()
        found[kind] = [loss.detach(), losses, *(parameter.grad for parameter in model.parameters())]
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())  # the last kind's
    for kind in training.KINDS[1:]:
        torch.testing.assert_close(found[kind], found["published"], atol=1e-6, rtol=1e-5)


def test_the_100m_model_has_about_100_million_parameters_and_the_whole_vocabulary():
    size = training.sizes("100m")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in training.Showo(size.config).parameters())
    assert parameters == 97_780_866 and size.config.vocab_size == 58498


def test_memory_that_was_held_stays_in_the_peak():
    before = report.memory_in_use("cpu")
    block = mmap.mmap(-1, 2**26)  # pages of its own: the allocator may have as many free already
    block.write(bytes(range(1, 129)) * 2**19)
    assert report.memory_in_use("cpu") - before > 50
    block.close()
    assert report.peak_memory("cpu") - before > 50  # the kernel's counts are off by a little


def test_a_measurement_says_what_it_did(capsys):
    training.main(["--size", "tiny", "--rows", "3", "--steps", "1", "--kind", "ours, packed, checkpointing"])
    found = json.loads(capsys.readouterr().out)
    assert found["peak_mib"] > 0 and found["seconds"] > 0 and len(found["losses"]) == 3
    assert found["parameters"] == 3_615_851 and 0 < found["supervised"] < found["positions"] <= 3 * (24 + 64 + 3)


@pytest.mark.slow
def test_the_command_ends_in_one_json_line(capsys):
    training.main(["--size", "tiny", "--rows", "3", "--steps", "1"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last) == {"machine", "torch", "date", "commit", "settings", "results", "limit", "ratios"}
    losses = [last["results"][kind]["losses"] for kind in training.KINDS]
    assert losses == [pytest.approx(losses[0], abs=1e-5)] * len(losses)
