"""`training.trainable: lora`: what is trained and saved, exact continuing, and what fits no adapter."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.schema import LoraSection
from models.adapters import (
    BASE,
    CONFIG,
    PREFIX,
    ROWS,
    WEIGHTS,
    adapter_disabled,
    load_adapter,
    merge_adapter,
    save_adapter,
    unload_adapter,
)
from models.loading import find_adapter
from tests.tiny_llms import FAMILIES, WORDS, tiny_showo
from tests.training.tiny import config_of, make_model, make_trainer, metrics_of, same, train
from tests.training.tiny_sources import clip_settings
from training.checkpointing import TRAINED, checkpoints
from training.optimization import adamw, make_optimizer, trained
from training.trainable import choose_trainable, keep_old_rows

LORA = {"training.trainable": "lora", "lora.rank": 4, "lora.dropout": 0.1, "experiment.log_grad_norm_every": 99}


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A model to start from, with weights that no other has."""
    folder = tmp_path_factory.mktemp("base") / "showo"
    make_model(config_of(world)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(world, base, tmp_path_factory):
    """A finished run of six steps, with checkpoints at 3 and 6."""
    output_dir = tmp_path_factory.mktemp("lora") / "out"
    return train(world, output_dir, LORA | {"experiment.init_from": base, "experiment.generate_every": 6}), output_dir


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("targets", "count"), [("all", {"phi": 6, "llama": 7}), ("attention", {"phi": 4, "llama": 4})])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_of_a_family_are_adapted_and_nothing_else_is_trained(family, targets, count):
    model = tiny_showo(family)
    ids = torch.arange(30)[None]
    before = model(ids).logits
    assert choose_trainable(model, "lora", LoraSection(rank=4, targets=targets)) == {}
    assert len(trained(model)) == 2 * 2 * count.get(family, count["llama"]), "two matrices for each layer of two"
    assert all("lora_" in name for name in trained(model)) and torch.equal(model(ids).logits, before)


def test_a_run_trains_and_saves_the_adapter_alone(run, base):
    trainer, output_dir = run
    frozen = {name: p for name, p in trainer.model.named_parameters() if not p.requires_grad}
    stored = load_file(base / "model.safetensors")
    assert all(torch.equal(p, stored[name.replace(".base_layer", "")]) for name, p in frozen.items())
    assert {CONFIG, WEIGHTS, BASE} <= names(output_dir) and "model.safetensors" not in names(output_dir)
    folder = checkpoints(output_dir)[-1]
    assert names(folder / "unwrapped_model") == {CONFIG, WEIGHTS, BASE}
    kept = {file: file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".pt")}
    assert {file.name for file in kept} == {TRAINED, WEIGHTS, "average.pt"}
    assert load_file(folder / TRAINED).keys() == trained(trainer.model).keys()
    assert json.loads((output_dir / CONFIG).read_text())["base_model_name_or_path"] == "showo"
    saved = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(output_dir / WEIGHTS).items()}
    assert same({name.replace(".default", ""): p for name, p in trainer.average.shadow.items()}, saved)
    lines = [line["step_loss_mmu"] for line in metrics_of(output_dir) if "lr" in line]
    assert lines[-1] < lines[0]


def test_a_killed_run_continues_to_the_last_bit(world, base, run, tmp_path):
    _, whole = run
    parts = shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(parts / "checkpoint-6")
    for name in (CONFIG, WEIGHTS, BASE):
        (parts / name).unlink()
    train(world, parts, LORA | {"experiment.init_from": base, "experiment.generate_every": 6})
    for name in (TRAINED, f"unwrapped_model/{WEIGHTS}"):
        files = [folder / "checkpoint-6" / name for folder in (whole, parts)]
        assert same(*map(load_file, files))
    moments = [torch.load(folder / "checkpoint-6" / "optimizer.bin", weights_only=True) for folder in (whole, parts)]
    assert all(same(state, moments[1]["state"][key]) for key, state in moments[0]["state"].items())
    assert metrics_of(whole) == metrics_of(parts)


def test_another_base_is_refused_when_a_run_continues(world, run, tmp_path):
    other = tmp_path / "other"
    torch.manual_seed(4321)  # other random numbers
    make_model(config_of(world)).save_pretrained(other)
    parts = shutil.copytree(run[1], tmp_path / "out")
    with pytest.raises(UserError, match="was made for another model, 'showo' .*differs.; give the one that it was"):
        train(world, parts, LORA | {"experiment.init_from": other, "training.max_train_steps": 7})


def test_weights_that_a_checkpoint_lacks_are_refused(world, base, run, tmp_path):
    parts = shutil.copytree(run[1], tmp_path / "out")
    file = parts / "checkpoint-6" / TRAINED
    save_file(dict(list(load_file(file).items())[1:]), file)
    with pytest.raises(UserError, match="trained.safetensors does not fit this model: missing 1"):
        train(world, parts, LORA | {"experiment.init_from": base, "training.max_train_steps": 7})


def test_a_start_from_an_adapter_is_refused_and_names_its_base(world, run):
    with pytest.raises(UserError, match="holds an adapter, not a model; give the model .*'showo'.*tools/export.py"):
        make_trainer(world, None, {"experiment.init_from": run[1]})


@pytest.mark.parametrize(
    "settings",
    [
        {"lora.dora": True, "training.gradient_accumulation_steps": 2},
        {"lora.base": "bf16", "model.gradient_checkpointing": True},
        {"lora.base": "nf4", "training.mixed_precision": "bf16"},
        {"lora.new": True, "training.mixed_precision": "bf16"},
    ],
)
def test_forms_of_adapters_learn_and_load(world, base, tmp_path, settings):
    if settings.get("lora.base") == "nf4":
        pytest.importorskip("torchao")
    output_dir, given = tmp_path / "out", LORA | settings | {"experiment.init_from": base}
    trainer = train(world, output_dir, given | {"training.max_train_steps": 3, "dataset.params.num_workers": 0})
    assert all(p.dtype == torch.float32 and p.abs().sum() > 0 for p in trained(trainer.model).values())
    model = make_model(config_of(world, overrides={"experiment.init_from": base}))
    load_adapter(model, find_adapter(output_dir))
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    ("key", "value"),
    [("training.trainable", "lora"), ("training.share_code_bits", True), ("optimizer.name", "adamw8bit")],
)
def test_sharded_runs_are_refused(world, monkeypatch, key, value):
    from accelerate.utils import DistributedType

    from training import processes

    config = config_of(world, overrides={key: value})
    with pytest.raises(UserError, match=f"{key}={value} does not work with DeepSpeed or FSDP2"):
        processes._refuse_sharded(config)
    monkeypatch.setattr(processes.Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="use one process, or DDP"):
        processes.make_accelerator(config, 1)


@pytest.mark.parametrize(("family", "tied"), [("phi", False), ("qwen3", True)])
def test_new_rows_are_trained_whole_and_belong_to_the_adapter(family, tied, tmp_path):
    model, plain = (tiny_showo(family, tie_word_embeddings=tied) for _ in range(2))
    ids = torch.randint(0, model.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
    old_rows = choose_trainable(model, "lora", LoraSection(rank=4, new=True))
    head = {"showo.lm_head.weight", "showo.lm_head.bias"}
    matrices = {"showo.model.embed_tokens.weight"} | (set() if tied else head)
    assert set(old_rows) == matrices
    norms = {name for name in trained(model) if "q_layernorm" in name or "k_layernorm" in name}
    assert len(norms) == (8 if family == "phi" else 0)
    keep_old_rows(model, old_rows)
    optimizer = adamw(model.named_parameters(), 0.5, old_rows, lr=1e-2)
    for _ in range(2):
        model.train()(ids, labels=ids, batch_size_lm=2).loss_lm.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    stored = plain.state_dict()
    for name in matrices:
        now = model.get_parameter(name)
        assert torch.equal(now[:WORDS], stored[name][:WORDS]) and not torch.equal(now[WORDS:], stored[name][WORDS:])
    save_adapter(model, tmp_path)
    assert load_file(tmp_path / ROWS).keys() == matrices | norms
    loaded = tiny_showo(family, tie_word_embeddings=tied)
    load_adapter(loaded, tmp_path)
    with torch.no_grad():
        with_it, without = model(ids).logits, plain(ids).logits
        assert torch.equal(loaded(ids).logits, with_it)
        for other in (model, loaded):
            with adapter_disabled(other):
                assert torch.equal(other(ids).logits, without)
        assert torch.equal(model(ids).logits, with_it) and (with_it - without).abs().max() > 0.5
        merged = tiny_showo(family, tie_word_embeddings=tied)
        load_adapter(merged, tmp_path)
        merge_adapter(merged)
        torch.testing.assert_close(merged(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-4)
        unload_adapter(loaded)
        assert torch.equal(loaded(ids).logits, without)


@pytest.mark.parametrize("rows", [torch.ones(400, 32), torch.ones(4, 8), torch.ones(()), torch.ones(4)])
def test_rows_that_do_not_fit_are_refused(rows, tmp_path):
    model = tiny_showo("llama")
    choose_trainable(model, "lora", LoraSection(new=True))
    save_adapter(model, tmp_path)
    save_file({"showo.model.embed_tokens.weight": rows}, tmp_path / ROWS)
    with pytest.raises(UserError, match="rows.safetensors holds .*embed_tokens.weight, which do not fit this model"):
        load_adapter(tiny_showo("llama"), tmp_path)


def test_the_projector_stays_as_it_is_unless_what_is_new_is_trained(world, tmp_path):
    """With CLIP-ViT features, `ClipVitUnderstanding` would train it."""
    for new, count in ((False, 0), (True, 4)):
        given = LORA | clip_settings(world, "llava_tuning") | {"lora.new": new, "training.max_train_steps": 2}
        trainer = train(world, tmp_path / str(new), given)
        assert sum("mm_projector" in name for name in trained(trainer.model)) == count
        assert (tmp_path / str(new) / ROWS).is_file() == new


def test_moments_of_8_bits_continue_to_the_last_bit(world, base, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    given = LORA | {
        "experiment.init_from": base,
        "optimizer.name": "adamw8bit",
        "lora.rank": 256,
    }  # few weights keep 32
    whole = train(world, tmp_path / "whole", given)
    assert isinstance(whole.optimizer.optimizer, bitsandbytes.optim.AdamW8bit)
    assert any(state["state1"].dtype == torch.uint8 for state in whole.optimizer.state.values())
    parts = shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(parts / "checkpoint-6")
    train(world, parts, given)
    assert same(*(load_file(tmp_path / name / "checkpoint-6" / TRAINED) for name in ("whole", "parts")))
    assert metrics_of(tmp_path / "whole") == metrics_of(parts)


def test_8_bit_moments_need_bitsandbytes(world, monkeypatch):
    monkeypatch.setattr("models.quantization.importlib.util.find_spec", lambda name: None)
    config = config_of(world, overrides={"optimizer.name": "adamw8bit"})
    with pytest.raises(UserError, match="optimizer.name=adamw8bit needs bitsandbytes, which is not installed: pip"):
        make_optimizer(tiny_showo("phi"), config)
