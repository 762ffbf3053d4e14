"""Checkpoints are whole or absent, ordered by number, and bring everything back (spec §12)."""

import io
import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from torch.distributed.checkpoint.api import CheckpointException

from common.config import TrainingConfig
from common.errors import UserError
from models import Showo
from tests.tiny import largest_file
from tests.training.tiny import same, smallest_showo
from training import checkpointing
from training.checkpointing import COURSE, TrainState, begin_course, checkpoints, find_resume, find_start
from training.data.streams import StreamState
from training.optimization import WeightAverage
from training.processes import executing_nothing

FILES = {"average.pt", "custom_checkpoint_0.pkl", "metadata.json", "model.safetensors", "optimizer.bin"}
FILES |= {"random_states_0.pkl", "streams_0.json", "counts_0.json", "unwrapped_model"}
STREAMS = {"t2i": StreamState(7, [28, 31]), "lm": StreamState(7, [7, 7])}


class Run:
    """Model, optimiser, schedule and average of a run, without its data."""

    def __init__(self, seed: int = 0, averaged: bool = True):
        torch.manual_seed(seed)
        self.accelerator, self.model = Accelerator(cpu=True), smallest_showo()
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
        state, model = TrainState(step, STREAMS), {"model": self.model, "average": self.average}
        return checkpointing.save_checkpoint(self.accelerator, folder, state, limit=limit, **model)

    def load(self, folder) -> TrainState:
        return checkpointing.load_checkpoint(self.accelerator, folder, self.average, self.model)


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_bit_for_bit(tmp_path):
    run = Run()
    run.step()
    before = parameters(run.model)
    folder = run.save(tmp_path, 1)
    saved = parameters(Showo.from_pretrained(str(folder / "unwrapped_model")))
    assert same(saved, run.average.shadow) and not same(saved, before), "the average, which loads on its own"
    assert same(before, parameters(run.model)), "saving must not change the run"
    expected = [run.step() for _ in range(3)]

    AcceleratorState._reset_state(True)
    other = Run(seed=5)
    assert other.load(folder) == TrainState(1, STREAMS)
    assert [other.step() for _ in range(3)] == expected, "the random numbers of the steps count, too"
    assert same(parameters(run.model), parameters(other.model)) and same(run.average.shadow, other.average.shadow)
    assert other.schedule.get_last_lr() == run.schedule.get_last_lr()
    assert other.average.updates == 4


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
    saved = parameters(Showo.from_pretrained(str(folder / "unwrapped_model")))
    assert same(saved, parameters(run.model)) and same(saved, other.average.shadow)


def failing(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("stage", ["state", "average", "model", "metadata"])
def test_an_interrupted_write_leaves_no_checkpoint_and_the_last_one_whole(tmp_path, monkeypatch, stage):
    run = Run()
    run.save(tmp_path, 1)
    targets = {
        "state": (run.accelerator, "save_state"),
        "average": (torch, "save"),
        "model": (run.model, "save_pretrained"),
        "metadata": (json, "dumps"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[stage], failing(OSError(28, "No space left on device")))
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
    run = Run()
    monkeypatch.setattr(run.accelerator, "save_state", save)
    with largest_file(20_000), pytest.raises(UserError, match="Make room on the disk") as error:
        run.save(tmp_path, 1)
    assert isinstance(error.value.__cause__, cause)
    assert names(tmp_path) == []


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_a_damaged_sharded_file_is_one_line(tmp_path, monkeypatch):
    run = Run()
    folder = run.save(tmp_path, 1)
    save_in_shards(folder / "shards")
    next((folder / "shards").glob("*.distcp")).write_bytes(b"")
    read = {"state_dict": {"x": torch.zeros(9999)}, "checkpoint_id": folder / "shards", "no_dist": True}
    monkeypatch.setattr(run.accelerator, "load_state", lambda _: torch.distributed.checkpoint.load(**read))
    with pytest.raises(UserError, match="cannot be continued from") as error:
        run.load(folder)
    assert isinstance(error.value.__cause__, CheckpointException)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal access"), TypeError("no"), KeyError("no")])
def test_what_has_nothing_to_do_with_the_disk_keeps_its_traceback(tmp_path, monkeypatch, error):
    run = Run()
    monkeypatch.setattr(run.accelerator, "save_state", failing(error))
    with pytest.raises(type(error)):
        run.save(tmp_path, 1)
    assert checkpoints(tmp_path) == []


def test_files_are_on_the_disk_before_the_name_that_before_the_oldest_goes(tmp_path, monkeypatch):
    run, done = Run(), []
    run.save(tmp_path, 1, limit=1)
    flush, remove = os.fsync, shutil.rmtree

    def watched_flush(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    def watched_remove(folder, *args, **kwargs):
        done.append((folder.name, names(tmp_path)))
        remove(folder, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", watched_flush)
    monkeypatch.setattr(shutil, "rmtree", watched_remove)
    folder, temporary = run.save(tmp_path, 2, limit=1), tmp_path / ".incomplete-checkpoint-2"
    inside = [temporary / path.relative_to(folder) for path in folder.rglob("*")]
    assert set(done[:-2]) == {temporary, *inside} and temporary / "unwrapped_model" in inside
    removed = ".incomplete-checkpoint-1-removed"
    assert done[-2:] == [tmp_path, (removed, [removed, "checkpoint-2"])]


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
    [((8, 9, 10, 11), 2, [10, 11]), ((8, 9, 10), None, [8, 9, 10]), ((200, 50), 1, [50]), ((0, 8, 9), 1, [0, 9])],
)
def test_the_limit_removes_the_oldest_by_number_but_not_what_was_just_written(tmp_path, steps, limit, left):
    run = Run()
    for step in steps:
        run.save(tmp_path, step, limit=limit)
    assert [folder.name for folder in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


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


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("metadata.json", '{"global_st'),
        ("metadata.json", '{"streams": {}}'),
        ("metadata.json", '{"global_step": "many"}'),
        ("streams_0.json", '{"lm": {"row": 3}}'),
        ("streams_0.json", '{"lm": {"batches": "x"}}'),
        ("streams_0.json", '{"lm": {"positions": [[1]]}}'),
        ("streams_0.json", '{"lm": {"positions": {}}}'),
        ("streams_0.json", '{"lm": {"seen": -1}}'),
        ("streams_0.json", '{"lm": {"skipped": {"a": 1e3}}}'),
        ("streams_0.json", '{"lm": {"deferred": [3]}}'),
        ("streams_0.json", '{"lm": {"positions": [1, 2], "chunks": [0]}}'),
        ("streams_0.json", '{"lm": {"positions": [1, 2], "deferred": [{}]}}'),
        ("counts_0.json", '{"nonfinite_batches": 1.5}'),
        ("counts_0.json", '{"nonfinite_batches": -1}'),
        ("optimizer.bin", ""),
        ("custom_checkpoint_0.pkl", "junk"),
        *((name, cut) for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "average.pt")),
        *((name, Path.unlink) for name in sorted(FILES - {"average.pt", "custom_checkpoint_0.pkl", "unwrapped_model"})),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage):
    run = Run()
    folder = run.save(tmp_path, 1)
    file = folder / name
    file.write_text(damage) if isinstance(damage, str) else damage(file)
    with pytest.raises(UserError, match="checkpoint-1"):
        run.load(folder)


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
    known = max(steps_of(folder / "metrics.jsonl"), default=0)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(known + 1, max(numbers, default=0) + 1):
            file.write(json.dumps({"step": step, "content": content}) + "\n")
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


# ---- nothing in a checkpoint is executed ----


class Touch:
    """Its pickle, once executed, makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickles(file: Path) -> dict[str, bytes]:
    """As `pickle` and as `torch.save` write it, alone and inside of what belongs there."""
    found = {}
    for name, content in (("alone", Touch(file)), ("inside", {"step": 3, "x": [Touch(file)]})):
        for zipped in (True, False):
            torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
            found[f"{name}-{zipped}"] = buffer.getvalue()
        found[name] = pickle.dumps(content)
    return found


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    """A pickle in the place of each file, of files that libraries look for first, and of FSDP2's index."""
    run, executed = Run(), tmp_path / "executed"
    folder = run.save(tmp_path, 1)
    torch.load(io.BytesIO(pickles(executed)["inside-True"]), weights_only=False)
    assert executed.exists(), "these pickles do something"
    executed.unlink()
    files = [file for file in folder.rglob("*") if file.is_file()]
    files += [folder / name for name in ("scheduler.bin", "sampler.bin", "shards/.metadata", "custom_checkpoint_1.pkl")]
    (folder / "shards").mkdir()
    for file in files:
        before = file.read_bytes() if file.exists() else None
        for name, content in pickles(executed).items():
            file.write_bytes(content)
            with suppress(UserError):
                run.load(folder)
                Showo.from_pretrained(folder / "unwrapped_model")
            assert not executed.exists(), f"{file.name}: {name}"
        file.unlink() if before is None else file.write_bytes(before)
    run.load(folder)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_the_index_of_sharded_files_is_read_before_torch_reads_it(tmp_path):
    save_in_shards(tmp_path / "shards")
    index = tmp_path / "shards" / ".metadata"
    with executing_nothing(tmp_path):
        assert torch.distributed.checkpoint.FileSystemReader(index.parent).read_metadata().state_dict_metadata
    index.write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "pytorch_model_fsdp_0").symlink_to(index.parent)
    for folder in (tmp_path, index.parent, tmp_path / "linked"):
        with pytest.raises(pickle.UnpicklingError, match="is no part of a checkpoint"), executing_nothing(folder):
            pass


def test_a_library_that_asks_for_more_than_tensors_does_not_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    content = io.BytesIO(pickles(tmp_path / "executed")["alone-True"])
    with executing_nothing(tmp_path), pytest.raises(pickle.UnpicklingError):
        torch.load(content, weights_only=False)
    assert not (tmp_path / "executed").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (COURSE, "[1"),
        (COURSE, json.dumps({"leaving": [], "to": "../elsewhere", "start": None})),
        (COURSE, json.dumps({"leaving": 3, "to": "abandoned-1", "start": None})),
        ("checkpoint-4/config.yaml", "a: [1"),
        ("checkpoint-4/config.yaml", "- 1"),
        ("checkpoint-4/config.yaml", "mask_schedule:\n"),
        ("checkpoint-4/config.yaml", "mask_schedule: 3\n"),
        ("checkpoint-4/config.yaml", "mask_schedule: []\n"),
        ("checkpoint-4/metadata.json", '{"global_step": 1e99}'),
        ("checkpoint-4/metadata.json", json.dumps({"global_step": 10**30, "num_processes": 1})),
        ("checkpoint-4/metadata.json", json.dumps({"global_step": 4, "num_processes": "2"})),
    ],
)
def test_damaged_notes_of_a_run_are_named(tmp_path, name, content):
    write_course(tmp_path, [4], "old")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        begin(tmp_path, "latest")
        checkpointing.check_same_config(tmp_path / "checkpoint-4", OmegaConf.structured(TrainingConfig))


def test_keys_of_a_checkpoints_configuration_may_be_numbers(tmp_path):
    (tmp_path / "config.yaml").write_text("1: 2\ntraining: {5: {6: 7}}\n")
    checkpointing.check_same_config(tmp_path, OmegaConf.structured(TrainingConfig))


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    """Files that can be read, with the numbers of another run or none at all."""
    run = Run()
    run.step()
    parts = {"model": run.model, "optimizer": run.optimizer, "schedule": run.schedule, "average": run.average}
    checkpointing.check_restored(tmp_path, **parts)
    run.schedule.base_lrs = [float("nan")]
    with pytest.raises(ValueError, match="schedule of the learning rate holds nan"):
        checkpointing.check_restored(tmp_path, **parts)
    run.schedule.base_lrs = [0.1]
    moments = next(iter(run.optimizer.state.values()))
    moments["exp_avg"] = moments["exp_avg"][:0]
    with pytest.raises(ValueError, match="exp_avg of the optimiser has shape"):
        checkpointing.check_restored(tmp_path, **parts)
    run.optimizer.state.clear()
    name = next(iter(run.average.shadow))
    run.average.shadow[name][0] = float("inf")
    with pytest.raises(UserError, match="holds weights that are NaN or infinite: 1 .showo"):
        checkpointing.check_restored(tmp_path, **parts)
    with pytest.raises(ValueError, match="that of another model"):
        run.average.load_state_dict({"updates": 1, "shadow": {name: torch.zeros(1)}})


@pytest.mark.parametrize(
    ("content", "says"),
    [("task: showo\n", True), ("image: {exif: apply}\n", True), ("image: {background: null}\n", False)],
)
def test_a_run_that_saw_images_otherwise_says_so(tmp_path, content, says):
    (tmp_path / "config.yaml").write_text(content)
    line = checkpointing.describe_images(tmp_path, OmegaConf.structured(TrainingConfig))
    assert ("seen on white" in line) if says else line is None
