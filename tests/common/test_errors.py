"""How a script ends on a user's mistake: seen from outside, as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
sys.path[0] = {root!r}
from common.errors import UserError, run_cli

def main(argv):
    {body}

run_cli(main)
"""


def run(repository: Path, body: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT.format(root=str(repository), body=body), "config=a", "prompt=b c"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "code", "out", "err"),
    [
        ("print(argv)", 0, "['config=a', 'prompt=b c']\n", ""),
        ("print('so far'); raise UserError('is 3;\\n  allowed: t2i')", 2, "so far\n", "error: is 3; allowed: t2i\n"),
        ("raise KeyboardInterrupt", 130, "", "interrupted\n"),
        ("raise KeyboardInterrupt('checkpoint-4 is there')", 130, "", "interrupted; checkpoint-4 is there\n"),
    ],
)
def test_the_end_of_a_script(repository, body, code, out, err):
    done = run(repository, body)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_our_own_mistakes_keep_their_traceback(repository):
    done = run(repository, "assert 1 == 2, 'ours'")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "AssertionError: ours" in done.stderr


def test_the_launcher_of_several_processes_repeats_the_line(repository, tmp_path):
    """By torch's own report of a failed process."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    done = run(repository, "raise UserError('mode is 3')", TORCHELASTIC_ERROR_FILE=str(file))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=done.returncode, error_file=str(file))
    assert failure.timestamp == json.loads(file.read_text())["timestamp"] > 0
    assert str(ChildFailedError("train.py", {0: failure})).rstrip("=\n").endswith("traceback : error: mode is 3")
