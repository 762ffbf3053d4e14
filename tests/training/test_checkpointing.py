"""Checkpoints are whole or absent, ordered by number, and bring everything back (spec §12)."""

import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.checkpoint.api import CheckpointException

from common.errors import UserError
from models import Showo, ShowoConfig
from training.checkpointing import (
    COURSE,
    TrainState,
    begin_course,
    checkpoints,
    find_resume,
    find_start,
    load_checkpoint,
    save_checkpoint,
)
from training.data.streams import StreamState
from training.optimization import WeightAverage

FILES = {"average.pt", "custom_checkpoint_0.pkl", "metadata.json", "model.safetensors", "optimizer.bin"}
FILES |= {"random_states_0.pkl", "streams_0.json", "counts_0.json", "unwrapped_model"}
STREAMS = {"t2i": StreamState(7, [28, 31]), "lm": StreamState(7, [7, 7])}


def tiny_showo() -> Showo:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    llm = {"model_type": "phi", "vocab_size": 20, "tie_word_embeddings": True, **sizes}
    vocabulary = {"vocab_size": 20 + 10 + 8 + 1, "llm_vocab_size": 20, "codebook_size": 8}
    return Showo(ShowoConfig(llm_config=llm, num_vq_tokens=4, **vocabulary))


class Run:
    """Model, optimiser, schedule and average of a run, without its data."""

    def __init__(self, seed: int = 0, averaged: bool = True):
        torch.manual_seed(seed)
        self.accelerator, self.model = Accelerator(cpu=True), tiny_showo()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=100)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.average = WeightAverage(self.model, 0.9) if averaged else None

    def step(self) -> float:
        ids = torch.randint(0, 39, (2, 9))
        loss = self.wrapped(ids, labels=ids, batch_size_lm=2).loss_lm
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.average:
            self.average.update(self.model)
        return loss.item()

    def save(self, folder, step: int, limit=None):
        state = TrainState(step, STREAMS)
        return save_checkpoint(self.accelerator, folder, state, model=self.model, average=self.average, limit=limit)

    def load(self, folder) -> TrainState:
        return load_checkpoint(self.accelerator, folder, self.average, self.model)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_bit_for_bit(tmp_path):
    run = Run()
    run.step()
    folder = run.save(tmp_path, 1)
    expected = [run.step() for _ in range(3)]

    AcceleratorState._reset_state(True)
    other = Run(seed=5)
    assert other.load(folder) == TrainState(1, STREAMS)
    assert [other.step() for _ in range(3)] == expected, "the random numbers of the steps count, too"
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, dict(other.model.named_parameters())[name])
        assert torch.equal(run.average.shadow[name], other.average.shadow[name])
    assert other.schedule.get_last_lr() == run.schedule.get_last_lr()
    assert other.average.updates == 4


def test_the_unwrapped_model_is_the_average_and_loads_on_its_own(tmp_path):
    run = Run()
    run.step()
    run.step()
    weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    loaded = Showo.from_pretrained(str(run.save(tmp_path, 2) / "unwrapped_model"))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, run.average.shadow[name])
    assert not torch.equal(loaded.showo.lm_head.bias, weights["showo.lm_head.bias"])
    assert all(torch.equal(p, weights[n]) for n, p in run.model.named_parameters()), "saving must not change the run"


def test_without_an_average_the_weights_are_saved_and_it_begins_anew_later(tmp_path):
    run = Run(averaged=False)
    run.step()
    folder = run.save(tmp_path, 1)
    assert set(names(folder)) == FILES - {"average.pt"}
    AcceleratorState._reset_state(True)
    other = Run(seed=3)
    other.step()
    other.load(folder)
    assert other.average.updates == 0
    for name, parameter in Showo.from_pretrained(str(folder / "unwrapped_model")).named_parameters():
        assert torch.equal(parameter, dict(run.model.named_parameters())[name])
        assert torch.equal(parameter, other.average.shadow[name])


@pytest.mark.parametrize("stage", ["state", "average", "model", "metadata"])
def test_an_interrupted_write_leaves_no_checkpoint_and_the_last_one_whole(tmp_path, monkeypatch, stage):
    run = Run()
    run.save(tmp_path, 1)
    run.step()

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    targets = {
        "state": (run.accelerator, "save_state"),
        "average": (torch, "save"),
        "model": (run.model, "save_pretrained"),
        "metadata": (json, "dumps"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[stage], broken)
        with pytest.raises(UserError, match="No space left.*last good checkpoint is .*checkpoint-1"):
            run.save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"], "what was half written is taken away"
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-1"] == [find_resume(tmp_path, "latest")]
    assert run.load(tmp_path / "checkpoint-1").global_step == 1
    run.save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"], "what was left over is cleared away"


def save_in_one(folder: str) -> None:
    Path(folder).mkdir()
    torch.save(torch.zeros(9999), Path(folder) / "x.bin")


def save_in_shards(folder: str) -> None:
    """As FSDP2 does it."""
    torch.distributed.checkpoint.save({"x": torch.zeros(9999)}, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("save, cause", [(save_in_one, RuntimeError), (save_in_shards, CheckpointException)])
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_torchs_own_writers_on_a_full_disk_are_told_as_that(tmp_path, monkeypatch, save, cause):
    run, limits = Run(), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(run.accelerator, "save_state", save)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes a file may have
    try:
        with pytest.raises(UserError, match="Make room on the disk") as error:
            run.save(tmp_path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(error.value.__cause__, cause)
    assert names(tmp_path) == []


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_a_damaged_sharded_file_is_one_line(tmp_path, monkeypatch):
    run = Run()
    folder = run.save(tmp_path, 1)
    save_in_shards(folder / "shards")
    next((folder / "shards").glob("*.distcp")).write_bytes(b"")
    state = {"x": torch.zeros(9999)}
    monkeypatch.setattr(
        run.accelerator,
        "load_state",
        lambda _: torch.distributed.checkpoint.load(state, checkpoint_id=folder / "shards", no_dist=True),
    )
    with pytest.raises(UserError, match="cannot be continued from") as error:
        run.load(folder)
    assert isinstance(error.value.__cause__, CheckpointException)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal access"), TypeError("no"), KeyError("no")])
def test_what_has_nothing_to_do_with_the_disk_keeps_its_traceback(tmp_path, monkeypatch, error):
    run = Run()

    def broken(_):
        raise error

    monkeypatch.setattr(run.accelerator, "save_state", broken)
    with pytest.raises(type(error)):
        run.save(tmp_path, 1)
    assert checkpoints(tmp_path) == []


def test_files_and_folders_are_on_the_disk_before_the_name_and_then_the_name(tmp_path, monkeypatch):
    flushed, flush = [], os.fsync

    def watched(descriptor):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    folder = Run().save(tmp_path, 1)
    temporary = tmp_path / ".incomplete-checkpoint-1"
    inside = [temporary / path.relative_to(folder) for path in folder.rglob("*")]
    assert set(flushed[:-1]) == {temporary, *inside} and temporary / "unwrapped_model" in inside
    assert flushed[-1] == tmp_path


def test_a_checkpoint_holds_these_files_also_in_place_of_another(tmp_path):
    run = Run()
    run.save(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "old").touch()
    folder = run.save(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-4"] and set(names(folder)) == FILES
    assert json.loads((folder / "metadata.json").read_text()) == {"global_step": 4, "num_processes": 1}
    streams = json.loads((folder / "streams_0.json").read_text())
    assert {name: StreamState(**stream) for name, stream in streams.items()} == STREAMS


@pytest.mark.parametrize(
    ("steps", "limit", "left"),
    [((8, 9, 10, 11), 2, [10, 11]), ((8, 9, 10), None, [8, 9, 10]), ((200, 50), 1, [50])],
)
def test_the_limit_removes_the_oldest_by_number_but_not_what_was_just_written(tmp_path, steps, limit, left):
    run = Run()
    for step in steps:
        run.save(tmp_path, step, limit=limit)
    assert [folder.name for folder in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_the_oldest_goes_only_after_the_new_one_stands(tmp_path, monkeypatch):
    run = Run()
    run.save(tmp_path, 1, limit=1)
    seen = []
    remove = shutil.rmtree

    def watched(folder, *args, **kwargs):
        seen.append((folder.name, [f.name for f in checkpoints(tmp_path)]))
        remove(folder, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    run.save(tmp_path, 2, limit=1)
    assert seen == [(".incomplete-checkpoint-1-removed", ["checkpoint-2"])]


def test_latest_goes_by_number_and_other_folders_do_not_count(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".incomplete-checkpoint-99", "checkpoint-10-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").touch()
    assert find_resume(tmp_path, "latest") == find_resume(tmp_path, True) == tmp_path / "checkpoint-10"
    assert find_resume(tmp_path / "checkpoint-9", "latest") is None
    assert find_resume(tmp_path, None) is find_resume(tmp_path, False) is None
    assert find_resume(tmp_path, "checkpoint-9") == find_resume("x", str(tmp_path / "checkpoint-9"))
    with pytest.raises(UserError, match=r"resume_from_checkpoint is 'checkpoint-11': no such folder"):
        find_resume(tmp_path, "checkpoint-11")


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("metadata.json", Path.unlink),
        ("metadata.json", lambda f: f.write_text('{"global_st')),
        ("metadata.json", lambda f: f.write_text('{"streams": {}}')),
        ("metadata.json", lambda f: f.write_text('{"global_step": "many"}')),
        ("streams_0.json", lambda f: f.write_text('{"lm": {"row": 3}}')),
        ("streams_0.json", Path.unlink),
        ("counts_0.json", Path.unlink),
        ("model.safetensors", cut),
        ("model.safetensors", Path.unlink),
        ("optimizer.bin", cut),
        ("optimizer.bin", lambda f: f.write_bytes(b"")),
        ("optimizer.bin", Path.unlink),
        ("custom_checkpoint_0.pkl", lambda f: f.write_bytes(b"junk")),
        ("random_states_0.pkl", cut),
        ("random_states_0.pkl", Path.unlink),
        ("average.pt", cut),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage):
    run = Run()
    folder = run.save(tmp_path, 1)
    damage(folder / name)
    with pytest.raises(UserError, match="checkpoint-1") as error:
        run.load(folder)
    assert "\n" not in str(error.value)


# ---- courses: what `latest` means ----


ACCELERATOR = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def write_course(folder: Path, numbers: list[int], content: str, final: bool = False) -> None:
    """What a run with these checkpoints leaves; `content` tells courses apart."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        checkpoint = folder / f"checkpoint-{number}"
        (checkpoint / "unwrapped_model").mkdir(parents=True)
        (checkpoint / "content").write_text(content)
        (checkpoint / "metadata.json").write_text(json.dumps({"global_step": number, "num_processes": 1}))
        (folder / f"images/generated-images-{number:08d}.png").write_text(content)
    before = folder.joinpath("metrics.jsonl").read_text() if folder.joinpath("metrics.jsonl").exists() else ""
    known = [json.loads(line)["step"] for line in before.splitlines()]
    steps = range(max(known, default=0) + 1, max(numbers, default=0) + 1)
    lines = [json.dumps({"step": step, "content": content}) + "\n" for step in steps]
    (folder / "metrics.jsonl").write_text(before + "".join(lines))
    for name in ("config.json", "model.safetensors") if final else ():
        (folder / name).write_text(content)


def files_of(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def begin(output_dir: Path, setting) -> Path | None:
    """Starts a run without training it; returns the checkpoint that it starts from."""
    start = find_start(output_dir, setting)
    begin_course(ACCELERATOR, output_dir, start)
    return start and start.folder


def steps_of(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


STARTS = {  # how a run starts: checkpoints in its folder, whether it has ended, the setting, what stays, what goes
    "latest": ([4, 8, 12], True, "latest", [4, 8, 12], []),
    "nothing": ([], False, "latest", [], []),
    "back": ([4, 8, 12], True, "checkpoint-4", [4], [8, 12]),
    "back-to-0": ([0, 4], False, "checkpoint-0", [0], [4]),
    "anew": ([4, 8], True, False, [], [4, 8]),
    "anew-beside-0": ([0], False, False, [], [0]),
    "anew-without-checkpoints": ([], True, False, [], []),
    "elsewhere": ([4, 12], False, "{other}/checkpoint-8", [], [4, 12]),
    "elsewhere-into-nothing": ([], False, "{other}/checkpoint-8", [], []),
}


def prepare(folder: Path, name: str) -> tuple[Path, str | bool]:
    present, ended, setting, _, _ = STARTS[name]
    write_course(folder / "out", present, "old", ended)
    if not (other := folder.parent / "other").exists():
        write_course(other, [8], "other")
    return folder / "out", setting.format(other=other) if setting else setting


@pytest.mark.parametrize("name", STARTS)
def test_a_start_leaves_its_own_course_and_sets_the_rest_aside(tmp_path, capsys, name):
    _, ended, _, stay, go = STARTS[name]
    output_dir, setting = prepare(tmp_path / "here", name)
    before, start = files_of(output_dir), begin(output_dir, setting)
    moves = bool(go) or (ended and not stay)
    assert [folder.name for folder in checkpoints(output_dir)] == [f"checkpoint-{number}" for number in stay]
    assert [folder.name for folder in checkpoints(output_dir / "abandoned-1")] == [f"checkpoint-{n}" for n in go]
    assert find_resume(output_dir, "latest") == start, "a crash before the first save continues this course"
    assert (output_dir / "model.safetensors").exists() == (ended and not moves)
    last = max(stay, default=0) if not name.startswith("elsewhere") else 0
    assert steps_of(output_dir / "metrics.jsonl") == list(range(1, last + 1))
    assert steps_of(output_dir / "abandoned-1/metrics.jsonl") == list(range(last + 1, max(go, default=0) + 1))
    told = capsys.readouterr().out
    assert told.count("\n") == moves
    if go:
        back = f"experiment.resume_from_checkpoint=abandoned-1/checkpoint-{go[-1]}"
        assert f"up to checkpoint-{go[-1]} set aside in {output_dir}/abandoned-1" in told and back in told
    after = {file.removeprefix("abandoned-1/"): text for file, text in files_of(output_dir).items()}
    assert {f: t for f, t in after.items() if f not in ("metrics.jsonl", COURSE)} == {
        f: t for f, t in before.items() if f != "metrics.jsonl"
    }, "everything is there, whole"
    assert (output_dir / COURSE).exists() == name.startswith("elsewhere")
    assert begin(output_dir, "latest") == start and not (output_dir / "abandoned-2").exists()


class Killed(BaseException):
    pass


def kill_after(monkeypatch, count: int) -> None:
    """Kills the process at change number `count` of a folder."""
    calls = iter(range(count))

    def counted(change):
        def changed(*args, **kwargs):
            if next(calls, None) is None:
                raise Killed
            return change(*args, **kwargs)

        return changed

    for name in ("rename", "replace", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))


@pytest.mark.parametrize("name", ["back", "back-to-0", "anew", "anew-without-checkpoints", "elsewhere"])
def test_a_start_that_is_killed_takes_effect_at_once_or_not_at_all(tmp_path, monkeypatch, name):
    whole, setting = prepare(tmp_path / "whole", name)
    old, new = find_resume(whole, "latest"), begin(whole, setting)
    expected = files_of(whole)
    for count in range(99):
        output_dir, setting = prepare(tmp_path / str(count), name)
        with monkeypatch.context() as patch:
            kill_after(patch, count)
            try:
                begin(output_dir, setting)
                break
            except Killed:
                pass
        start = find_resume(output_dir, "latest")
        expected_start = str((old, new)[count > 0]).replace(str(whole), str(output_dir))
        assert str(start) == expected_start, "the first change decides"
        # Then the same command, or one that only means the same.
        assert begin(output_dir, "latest" if count else setting) == start or not count
        assert files_of(output_dir) == expected, count
    assert count > 4


def test_a_course_that_was_left_can_be_returned_to(tmp_path):
    write_course(tmp_path, [4, 8, 12], "old")
    begin(tmp_path, "checkpoint-4")
    write_course(tmp_path, [8], "new")
    back = begin(tmp_path, "abandoned-1/checkpoint-8")
    assert back == find_resume(tmp_path, "latest") == tmp_path / "abandoned-1/checkpoint-8"
    assert [(c.name, (c / "content").read_text()) for c in checkpoints(tmp_path / "abandoned-2")] == [
        ("checkpoint-4", "old"),
        ("checkpoint-8", "new"),
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "content": "old"} for step in range(1, 9)]
    assert steps_of(tmp_path / "abandoned-2/metrics.jsonl") == [5, 6, 7, 8]
    assert begin(tmp_path, "latest") == back, "killed before it has saved"
    Run().save(tmp_path, 10)
    assert find_resume(tmp_path, "latest") == tmp_path / "checkpoint-10" and not (tmp_path / COURSE).exists()
