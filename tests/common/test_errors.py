"""How a script ends: its exit code, and what it prints."""

import json
import sys
from unittest.mock import Mock

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from common.errors import UserError, run_cli


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("is 3;\n  allowed: t2i"), 2, "error: is 3; allowed: t2i\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("checkpoint-4 is there"), 130, "interrupted; checkpoint-4 is there\n"),
    ],
)
def test_the_end_of_a_script(capsys, error, code, told):
    with pytest.raises(SystemExit) as end:
        run_cli(Mock(side_effect=error))
    assert (end.value.code, *capsys.readouterr()) == (code, "", told)


def test_a_script_gets_its_arguments_and_our_own_mistakes_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "config=a", "prompt=b c"])
    main = Mock(side_effect=[None, AssertionError("ours")])
    run_cli(main)
    main.assert_called_once_with(["config=a", "prompt=b c"])
    with pytest.raises(AssertionError, match="ours"):
        run_cli(main)


def test_the_launcher_of_several_processes_repeats_the_line(monkeypatch, tmp_path):
    """By torch's own report of a failed process."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit):
        run_cli(Mock(side_effect=UserError("mode is 3")))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert failure.timestamp == json.loads(file.read_text())["timestamp"] > 0
    assert str(ChildFailedError("train.py", {0: failure})).rstrip("=\n").endswith("traceback : error: mode is 3")
