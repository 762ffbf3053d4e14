"""What a run reports: on disk always, in wandb if it is wanted. wandb itself runs here, offline."""

import errno
import json
import logging
import os
import sys
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.tracking import Tracker, _logged_in, _mode_of_environment, _quiet


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A machine where nobody is logged in."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))


def test_a_step_has_one_line_however_often_it_is_logged(tmp_path):
    for start in (0, 2):  # the second run goes on where the first stopped
        with Tracker("project", "name", tmp_path) as tracker:
            for step in (start, start + 1):
                tracker.log({"loss": torch.tensor(0.5)}, step)
                assert lines(tmp_path)[-1] == {"step": step, "loss": 0.5}, "on the disk at once"
                tracker.log({"norm": 1, "note": "good"}, step)
                tracker.log({"loss": 0.25}, step)
    assert lines(tmp_path) == [{"step": step, "loss": 0.25, "norm": 1, "note": "good"} for step in range(4)]
    assert not (tmp_path / "wandb").exists()


def test_a_continued_run_logs_each_step_once(tmp_path):
    file = tmp_path / "metrics.jsonl"
    kept = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 2, "eval_loss": 1.0}\n'
    for rest in ('{"step": 3, "loss": 0.3}\n', '{"step": 3, "lo', "\n[]\n"):  # lost steps, a line cut in two, no lines
        file.write_text(kept + rest)
        before = file.stat().st_ino
        Tracker("project", "name", tmp_path, last_step=2)
        assert file.read_text() == kept and file.stat().st_ino != before, "put in place whole"
    before = file.stat()
    Tracker("project", "name", tmp_path, last_step=2)
    assert file.stat() == before, "what needs no change is left alone"
    for text in (kept, kept.rstrip("\n")):  # the last line end was not written
        file.write_text(text)
        Tracker("project", "name", tmp_path, last_step=2).log({"loss": 0.3}, 3)
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2, 3]
    assert not list(tmp_path.glob(".*"))


def test_a_crash_while_lost_steps_are_taken_away_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(os, "fsync", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Tracker("project", "name", tmp_path, last_step=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_pictures_are_saved_as_one_sheet(tmp_path):
    tracker = Tracker("project", "name", tmp_path)
    panel = "Original images v.s. Reconstructed images v.s. Predicted images"
    tracker.log_images(panel, [Image.new("RGB", (64, 64), "red")] * 2, ["one", "two"], step=12)
    tracker.log_images("unsaved", [Image.new("RGB", (64, 64))], ["x"], step=12, save=False)
    tracker.log_images("empty", [], [], step=12)
    name = "original-images-v-s-reconstructed-images-v-s-predicted-images-00000012.png"
    assert os.listdir(tmp_path / "images") == [name]
    sheet = Image.open(tmp_path / "images" / name).convert("RGB")
    assert sum(pixel == (255, 0, 0) for pixel in sheet.get_flattened_data()) == 2 * 128 * 128
    with pytest.raises(AssertionError, match="2 captions"):
        tracker.log_images("panel", [Image.new("RGB", (8, 8))], ["one", "two"], step=1)


def test_other_processes_write_nothing(tmp_path):
    tracker = Tracker("project", "name", tmp_path / "out", enabled=False)
    tracker.log({"loss": 1}, 0)
    tracker.log_images("panel", [Image.new("RGB", (8, 8))], ["x"], 0)
    tracker.log_table("panel", ["column"], [[1]])
    tracker.finish()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "online"])
def test_without_login_wandb_runs_offline_and_says_so_once(tmp_path, nobody, capsys, mode):
    options = {"entity": None, "resume": "auto", "mode": mode}
    tracker = Tracker("project", "name", tmp_path, config={"seed": 3}, wandb_config=options)
    tracker.log({"loss": 1.0}, step=1)
    tracker.log_images("Generated images", [Image.new("RGB", (8, 8), "blue")], ["blue"], step=1)
    assert tracker.run.settings.mode == "offline" and dict(tracker.run.config) == {"seed": 3}
    tracker.finish()
    told = capsys.readouterr().out
    assert told.count("not logged in") == told.count("offline") == 1
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (picture,) = run.glob("files/media/images/Generated images_1_*.png")
    assert Image.open(picture).getpixel((0, 0)) == (0, 0, 255)
    assert list(run.glob("run-*.wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_setting_wins_over_the_environment(tmp_path, nobody, monkeypatch, capsys, mode):
    monkeypatch.setenv("WANDB_MODE", "disabled" if mode == "offline" else "offline")
    with Tracker("project", "name", tmp_path, wandb_config={"mode": mode}) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    assert bool(list(tmp_path.glob("wandb/offline-run-*"))) == (mode == "offline")
    assert capsys.readouterr().out == ""


def test_an_unknown_mode_in_the_environment_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "foo")
    with pytest.raises(UserError, match="WANDB_MODE is 'foo'; allowed: online, offline, disabled"):
        Tracker("project", "name", tmp_path)


@pytest.mark.slow
def test_a_key_without_a_server_falls_back_to_offline(tmp_path, nobody, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("common.tracking.INIT_TIMEOUT", 2)
    with Tracker("project", "name", tmp_path) as tracker:
        tracker.log({"loss": 1.0}, step=1)
        assert tracker.run.settings.mode == "offline"
    assert "offline" in capsys.readouterr().out
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_without_wandb_installed_the_disk_is_enough(tmp_path, nobody, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker("project", "name", tmp_path) as tracker:
        tracker.log({"loss": 1}, 0)
    assert "not installed" in capsys.readouterr().out
    assert lines(tmp_path) == [{"step": 0, "loss": 1}]


def test_a_full_disk_under_wandb_is_one_line(tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = Tracker("project", "name", tmp_path, wandb_config={"mode": "disabled"})
    for name, use in {
        "log": lambda: tracker.log_images("panel", [Image.new("RGB", (8, 8))], ["a"], 0, save=False),
        "finish": tracker.finish,
    }.items():
        tracker.run = SimpleNamespace(**{name: full})
        with pytest.raises(UserError, match="cannot write .*wandb .No space left on device"):
            use()


@pytest.mark.parametrize(
    ("variable", "value", "mode"),
    [
        ("WANDB_MODE", "dryrun", "offline"),
        ("WANDB_MODE", "run", "online"),
        ("WANDB_MODE", "OFFLINE", "offline"),
        ("WANDB_MODE", "", None),
        ("WANDB_DISABLED", "true", "disabled"),
        ("WANDB_DISABLED", "1", "disabled"),
        ("WANDB_DISABLED", "false", None),
    ],
)
def test_wandbs_older_words_in_the_environment(nobody, monkeypatch, variable, value, mode):
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    monkeypatch.setenv(variable, value)
    assert _mode_of_environment() == mode


@pytest.mark.slow
def test_a_dry_run_is_recorded_offline_by_wandb_itself(tmp_path, nobody, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with Tracker("project", "name", tmp_path) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    assert list(tmp_path.glob("wandb/offline-run-*")) and capsys.readouterr().out == ""


@pytest.mark.parametrize("line", ['{"step": 1e999}', '{"step": "x"}', "[" * 100_000, '{"a": ' * 5000, "[1]", '{"ste'])
def test_lines_that_no_run_wrote_are_cut_off_ones(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 9}}')
    with Tracker("project", "name", tmp_path, wandb_config={"mode": "disabled"}, last_step=1) as tracker:
        tracker.log({"loss": 1}, 2)
    assert lines(tmp_path) == [{"step": 1}, {"step": 2, "loss": 1}]


def test_metrics_that_are_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl is no regular file"):
        Tracker("project", "name", tmp_path, wandb_config={"mode": "disabled"}, last_step=1)


def test_an_error_of_writing_names_the_file(tmp_path, monkeypatch):
    tracker = Tracker("project", "name", tmp_path, wandb_config={"mode": "disabled"})
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        tracker.log({"loss": 1}, 2)
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("place", ["~nobody-of-this-name/x", "pipe", "bytes"])
def test_an_odd_file_of_logins_holds_none(tmp_path, nobody, monkeypatch, place):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"machine \xff\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", place)
    assert not _logged_in()


def test_a_log_of_wandbs_own_on_a_full_disk_is_nobodys_trouble(capsys):
    handler = logging.FileHandler("/dev/full")
    logger = logging.getLogger("wandb")
    logger.addHandler(handler)
    try:
        _quiet(None)
        logger.error("a line")
        assert capsys.readouterr().err == "" and logging.raiseExceptions
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()
