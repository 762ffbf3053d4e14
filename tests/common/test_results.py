"""Results of runs in one folder: nothing that is there is lost, and nothing is written in half."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from common.results import ResultFolder, copies_in
from tests.tiny import largest_file

PICTURE = Image.new("RGB", (8, 8), "red")


def run(folder: Path, count: int = 1, mode: str = "t2i", **settings) -> ResultFolder:
    results = ResultFolder(folder, **settings)
    for number in range(count):
        results.add(file=results.save(PICTURE), mode=mode, prompt=f"p{number}", seed=1)
        results.show(PICTURE, "p")
    results.write_grid()
    return results


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def files_in_lines(folder: Path) -> list[str]:
    return [json.loads(line)["file"] for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_later_run_adds_to_the_earlier_ones(tmp_path):
    assert run(tmp_path / "new", 2).note == ""
    assert "holds 2 images of earlier runs, which stay; overwrite=true replaces them" in run(tmp_path / "new").note
    images = ["0000.png", "0001.png", "0002.png"]
    assert names(tmp_path / "new") == [*images, "grid-0002.png", "grid.png", "results.jsonl"]
    assert files_in_lines(tmp_path / "new") == images


def test_numbers_that_others_use_are_skipped_and_their_files_stay(tmp_path):
    own = {name: f"{name} of the user" for name in ("0000.png", "0002.png", "grid.png", "notes.txt")}
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    for overwrite in (False, True):
        run(tmp_path, 2, overwrite=overwrite)
        assert files_in_lines(tmp_path)[-2:] == ["0001.png", "0003.png"]
        assert {name: (tmp_path / name).read_text() for name in own} == own
        assert names(tmp_path) == sorted([*own, "0001.png", "0003.png", "grid-0001.png", "results.jsonl"])


def test_overwrite_removes_what_earlier_runs_wrote_and_only_that(tmp_path):
    for _ in range(2):
        run(tmp_path, 2)
    (tmp_path / "0001.png").write_text("painted over by the user")
    (tmp_path / "0009.png").write_text("the user's")
    results = run(tmp_path, 1, overwrite=True)
    assert "3 images of earlier runs, which are replaced; 1 image changed since stays: 0001.png" in results.note
    assert names(tmp_path) == ["0000.png", "0001.png", "0009.png", "grid-0000.png", "results.jsonl"]
    assert (tmp_path / "0001.png").read_text() == "painted over by the user"
    assert files_in_lines(tmp_path) == ["0001.png", "0000.png"]
    run(tmp_path / "other", 3)
    run(tmp_path / "other", 1, overwrite=True)
    assert names(tmp_path / "other") == ["0000.png", "grid.png", "results.jsonl"]


@pytest.mark.parametrize("text", ["notes\n", '{"a": 1}\n', "[1]\n", '{"file": 3, "mode": "t2i"}\n', "[" * 9999, "\xff"])
def test_results_of_others_are_refused(tmp_path, text):
    (tmp_path / "results.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="results.jsonl was not written by this command"):
        ResultFolder(tmp_path, overwrite=True)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("elsewhere", path)])
def test_results_are_a_file(tmp_path, make):
    make(tmp_path / "results.jsonl")
    with pytest.raises(UserError, match="results.jsonl was not written by this command"):
        ResultFolder(tmp_path)


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path):
    run(tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"file": "0001.p')
    run(tmp_path)
    first, _, second = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in (first, second)] == ["0000.png", "0001.png"]
    assert len(run(tmp_path).earlier) == 2


def test_names_that_are_no_text_are_written_readably(tmp_path):
    results = ResultFolder(tmp_path)
    results.add(file=results.save(PICTURE), mode="mmu", image=os.fsdecode(b"caf\xe9.png"), answer="é")
    record = json.loads((tmp_path / "results.jsonl").read_text(encoding="utf-8"))
    assert record["image"] == r"caf\xe9.png" and record["answer"] == "é"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_what_was_there_and_no_half_files(tmp_path, overwrite):
    run(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    results = ResultFolder(tmp_path, overwrite)
    with largest_file(40), pytest.raises(UserError, match="cannot write .*0002.png"):
        results.save(PICTURE)
    if not overwrite:
        with largest_file(len(before["results.jsonl"]) + 10), pytest.raises(UserError, match="cannot write .*results"):
            results.add(file="0002.png", mode="t2i", prompt="p")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_copies_for_people_are_no_images_to_ask_about(tmp_path):
    """What was generated may be asked about, what was asked about already is there as the user's own image."""
    PICTURE.save(tmp_path / "0000.png")
    run(tmp_path, 1, mode="t2i")
    run(tmp_path, 1, mode="mmu")
    assert copies_in(tmp_path) == {"0002.png", "grid.png", "grid-0002.png"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_must_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to"):
        ResultFolder(tmp_path)


def document(results: ResultFolder, num_images: int) -> None:
    """A document of a text and so many images, as `inference_mixed.py` writes it."""
    files = [results.save(PICTURE) for _ in range(num_images)]
    results.add(files=files, mode="story")
    results.show_row([("a text", ""), *((PICTURE, "") for _ in files)])


def test_a_line_may_hold_several_images_or_none(tmp_path):
    for number, overwrite in enumerate((False, False, True)):
        results = ResultFolder(tmp_path, overwrite)
        assert len(results.earlier) == 2 * number
        for num_images in (0, 2, 0):
            document(results, num_images)
        results.write_grid()
        lines = [json.loads(line)["files"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        images = [["0000.png", "0001.png"], ["0002.png", "0003.png"]][: 2 if number == 1 else 1]
        assert lines == [files for pair in images for files in ([], pair, [])]
    assert names(tmp_path) == ["0000.png", "0001.png", "grid.png", "results.jsonl"]


def test_rows_of_the_overview_stay_together(tmp_path):
    """As wide as the longest row, and as high as there are rows."""
    sizes = []
    for counts in ((1, 1, 1), (3, 1, 1), (3, 3, 3), (9, 1)):
        results = ResultFolder(tmp_path)
        for count in counts:
            document(results, count)
        sizes.append(Image.open(results.write_grid()).size)
    (two, *_), (four, height), nine = sizes[0], sizes[1], sizes[3]
    assert sizes[1] == sizes[2] and two < four < nine[0] and nine[1] > height * 2 / 3
