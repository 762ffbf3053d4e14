"""Stops a training run at random moments, also while it saves or starts, and checks that nothing but steps is lost.

    python3 tests/end_to_end/kill_and_resume.py kills=30 seed=0 output_dir=outputs/kill_and_resume

The tiny world is trained once without a stop and once with signals (`HOWS`) again and again, each time by the command
that users type, with all three flows and loader workers. Some starts step back to an older checkpoint, begin anew, or
return to a checkpoint that was set aside (`STARTS`). After each stop, every folder with a checkpoint's name is whole,
and ``latest`` means the course that was asked for: at most `save_every` steps are lost, none after SIGTERM or Ctrl-C.
At the end weights, average, optimiser, random states and every line of `metrics.jsonl`, which holds each step once,
equal those of the run without a stop to the last bit. Ends with 1 if anything does not hold.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from common.config import read_settings
from common.errors import UserError, run_cli
from common.settings import setting
from tests.training.tiny import arguments, metrics_of, write_world
from training.checkpointing import checkpoints, find_resume
from training.guards import StopSignals

AIMS = ("saving", "step", "start", "saving")  # where in a run a signal is to strike, in turn
KILL, TERM, CTRL_C = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
HOWS = ((KILL,), (CTRL_C,), (KILL,), (TERM,), (CTRL_C, CTRL_C))  # the signals, in turn
# Exit codes of a run that takes steps. -2: the second Ctrl-C came when all was saved and Python was ending.
ENDS = {(KILL,): [-9], (TERM,): [0], (CTRL_C,): [130], (CTRL_C, CTRL_C): [130, -2]}
STARTS = ("latest", "latest", "back", "latest", "anew", "latest", "return")
SAVE_EVERY = 4
STEPS_PER_KILL = 16  # enough for the run to be still going at the last kill
PATIENCE = 240  # seconds without what is waited for
LOADERS = {".safetensors": load_file, ".yaml": OmegaConf.load, ".json": lambda file: json.loads(file.read_text())}
LOADERS |= dict.fromkeys((".bin", ".pt"), lambda file: torch.load(file, weights_only=False))
LOADERS[".pkl"] = lambda file: torch.load(file, weights_only=False)


@dataclass
class KillSettings:
    kills: int = setting(30, "times that the run is killed", low=1)
    seed: int = setting(0, "of the moments")
    output_dir: str | None = setting(None, "null: a temporary folder, removed at the end")


def check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


@dataclass
class Kill:
    """What was found after one.

    start: `experiment.resume_from_checkpoint`. aim, how: see `AIMS`, `HOWS`. reached: last step logged before it.
    newest: step that `latest` means. unfinished: folders that were being written or removed when it struck. seconds:
    that the process lived.
    """

    start: str
    aim: str
    how: tuple[signal.Signals, ...]
    reached: int
    newest: int
    unfinished: list[str]
    seconds: float

    @property
    def row(self) -> str:
        struck = " ".join(name.removeprefix(".incomplete-") for name in self.unfinished)
        numbers = f"{self.reached:>7} {self.newest:>10} {self.reached - self.newest:>5} {self.seconds:>6.1f}"
        signals = "+".join(number.name.removeprefix("SIG") for number in self.how)
        return f"{self.start:<26} {self.aim:<8} {signals:<8} {numbers}  {struck}"


HEADER = f"kill  {'start':<26} aim      signal   reached checkpoint  lost      s  unfinished"


@dataclass
class Training:
    """`training/train.py` on the tiny world, started again and again in one output folder."""

    world: Path
    output_dir: Path
    steps: int
    process: subprocess.Popen | None = None
    before: tuple[int, int] = (0, 0)  # inode and length of metrics.jsonl at the start of the process
    begun_at: int = 0  # step that the process starts from
    started: float = 0.0
    left_over: dict[str, int] = field(default_factory=dict)  # half folders at the start, and when they last changed

    @property
    def metrics(self) -> Path:
        return self.output_dir / "metrics.jsonl"

    @property
    def newest(self) -> int:
        return step_of(find_resume(self.output_dir, "latest"))

    def setting(self, start: str) -> str:
        """`experiment.resume_from_checkpoint` for one of `STARTS`; ``latest`` where there is nothing to go back to."""
        if start == "anew":
            return "false"
        folders = [self.output_dir, *sorted(self.output_dir.glob("abandoned-*"), key=lambda f: int(f.name[10:]))]
        if start == "back" and len(found := checkpoints(folders[0])) > 1:
            return found[0].name
        if start == "return" and (found := checkpoints(folders[-1])):
            return str(found[-1].relative_to(self.output_dir))
        return "latest"

    def start(self, setting: str = "latest") -> None:
        overrides = {
            "experiment.resume_from_checkpoint": setting,
            "training.max_train_steps": self.steps,
            "experiment.save_every": SAVE_EVERY,
            "experiment.checkpoints_total_limit": 2,
            "experiment.generate_every": 10 * SAVE_EVERY,
            "experiment.log_grad_norm_every": 5,
            "dataset.params.num_workers": 1,
        }
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
        env |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        command = [sys.executable, str(ROOT / "training/train.py")]
        command += arguments(self.world, self.output_dir, overrides)
        self.before = self.place_of_metrics()
        self.begun_at = step_of(find_resume(self.output_dir, False if setting == "false" else setting))
        self.left_over, self.started = self.half_folders(), time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.world, env=env, stdout=log, stderr=log)

    @property
    def log(self) -> Path:
        return self.output_dir.with_suffix(".log")

    def half_folders(self) -> dict[str, int]:
        """Name → when it last changed, of checkpoints that are being written or removed, or were."""
        return {path.name: path.stat().st_ctime_ns for path in self.output_dir.glob(".incomplete-*")}

    def new_steps(self) -> list[int]:
        """Steps logged since the start of the process, in order; those of before are taken out of the file first."""
        inode, length = self.place_of_metrics()
        if not inode:
            return []
        start = self.before[1] if inode == self.before[0] else 0  # it is replaced where there was something to take out
        lines = self.metrics.read_bytes()[start:].split(b"\n")[:-1]
        return [line["step"] for line in map(json.loads, lines) if "lr" in line and line["step"] > self.begun_at]

    def place_of_metrics(self) -> tuple[int, int]:
        """Inode and length of the file; zeros where there is none yet."""
        if not self.metrics.exists():
            return 0, 0
        stat = self.metrics.stat()
        return stat.st_ino, stat.st_size

    def wait_for(self, happened, what: str) -> None:
        """Until `happened()`; a process that ends before is a failure."""
        while not happened():
            ended = self.process.poll() is not None
            if ended or time.monotonic() - self.started > PATIENCE:
                how = f"ended with {self.process.returncode}" if ended else "hangs"
                raise AssertionError(f"waiting for {what}, the run {how}: {self.log.read_text()[-2000:]}")
            time.sleep(0.002)

    def finish(self) -> None:
        self.process.wait(PATIENCE)
        check(self.process.returncode == 0, f"the run ended with {self.process.returncode}: {self.log.read_text()}")


@dataclass
class Killer:
    """Chooses moments; `saving` strikes at once the first time, then anywhere about a save."""

    rng: random.Random
    start_seconds: float
    strikes: int = field(default=0)

    def wait(self, training: Training, aim: str) -> None:
        """Until the moment has come."""
        if aim == "start":  # while it loads, at the latest at the first step
            until = training.started + self.rng.uniform(0.1, self.start_seconds)
            while time.monotonic() < until and not training.new_steps():
                time.sleep(0.002)
        elif aim == "step":
            count = self.rng.randint(1, 12)
            training.wait_for(lambda: len(training.new_steps()) >= count, f"{count} steps")
            time.sleep(self.rng.uniform(0, 0.1))
        else:
            count = self.rng.randint(1, 3)
            training.wait_for(lambda: _is_saving(training, count), f"{count} saves")
            time.sleep(self.rng.uniform(0, 0.03) if self.strikes else 0)
            self.strikes += 1


def _is_saving(training: Training, count: int) -> bool:
    """Whether the process is at its save number `count`, or behind it."""
    due = [step for step in training.new_steps() if step % SAVE_EVERY == 0]
    return len(due) >= count and (training.output_dir / f".incomplete-checkpoint-{due[-1]}").exists()


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def kill(training: Training, killer: Killer, start: str, aim: str, how: tuple[signal.Signals, ...]) -> Kill:
    """Starts the run, sends it signals, and looks at what it leaves."""
    before, setting = training.newest, training.setting(start)
    training.start(setting)
    try:
        killer.wait(training, aim)
        for number in how[:-1]:
            training.process.send_signal(number)
            time.sleep(StopSignals.ONE_CTRL_C + killer.rng.uniform(0, 0.2))
        training.process.send_signal(how[-1])
        training.process.wait(PATIENCE)
    finally:
        training.process.kill()
    steps, newest, code = training.new_steps(), training.newest, training.process.returncode
    check(aim == "start" or code in ENDS[how], f"the run ended with {code}: {training.log.read_text()[-2000:]}")
    first = training.begun_at
    check(not steps or steps == list(range(first + 1, first + len(steps) + 1)), f"from {first} it took {steps}")
    reached = steps[-1] if steps else newest
    lost = 0 if how in ((TERM,), (CTRL_C,)) and aim != "start" else SAVE_EVERY
    check(0 <= reached - newest <= lost, f"at step {reached} {how} left step {newest}, started from {first}")
    check(newest in (before, first) if not steps else newest >= first, f"{setting} at {before} left {newest}")
    unfinished = sorted(name for name, _ in training.half_folders().items() - training.left_over.items())
    return Kill(setting, aim, how, reached, newest, unfinished, time.monotonic() - training.started)


# ---- what checkpoints hold ----


def content_of(checkpoint: Path) -> dict:
    """File → what it holds; every one can be read.

    Raises:
        AssertionError: one cannot.
    """
    content = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            content[str(file.relative_to(checkpoint))] = LOADERS[file.suffix](file)
        except Exception as error:
            raise AssertionError(f"{file} cannot be read: {error}") from error
    return content


def check_whole(output_dir: Path, names: set[str]) -> None:
    """Every folder with a checkpoint's name has all files, can be read, and says the step it is named after."""
    for folder in (folder for place in (output_dir, *output_dir.glob("abandoned-*")) for folder in checkpoints(place)):
        content = content_of(folder)
        check(set(content) == names, f"{folder} is not whole: {sorted(names ^ set(content))}")
        check(content["metadata.json"]["global_step"] == int(folder.name.split("-")[1]), f"{folder}: another step")


def same(one, other) -> bool:
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def check_same_run(whole: Path, parts: Path) -> None:
    """Final model, newest checkpoint and metrics of two runs are equal."""
    check(same(*(load_file(folder / "model.safetensors") for folder in (whole, parts))), "final weights differ")
    newest = [checkpoints(folder)[-1] for folder in (whole, parts)]
    check(newest[0].name == newest[1].name, f"{newest[0].name} and {newest[1].name}")
    one, other = map(content_of, newest)
    differ = [name for name in one if name != "config.yaml" and not same(one[name], other[name])]
    check(not differ, f"{newest[0].name}: {', '.join(differ)} differ")
    lines = [metrics_of(folder) for folder in (whole, parts)]
    differ = [one["step"] for one, other in zip(*lines, strict=False) if one != other]
    check(lines[0] == lines[1], f"metrics.jsonl: {len(lines[0])} and {len(lines[1])} lines, {differ[:3]} differ")


# ---- the whole ----


def run_kills(folder: Path, kills: int, seed: int, report=print) -> list[Kill]:
    """Trains with and without kills in `folder` and compares.

    Raises:
        AssertionError: something does not hold.
    """
    world = write_world(folder / "world")
    steps = STEPS_PER_KILL * kills
    whole, parts = Training(world, folder / "whole", steps), Training(world, folder / "parts", steps)
    whole.start()
    whole.wait_for(whole.new_steps, "the first step")
    start_seconds = time.monotonic() - whole.started
    whole.finish()
    report(f"{steps} steps without a stop: {time.monotonic() - whole.started:.0f} s")
    names = set(content_of(checkpoints(whole.output_dir)[-1]))
    killer, found = Killer(random.Random(seed), start_seconds), []
    report(HEADER)
    for number in range(kills):
        found.append(kill(parts, killer, *(cycle[number % len(cycle)] for cycle in (STARTS, AIMS, HOWS))))
        check_whole(parts.output_dir, names)
        report(f"{number + 1:>4}  {found[-1].row}")
    parts.start()
    parts.finish()
    check(not list(parts.output_dir.glob(".incomplete-*")), "half checkpoints are left at the end")
    check_same_run(whole.output_dir, parts.output_dir)
    return found


def main(argv: list[str]) -> None:
    settings = read_settings(argv, KillSettings, "kills=30 seed=0 output_dir=outputs/kill_and_resume")
    if settings.output_dir and (folder := Path(settings.output_dir)).exists() and any(folder.iterdir()):
        raise UserError(f"output_dir={folder} is not empty; give another folder, or none for a temporary one")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(settings.output_dir or temporary).absolute()
        try:
            found = run_kills(folder, settings.kills, settings.seed, partial(print, flush=True))
        except AssertionError as error:
            print(f"FAILED: {error}")
            raise SystemExit(1) from None
    struck = sum(bool(one.unfinished) for one in found)
    lost = sum(one.reached - one.newest for one in found)
    print(
        f"{len(found)} stops, {struck} of them while a checkpoint was written or removed; {lost} steps taken twice, "
        f"none lost; the same weights and metrics to the last bit, in {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    run_cli(main)
