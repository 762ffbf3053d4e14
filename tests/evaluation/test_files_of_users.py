"""What people's files look like, which of them an evaluation needs, and what it must not overwrite."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from tests.evaluation.official import MME, WRITERS, noise, save_image, write_text

ANSWERS = {"201": "table", "202": "yes", "203": "left"}
WRITTEN_FOR = {"emoji_naming": "emoji"} | {name: name for name in WRITERS if name != "emoji"}


def asked(evaluation, task: str) -> list[tuple]:
    """All that a task reads."""
    items = evaluation.prepared(task, "coco_scores=clip", "reconstruction_fid=false").items
    images = [item.open_image().tobytes() if item.open_image else b"" for item in items]
    return [
        (item.key, item.prompt, item.image, item.expected, image) for item, image in zip(items, images, strict=True)
    ]


def add_hidden_files(root: Path) -> None:
    """What a Mac, Jupyter and killed commands leave beside every file and in every folder."""
    for file in [path for path in root.rglob("*") if path.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")
        file.with_name(f"{file.name}.partial").write_bytes(b"cut off")
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        for hidden in (".ipynb_checkpoints", "__MACOSX"):
            for file in [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")][:1]:
                (folder / hidden).mkdir()
                shutil.copy(file, folder / hidden / file.name)


@pytest.mark.parametrize("task", WRITTEN_FOR)
def test_hidden_files_are_passed_over(own, task):
    WRITERS[WRITTEN_FOR[task]](own.root)
    before = asked(own, task)
    add_hidden_files(own.root)
    assert asked(own, task) == before


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("task", ["pope", "mme", "vqav2", "gqa", "flickr30k", "geneval", "coco", "emoji_naming"])
def test_marks_and_line_ends_of_windows(own, task, encoding):
    WRITERS[WRITTEN_FOR[task]](own.root)
    before = asked(own, task)
    for file in [path for path in own.root.rglob("*") if path.suffix in (".json", ".jsonl", ".txt")]:
        if "clip" not in file.parts:
            file.write_bytes(file.read_text().replace("\n", "\r\n").encode(encoding))
    assert asked(own, task) == before


def test_upper_case_suffixes(own):
    WRITERS["mme"](own.root)
    before = asked(own, "mme")
    for file in [path for path in (own.root / MME / "color").iterdir() if path.is_file()]:
        file.rename(file.with_suffix(file.suffix.upper()))
    assert [row[:2] for row in asked(own, "mme")] == [row[:2] for row in before]


def test_names_that_are_no_utf_8(own):
    folder = own.root / "images"
    save_image(folder / "a.png", 9)
    (folder / "a.png").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    own.run("reconstruction", "reconstruction_fid=false", "batch_size=1")
    (line,) = own.lines("reconstruction/predictions.jsonl")
    assert line["image"] == "caf\\xe9.png"


@pytest.mark.slow
def test_reconstruction_reads_no_data_root(own):
    """Neither does it read what it wrote itself."""
    save_image(own.root / "images/a.png", 9)
    own = replace(own, folder=own.root / "images/out")
    for _ in range(2):
        found = own.run("reconstruction", "reconstruction_fid=false", "data_root=nowhere")
        assert found["reconstruction"]["items"] == 1
    own.refuses(
        "data_root=nowhere does not exist", "reconstruction,gqa", "reconstruction_fid=false", "data_root=nowhere"
    )


@pytest.mark.parametrize("task", ["pope", "vqav2", "gqa", "flickr30k", "emoji_naming"])
def test_only_the_images_of_the_items_that_are_asked_are_needed(own, task):
    WRITERS[WRITTEN_FOR[task]](own.root)
    first = own.prepared(task, "max_items=1").items[0]
    for file in own.root.rglob("*"):
        if file.suffix in (".jpg", ".png") and file.name != Path(first.image).name:
            file.unlink()
    assert own.prepared(task, "max_items=1").items[0].open_image()
    with pytest.raises(UserError, match="images are missing, the first is"):
        own.prepared(task)


def test_a_comparison_reads_nothing_but_the_two_results(evaluation):
    """Neither data nor networks that were needed to ask and to judge."""
    evaluation.answer("gqa", ANSWERS)
    given = [f"compare={evaluation.folder},{evaluation.folder}", "data_root=nowhere", "fid_features=nowhere.pt"]
    with pytest.raises(UserError, match="has no coco, only gqa"):
        evaluation.run("coco", *given)
    with pytest.raises(UserError, match="has no geneval"):
        evaluation.run("geneval", *given, "geneval_repository=nowhere")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "compare: nowhere holds no results.json of an evaluation, and as a checkpoint: .*does not exist"),
        ("images", "images holds neither an evaluation's results.json nor a checkpoint's config.json"),
    ],
)
def test_comparing_what_is_no_evaluation(evaluation, name, message):
    folder = evaluation.root / name if name == "images" else name
    evaluation.refuses(message, "gqa", f"compare={folder},{folder}")
    assert not evaluation.folder.exists()


@pytest.mark.parametrize(
    "text", ['{"tasks": 1}', '{"tasks": {"gqa": 1}}', '{"tasks": {"gqa": {"settings": {}}}}', "[" * 100_000, "\0", "[]"]
)
def test_comparing_foreign_results(evaluation, tmp_path, text):
    write_text(tmp_path / "results.json", text)
    evaluation.refuses("results.json.*(is no valid JSON|expected)", "gqa", f"compare={tmp_path},{tmp_path}")


@pytest.mark.parametrize(
    "name",
    [
        "results.json",
        "results.md",
        "metrics.jsonl",
        "gqa/settings.json",
        "gqa/answers-000.jsonl",
        "gqa/predictions.jsonl",
        "gqa/counts.json",
        "gqa/best_worst.png",
        "geneval/images/00000/samples/0002.png",
        "geneval/images/00001/metadata.jsonl",
        "reconstruction/predictions.jsonl",
    ],
)
def test_files_of_others_are_not_overwritten(evaluation, monkeypatch, name):
    """It is said before any weights are read."""
    monkeypatch.setattr("models.ShowoPipeline.from_config", None)
    write_text(evaluation.folder / name, "mine")
    evaluation.refuses(f"{name} is there and was not written by", "gqa,geneval,reconstruction")
    assert evaluation.text(name) == "mine"


def test_what_lies_beside_the_submission_stays(evaluation):
    evaluation.answer("gqa", ANSWERS)
    write_text(evaluation.folder / "gqa/submission/notes.txt", "mine")
    evaluation.run("gqa")
    assert evaluation.text("gqa/submission/notes.txt") == "mine"
    write_text(evaluation.folder / "compare.md", "mine")
    both = f"compare={evaluation.folder},{evaluation.folder}"
    evaluation.refuses("compare.md is there and was not written by", "gqa", both)


def test_copied_results_can_be_gone_on_with(evaluation, tmp_path):
    """Times of files change when they are copied."""
    evaluation.answer("gqa", ANSWERS)
    shutil.copytree(evaluation.folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert replace(evaluation, folder=tmp_path / "copy").run("gqa")["gqa"]["items"] == 3


def test_a_full_disk_leaves_what_was_there(evaluation, monkeypatch):
    evaluation.answer("gqa", ANSWERS)
    before = {path: path.read_bytes() for path in evaluation.folder.rglob("*.*") if path.is_file()}

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "replace", full)
    evaluation.refuses(r"cannot write .*settings.json \(No space left on device\)", "gqa")
    monkeypatch.undo()
    after = {path: path.read_bytes() for path in evaluation.folder.rglob("*.*") if path.is_file()}
    assert {path: after[path] for path in before} == before and not list(evaluation.folder.rglob("*.partial"))


def test_pipes_are_no_files(own):
    WRITERS["gqa"](own.root)
    file = own.root / "gqa/testdev_balanced_questions.json"
    file.unlink()
    os.mkfifo(file)
    own.refuses("testdev_balanced_questions.json .* is no regular file", "gqa")
    os.rename(file, own.root / "gqa/images/n1.jpg")
    shutil.copy(own.root / "gqa/images/n2.jpg", own.root / "n2.jpg")
    WRITERS["gqa"](own.root.parent / "other")
    shutil.copy(own.root.parent / "other/gqa/testdev_balanced_questions.json", file)
    own.refuses("1 of 2 images are missing, the first is .*n1.jpg", "gqa")


@pytest.mark.parametrize("codes", [np.array([0, 99]), np.array([-1]), np.array([0.5]), np.array([{}]), b"x"])
def test_damaged_codes_of_a_reconstruction(tmp_path, codes):
    from evaluation.tasks.reconstruction import read_codes

    if isinstance(codes, bytes):
        (tmp_path / "a.npy").write_bytes(codes)
    else:
        np.save(tmp_path / "a.npy", codes)
    with pytest.raises(UserError, match="a.npy is damaged; remove"):
        read_codes(tmp_path / "a.npy", 64)


def test_transparent_images(own):
    """They lie on `image.background`, which answers then depend on."""
    WRITERS["gqa"](own.root)
    image = noise(0).convert("RGBA")
    image.putalpha(0)
    image.save(own.root / "gqa/images/n1.png")
    (own.root / "gqa/images/n1.png").rename(own.root / "gqa/images/n1.jpg")
    for given, colour in (("image.background=white", 255), ("image.background=black", 0)):
        run = own.prepared("gqa", given)
        assert run.items[0].open_image().getextrema() == ((colour, colour),) * 3
        assert run.store.settings.get("image.background") == (None if colour else "black")


def test_answers_may_be_as_long_as_in_the_benchmarks_loaders(evaluation):
    found = {
        task: evaluation.prepared(task, "max_new_tokens=null").store.settings["max_new_tokens"]
        for task in ("pope", "mme", "vqav2", "gqa", "mmmu", "flickr30k")
    }
    assert found.pop("flickr30k") == 64 and set(found.values()) == {128}


def test_mme_judges_the_text_of_its_submission(evaluation):
    """Line breaks are joined before the first four characters are looked at."""
    keys = [item.key for item in evaluation.prepared("mme").items]
    evaluation.answer("mme", dict.fromkeys(keys, "a\n\n no"))
    assert {line["parsed"] for line in evaluation.lines("mme/predictions.jsonl")} == {"no"}
    assert evaluation.text("mme/submission/color.txt").splitlines()[0].endswith("\ta no")


@pytest.mark.slow
def test_rotations_are_told_once(own, capsys):
    """Of each image, however many questions ask about it; what is turned is not told."""
    WRITERS["gqa"](own.root)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(1).save(own.root / "gqa/images/n1.jpg", exif=exif)
    own.run("gqa", "batch_size=1")
    assert capsys.readouterr().out.count("gqa: 1 image carries a rotation (EXIF), ignored; image.exif=apply") == 1
    own.inside("turned").run("gqa", "image.exif=apply")
    assert "(EXIF)" not in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["bootstrap_samples=100000000000", "fid_size=100000", "max_new_tokens=99999999999"])
def test_numbers_beyond_reason(evaluation, setting):
    evaluation.refuses(f"{setting.partition('=')[0]} is .*; it must be", "gqa", setting)


def test_folders_that_are_files(evaluation, tmp_path):
    write_text(tmp_path / "file", "")
    evaluation.refuses("data_root=.*file is a file; give a folder", "gqa", f"data_root={tmp_path}/file")
    given = f"reconstruction_images={tmp_path}/file"
    evaluation.refuses("reconstruction_images=.*file is a file; give a folder", "reconstruction", given)


@pytest.mark.slow
def test_images_that_are_gone_are_made_again(own):
    WRITERS["reconstruction"](own.root)
    given = ("reconstruction", "reconstruction_fid=false", "batch_size=1")
    before = own.run(*given)
    for number, suffix in enumerate((".png", ".npy")):
        sorted((own.folder / "reconstruction/images").glob(f"*{suffix}"))[number].unlink()
    assert own.run(*given) == before


def test_a_question_beyond_the_models_positions(own):
    WRITERS["gqa"](own.root)
    file = own.root / "gqa/testdev_balanced_questions.json"
    file.write_text(file.read_text().replace("What 202?", "a " * 20_000))
    own.refuses("take .* positions, .* is more than the .* that the model knows", "gqa")
