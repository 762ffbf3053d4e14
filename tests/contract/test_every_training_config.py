"""Every YAML of Show-o takes two real steps; only paths, sizes and step counts are other than written (spec §14).

Training files train. Demo files hold no data: they generate in two steps and answer in two tokens.
"""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import inference_mmu
import inference_t2i
from examples.scenes import new_icon
from models import Showo, ShowoConfig
from models.backbones import read_llm_config
from tests.contract.test_configs import ALIGNMENT, DEMOS, FILES, STAGES
from tests.training import tiny
from tests.training.test_preference import write_pairs
from tests.training.tiny_sources import CLIP_WIDTH, write_clip, write_imagenet, write_llava, write_llm_weights
from tools import small_clip
from training import train, train_w_clip_vit

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
MIXED = ["showo_mixed", "showo_tiny_mixed"]
OTHER_TASKS = [*ALIGNMENT.values(), *(f"showo_tiny_{task}" for task in ALIGNMENT)]
SMALL = [name for name in FILES if "tiny" in name and not name.endswith(("magvitv2", "demo", "mixed", "lora"))]
SMALL = [name for name in SMALL if name not in OTHER_TASKS]
SIDES = {96: 32, 256: 32, 512: 48}  # the resolution of a file → that of its test, with 8 pixels a token
FAMILIES = {"llama3": "llama", "qwen2_5": "qwen2"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data of every kind, both tokenizers, a language model's weights, CLIP towers and models to start from."""
    folder = tiny.write_world(tmp_path_factory.mktemp("world") / "tiny")
    write_llm_weights(folder / "llm")
    write_imagenet(folder / "imagenet")
    for rounds in (1, 2):
        write_llava(folder, rounds)
    write_stories(folder)
    write_clip(folder / "clip")
    small_clip.main([f"output_dir={folder}/small_clip", "hidden_size=32", "heads=2"])
    sizes = {"codebook_size": tiny.CODEBOOK_SIZE, "vocab_size": tiny.VOCAB_SIZE, "llm_vocab_size": tiny.LLM_VOCAB_SIZE}
    llm = {"llm_model_path": str(folder / "llm"), "llm_config": read_llm_config(str(folder / "llm"))}
    for side, branch in product(SIDES.values(), ("", "_w_clip_vit")):
        clip = {"w_clip_vit": bool(branch), "clip_feature_size": CLIP_WIDTH}
        config = ShowoConfig(num_vq_tokens=(side // 8) ** 2, **llm, **sizes, **clip)
        Showo(config).save_pretrained(folder / f"start{side}{branch}")
    start = str(ROOT / "checkpoints/showo-tiny/showo")
    config = ShowoConfig.from_pretrained(start, w_clip_vit=True, clip_feature_size=32)
    Showo.from_pretrained(start, config=config, allow_missing=("mm_projector.",)).save_pretrained(folder / "small")
    return folder


def write_stories(folder: Path) -> None:
    """`stories.jsonl`, with the images of the LLaVA files."""
    images = sorted(path.name for path in (folder / "images").iterdir())
    stories = [{"captions": ["a square", "another"], "images": [one, other]} for one, other in pairwise(images)]
    (folder / "stories.jsonl").write_text("\n".join(map(json.dumps, stories)))


def read(name: str) -> dict:
    """The YAML as written."""
    return yaml.safe_load(FILES[name].read_text())


def side_of(name: str) -> int:
    return SIDES[read(name)["dataset"]["preprocessing"]["resolution"]]


def data(world: Path, name: str) -> dict:
    """The paths of a run, of the sort that its configuration names, and as held-out data where it has such."""
    dataset, shards = read(name)["dataset"], world / "train-{000000..000001}.tar"
    paths = {
        "t2i_shards_path_or_url": world / "imagenet" if dataset["gen_type"] == "imagenet1k" else shards,
        "mmu_shards_path_or_url": shards,
        "lm_shards_path_or_url": world / "texts.parquet",
    }
    if dataset["und_type"].startswith("llava"):
        paths["mmu_shards_path_or_url"] = world / f"llava_{1 if 'pretrain' in dataset['und_type'] else 2}.json"
        paths["mmu_image_root"] = world / "images"
    if name in MIXED:
        paths |= {"mixed_shards_path_or_url": world / "stories.jsonl", "mixed_image_root": world / "images"}
    given = {f"train_{key}": path for key, path in paths.items()}
    given |= {f"eval_{key}": path for key, path in paths.items() if f"eval_{key}" in dataset["params"]}
    return {f"dataset.params.{key}": path for key, path in given.items()}


def sizes(world: Path, name: str) -> dict:
    """What the tiny world's models have other than the published ones."""
    side = side_of(name)
    with_system_prompt = "tuning_2_w_clip" in name or name in DEMOS and "clip" in name  # long in the tiny tokenizer
    return {
        "dataset.preprocessing.resolution": side,
        "dataset.preprocessing.max_seq_length": 200 if with_system_prompt else 32,
        "model.showo.num_vq_tokens": (side // 8) ** 2,
        "model.showo.llm_vocab_size": tiny.LLM_VOCAB_SIZE,
        "model.showo.codebook_size": tiny.CODEBOOK_SIZE,
        "model.showo.vocab_size": tiny.VOCAB_SIZE,
        "model.showo.llm_model_path": world / "llm",
        "model.vq_model.vq_model_name": world / "magvitv2",
        "model.clip_vit_name": world / "clip",
    }


def start_of(world: Path, name: str) -> Path | None:
    """What a stage begins with; tuning 1 with CLIP-ViT begins with a model that has no projector."""
    if name.endswith("stage1") or name == "showo_tiny_train":
        return None
    if name in SMALL:
        return world / "small" if "tuning_2_w_clip" in name else ROOT / "checkpoints/showo-tiny/showo"
    return world / f"start{side_of(name)}{'_w_clip_vit' if 'tuning_2_w_clip' in name else ''}"


def overrides(world: Path, name: str, output_dir: Path) -> dict:
    """The command line behind the launch line of a training file."""
    given = {f"training.batch_size_{flow}": size for flow, size in (("t2i", 3), ("lm", 1), ("mmu", 2))}
    given |= {f"experiment.{what}_every": 1 for what in ("save", "log", "log_grad_norm")}
    given |= {f"experiment.{what}_every": 2 for what in ("generate", "eval")}
    given |= {"training.max_train_steps": 2, "lr_scheduler.params.warmup_steps": 0, "training.generation_timesteps": 2}
    given |= {"experiment.output_dir": output_dir, "experiment.checkpoints_total_limit": 2}
    given |= {"experiment.init_from": start_of(world, name) or "null", "dataset.params.shuffle_buffer_size": 20}
    given |= data(world, name)
    if name in MIXED:
        given |= {"training.batch_size_mixed": 2, "mixed.max_length": 200}
        given |= {"validation_prompts_file": world / "prompts.txt"}
    if name in SMALL:
        return given | ({"model.clip_vit_name": world / "small_clip"} if "clip" in name else {})
    return given | sizes(world, name) | {"dataset.params.num_workers": 0}


def arguments(name: str, given: dict) -> list[str]:
    return [f"config={FILES[name]}", *(f"{key}={value}" for key, value in given.items())]


def run(name: str, given: dict) -> None:
    """Through the entry point of the file's branch."""
    AcceleratorState._reset_state(True)
    (train_w_clip_vit if "clip" in name else train).main(arguments(name, given))
    AcceleratorState._reset_state(True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_trained(output_dir: Path) -> None:
    """Two steps with finite losses of all flows, both checkpoints, and a final model that loads."""
    lines = [line for line in tiny.metrics_of(output_dir) if "lr" in line]
    assert [line["step"] for line in lines] == [1, 2]
    losses = [value for line in lines for key, value in line.items() if key.startswith("step_loss_")]
    assert len(losses) in (6, 10), "of three flows, or with the codes and texts of documents"
    assert all(math.isfinite(loss) and 0 < loss < 20 for loss in losses)
    for step in (1, 2):
        folder = output_dir / f"checkpoint-{step}"
        assert json.loads((folder / "metadata.json").read_text())["global_step"] == step
        assert weights(folder / "unwrapped_model").keys() == weights(output_dir).keys()
    assert isinstance(Showo.from_pretrained(str(output_dir)), Showo)


def assert_learned(output_dir: Path, start: Path | None, projector_only: bool) -> None:
    """What a stage may change has changed between its two steps, and nothing else since its start."""
    first, last = weights(output_dir / "checkpoint-1" / "unwrapped_model"), weights(output_dir)
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, last[name])}
    projector = {name for name in last if name.startswith("mm_projector.")}
    assert changed == (projector if projector_only else set(last))
    if projector_only:
        assert len(projector) == 4
        assert all(torch.equal(tensor, last[name]) for name, tensor in weights(start).items() if name not in projector)


@pytest.mark.parametrize("name", [*STAGES, *SMALL, *MIXED])
def test_a_stage_takes_two_steps(name, world, tmp_path):
    out, start = tmp_path / "out", start_of(world, name)
    run(name, overrides(world, name, out))
    assert_trained(out)
    assert_learned(out, start, "tuning_1_w_clip" in name)
    panels = {path.name.rpartition("-")[0] for path in (out / "images").iterdir()}
    assert len(panels) == 2, "generated and predicted images"
    evaluated = {key for line in tiny.metrics_of(out) for key in line if key.startswith("eval_loss")}
    held_out = [key for key in read(name)["dataset"]["params"] if key.startswith("eval_") and key.endswith("url")]
    assert evaluated - {"eval_loss_mixed_text"} == {f"eval_loss_{key.split('_')[1]}" for key in held_out}
    assert (name in MIXED) == ("step_loss_mixed_text" in tiny.steps_of(out)[-1])


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_a_task_of_a_trained_model_takes_two_steps(name, world, tmp_path):
    """At the sizes of its file, but for those of models, batches and samples."""
    task, out, start = read(name)["task"], tmp_path / "out", world / f"start{side_of(name)}"
    clip = "w_clip_vit" in name
    given = {f"experiment.{what}_every": 1 for what in ("save", "log")} | sizes(world, name)
    given |= {f"experiment.{what}_every": 2 for what in ("generate", "eval")} | {"experiment.output_dir": out}
    given |= {"training.max_train_steps": 2, "lr_scheduler.params.warmup_steps": 0, "training.generation_timesteps": 2}
    given |= {"experiment.init_from": f"{start}{'_w_clip_vit' if clip else ''}", "dataset.params.num_workers": 0}
    given |= {"training.gradient_accumulation_steps": 1, "validation_prompts_file": world / "prompts.txt"}
    given |= {"dataset.preprocessing.max_seq_length": 200 if clip else 64}
    shards, llava = world / "train-{000000..000001}.tar", world / "llava_2.json"
    paths = {"reconstruction_shards_path_or_url": shards, "mmu_shards_path_or_url": llava}
    if task != "reconstruction":
        paths = {"pairs": write_pairs(world, world / "images")} if task == "preference" else {"prompts": shards}
    given |= {f"dataset.params.train_{key}": path for key, path in paths.items()}
    held_out = [key for key in paths if f"eval_{key}" in read(name)["dataset"]["params"]]
    given |= {f"dataset.params.eval_{key}": paths[key] for key in held_out}
    if task == "reconstruction":
        given |= {"dataset.params.train_mmu_image_root": world / "images"}
    if task in ("policy", "distillation"):
        given |= {f"{task}.timesteps": 8, "training.batch_size_prompts": 2}
    if task == "policy":
        given |= {"policy.reward": "tests.training.test_policy:brightness", "policy.group_size": 2, "policy.min_std": 0}
    AcceleratorState._reset_state(True)
    train.main(arguments(name, given))
    AcceleratorState._reset_state(True)
    lines = tiny.steps_of(out)
    assert [line["step"] for line in lines] == [1, 2] and all(map(math.isfinite, lines[1].values()))
    first, last = weights(out / "checkpoint-1" / "unwrapped_model"), weights(out)
    assert {key for key, tensor in first.items() if not torch.equal(tensor, last[key])} == set(last)
    assert bool(held_out) == any(key.startswith("eval") for line in tiny.metrics_of(out) for key in line)


def test_an_adapter_takes_two_steps_and_generates(world, tmp_path):
    name, start = "showo_tiny_lora", ROOT / "checkpoints/showo-tiny/showo"
    new_icon.main([f"output_dir={tmp_path / 'ladder'}", "images=6", "prompts=4", "size=64"])
    given = {"experiment.output_dir": tmp_path / "out", "experiment.init_from": start, "experiment.log_every": 1}
    given |= {"training.max_train_steps": 2, "lr_scheduler.params.warmup_steps": 0, "training.batch_size_t2i": 2}
    given |= {
        f"dataset.params.train_{flow}_shards_path_or_url": tmp_path / "ladder/train-000000.tar"
        for flow in ("t2i", "mmu")
    }
    run(name, given | {"validation_prompts_file": tmp_path / "ladder/prompts.txt", "training.batch_size_mmu": 2})
    assert [line["step"] for line in tiny.steps_of(tmp_path / "out")] == [1, 2]
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("adapter*"))
    assert size < 5e6 and not (tmp_path / "out/model.safetensors").exists()
    given = {"model.showo.pretrained_model_path": start, "adapter": tmp_path / "out", "mode": "t2i"}
    given |= {"validation_prompts_file": tmp_path / "ladder/prompts.txt", "output_dir": tmp_path / "images"}
    inference_t2i.main(arguments(name, given | {"batch_size": 4, "generation_timesteps": 2}))
    new_icon.main([f"output_dir={tmp_path / 'ladder'}", "size=64", f"score={tmp_path / 'images'}"])


@pytest.mark.parametrize("llm", FAMILIES)
def test_another_language_model_takes_two_steps_in_both_stages(llm, world, tmp_path):
    """Stage 1 leaves all that the language model brought as it was, stage 2 begins there and trains everything."""
    folder, heads = world / llm, {"num_attention_heads": 4, "num_key_value_heads": 2}
    tiny.write_llm(folder, world / "corpus.txt", family=FAMILIES[llm], **heads)
    given = load_file(write_llm_weights(folder, tied=llm == "qwen2_5") / "model.safetensors")
    matrices = {name for name in given if name in ("model.embed_tokens.weight", "lm_head.weight")}
    for stage in (1, 2):
        name, out = f"showo_{llm}_stage{stage}", tmp_path / f"stage{stage}"
        start = tmp_path / "stage1" if stage == 2 else "null"
        changes = {"model.showo.llm_model_path": folder, "experiment.init_from": start}
        run(name, overrides(world, name, out) | changes)
        assert_trained(out)
        got = weights(out)
        changed = {n for n, old in given.items() if not torch.equal(got[f"showo.{n}"][: len(old)], old.float())}
        assert changed == (matrices if stage == 1 else set(given))
        if stage == 1:
            rows = tiny.LLM_VOCAB_SIZE
            assert all(torch.equal(got[f"showo.{n}"][:rows], given[n][:rows].float()) for n in matrices)
    assert Showo.from_pretrained(str(out)).config.llm_config["model_type"] == FAMILIES[llm]
    checkpoint = {"model.showo.llm_model_path": folder, "model.showo.pretrained_model_path": out}
    infer(name, sizes(world, name) | checkpoint, world, tmp_path)


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_generates_in_two_steps_and_answers_in_two_tokens(name, world, tmp_path):
    start = world / f"start{side_of(name)}{'_w_clip_vit' if 'clip' in name else ''}"
    infer(name, sizes(world, name) | {"model.showo.pretrained_model_path": start}, world, tmp_path)


def infer(name: str, given: dict, world: Path, folder: Path) -> None:
    """Both inference scripts."""
    given = given | {"seed": 1, "generation_timesteps": 2, "max_new_tokens": 2, "guidance_scale": 1.5}
    given |= {"validation_prompts_file": world / "prompts.txt", "mmu_image_root": world / "images"}
    given |= {"mode": "t2i", "question": "Which?"}
    for script, mode, count in ((inference_t2i, "t2i", 4), (inference_mmu, "mmu", 12)):
        script.main(arguments(name, given | {"output_dir": folder / mode}))
        lines = (folder / mode / "results.jsonl").read_text().splitlines()
        assert len(lines) == count and {json.loads(line)["mode"] for line in lines} == {mode}
        assert (folder / mode / "grid.png").is_file()


@pytest.mark.parametrize("name", ["showo_instruction_tuning_1", "showo_instruction_tuning_2_w_clip_vit_512x512"])
def test_an_entry_point_runs_from_another_folder(name, world, tmp_path):
    """Without PYTHONPATH; the paths of the data come from the environment, that of the result is relative."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
    given = overrides(world, name, Path("runs/out")) | {"device": "cpu"}
    for key in data(world, name):
        variable = read(name)["dataset"]["params"][key.rpartition(".")[2]].removeprefix("${oc.env:").removesuffix("}")
        env[variable] = str(given.pop(key))
    script = ROOT / "training" / ("train_w_clip_vit.py" if "clip" in name else "train.py")
    command = [sys.executable, str(script), f"config=configs/{name}.yaml", *arguments(name, given)[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_trained(tmp_path / "runs/out")
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr, done.stderr
