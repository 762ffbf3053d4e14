"""The memory calculation: what can be known exactly."""

from omegaconf import OmegaConf

from benchmarks import memory
from benchmarks.report import ROOT


def terms(name: str) -> memory.Terms:
    return memory.terms_of(OmegaConf.load(ROOT / f"configs/showo_{name}.yaml"))


def test_weights_gradients_and_moments_take_16_bytes_a_parameter():
    states = terms("pretraining_stage1").states
    # Phi-1.5 with q and k norms; 24 layers of 50,354,432, two tables of 58,498 · 2048, and 58,498 + 4,096
    assert states["DDP"] / 16 == 1_448_176_770
    assert states["FSDP2"] * memory.GPUS == states["DDP"]


def test_a_projector_alone_has_hardly_any_optimiser_state():
    whole, projector = terms("instruction_tuning_2_w_clip_vit"), terms("instruction_tuning_1_w_clip_vit")
    assert projector.states["DDP"] < 0.27 * whole.states["DDP"]
    assert projector.frozen == whole.frozen > terms("instruction_tuning_2").frozen


def test_every_published_stage_has_its_line():
    lines = memory.table().splitlines()
    assert len(memory.stages()) == 11 and len(lines) == 13
    assert all(file.stem.removeprefix("showo_") in line for file, line in zip(memory.stages(), lines[2:], strict=True))
