"""Folders of class folders, and what their classes are called."""

import json
import random

import pytest

from common.errors import UserError
from training.data.imagenet import ImageFolder

SYNSETS = "n01440764 tench, Tinca tinca\nn02123045 tabby, tabby cat\nn99999999 unused\n"


def write_classes(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / f"{name}_0.JPEG").touch()
        (root / name / "notes.txt").touch()
    return root


def texts(folder) -> dict[str, str]:
    raws = [next(folder.read(index, random.Random(0))) for index in range(len(folder))]
    return {raw["__key__"].split("/")[0]: raw["text"] for raw in raws}


def test_every_image_is_a_sample_and_nothing_else(tmp_path):
    write_classes(tmp_path, "kite", "ice cream")
    (tmp_path / "kite" / "x.png").touch()
    (tmp_path / "readme.jpg").touch()
    folder = ImageFolder(str(tmp_path))
    raws = [next(folder.read(index, random.Random(0))) for index in range(folder.samples)]
    assert [raw["__key__"] for raw in raws] == ["ice cream/ice cream_0.JPEG", "kite/kite_0.JPEG", "kite/x.png"]
    assert raws[0]["image"] == str(tmp_path / "ice cream" / "ice cream_0.JPEG")
    assert texts(folder) == {"kite": "kite", "ice cream": "ice cream"}, "folder names, where there is nothing better"


@pytest.mark.parametrize("place", [".", "train", "Data/CLS-LOC/train"])
@pytest.mark.parametrize("file", ["LOC_synset_mapping.txt", "synset_words.txt"])
def test_classes_are_called_by_the_first_name_of_their_synset(tmp_path, place, file):
    write_classes(tmp_path / place, "n01440764", "n02123045")
    (tmp_path / file).write_text(SYNSETS)
    given = tmp_path if place == "train" else tmp_path / place
    assert texts(ImageFolder(str(given))) == {"n01440764": "tench", "n02123045": "tabby"}


@pytest.mark.parametrize("form", ["txt", "json"])
def test_given_names_override_all_others_and_classes_without_one_are_warned_of(tmp_path, form, caplog):
    write_classes(tmp_path / "train", "n01440764", "n02123045", "kite", "n00000001")
    (tmp_path / "LOC_synset_mapping.txt").write_text(SYNSETS)
    names = {"n02123045": "a cat, striped", "kite": "red kite"}
    lines = "\n".join(f"{folder} {name}" for folder, name in names.items())
    (tmp_path / f"names.{form}").write_text(json.dumps(names) if form == "json" else lines)
    folder = ImageFolder(str(tmp_path), str(tmp_path / f"names.{form}"))
    assert texts(folder) == {"n01440764": "tench", "n00000001": "n00000001"} | names
    assert "1 classes such as n00000001 have no name" in caplog.text and "class_names_path" in caplog.text


@pytest.mark.parametrize("content", [b"n01440764\n", b"[1, 2]", b"\xff"])
def test_a_mapping_that_is_none_is_named(tmp_path, content):
    write_classes(tmp_path / "data", "kite")
    name = "names.json" if content.startswith(b"[") else "names.txt"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} does not give a name for each class folder"):
        ImageFolder(str(tmp_path / "data"), str(tmp_path / name))


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "train" / "kite").mkdir(parents=True)
    with pytest.raises(UserError, match=r"train holds no \.jpeg"):
        ImageFolder(str(tmp_path))


def test_hidden_files_are_passed_over_and_other_images_told(tmp_path, caplog):
    for name in (".ipynb_checkpoints", "__MACOSX", "kite.partial"):
        write_classes(tmp_path, name)
    write_classes(tmp_path, "kite")
    for name in ("._kite_0.JPEG", "b.GIF", "c.cr2", "d.tif", "e.svg", "f.WebP"):
        (tmp_path / "kite" / name).touch()
    folder = ImageFolder(str(tmp_path))
    raws = [next(folder.read(index, random.Random(0))) for index in range(len(folder))]
    assert [raw["__key__"] for raw in raws] == ["kite/f.WebP", "kite/kite_0.JPEG"]
    assert "4 images such as kite/b.GIF are left out" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["names.txt", "names.JSON"])
def test_names_in_any_unicode(tmp_path, encoding, name):
    write_classes(tmp_path / "data", "kite")
    text = json.dumps({"kite": "Milan"}) if name.endswith("JSON") else "kite Milan\r\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert texts(ImageFolder(str(tmp_path / "data"), str(tmp_path / name))) == {"kite": "Milan"}
