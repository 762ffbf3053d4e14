"""How a script ends: its exit code, and what it prints."""

import json
import os
import subprocess
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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "out/x.png"), "error: out/x.png: No space left on device\n"),
        (PermissionError(13, "Permission denied", b"caf\xe9"), "Permission denied\n"),
        (OSError("odd"), "error: odd\n"),
        (MemoryError(), "error: there is not enough memory; give smaller files, sizes or batches\n"),
    ],
)
def test_errors_of_the_disk_are_one_line_with_the_path(capsys, error, told):
    with pytest.raises(SystemExit) as end:
        run_cli(Mock(side_effect=error))
    output, errors = capsys.readouterr()
    assert (end.value.code, output, errors.count("\n")) == (2, "", 1) and errors.endswith(told)


def test_an_argument_that_a_library_does_not_take_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["small_llm.py", "output_dir=caf\udce9"])
    with pytest.raises(SystemExit) as end:
        run_cli(Mock(side_effect=TypeError("while processing 'path'")))
    assert end.value.code == 2 and "no UTF-8, which a library" in capsys.readouterr().err


TALKS = """
import sys
from common.errors import run_cli
def main(arguments):
    for number in range(3000):
        print(f"{number} \\u2026 caf\\udce9", flush=number % 1000 == 0)
    open(sys.argv[1], "w").write("done")
run_cli(main)
"""


@pytest.mark.parametrize("ending", ["| head -1", ">&-", "> /dev/full", "2>&- >&-", "> /dev/null"])
def test_work_goes_on_when_nobody_listens(tmp_path, ending):
    """A pipe that closes, a closed or full stdout, a terminal that knows ASCII only, a name that is no Unicode."""
    (tmp_path / "talks.py").write_text(TALKS)
    command = f"set -o pipefail; {sys.executable} {tmp_path}/talks.py {tmp_path}/done {ending}"
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr, (tmp_path / "done").read_text()) == (0, "", "done")
    assert result.stdout == ("0 \\u2026 caf\\udce9\n" if "head" in ending else "")


def test_ctrl_c_is_one_word_also_where_a_library_takes_it_for_an_error(tmp_path):
    """As transformers does while it is imported."""
    (tmp_path / "loads.py").write_text(
        """
import os, signal
from common.errors import run_cli
def main(arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("are the requirements installed?")
run_cli(main)
"""
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    result = subprocess.run([sys.executable, tmp_path / "loads.py"], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_ctrl_c_while_a_script_of_ours_loads_its_libraries():
    code = "import sys; sys.modules['__main__'].__file__ = 'evaluate.py'; import common, os, signal"
    code += "; os.kill(os.getpid(), signal.SIGINT); print('went on')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")
