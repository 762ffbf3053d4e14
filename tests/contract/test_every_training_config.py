"""Every YAML takes two real steps; only paths, sizes and step counts are other than written (spec §14).

The eleven training files and those of the emoji world train. The four demo files hold no data and no training keys:
they draw or answer with two steps of their loop, and train as well when the command line says from what.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import inference_mmu
import inference_t2i
from models import Showo, ShowoConfig
from models.backbones import read_llm_config
from tests.training import tiny
from tests.training.tiny_sources import CLIP_WIDTH, write_clip, write_imagenet, write_llava, write_llm_weights
from tools import small_clip
from training import train, train_w_clip_vit

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
OTHER_LLMS = {f"showo_{llm}_stage{stage}": llm for llm in ("llama3", "qwen2_5") for stage in (1, 2)}
FAMILIES = {"llama3": "llama", "qwen2_5": "qwen2"}
PUBLISHED = sorted(path.stem for path in CONFIGS.glob("showo_*.yaml") if "tiny" not in path.stem)
PUBLISHED = [name for name in PUBLISHED if name not in OTHER_LLMS]
DEMOS = [name for name in PUBLISHED if "demo" in name]
STAGES = [name for name in PUBLISHED if "demo" not in name]
SMALL = [f"showo_tiny_{stage}" for stage in ("stage1", "stage2", "stage3")]
SMALL += [f"showo_tiny_instruction_tuning_{n}{branch}" for n in (1, 2) for branch in ("", "_w_clip_vit")]
SMALL.append("showo_tiny_train")
SIDES = {256: 32, 512: 48}  # the resolution of a file → that of its test, with 8 pixels a token
SYSTEM_ROOM = 200  # M of the CLIP tuning rows: the system prompt is long in the tiny tokenizer


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data of every kind, both tokenizers, a language model's weights, a CLIP tower and models to start from."""
    folder = tiny.write_world(tmp_path_factory.mktemp("world") / "tiny")
    write_llm_weights(folder / "llm")
    write_imagenet(folder / "imagenet")
    for rounds in (1, 2):
        write_llava(folder, rounds)
    write_clip(folder / "clip")
    for side in SIDES.values():
        for branch in ("", "_w_clip_vit"):
            showo(folder / "llm", (side // 8) ** 2, bool(branch)).save_pretrained(folder / f"start{side}{branch}")
    return folder


def showo(llm: Path, num_vq_tokens: int, w_clip_vit: bool) -> Showo:
    sizes = {"codebook_size": tiny.CODEBOOK_SIZE, "vocab_size": tiny.VOCAB_SIZE, "llm_vocab_size": tiny.LLM_VOCAB_SIZE}
    branch = {"w_clip_vit": w_clip_vit, "clip_feature_size": CLIP_WIDTH}
    config = {"llm_model_path": str(llm), "llm_config": read_llm_config(str(llm)), **sizes, **branch}
    return Showo(ShowoConfig(num_vq_tokens=num_vq_tokens, **config))


def data(world: Path, gen_type: str, und_type: str) -> dict:
    """The paths of a run, of the sort that its configuration names."""
    shards = world / "train-{000000..000001}.tar"
    llava = world / f"llava_{1 if und_type == 'llava_pretrain' else 2}.json"
    paths = {
        "train_t2i_shards_path_or_url": world / "imagenet" if gen_type == "imagenet1k" else shards,
        "train_mmu_shards_path_or_url": llava if und_type.startswith("llava") else shards,
        "train_lm_shards_path_or_url": world / "texts.parquet",
    }
    if und_type.startswith("llava"):
        paths["train_mmu_image_root"] = world / "images"
    return {f"dataset.params.{key}": path for key, path in paths.items()}


SMALL_BATCHES = {"training.batch_size_t2i": 3, "training.batch_size_lm": 1, "training.batch_size_mmu": 2}
STEPS = {
    "training.max_train_steps": 2,
    "lr_scheduler.params.warmup_steps": 0,
    "training.generation_timesteps": 2,
    **{f"experiment.{what}_every": 1 for what in ("save", "log", "log_grad_norm")},
    **{f"experiment.{what}_every": 2 for what in ("generate", "eval")},
}


def read(name: str) -> dict:
    """The YAML as written."""
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def published_sizes(world: Path, name: str, system_prompt: bool) -> dict:
    """What the tiny world's models and the test machine have other than the published ones."""
    side = SIDES[read(name)["dataset"]["preprocessing"]["resolution"]]
    return {
        "dataset.preprocessing.resolution": side,
        "dataset.preprocessing.max_seq_length": SYSTEM_ROOM if system_prompt else 32,
        "model.showo.num_vq_tokens": (side // 8) ** 2,
        "model.showo.llm_vocab_size": tiny.LLM_VOCAB_SIZE,
        "model.showo.codebook_size": tiny.CODEBOOK_SIZE,
        "model.showo.vocab_size": tiny.VOCAB_SIZE,
        "model.showo.llm_model_path": world / "llm",
        "model.vq_model.vq_model_name": world / "magvitv2",
        "model.clip_vit_name": world / "clip",
    }


def start_of(world: Path, name: str, output_dir: Path | None = None) -> Path | None:
    """What a stage begins with; CLIP pre-training begins with a model that has no projector."""
    if name == "showo_pretraining_stage1" or name in OTHER_LLMS and name.endswith("stage1"):
        return None
    if name in OTHER_LLMS:
        return output_dir.with_name("stage1")
    side = SIDES[read(name)["dataset"]["preprocessing"]["resolution"]]
    return world / f"start{side}{'_w_clip_vit' if 'tuning_2_w_clip' in name else ''}"


def overrides(world: Path, name: str, output_dir: Path) -> list[str]:
    """The command line behind the launch line of a published training file."""
    dataset = read(name)["dataset"]
    given = data(world, dataset["gen_type"], dataset["und_type"]) | SMALL_BATCHES | STEPS
    given |= published_sizes(world, name, "tuning_2_w_clip" in name)
    given |= {"experiment.output_dir": output_dir, "dataset.params.num_workers": 0}
    if start := start_of(world, name, output_dir):
        given["experiment.init_from"] = start
    return [f"{key}={value}" for key, value in given.items()]


def run(name: str, arguments: list[str]) -> None:
    """Through the entry point of the file's branch."""
    AcceleratorState._reset_state(True)
    entry = train_w_clip_vit if "clip" in name else train
    entry.main([f"config={CONFIGS / name}.yaml", *arguments])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_trained(output_dir: Path) -> list[dict]:
    """Two steps with finite losses of all three flows, both checkpoints, and a final model that loads."""
    lines = [line for line in tiny.metrics_of(output_dir) if "lr" in line]
    assert [line["step"] for line in lines] == [1, 2]
    losses = [line[f"step_loss_{flow}"] for line in lines for flow in ("t2i", "lm", "mmu")]
    assert all(math.isfinite(loss) and 0 < loss < 20 for loss in losses)
    for step in (1, 2):
        folder = output_dir / f"checkpoint-{step}"
        assert json.loads((folder / "metadata.json").read_text())["global_step"] == step
        assert weights(folder / "unwrapped_model").keys() == weights(output_dir).keys()
    assert isinstance(Showo.from_pretrained(str(output_dir)), Showo)
    return lines


def assert_learnt(output_dir: Path, start: Path | None, projector_only: bool) -> None:
    """What a stage may change has changed between its two steps, and nothing else since its start."""
    first, last = weights(output_dir / "checkpoint-1" / "unwrapped_model"), weights(output_dir)
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, last[name])}
    projector = {name for name in last if name.startswith("mm_projector.")}
    if projector_only:
        assert changed == projector and len(projector) == 4
        assert all(torch.equal(tensor, last[name]) for name, tensor in weights(start).items() if name not in projector)
    else:
        assert changed == set(last)


# --- the eleven training files


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_published_stage_takes_two_steps(name, world, tmp_path):
    run(name, overrides(world, name, tmp_path / "out"))
    assert_trained(tmp_path / "out")
    assert_learnt(tmp_path / "out", start_of(world, name), "tuning_1_w_clip" in name)
    panels = {path.name.rpartition("-")[0] for path in (tmp_path / "out" / "images").iterdir()}
    assert len(panels) == 2, "drawn and predicted pictures"


@pytest.mark.slow
def test_stage_1_begins_with_the_language_models_weights(world, tmp_path):
    name = "showo_pretraining_stage1"
    run(name, [*overrides(world, name, tmp_path), "optimizer.params.learning_rate=0"])
    given, got = load_file(world / "llm" / "model.safetensors"), weights(tmp_path)
    layer = "model.layers.0.mlp.fc1.weight"
    assert given[layer].dtype == torch.float16
    assert torch.equal(got[f"showo.{layer}"], given[layer].float())
    rows = len(given["model.embed_tokens.weight"])  # the spare rows of the language model are kept
    kept = got["showo.model.embed_tokens.weight"][:rows]
    assert rows == tiny.LLM_VOCAB_SIZE + 30 and torch.equal(kept, given["model.embed_tokens.weight"].float())


@pytest.mark.slow
def test_a_stage_begins_in_the_published_way(world, tmp_path):
    """The last checkpoint of the stage before, copied to `checkpoint-0`; there it may lack the projector."""
    before, name = "showo_pretraining_stage3", "showo_instruction_tuning_1_w_clip_vit"
    run(before, overrides(world, before, tmp_path / "before"))
    shutil.copytree(tmp_path / "before" / "checkpoint-2", tmp_path / "out" / "checkpoint-0")
    given = [argument for argument in overrides(world, name, tmp_path / "out") if "init_from" not in argument]
    run(name, given)
    assert_trained(tmp_path / "out")
    assert_learnt(tmp_path / "out", tmp_path / "before", projector_only=True)


# --- other language models


@pytest.mark.slow
@pytest.mark.parametrize("llm", FAMILIES)
def test_another_language_model_takes_two_steps_in_both_stages(llm, world, tmp_path):
    """Stage 1 leaves all that the language model brought as it was, stage 2 begins there and trains everything."""
    folder, tied = world / llm, {"tied": llm == "qwen2_5"}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tiny.write_llm(folder, world / "corpus.txt", family=FAMILIES[llm], **heads)
    given = load_file(write_llm_weights(folder, **tied) / "model.safetensors")
    matrices = {name for name in given if name in ("model.embed_tokens.weight", "lm_head.weight")}
    for stage in (1, 2):
        name, out = f"showo_{llm}_stage{stage}", tmp_path / f"stage{stage}"
        arguments = [a for a in overrides(world, name, out) if not a.startswith("model.showo.llm_model_path=")]
        arguments.append(f"model.showo.llm_model_path={folder}")
        run(name, arguments)
        assert_trained(out)
        got = weights(out)
        changed = {n for n, old in given.items() if not torch.equal(got[f"showo.{n}"][: len(old)], old.float())}
        assert changed == (matrices if stage == 1 else set(given))
        if stage == 1:
            rows = tiny.LLM_VOCAB_SIZE
            assert all(torch.equal(got[f"showo.{n}"][:rows], given[n][:rows].float()) for n in matrices)
    assert Showo.from_pretrained(str(out)).config.llm_config["model_type"] == FAMILIES[llm]
    use = {"model.showo.pretrained_model_path": out, "model.showo.load_from_showo": True, "mode": "t2i", "seed": 1}
    use |= {"question": "Which colour?", "mmu_image_root": world / "images", "max_new_tokens": 2}
    use |= {"generation_timesteps": 2, "validation_prompts_file": world / "prompts.txt"}
    arguments = [f"config={CONFIGS / name}.yaml", *arguments, *(f"{key}={value}" for key, value in use.items())]
    for script, mode in ((inference_t2i, "t2i"), (inference_mmu, "mmu")):
        script.main([*arguments, f"output_dir={tmp_path / mode}"])
        assert (tmp_path / mode / "grid.png").is_file()


# --- the four demo files


def demo_sizes(world: Path, name: str) -> dict:
    side = SIDES[read(name)["dataset"]["preprocessing"]["resolution"]]
    checkpoint = world / f"start{side}{'_w_clip_vit' if 'clip' in name else ''}"
    return published_sizes(world, name, "clip" in name) | {"model.showo.pretrained_model_path": checkpoint}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_draws_in_two_steps_and_answers_in_two_tokens(name, world, tmp_path):
    """What the file is for: it names no data, and its checkpoint is finished."""
    given = demo_sizes(world, name) | {"seed": 1, "generation_timesteps": 2, "max_new_tokens": 2}
    given |= {"validation_prompts_file": world / "prompts.txt", "question": "Which colour?"}
    given |= {"mmu_image_root": world / "images", "guidance_scale": 1.5, "mode": "t2i"}
    arguments = [f"config={CONFIGS / name}.yaml", *(f"{key}={value}" for key, value in given.items())]
    for script, mode, count in ((inference_t2i, "t2i", 4), (inference_mmu, "mmu", 12)):
        script.main([*arguments, f"output_dir={tmp_path / mode}"])
        lines = (tmp_path / mode / "results.jsonl").read_text().splitlines()
        assert len(lines) == count and {json.loads(line)["mode"] for line in lines} == {mode}
        assert (tmp_path / mode / "grid.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_trains_when_the_command_line_says_from_what(name, world, tmp_path):
    und_type = "llava_tuning" if "clip" in name else "captioning"
    given = data(world, "t2i", und_type) | SMALL_BATCHES | STEPS | demo_sizes(world, name)
    given |= {"experiment.output_dir": tmp_path, "dataset.und_type": und_type, "dataset.params.num_workers": 0}
    run(name, [f"{key}={value}" for key, value in given.items()])
    assert_trained(tmp_path)


# --- the emoji world, with the tokenizers that come with the repository


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_small_stage_takes_two_steps(name, world, tmp_path):
    dataset = read(name)["dataset"]
    given = data(world, dataset["gen_type"], dataset["und_type"]) | SMALL_BATCHES | STEPS
    held_out = [key for key in dataset["params"] if key.startswith("eval_")]
    given |= {f"dataset.params.{key}": given[f"dataset.params.{key.replace('eval', 'train')}"] for key in held_out}
    given |= {"experiment.output_dir": tmp_path / "out", "dataset.params.shuffle_buffer_size": 20}
    if "clip" in name:
        given["model.clip_vit_name"] = small_clip_folder(world)
    given["experiment.checkpoints_total_limit"] = 2  # both are looked at
    start = small_start(world, name)
    given["experiment.init_from"] = start or "null"
    run(name, [f"{key}={value}" for key, value in given.items()])
    assert_trained(tmp_path / "out")
    assert_learnt(tmp_path / "out", start, "tuning_1_w_clip" in name)
    evaluated = {key for line in tiny.metrics_of(tmp_path / "out") for key in line if key.startswith("eval_loss")}
    assert evaluated == {f"eval_loss_{key.split('_')[1]}" for key in held_out if key.endswith("url")}


def small_clip_folder(world: Path) -> Path:
    """The tower of `make train-tiny-stages`, narrower."""
    folder = world / "small_clip"
    if not folder.exists():
        small_clip.main([f"output_dir={folder}", "hidden_size=32", "heads=2"])
    return folder


def small_start(world: Path, name: str) -> Path | None:
    """Stage 1 begins with nothing, tuning with CLIP features from the run that has made the projector."""
    if name in ("showo_tiny_stage1", "showo_tiny_train"):
        return None
    start = ROOT / "checkpoints/showo-tiny/showo"
    if not name.endswith("tuning_2_w_clip_vit"):
        return start
    folder = world / "small_start"
    if not folder.exists():
        config = ShowoConfig.from_pretrained(start, w_clip_vit=True, clip_feature_size=32)
        Showo.from_pretrained(str(start), config=config, allow_missing=("mm_projector.",)).save_pretrained(folder)
    return folder


# --- both entry points as users start them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("train.py", "showo_instruction_tuning_1"),
        ("train_w_clip_vit.py", "showo_instruction_tuning_2_w_clip_vit_512x512"),
    ],
)
def test_an_entry_point_runs_from_another_folder(script, name, world, tmp_path):
    """Without PYTHONPATH; the paths of the data come from the environment, that of the result is relative."""
    dataset = read(name)["dataset"]
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
    given = overrides(world, name, Path("runs/out"))
    for key, path in data(world, dataset["gen_type"], dataset["und_type"]).items():
        variable = dataset["params"][key.rpartition(".")[2]].removeprefix("${oc.env:").removesuffix("}")
        env[variable] = str(path)
        given.remove(f"{key}={path}")
    command = [sys.executable, str(ROOT / "training" / script), f"config=configs/{name}.yaml", "device=cpu", *given]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_trained(tmp_path / "runs/out")
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_every_file_is_here():
    assert len(PUBLISHED) == 15 and len(STAGES) == 11 and len(DEMOS) == 4
    others = {"showo_tiny_magvitv2", "showo_tiny_demo"}  # of other scripts
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PUBLISHED, *OTHER_LLMS, *SMALL} | others
