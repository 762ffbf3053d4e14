"""How a script ends on a user's mistake: seen from outside, as a process."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError, run_cli

SCRIPT = """
import sys
sys.path[0] = {root!r}
from common.errors import UserError, run_cli

def main(argv):
    {body}

run_cli(main)
"""


def run(repository: Path, body: str, *arguments: str) -> subprocess.CompletedProcess:
    script = SCRIPT.format(root=str(repository), body=body)
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)


def test_user_error_is_one_line_and_exit_code_2(repository):
    done = run(repository, "print('so far'); raise UserError('mode is 3;\\n  allowed: t2i')")
    assert (done.returncode, done.stdout, done.stderr) == (2, "so far\n", "error: mode is 3; allowed: t2i\n")


def test_our_own_mistakes_keep_their_traceback(repository):
    done = run(repository, "assert 1 == 2, 'ours'")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "AssertionError: ours" in done.stderr


def test_ctrl_c_ends_with_130(repository):
    done = run(repository, "raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_main_gets_the_arguments_and_a_good_run_ends_with_0(repository):
    done = run(repository, "print(argv)", "config=a", "prompt=b c")
    assert (done.returncode, done.stdout) == (0, "['config=a', 'prompt=b c']\n")


def test_run_cli_raises_system_exit_in_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "x=1"])

    def main(argv: list[str]) -> None:
        raise UserError(f"unknown {argv[0]}")

    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: unknown x=1\n"
