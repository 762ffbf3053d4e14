"""Adapters outside of training: on and off, saved, loaded, merged, in a pipeline and the scripts; what is refused."""

import json
import pickle
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import inference_t2i
from common.config import InferenceConfig, load_config
from common.errors import UserError
from evaluation.answers import model_settings
from evaluation.schema import EvaluationConfig
from models import Showo, ShowoPipeline
from models.adapters import (
    BASE,
    CONFIG,
    WEIGHTS,
    adapter_disabled,
    add_adapter,
    describe_base,
    load_adapter,
    merge_adapter,
    save_adapter,
    unload_adapter,
)
from models.generation import cpu
from tests.models.test_pipeline_parts import made, new_pipeline
from tests.parity.goldens import PHI, tiny_showo
from tests.tiny import write_checkpoints
from tests.tiny_llms import tiny_showo as showo_of

IDS = torch.arange(40).view(2, 20)


def adapted(model: Showo, *, dora: bool = False, rank: int = 2) -> Showo:
    """With an adapter that changes much."""
    targets = [*model.config.backbone.attention, *model.config.backbone.mlp]
    add_adapter(model, describe_base(model), r=rank, lora_alpha=4 * rank, use_dora=dora, target_modules=targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(std=0.1)
            elif parameter.requires_grad:
                parameter.mul_(1.1)
    return model


def logits(model: Showo) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Checkpoints, and `adapter`, one for them."""
    root = tmp_path_factory.mktemp("tiny")
    places = write_checkpoints(root)
    save_adapter(adapted(loaded_showo(places)), root / "adapter")
    return places | {"adapter": root / "adapter"}


def loaded_showo(places, **settings) -> Showo:
    return Showo.from_pretrained(str(places["showo"]), llm_model_path=str(PHI), **settings).eval()


def loaded_pipeline(places, **settings) -> ShowoPipeline:
    return ShowoPipeline.from_pretrained(
        places["showo"], vq_model=str(places["magvitv2"]), llm=str(PHI), device="cpu", **settings
    )


@pytest.fixture
def copy(places, tmp_path) -> Path:
    """An adapter to damage."""
    return shutil.copytree(places["adapter"], tmp_path / "copy")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["phi", "qwen3"])
def test_an_adapter_is_saved_loaded_switched_off_merged_and_taken_off(family, dora, tmp_path):
    plain, trained, loaded = (showo_of(family) for _ in range(3))
    save_adapter(adapted(trained, dora=dora), tmp_path / "adapter")
    load_adapter(loaded, tmp_path / "adapter")
    with_it, without = logits(trained), logits(plain)
    assert (with_it - without).abs().max() > 0.1 and torch.equal(logits(loaded), with_it)
    for model, flags in ((trained, {True, False}), (loaded, {False})):
        with adapter_disabled(model):
            assert torch.equal(logits(model), without)
        assert torch.equal(logits(model), with_it) and {p.requires_grad for p in model.parameters()} == flags
    unload_adapter(trained)
    assert torch.equal(logits(trained), without) and trained.state_dict().keys() == plain.state_dict().keys()
    merge_adapter(loaded)
    torch.testing.assert_close(logits(loaded), with_it, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(Showo.from_pretrained(str(tmp_path / "merged")).eval()), logits(loaded))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Could not find a config file")
def test_peft_reads_and_writes_the_same_folder(tmp_path):
    trained, theirs, ours = (showo_of("llama") for _ in range(3))
    save_adapter(adapted(trained), tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    assert torch.equal(logits(model.get_base_model()), logits(trained))
    model.save_pretrained(str(tmp_path / "theirs"))
    load_adapter(ours, tmp_path / "theirs")
    assert torch.equal(logits(ours), logits(trained))


def test_a_pipeline_takes_an_adapter_at_loading_or_later(places, tmp_path):
    given = loaded_pipeline(places, adapter=places["adapter"])
    pipeline = loaded_pipeline(places)
    before = made(pipeline)
    pipeline.load_adapter(places["adapter"])
    assert made(pipeline) == made(given) != before
    with pytest.raises(UserError, match="has an adapter already"):
        pipeline.load_adapter(places["adapter"])
    with pytest.raises(UserError, match="has an adapter; merge it first"):
        pipeline.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    pipeline.unload_adapter()
    assert made(pipeline) == before
    given.merge_adapter()
    torch.testing.assert_close(logits(given.model), logits(adapted_model(places)), rtol=1e-4, atol=1e-4)


def adapted_model(places) -> Showo:
    model = loaded_showo(places)
    load_adapter(model, places["adapter"])
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_base_is_still_the_same_one(places, dtype):
    model = loaded_showo(places, dtype=dtype)
    load_adapter(model, places["adapter"])
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert (logits(model) - logits(adapted_model(places))).abs().max() < 0.3


def test_the_scripts_generate_with_the_adapter(places, tmp_path):
    common = [f"config={places['demo']}", "mode=t2i", "prompt=w1 w2", "seed=1"]
    for name, more in (("with", [f"adapter={places['adapter']}"]), ("without", [])):
        inference_t2i.main([*common, *more, f"output_dir={tmp_path / name}"])
    with_it, without = ((tmp_path / name / "0000.png").read_bytes() for name in ("with", "without"))
    assert with_it != without
    config = load_config([*common, f"adapter={places['adapter']}"], InferenceConfig)
    pipeline = ShowoPipeline.from_config(config)
    assert pipeline.model.peft_config


def test_an_evaluation_tells_adapters_and_quantised_weights_apart(places, copy):
    def settings(*more):
        return model_settings(load_config([f"config={places['demo']}", *more], EvaluationConfig))

    weights = load_file(copy / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in weights.items()}, copy / WEIGHTS)
    found = [
        settings(),
        settings(f"adapter={places['adapter']}"),
        settings(f"adapter={copy}"),
        settings("quantization=int8"),
    ]
    assert len({json.dumps(one) for one in found}) == len(found)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BAD = {
    "holds no adapter": lambda folder: (folder / WEIGHTS).unlink(),
    "holds no adapter; expected adapter_config.json": lambda folder: (folder / WEIGHTS).rename(
        folder / "adapter_model.bin"
    ),
    "peft_type is 'IA3'; only LORA": lambda folder: edit(folder / CONFIG, peft_type="IA3"),
    "modules_to_save is .*only its default": lambda folder: edit(folder / CONFIG, modules_to_save=["lm_head"]),
    "megatron_config is": lambda folder: edit(folder / CONFIG, megatron_config={"a": 1}, megatron_core="antigravity"),
    "target_modules must be names": lambda folder: edit(folder / CONFIG, target_modules=[]),
    "field 'target_modules' is": lambda folder: edit(folder / CONFIG, target_modules=".*(a+)+b"),
    "r is 1000000; it must be from 1 to 4096": lambda folder: edit(folder / CONFIG, r=10**6),
    "lora_alpha is inf": lambda folder: edit(folder / CONFIG, lora_alpha=float("inf")),
    "does not fit this model: .*mis-shaped": lambda folder: edit(folder / CONFIG, r=3),
    "does not fit this model: missing": lambda folder: edit(folder / CONFIG, use_dora=True),
    "does not fit this model: unexpected": lambda folder: edit(folder / CONFIG, target_modules=["q_proj"]),
    "cannot be read; it may be truncated": lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps("no")),
    "holds weights that are NaN": lambda folder: save_file(
        {name: tensor * float("nan") for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS
    ),
    "made for another model, 'showo' .no weight": lambda folder: edit(folder / BASE, weights={}),
    "made for another model, .*differs": lambda folder: edit(
        folder / BASE, weights=dict.fromkeys(json.loads((folder / BASE).read_text())["weights"], {"shape": [2]})
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_adapter_of_this_model_is_refused_and_leaves_it_as_it_was(copy, places, message):
    BAD[message](copy)
    model = loaded_showo(places)
    names = model.state_dict().keys()
    with pytest.raises(UserError, match=message) as error:
        load_adapter(model, copy)
    assert "\n" not in str(error.value) and model.state_dict().keys() == names


@pytest.mark.parametrize("other", [lambda: showo_of("llama"), lambda: scaled(tiny_showo())], ids=["family", "weights"])
def test_another_model_is_refused(places, other):
    with pytest.raises(UserError, match=r"adapter=.* was made for another model, 'showo' .*; give the one that it was"):
        load_adapter(other(), places["adapter"])


def scaled(model: Showo) -> Showo:
    """As if it had been trained for some more steps."""
    with torch.no_grad():
        model.showo.get_decoder().layers[0].self_attn.q_proj.weight.mul_(1.01)
    return model


def test_without_a_word_on_its_base_only_shapes_are_compared(places, copy, caplog):
    (copy / BASE).unlink()
    load_adapter(scaled(tiny_showo()), copy)
    assert "does not say which model it was made for" in caplog.text


def test_what_needs_an_adapter_says_so():
    for function in (merge_adapter, unload_adapter):
        with pytest.raises(ValueError, match="has no adapter; load one first"):
            function(tiny_showo())


def test_cpu_kernels_stay_when_an_adapter_is_merged(places):
    pipeline = new_pipeline()
    cpu.enable(pipeline.model)
    pipeline.load_adapter(places["adapter"])
    pipeline.merge_adapter()
    layer = pipeline.model.showo.get_decoder().layers[0]
    assert type(layer.self_attn.q_proj) is cpu.SkinnyLinear


def test_an_adapters_error_ends_a_script_before_weights_are_read(places, tmp_path, monkeypatch):
    monkeypatch.setattr("models.checkpoint_io.load_state_dict_folder", lambda folder: pytest.fail("weights were read"))
    arguments = [f"config={places['demo']}", "mode=t2i", "prompt=w1", f"output_dir={tmp_path / 'out'}"]
    for adapter, message in (
        (places["showo"], "holds no adapter; expected"),
        (tmp_path / "x", "adapter=.*x: .*does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            inference_t2i.main([*arguments, f"adapter={adapter}"])
