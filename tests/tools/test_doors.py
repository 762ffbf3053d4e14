"""For one release the commands can be run by the paths of before."""

import runpy
import subprocess
import sys

import pytest

MOVED = {
    f"training/data/{name}.py": f"tools/{name}.py"
    for name in ("make_shards", "encode_images", "llava_shards", "small_llm", "small_clip")
}
MOVED |= {f"training/{name}.py": f"tools/{name}.py" for name in ("plot", "export")}
MOVED |= {"training/data/emoji_world.py": "examples/emoji_world/make.py"}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_names_the_new_one_and_does_the_same(repository, monkeypatch, capsys, old):
    said = []
    for script in (old, MOVED[old]):
        monkeypatch.setattr(sys, "path", ["", *sys.path])
        monkeypatch.setattr(sys, "argv", [script, "no_such_setting=1"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(repository / script), run_name="__main__")
        said.append(capsys.readouterr().err)
        assert ended.value.code == 2 and "error: " in said[-1] and "no_such_setting" in said[-1]
    assert said[0] == f"{old} is now {MOVED[old]}\n" + said[1]


@pytest.mark.slow
def test_an_old_path_works_from_anywhere(repository, tmp_path):
    command = [sys.executable, str(repository / "training/data/emoji_world.py"), "output_dir=world"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 2 and done.stderr.count("\n") == 2 and "\nerror: npm is needed to download" in done.stderr
