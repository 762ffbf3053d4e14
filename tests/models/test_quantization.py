"""Quantised weights: how far they are from the whole ones, that both loops run on them, and what is refused."""

from functools import partial

import pytest
import torch
from torch import nn

import inference_t2i
from benchmarks import published
from common.errors import UserError
from models import ShowoPipeline, quantization
from models.adapters import load_adapter, merge_adapter, save_adapter
from models.generation import cpu
from models.quantization import is_quantized, quantize
from tests.models.generation.test_runner import both_loops
from tests.models.test_adapters import adapted, loaded_pipeline, loaded_showo, logits
from tests.models.test_pipeline_parts import made
from tests.tiny import write_checkpoints
from tests.tiny_llms import tiny_showo

SIZES = {"hidden_size": 64, "intermediate_size": 96}  # multiples of what a group and a block need
KINDS = {"int8": 0.015, "int4": 0.1, "nf4": 0.12}  # largest error of a layer's output, by its norm
DTYPES = dict.fromkeys(KINDS, (torch.float32, torch.bfloat16)) | {"int4": (torch.bfloat16,)}

pytest.importorskip("torchao")


@pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind in KINDS for dtype in DTYPES[kind]])
@pytest.mark.parametrize("family", ["phi", "llama"])
@torch.no_grad()
def test_the_layers_of_the_decoder_are_quantised_and_nothing_else(family, kind, dtype):
    model, whole = (tiny_showo(family, **SIZES).to(dtype) for _ in range(2))
    quantize(model, kind)
    backbone = model.config.backbone
    for name, module in whole.named_modules():
        if isinstance(module, nn.Linear):
            other, x = model.get_submodule(name), torch.randn(50, module.in_features, dtype=dtype)
            is_target = name.rpartition(".")[2] in (*backbone.attention, *backbone.mlp)
            assert (type(other.weight) is not nn.Parameter) == is_target
            exact, rounded = module(x).float(), other(x).float()
            error = (exact - rounded).norm() / exact.norm()
            assert 0 < error < KINDS[kind] if is_target else torch.equal(exact, rounded)
    assert model.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_both_loops_run_on_quantised_weights(kind):
    """Cached equals uncached, in fp32; in bf16 rounding decides between tokens that are near."""
    model = tiny_showo("llama", **SIZES).to(DTYPES[kind][0])
    quantize(model, kind)
    cpu.enable(model)
    ours = both_loops(partial(model.mmu_generate, top_k=1), model.t2i_generate)
    assert [tensor.shape for tensor in ours] == [(1, 20), (1, 16)] and ours[1].max() < model.config.codebook_size
    if kind == "int4":
        return
    theirs = both_loops(partial(published.mmu_generate, model), partial(published.t2i_generate, model))
    assert all(map(torch.equal, ours, theirs))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def quantized(places) -> ShowoPipeline:
    return loaded_pipeline(places, quantization="int8")


def test_a_pipeline_is_quantised_at_loading(places, quantized):
    assert is_quantized(quantized.model) and not is_quantized(quantized.vq_model)
    assert made(quantized)[0] and quantized.to("cpu") is quantized


def test_an_adapter_is_merged_before_the_weights_are_quantised(places, quantized, tmp_path):
    save_adapter(adapted(loaded_showo(places)), tmp_path / "adapter")
    pipeline = loaded_pipeline(places, adapter=tmp_path / "adapter", quantization="int8")
    whole = loaded_showo(places)
    load_adapter(whole, tmp_path / "adapter")
    assert 0 < (logits(pipeline.model) - logits(whole)).abs().max() < 0.5 < logits(whole).abs().max()
    with pytest.raises(UserError, match="load with adapter=… beside quantization=…, which merges it first"):
        quantized.load_adapter(tmp_path / "adapter")


def test_an_adapter_is_not_merged_into_quantised_weights():
    model = tiny_showo("phi", **SIZES)
    quantize(model, "nf4")
    with pytest.raises(UserError, match="cannot be merged into quantised weights"):
        merge_adapter(adapted(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipeline, folder: pipeline.to(dtype="bf16"), "stay on their device and in their dtype"),
        (lambda pipeline, folder: pipeline.to("meta"), "stay on their device and in their dtype"),
        (lambda pipeline, folder: pipeline.save_pretrained(folder / "new"), "quantised weights are not saved"),
    ],
)
def test_quantised_weights_stay_where_they_are(quantized, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        change(quantized, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("int4", {"hidden_size": 48}, "quantization=int4 does not fit .*mlp.fc1 of 96 x 48 weights; give int8"),
        ("nf4", {"hidden_size": 32, "intermediate_size": 9}, "nf4 does not fit .*mlp.fc1 of 9 x 32"),
    ],
)
def test_widths_that_do_not_fit_are_refused(kind, sizes, message):
    with pytest.raises(UserError, match=message):
        quantize(tiny_showo("phi", **SIZES | sizes), kind)


def test_int4_needs_bf16():
    with pytest.raises(UserError, match="quantization=int4 needs bf16; give dtype=bf16"):
        quantize(tiny_showo("phi", **SIZES), "int4")


def test_what_the_library_does_not_run_is_one_line(monkeypatch):
    def fails(*_):
        raise NotImplementedError("Could not run 'aten::x' with arguments from the 'CPU' backend.\nThis could be")

    monkeypatch.setattr(quantization, "_by_torchao", fails)
    with pytest.raises(UserError, match="quantization=int8 does not run on cpu here .Could not run .*leave it out"):
        quantize(tiny_showo("phi"), "int8")


def test_a_package_that_is_missing_is_named_before_weights_are_read(places, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("models.checkpoint_io.load_state_dict_folder", lambda folder: pytest.fail("weights were read"))
    arguments = [f"config={places['demo']}", "mode=t2i", "prompt=w1", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="needs torchao, which is not installed: pip install 'torchao==0.13.0'"):
        inference_t2i.main([*arguments, "quantization=int8"])


def test_a_script_generates_with_quantised_weights(places, tmp_path):
    arguments = [f"config={places['demo']}", "mode=t2i", "prompt=w1", f"output_dir={tmp_path / 'out'}"]
    inference_t2i.main([*arguments, "quantization=nf4"])
    assert (tmp_path / "out" / "0000.png").is_file()
