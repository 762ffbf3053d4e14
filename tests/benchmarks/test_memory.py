"""The memory calculation: what can be known exactly, and how far the rest is from a measurement."""

import pytest
from omegaconf import OmegaConf
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks import memory
from benchmarks.report import ROOT
from training.loss import MAX_LOGITS


def terms(name: str) -> memory.Terms:
    return memory.terms_of(OmegaConf.load(ROOT / f"configs/showo_{name}.yaml"))


def test_weights_gradients_and_moments_take_16_bytes_a_parameter():
    states = terms("pretraining_stage1").states
    # Phi-1.5 with q and k norms; 24 layers of 50,354,432, two tables of 58,498 · 2048, and 58,498 + 4,096
    assert states["1 GPU"] / 16 == 1_448_176_770
    assert states["FSDP2"] * memory.GPUS == states["1 GPU"]
    assert states["ZeRO-2"] == (2 + 14 / memory.GPUS) * 1_448_176_770


@pytest.mark.slow
def test_a_projector_alone_has_hardly_any_optimiser_state():
    whole, projector = terms("instruction_tuning_2_w_clip_vit"), terms("instruction_tuning_1_w_clip_vit")
    assert projector.states["1 GPU"] < 0.27 * whole.states["1 GPU"]
    assert projector.frozen == whole.frozen > terms("instruction_tuning_2").frozen


def test_the_clip_tower_is_that_of_vit_l_14_at_336():
    assert memory.parameters(CLIPVisionModel, CLIPVisionConfig(**memory.CLIP)) == 303_507_456


def test_more_supervised_positions_cost_their_hidden_states_only():
    model = memory.training.sizes("100m").config
    few, more = (memory.terms(model, 8, 387, [1000, 50, last]) for last in (10, 20))
    assert more.loss - few.loss == 2 * 4 * 512 * 10
    assert few.loss - 2 * 4 * 512 * 1060 == 4 * MAX_LOGITS, "one chunk of logits"
    assert memory.terms(model, 8, 387, [1, 1, 1]).loss == 3 * (4 * 58498 + 2 * 4 * 512)
    assert few.peak("1 GPU") > few.states["1 GPU"]


def test_an_adapter_has_hardly_any_states_and_a_batch_that_fits_is_the_largest():
    states = {way: memory.tuning_terms(way, 256, 1).states[way] for way in memory.TUNING}
    assert states["all, adamw"] == 16 * 1_448_176_770
    adapter = 16 * 24 * (4 * 2 * 2048 + 2 * (2048 + 8192))  # of rank 16 on six layers
    assert states["lora, base bf16"] == 2 * 1_448_176_770 + 16 * adapter
    assert sorted(states, key=states.get, reverse=True) == list(memory.TUNING)
    rows = memory.most_rows("lora, base bf16", 256, 24)
    peaks = [memory.tuning_terms("lora, base bf16", 256, n).peak("lora, base bf16") for n in (rows, rows + 1)]
    assert peaks[0] <= 0.9 * 24e9 < peaks[1] and memory.most_rows("all, adamw", 256, 24) == 0


@pytest.mark.slow
def test_the_calculation_is_near_a_measured_peak():
    line = memory.check(rows=6)
    assert abs(float(line.rpartition("(")[2].removesuffix(" %)"))) < 15, line


@pytest.mark.slow
def test_every_published_stage_has_its_line():
    lines = memory.table().splitlines()
    assert len(memory.stages()) == 11 and len(lines) == 13
    assert all(file.stem.removeprefix("showo_") in line for file, line in zip(memory.stages(), lines[2:], strict=True))
