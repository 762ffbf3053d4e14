"""DDP, DeepSpeed ZeRO-2 and FSDP2 with two processes on the CPU: the same losses as one, and exact continuation."""

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
from safetensors.torch import load_file

from models import Showo
from models.images import preprocess
from tests.training.tiny import CAPTIONS, LLM_VOCAB_SIZE, arguments, metrics_of, picture, write_llm
from tests.training.tiny_sources import write_llm_weights

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = Path(sys.executable).with_name("accelerate")
WORKER = ROOT / "tests/training/worker.py"
KINDS = ("ddp", "zero2", "fsdp2")
ALL_KINDS = (*KINDS, "zero3")  # which has no moving average
SETTINGS = {
    "device": None,
    "training.gradient_accumulation_steps": 2,
    "training.max_train_steps": 4,
    "training.max_grad_norm": 1.0,
    "experiment.save_every": 2,
    "experiment.generate_every": 2,
    "experiment.log_grad_norm_every": 2,
    "dataset.params.num_workers": 1,
    "model.gradient_checkpointing": True,
}


def launcher(kind: str, processes: int) -> list[str]:
    file = {"ddp": "2_cpu_ddp"}.get(kind, "2_cpu_deepspeed_zero2")
    launch = [str(ACCELERATE), "launch", "--config_file", str(ROOT / f"accelerate_configs/{file}.yaml")]
    if kind.startswith("zero"):
        return [*launch, *f"--num_processes {processes} --zero_stage {kind[-1]} --zero3_save_16bit_model true".split()]
    if kind == "ddp" and processes == 2:
        return launch
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable] if processes == 1 and kind == "ddp" else torchrun


def environment(kind: str) -> dict[str, str]:
    """What `accelerate launch` would set for the kind."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
    kept |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    if not kind.startswith("zero"):
        kept["ACCELERATE_USE_CPU"] = "true"
    if kind == "fsdp2":
        settings = yaml.safe_load((ROOT / "accelerate_configs/8_gpus_fsdp2.yaml").read_text())["fsdp_config"]
        kept |= {key.upper(): str(value).lower() for key, value in settings.items()}
        kept["FSDP_AUTO_WRAP_POLICY"] = settings["fsdp_auto_wrap_policy"]
        kept["FSDP_STATE_DICT_TYPE"] = settings["fsdp_state_dict_type"]
        kept |= {"ACCELERATE_USE_FSDP": "true", "TEST_FSDP2": "1"}
    return kept


def run(kind: str, world: Path, output_dir: Path, overrides: dict | None = None, *, processes: int = 2, **extra) -> str:
    """Trains to the end; returns what was printed."""
    settings = SETTINGS | ({"training.ema_decay": None} if kind == "zero3" else {}) | (overrides or {})
    command = [*launcher(kind, processes), str(WORKER), *arguments(world, output_dir, settings)]
    env = environment(kind) | {key: str(value) for key, value in extra.items()}
    done = subprocess.run(command, cwd=output_dir.parent, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def without_the_last_checkpoint(whole: Path, parts: Path) -> None:
    """A copy of a run as it would have been killed behind step 2."""
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-4")
    (parts / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def whole_runs(world, tmp_path_factory):
    """Kind and number of processes → a whole run, made when first asked for."""
    runs = {}

    def get(kind: str, processes: int = 2) -> Path:
        key = kind, processes
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp(kind) / "whole"
            run(kind, world, runs[key], processes=processes)
        return runs[key]

    return get


@pytest.fixture(scope="module")
def moved_runs(world, tmp_path_factory, whole_runs):
    """Kind, numbers of processes before and after step 2 → the run's folder and what it printed."""
    runs = {}

    def get(*key) -> tuple[Path, str]:
        if key not in runs:
            kind, before, after = key
            parts = tmp_path_factory.mktemp(kind) / "parts"
            without_the_last_checkpoint(whole_runs(kind, before), parts)
            runs[key] = parts, run(kind, world, parts, processes=after)
        return runs[key]

    return get


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_continued_run_is_the_uninterrupted_one_to_the_last_bit(world, tmp_path, whole_runs, kind):
    whole, parts = whole_runs(kind), tmp_path / "parts"
    without_the_last_checkpoint(whole, parts)
    assert "checkpoint-2, step 2" in run(kind, world, parts)
    assert len(list((whole / "images").glob("generated-images-*.png"))) == 2
    assert Showo.from_pretrained(str(whole)).config.num_vq_tokens == 16
    for name in ("model.safetensors", "checkpoint-4/unwrapped_model/model.safetensors"):
        before, after = load_file(whole / name), load_file(parts / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items()), name
    files = [folder / "checkpoint-4/average.pt" for folder in (whole, parts)]
    assert [file.is_file() for file in files] == [kind != "zero3"] * 2
    if kind != "zero3":
        averages = [torch.load(file, weights_only=True)["shadow"] for file in files]
        assert all(torch.equal(tensor, averages[1][key]) for key, tensor in averages[0].items())
    assert metrics_of(whole) == metrics_of(parts)
    for process in range(2):
        streams = [(folder / f"checkpoint-4/streams_{process}.json").read_text() for folder in (whole, parts)]
        assert streams[0] == streams[1]


@pytest.mark.parametrize("kind", ("zero2", "zero3", "fsdp2"))
def test_every_kind_is_the_same_training(whole_runs, kind):
    names = ("step_loss_t2i", "step_loss_lm", "step_loss_mmu", "lr", "accuracy/t2i")
    lines = [[line for line in metrics_of(whole_runs(k)) if "lr" in line] for k in ("ddp", kind)]
    assert len(lines[0]) == len(lines[1]) == 4
    for ours, theirs in zip(*lines, strict=True):
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-4)
    norms = [[line for line in metrics_of(whole_runs(k)) if "grad_norm" in str(line)] for k in ("ddp", kind)]
    assert len(norms[0]) == len(norms[1]) == 2
    for ours, theirs in zip(*norms, strict=True):
        # Some gradients are rounding alone: softmax does not see what the keys' norm adds where they are not rotated.
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-9)
    if kind == "zero3":
        return  # its weights are the model's own, those of the others the average
    weights = [load_file(whole_runs(k) / "model.safetensors") for k in ("ddp", kind)]
    for name, tensor in weights[0].items():
        # Softmax does not see what the keys' norm adds where keys are not rotated: the gradient there is rounding
        # alone, and AdamW makes steps of it.
        atol = 1e-4 if name.endswith("k_layernorm.bias") else 1e-5
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_packed_rows_are_the_same_training(world, tmp_path, whole_runs, kind):
    run(kind, world, tmp_path / "packed", {"dataset.packing": True, "experiment.generate_every": 99})
    names = ("step_loss_t2i", "step_loss_lm", "step_loss_mmu", "lr", "accuracy/t2i")
    folders = (whole_runs(kind), tmp_path / "packed")
    plain, packed = ([line for line in metrics_of(folder) if "lr" in line] for folder in folders)
    for before, after in zip(plain, packed, strict=True):
        assert [after[n] for n in names] == pytest.approx([before[n] for n in names], rel=1e-3)
        assert after["padding_share_unpacked"] == pytest.approx(before["padding_share"])
        assert after["padding_share"] < before["padding_share"]


@pytest.fixture(scope="module")
def llama_world(world, tmp_path_factory):
    """The same data for a Llama whose heads share keys and values, and whose head is its embedding."""
    folder = tmp_path_factory.mktemp("llama")
    write_llm(folder / "llm", world / "corpus.txt", family="llama", num_attention_heads=4, num_key_value_heads=2)
    write_llm_weights(folder / "llm", tied=True)
    start = {"model.showo.load_from_showo": False, "model.showo.llm_model_path": folder / "llm"}
    return start | {"training.ema_decay": None, "experiment.generate_every": 99}


@pytest.mark.parametrize("trainable", ["all", "new"])
def test_another_family_is_the_same_training_in_every_kind(world, llama_world, tmp_path, trainable):
    settings = llama_world | {"training.trainable": trainable, "dataset.packing": trainable == "all"}
    names = ("step_loss_t2i", "step_loss_lm", "step_loss_mmu", "lr")
    given = load_file(llama_world["model.showo.llm_model_path"] / "model.safetensors")
    matrix, found = "model.embed_tokens.weight", {}
    for kind in KINDS:
        run(kind, world, tmp_path / kind, settings)
        found[kind] = [[line[n] for n in names] for line in metrics_of(tmp_path / kind) if "lr" in line]
        weights = load_file(tmp_path / kind / "model.safetensors")
        head = {"showo.lm_head.weight"}  # FSDP2 writes a tied matrix twice
        assert {f"showo.{name}" for name in given} == set(weights) - head
        changed = {name for name, old in given.items() if not same_rows(weights[f"showo.{name}"], old.float())}
        assert changed == ({matrix} if trainable == "new" else set(given))
        if trainable == "new":
            assert same_rows(weights[f"showo.{matrix}"], given[matrix].float()[:LLM_VOCAB_SIZE]), "to the last bit"
    for kind in KINDS[1:]:
        for ours, theirs in zip(found[kind], found["ddp"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def same_rows(tensor: torch.Tensor, old: torch.Tensor) -> bool:
    return torch.equal(tensor[: len(old)], old)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Eight batches of every flow."""
    items = [{"image": preprocess(picture(text), 32), "text": text} for text in CAPTIONS]
    dealt = {
        "t2i": [[items[(3 * n + i) % 12] for i in range(4)] for n in range(8)],
        "lm": [[f"text number {n}: {CAPTIONS[n]}"] for n in range(8)],
        "mmu": [[items[(5 * n + i) % 12] for i in range(2)] for n in range(8)],
    }
    file = tmp_path_factory.mktemp("batches") / "batches.pt"
    torch.save(dealt, file)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns_from_the_same_global_batch(world, tmp_path, batches, kind):
    """Nothing is drawn: all image tokens are masked and no text is dropped."""
    still = {"training.min_masking_rate": 1.0, "training.cond_dropout_prob": 0.0, "experiment.generate_every": 99}
    run("ddp", world, tmp_path / "one", still, processes=1, TEST_BATCHES=batches)
    run(kind, world, tmp_path / "two", still | {"training.gradient_accumulation_steps": 1}, TEST_BATCHES=batches)
    names = ("step_loss_t2i", "step_loss_lm", "step_loss_mmu", "lr")
    lines = [[line for line in metrics_of(tmp_path / name) if "lr" in line] for name in ("one", "two")]
    assert [len(found) for found in lines] == [4, 4]
    for one, two in zip(*lines, strict=True):
        assert [one[n] for n in names] == pytest.approx([two[n] for n in names], rel=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [*((kind, *numbers) for kind in KINDS for numbers in ((2, 1), (1, 2), (2, 4))), ("zero3", 2, 1)],
)
def test_another_number_of_processes_keeps_weights_optimiser_and_schedule(whole_runs, moved_runs, kind, before, after):
    """Whether the moments went on the losses tell, too: the last ones would be 0.3 % away from those of DDP if not."""
    parts, output = moved_runs(kind, before, after)
    assert f"was written by {before} processes, now there are {after}: weights, optimiser and schedule" in output
    assert "the counts of NaN batches and skipped samples start again" in output
    lines = [line for line in metrics_of(parts) if "lr" in line]
    whole = [line for line in metrics_of(whole_runs(kind, before)) if "lr" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == [line["lr"] for line in whole]
    of_ddp = [line for line in metrics_of(moved_runs("ddp", before, after)[0]) if "lr" in line]
    for ours, theirs in zip(lines, of_ddp, strict=True):
        names = ("step_loss_t2i", "step_loss_lm", "step_loss_mmu")
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-4)
    if kind == "ddp":
        state = torch.load(parts / "checkpoint-4/optimizer.bin", weights_only=True)["state"]
        assert {int(s["step"]) for s in state.values()} == {4}, "the moments went on, they did not begin anew"


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_loss_of_one_process_is_dropped_by_all_and_none_waits(world, tmp_path, kind):
    """At the second of two accumulated batches, when gradients are about to be exchanged."""
    run(kind, world, tmp_path / "out", {"experiment.generate_every": 99}, TEST_NAN="1:4")
    lines = [line for line in metrics_of(tmp_path / "out") if "lr" in line]
    assert [line.get("nonfinite_batches") for line in lines] == [None, 1, 1, 1]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    read = [json.loads((tmp_path / f"out/checkpoint-4/streams_{n}.json").read_text()) for n in range(2)]
    assert [streams["mmu"]["batches"] for streams in read] == [9, 9], "eight to learn from, and the dropped one"
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out/model.safetensors").values())


def launched(command: list[str], world: Path, folder: Path) -> subprocess.CompletedProcess:
    """Without a hint that the processes are to use CPUs."""
    arguments_ = arguments(world, folder / "out", SETTINGS | {"experiment.generate_every": 99})
    env = environment("zero2")
    return subprocess.run(
        [*command, str(WORKER), *arguments_], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def test_processes_join_without_being_told_that_these_are_cpus(world, tmp_path, whole_runs):
    done = launched(launcher("ddp", 2), world, tmp_path)
    assert done.returncode == 0, done.stderr
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole_runs("ddp"), tmp_path / "out"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items()), "they must learn together"
    assert json.loads((tmp_path / "out/checkpoint-4/metadata.json").read_text())["num_processes"] == 2


def test_a_launch_that_falls_apart_into_single_runs_is_refused(world, tmp_path):
    settings = {"distributed_type": "MULTI_CPU", "num_processes": 2, "num_machines": 1, "machine_rank": 0}
    file = tmp_path / "multi_cpu.yaml"
    file.write_text(yaml.safe_dump(settings | {"compute_environment": "LOCAL_MACHINE", "use_cpu": True}))
    done = launched([str(ACCELERATE), "launch", "--config_file", str(file)], world, tmp_path)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert "error: several processes were launched, but each runs alone" in done.stderr


@pytest.mark.parametrize("options", [["1_cpu.yaml", "--quiet"], ["2_cpu_ddp.yaml"]], ids=["1", "2"])
def test_what_a_launcher_prints_ends_in_the_users_mistake(world, tmp_path, options):
    launch = [str(ACCELERATE), "launch", "--config_file", str(ROOT / "accelerate_configs" / options[0]), *options[1:]]
    command = [*launch, str(ROOT / "training/train.py"), *arguments(world, tmp_path / "out", {"training.modle": 1})]
    done = subprocess.run(command, env=environment("ddp"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and ("Traceback" in done.stderr) == (len(options) == 1)
    assert "error: " in (last := done.stderr.rstrip("=\n").splitlines()[-1]) and "training.modle" in last
