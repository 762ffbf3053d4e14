"""Folders of class folders, and what their classes are called."""

import json
import logging
import random

import pytest

from common.errors import UserError
from tests.training.tiny import CAPTIONS, image_bytes, picture
from training.data.imagenet import ImageFolder


def write_classes(root, *names, each: int = 2):
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(each):
            (root / name / f"{name}_{number}.JPEG").write_bytes(image_bytes(picture(CAPTIONS[number]), "JPEG"))
    return root


def texts(folder) -> dict[str, str]:
    raws = [next(folder.read(index, random.Random(0))) for index in range(len(folder))]
    return {raw["__key__"].split("/")[0]: raw["text"] for raw in raws}


def test_every_picture_is_a_sample_and_nothing_else(tmp_path):
    write_classes(tmp_path, "kite", "ice cream")
    (tmp_path / "kite" / "notes.txt").write_text("no picture")
    (tmp_path / "kite" / "x.png").write_bytes(b"")
    (tmp_path / "readme.jpg").write_bytes(b"")
    folder = ImageFolder(str(tmp_path))
    assert folder.samples == len(folder) == 5
    raws = [next(folder.read(index, random.Random(0))) for index in range(5)]
    assert [raw["__key__"] for raw in raws[:2]] == ["ice cream/ice cream_0.JPEG", "ice cream/ice cream_1.JPEG"]
    assert raws[0]["image"] == str(tmp_path / "ice cream" / "ice cream_0.JPEG")
    assert texts(folder) == {"kite": "kite", "ice cream": "ice cream"}, "folder names, where there is nothing better"


@pytest.mark.parametrize("place", [".", "train", "Data/CLS-LOC/train"])
@pytest.mark.parametrize("file", ["LOC_synset_mapping.txt", "synset_words.txt"])
def test_classes_are_called_by_the_first_name_of_their_synset(tmp_path, place, file):
    write_classes(tmp_path / place, "n01440764", "n02123045")
    (tmp_path / file).write_text("n01440764 tench, Tinca tinca\nn02123045 tabby, tabby cat\nn99999999 unused\n")
    given = tmp_path if place == "train" else tmp_path / place
    assert texts(ImageFolder(str(given))) == {"n01440764": "tench", "n02123045": "tabby"}


@pytest.mark.parametrize("form", ["txt", "json"])
def test_given_names_go_over_all_others(tmp_path, form):
    write_classes(tmp_path / "train", "n01440764", "n02123045", "kite")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn02123045 tabby, tabby cat\n")
    names = {"n02123045": "a cat, striped", "kite": "red kite"}
    lines = "\n".join(f"{folder} {name}" for folder, name in names.items())
    (tmp_path / f"names.{form}").write_text(json.dumps(names) if form == "json" else lines)
    folder = ImageFolder(str(tmp_path), str(tmp_path / f"names.{form}"))
    assert texts(folder) == {"n01440764": "tench"} | names


def test_codes_of_classes_as_text_are_warned_of(tmp_path, caplog):
    write_classes(tmp_path, "n01440764")
    with caplog.at_level(logging.WARNING):
        assert texts(ImageFolder(str(tmp_path))) == {"n01440764": "n01440764"}
    assert "1 classes such as n01440764 have no name" in caplog.text and "class_names_path" in caplog.text


@pytest.mark.parametrize("content", ["n01440764\n", "[1, 2]", "\xff"])
def test_a_mapping_that_is_none_is_named(tmp_path, content):
    write_classes(tmp_path / "data", "kite")
    name = "names.json" if content.startswith("[") else "names.txt"
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{name} does not give a name for each class folder"):
        ImageFolder(str(tmp_path / "data"), str(tmp_path / name))


def test_a_folder_without_pictures_is_an_error(tmp_path):
    (tmp_path / "train" / "kite").mkdir(parents=True)
    with pytest.raises(UserError, match=r"train holds no \.jpeg"):
        ImageFolder(str(tmp_path))
