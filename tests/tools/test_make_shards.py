"""Shards out of every form in which people keep images with captions."""

import errno
import io
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from common.errors import UserError
from models.images import ImageOptions
from tests.tools.sets import read_set
from tests.training.tiny import CAPTIONS, image_bytes, picture
from tools.captioned import split_of
from tools.make_shards import checked_image, main
from tools.shard_writing import in_order, write_shard


@pytest.fixture
def pets(tmp_path) -> Path:
    """Twelve images with a text beside each, in two folders."""
    for index, caption in enumerate(CAPTIONS):
        place = tmp_path / "pets" / "ba"[index % 2] / f"pet.{index:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image_bytes(picture(caption)))
        place.with_suffix(".txt").write_text(f" {caption}\n")
    return tmp_path / "pets"


def arguments(source: Path, **settings) -> list[str]:
    values = {"source": source, "output": source.parent / "shards" / "train"} | settings
    return [f"{key}={value}" for key, value in values.items()]


def run(source: Path, **settings) -> tuple[list[dict], dict]:
    main(arguments(source, **settings))
    return read_set(Path(settings.get("output", source.parent / "shards" / "train")))


def texts(samples: list[dict]) -> list[str]:
    return [sample["txt"].decode() for sample in samples]


# ---- every form of source ----


def test_texts_beside_the_images(pets, capsys):
    samples, manifest = run(pets, shard_size=5)
    assert sorted(texts(samples)) == sorted(CAPTIONS) and texts(samples) != sorted(texts(samples))
    assert all(sample["png"] == image_bytes(picture(sample["txt"].decode())) for sample in samples)  # byte for byte
    assert len({sample["__key__"] for sample in samples}) == 12 and not any("json" in sample for sample in samples)
    assert [shard["samples"] for shard in manifest["shards"]] == [5, 5, 2] and manifest["skipped"] == {}
    assert "12 samples in 3 shards" in capsys.readouterr().out
    (pets / "a" / "pet.01.txt").write_text("one\n\ntwo\n")
    assert "one\n\ntwo" in texts(run(pets, overwrite=True)[0])
    assert {"one", "two"} < set(texts(run(pets, txt_lines=True, overwrite=True)[0]))


PLAIN = [{"image": "a/pet.01.png", "text": "one", "n": "0"}, {"image": "b/pet.02.png", "text": "two, too", "n": "1"}]
TABLES = {
    "comma.csv": 'image,text,n\na/pet.01.png,one,0\nb/pet.02.png,"two, too",1\n',
    "tab.tsv": "image\ttext\tn\na/pet.01.png\tone\t0\nb/pet.02.png\ttwo, too\t1\n",
    "pipe.txt": "image| text| n\na/pet.01.png| one| 0\nb/pet.02.png| two, too| 1\n",  # as Flickr30k has it
    "records.json": json.dumps(PLAIN),
    "lines.jsonl": "\n\n".join(map(json.dumps, PLAIN)),
    "files.json": json.dumps({row["image"]: row["text"] for row in PLAIN}),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_form(pets, name):
    table = pets.parent / name
    table.write_text(TABLES[name])
    samples, _ = run(pets, captions=table, shuffle=False, metadata=True)
    assert texts(samples) == ["one", "two, too"] and samples[0]["png"] == (pets / "a/pet.01.png").read_bytes()
    extra = {"file_name": "a/pet.01.png"} if name == "files.json" else {"image": "a/pet.01.png", "n": "0"}
    assert json.loads(samples[0]["json"]) == extra


def test_jsonl_with_lines_that_cannot_be_read(pets):
    lines = ['{"image": "a/pet.01.png", "caption": "one", "id": 7}', "{broken", "[1]", '{"image": 3, "caption": "x"}']
    lines += ['{"image": "a/pet.07.png", "caption": "half \\ud83d"}', '{"image": "a\\u0000b.png", "caption": "x"}']
    lines += ['{"image": "a/pet.03.png", "caption": null}', '{"image": "a/pet.05.png", "caption": 5}', ""]
    lines += ['{"image": "a/pet.01.png", "caption": "another of it"}']
    (pets.parent / "c.jsonl").write_text("\n".join(lines))
    samples, manifest = run(pets, captions=pets.parent / "c.jsonl", metadata=True, shuffle=False)
    assert texts(samples) == ["one", "another of it"] and json.loads(samples[0]["json"])["id"] == 7
    assert manifest["skipped"] == {"malformed_item": 5, "no_caption": 1, "missing_file": 1}


def test_coco_gives_a_sample_for_each_caption_or_one_for_each_image(pets):
    images = [{"id": 10 + index, "file_name": f"a/pet.{index:02d}.png"} for index in (1, 3, 5)]
    notes = [{"image_id": 10 + i, "id": n, "caption": f"{n} of {i} "} for n in range(3) for i in (1, 3)]
    coco = pets.parent / "captions_val.json"
    coco.write_text(json.dumps({"images": images, "annotations": notes}))
    for settings, expected in (
        ({}, [f"{n} of {i}" for i in (1, 3) for n in range(3)]),
        ({"captions_per_image": "first"}, ["0 of 1", "0 of 3"]),
        ({"captions_per_image": "join"}, ["0 of 1 1 of 1 2 of 1", "0 of 3 1 of 3 2 of 3"]),
    ):
        samples, manifest = run(pets, captions=coco, overwrite=True, shuffle=False, **settings)
        assert texts(samples) == expected and manifest["skipped"] == {"no_caption": 1}


def test_an_imagefolder_with_metadata(pets):
    for folder, names in (("a", (1, 3)), ("b", (2,))):
        rows = [{"file_name": f"pet.{i:02d}.png", "text": f"{folder}{i}"} for i in names]
        (pets / folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(texts(run(pets)[0])) == ["a1", "a3", "b2"]  # each relative to its own folder


def test_folders_named_after_their_classes(tmp_path):
    for number, name in enumerate(("n01440764", "kite", "n01440764")):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        picture(CAPTIONS[number]).save(tmp_path / "train" / name / f"{number}.JPEG")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    settings = {"captions": "folders", "metadata": True, "shuffle": False, "output": tmp_path / "shards" / "train"}
    samples, _ = run(tmp_path, **settings)
    assert texts(samples) == ["kite", "tench", "tench"] and "jpg" in samples[0]
    assert json.loads(samples[1]["json"]) == {"file_name": "n01440764/0.JPEG"}


def hub_data_set(folder: Path, rows: list[dict], name: str = "train-00000-of-00001") -> Path:
    for place in ("data", ".cache"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / ".cache" / "other.parquet").write_bytes(b"hidden")
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=4)
    return folder


def hub_rows(captions=CAPTIONS) -> list[dict]:
    return [
        {"image": {"bytes": image_bytes(picture(text)), "path": None}, "text": text, "label": index}
        for index, text in enumerate(captions)
    ]


def test_a_hub_data_set_in_parquet(tmp_path):
    folder = hub_data_set(tmp_path / "hub", hub_rows())
    samples, _ = run(folder, metadata=True)
    assert sorted(texts(samples)) == sorted(CAPTIONS) and texts(samples)[:4] != CAPTIONS[:4]
    for sample, text in zip(samples, texts(samples), strict=True):
        assert sample["png"] == image_bytes(picture(text)) and CAPTIONS[json.loads(sample["json"])["label"]] == text
    assert texts(run(folder, metadata=True, shuffle=False, overwrite=True)[0]) == CAPTIONS
    file = folder / "data/train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file), file, compression="none", use_dictionary=False)
    file.write_bytes(file.read_bytes().replace(CAPTIONS[1].encode(), b"\xff" * len(CAPTIONS[1])))  # no UTF-8
    samples, manifest = run(folder, overwrite=True)
    assert sorted(texts(samples)) == sorted(set(CAPTIONS) - {CAPTIONS[1]})
    assert manifest["skipped"] == {"malformed_item": 1}


def test_parquet_with_plain_bytes_lists_of_captions_and_paths(tmp_path):
    data = image_bytes(picture(CAPTIONS[0]))
    rows = [{"photo": data, "says": ["one", "two"]}, {"photo": None, "says": ["x"]}]
    samples, manifest = run(hub_data_set(tmp_path / "bytes", rows), caption_column="says", shuffle=False)
    assert texts(samples) == ["one", "two"] and manifest["skipped"] == {"malformed_item": 1}
    folder = hub_data_set(tmp_path / "paths", [{"image": {"bytes": None, "path": "x.png"}, "caption": "by path"}])
    (folder / "data" / "x.png").write_bytes(data)
    assert texts(run(folder, overwrite=True)[0]) == ["by path"]


def test_a_hub_data_set_of_several_splits_wants_one_named(tmp_path):
    folder = hub_data_set(tmp_path / "hub", hub_rows(CAPTIONS[:3]))
    hub_data_set(folder, hub_rows(CAPTIONS[3:5]), "validation-00000-of-00001")
    with pytest.raises(UserError, match="holds the splits train, validation; choose one"):
        run(folder)
    with pytest.raises(UserError, match="split=test: source=.* has train, validation"):
        run(folder, split="test")
    assert sorted(texts(run(folder, split="validation")[0])) == sorted(CAPTIONS[3:5])
    assert split_of("val/a/metadata.csv") == "validation" and split_of("trains/values.parquet") == ""
    assert split_of("data/restval-00001-of-00002.parquet") == "restval"


# ---- bad data ----


def test_what_cannot_be_read_is_left_out_counted_and_told(pets, capsys):
    bad = {"01.png": (pets / "a" / "pet.01.png").read_bytes()[:-30], "03.png": b"", "05.txt": b" \n", "09.txt": b"\xff"}
    for name, content in bad.items():
        (pets / "a" / f"pet.{name}").write_bytes(content)
    (pets / "a" / "pet.07.txt").unlink()
    (pets / "a" / "pet.11.png").unlink()
    (pets / "a" / "pet.11.png").symlink_to("nowhere.png")
    samples, manifest = run(pets)
    kinds = {"unreadable_image": 2, "empty_text": 1, "no_caption": 1, "malformed_item": 1, "missing_file": 1}
    assert len(samples) == 6 and manifest["skipped"] == kinds
    told = capsys.readouterr().out
    assert "skipped 6 of 12 samples (50.0%)" in told and "no pet.07.txt beside it" in told and "pet.11.png" in told
    for file in pets.glob("b/*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="nothing is left to write: skipped 12 of 12 .* 8 unreadable_image"):
        main(arguments(pets, output=pets.parent / "empty" / "train"))
    assert not list((pets.parent / "empty").iterdir())


@pytest.mark.parametrize(("form", "suffix"), [("JPEG", "jpg"), ("WEBP", "webp"), ("PNG", "png"), ("BMP", "png")])
def test_images_keep_their_bytes_unless_no_flow_reads_them(form, suffix):
    data = image_bytes(picture(CAPTIONS[0]), form)
    for resize in (0, 32):
        member, kept, is_rotated = checked_image(data, resize, 95)
        assert member == suffix and (form == "BMP" or kept == data) and not is_rotated
    if form == "BMP":
        assert Image.open(io.BytesIO(kept)).tobytes() == picture(CAPTIONS[0]).tobytes()


@pytest.mark.parametrize(("size", "form", "new"), [((64, 100), "JPEG", (16, 25)), ((90, 40), "PNG", (36, 16))])
def test_larger_images_are_scaled_in_their_own_format(size, form, new):
    data = image_bytes(picture(CAPTIONS[0]).resize(size), form)
    small = Image.open(io.BytesIO(checked_image(data, 16, 90)[1]))
    assert small.size == new and small.format == form
    if form == "PNG":
        assert small.tobytes() == Image.open(io.BytesIO(data)).resize(new, Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_what_is_written_anew_can_still_be_turned(form):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (80, 40)).save(buffer, form, exif=exif)
    for choice, as_is in (("ignore", form != "TIFF"), ("apply", False)):  # decoders turn TIFF by themselves
        _, data, is_rotated = checked_image(buffer.getvalue(), 20, 95, options=ImageOptions(exif=choice))
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == ((40, 20) if as_is else (20, 40))
            assert image.getexif().get(0x0112, 1) == (6 if as_is else 1)
        assert is_rotated == as_is


def files(folder: Path, **content: str | bytes) -> Path:
    """A folder of files; `__` in a name stands for a dot, ``//`` for a folder."""
    for name, data in content.items():
        place = folder / name.replace("__", ".").replace("//", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


DATA = image_bytes(picture(CAPTIONS[0]))


def test_what_systems_and_killed_commands_leave_is_no_data(pets, capsys):
    (pets / "a" / "loop").symlink_to(pets)  # a folder is visited once
    (pets / "itself").symlink_to("itself")
    for place in ("._pet.01", ".ipynb_checkpoints/pet.01", "__MACOSX/pet.01", "x.partial/pet.01"):
        for suffix in (".png", ".txt"):
            (pets / "a" / place).with_suffix(suffix).parent.mkdir(exist_ok=True)
            (pets / "a" / (place + suffix)).write_bytes(b"no data")
    samples, manifest = run(pets)
    assert sorted(texts(samples)) == sorted(CAPTIONS) and manifest["skipped"] == {}
    (pets.parent / "linked").mkdir()
    (pets.parent / "linked" / "b").symlink_to(pets / "b")  # other links are followed
    assert len(run(pets.parent / "linked", output=pets.parent / "other" / "train")[0]) == 6


def test_class_folders_without_the_hidden_ones(tmp_path):
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"):
        files(tmp_path / "in" / name, **{"0__png": DATA, "1__GIF": image_bytes(picture(CAPTIONS[1]), "GIF")})
        files(tmp_path / "in" / name, **{".__0__png": b"\0", "notes__txt": "x"})
    samples, manifest = run(tmp_path / "in", captions="folders", shuffle=False, output=tmp_path / "out" / "train")
    assert texts(samples) == ["cat", "cat", "dog", "dog"] and manifest["skipped"] == {}
    assert all("png" in sample for sample in samples)


def test_texts_in_capitals_marked_or_wide_and_other_formats(tmp_path):
    names = {
        "a__PNG": DATA,
        "a__TXT": "\ufeffa",
        "b__Jpg": image_bytes(picture(CAPTIONS[0]), "JPEG"),
        "b__Txt": "b",
        "B__png": DATA,
        "g__png": DATA,
        "g__TXT": "another's",
        "g__txt": "g",
    }
    wide = {"c__tif": image_bytes(picture(CAPTIONS[0]), "TIFF"), "c__txt": "ç".encode("utf-16")}
    odd = {"d__heic": b"?", "d__txt": "d", "e__xyz": DATA, "e__txt": "e", "f__png": DATA, "f__txt": b"\xe9"}
    samples, manifest = run(files(tmp_path / "in", **names, **wide, **odd), shuffle=False)
    assert texts(samples) == ["a", "b", "ç", "g"]
    assert manifest["skipped"] == {"unreadable_image": 1, "missing_file": 2, "malformed_item": 1, "no_caption": 1}


@pytest.mark.parametrize(
    ("name", "content", "expected", "skipped"),
    [
        ("t.CSV", "\ufeffimage,text\r\na/pet.01.png,one, two\r\n", ["one, two"], {}),
        ("t.csv", "image,text,\na/pet.01.png,one,\nb/pet.02.png,two\n", ["one", "two"], {}),
        ("t.csv", "Image,Caption\na/pet.01.png,one\n", ["one"], {}),
        ("t.csv", "image,text\na/pet.01.png,one\nb/pet.02.png\n", ["one"], {"malformed_item": 1}),
        ("t.csv", "image,text\na/pet.01.png,one\na/pet.01.png,\n", ["one"], {"empty_text": 1}),
        ("t.csv", "image,text\na/pet.01.png,ä\n".encode("utf-16"), ["ä"], {}),
        ("t.tsv", 'image\ttext\na/pet.01.png\t"one\nb/pet.02.png\ttwo"\n', ['"one', 'two"'], {}),
        ("t.jsonl", "[" * 50_000 + '\n{"image": "a/pet.01.png", "text": "\\ufeffone"}', ["one"], {"malformed_item": 1}),
        ("t.jsonl", '{"image": "a/pet.01.png", "text": "ä"}\n'.encode("utf-16"), ["ä"], {}),
        ("t.jsonl", '{"image": "a/pet.01.png", "text": ["x", null]}', None, {"malformed_item": 1}),
        ("t.JSON", '[{"image": "a/pet.01.png", "text": "one"}, 7]', ["one"], {"malformed_item": 1}),
        ("t.csv", "image,text\n/dev/zero,one\nb/pet.02.png,two\n", ["two"], {"missing_file": 1}),
    ],
)
def test_tables_as_people_have_them(pets, name, content, expected, skipped):
    files(pets.parent, **{name.replace(".", "__"): content})
    if expected is None:
        with pytest.raises(UserError, match="nothing is left to write: skipped 1 of 1"):
            run(pets, captions=pets.parent / name)
        return
    samples, manifest = run(pets, captions=pets.parent / name, shuffle=False)
    assert texts(samples) == expected and manifest["skipped"] == skipped


def test_what_coco_lacks_is_counted_one_by_one(pets):
    images = [{"id": 1, "file_name": "a/pet.01.png"}, {"id": 2, "file_name": "b/pet.02.png"}, {"id": 3}, 5]
    notes = [{"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": " "}, {"image_id": 9, "caption": "lost"}]
    notes += [{"image_id": 2, "caption": None}, {"image_id": [1], "caption": "x"}, 7]
    (pets.parent / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    samples, manifest = run(pets, captions=pets.parent / "c.json")
    assert texts(samples) == ["one"] and manifest["skipped"] == {"malformed_item": 6, "empty_text": 1}


def test_images_of_sixteen_bits_are_scaled_and_rotations_are_told(tmp_path, capsys):
    ramp = Image.frombytes("I;16", (256, 2), b"".join((257 * x).to_bytes(2, "little") for x in range(256)) * 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = io.BytesIO()
    Image.new("RGB", (8, 4)).save(photo, "JPEG", exif=exif)
    source = files(tmp_path / "in", a__png=image_bytes(ramp), a__txt="a", b__jpg=photo.getvalue(), b__txt="b")
    for exif, size in (("ignore", (8, 4)), ("apply", (4, 8))):
        samples, _ = run(source, shuffle=False, overwrite=True, **{"image.exif": exif})
        told = "1 images carry a rotation, ignored as published" in capsys.readouterr().out
        image = Image.open(io.BytesIO(samples[0]["png"]))
        assert [image.convert("L").getpixel((x, 0)) for x in (0, 100, 255)] == [0, 100, 255]
        assert Image.open(io.BytesIO(samples[1]["jpg"])).size == size and told == (exif == "ignore")
        assert (samples[1]["jpg"] == photo.getvalue()) == (exif == "ignore")


def test_names_that_are_no_utf8(tmp_path):
    folder = os.fsencode(tmp_path / "in") + b"\xe9"
    os.mkdir(folder)
    for name, data in ((b"caf\xe9.png", DATA), (b"caf\xe9.txt", b"words"), (b"x\xe9.png", DATA)):
        with open(folder + b"/" + name, "wb") as file:
            file.write(data)
    source = Path(os.fsdecode(folder))
    samples, manifest = run(source, metadata=True, output=tmp_path / "out" / "train")
    assert texts(samples) == ["words"] and manifest["settings"]["source"].endswith("in\\xe9")
    table = pyarrow.Table.from_pylist([{"image": DATA, "text": "of parquet"}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "hub").mkdir()
    os.rename(tmp_path / "x.parquet", os.fsencode(tmp_path / "hub") + b"/\xe9.parquet")
    assert texts(run(tmp_path / "hub", output=tmp_path / "out2" / "train")[0]) == ["of parquet"]


# ---- whole or absent, the same again ----


def test_the_same_settings_write_the_same_bytes_and_others_want_to_be_told(pets):
    _, manifest = run(pets, num_workers=1)
    assert run(pets, num_workers=5)[1] == manifest
    other = run(pets, seed=1, output=pets.parent / "other" / "train")[1]
    assert [shard["sha256"] for shard in other["shards"]] != [shard["sha256"] for shard in manifest["shards"]]
    with pytest.raises(UserError, match=r"train-manifest.json belongs to another data set \(shard_size=1000\)"):
        run(pets, shard_size=5)
    assert len(run(pets, shard_size=5, overwrite=True)[1]["shards"]) == 3
    (pets.parent / "shards" / "train-manifest.json").unlink()
    with pytest.raises(UserError, match="train-000000.tar is there already, without a manifest"):
        run(pets, shard_size=5)
    with pytest.raises(UserError, match="choose another output, or move it away"):  # whose it is nobody knows
        run(pets, overwrite=True)


ENTRY = {"file": "train-000000.tar", "samples": 1, "sha256": ""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train-000000__tar": "theirs"}, "000000.tar is there already, without a manifest that lists it"),
        ({"train-000000__tar": "theirs", "train-manifest__json": '{"a": 1}'}, "json is no manifest of shards"),
        ({"train-manifest__json": "[" * 50_000}, "json is no valid JSON"),
        ({"a__png": "x", "train-manifest__json": '{"shards": [{"file": "a.png", "sha256": ""}]}'}, "is no manifest of"),
        *(
            ({"train-manifest__json": json.dumps({"shards": [ENTRY | bad]})}, "json is no manifest of shards")
            for bad in ({"file": "../pets/a"}, {"file": ".."}, {"file": ""}, {"samples": "12"}, {"samples": None})
        ),
    ],
)
def test_what_somebody_else_wrote_is_not_replaced_even_if_told(pets, content, message):
    folder = files(pets.parent / "shards", **content)
    with pytest.raises(UserError, match=message):
        run(pets, overwrite=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        name.replace("__", "."): data for name, data in content.items()
    }


def test_shards_beside_our_own_are_not_replaced(pets):
    run(pets)
    (pets.parent / "shards" / "train-000007.tar").write_bytes(b"theirs")
    with pytest.raises(UserError, match="train-000007.tar is there already, without a manifest that lists it"):
        run(pets, shard_size=5, overwrite=True)
    assert (pets.parent / "shards" / "train-000007.tar").read_bytes() == b"theirs"


def test_a_command_that_was_killed_while_it_published_can_be_repeated(pets, monkeypatch):
    run(pets)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(pets, shard_size=5, overwrite=True)
    assert len(run(pets, shard_size=5, overwrite=True)[1]["shards"]) == 3


def test_an_existing_set_survives_a_run_that_fails(pets):
    _, manifest = run(pets)
    hub = hub_data_set(pets.parent / "hub", hub_rows())
    file = hub / "data" / "train-00000-of-00001.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:200] + bytes(1000) + data[1200:])  # inside a row group; the footer is whole
    with pytest.raises(UserError, match="row group ., is damaged"):
        run(hub, output=pets.parent / "shards" / "train", overwrite=True)
    assert run(pets)[1] == manifest


def test_a_full_disk_is_told_in_one_line_and_leaves_no_shard(tmp_path):
    def samples():
        yield {"__key__": "0", "txt": b"x"}
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*a-000000\.tar \(No space left on device\)"):
        write_shard(tmp_path / "a-000000.tar", samples())
    assert not (tmp_path / "a-000000.tar").exists()


def test_threads_keep_the_order_and_do_not_run_ahead():
    taken = []
    results = in_order(lambda number: number**2, (taken.append(n) or n for n in range(40)), threads=3, ahead=6)
    assert next(results) == 0 and len(taken) <= 7
    assert list(results) == [number**2 for number in range(1, 40)]


# ---- mistakes ----

FILES = {
    "bare/x.png": "",
    "c.csv": "image,number\nx.png,1\n",
    "c.json": "{",
    "number.json": "7",
    "instances.json": '{"images": [{"id": 1, "file_name": "x.png"}], "annotations": [{"image_id": 1}]}',
    "lfs/train.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "arrow/data-00000-of-00001.arrow": "",
    "empty/notes.md": "",
    "empty.csv": "\n",
    "header.csv": "image,caption\n",
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "none"}, "none is no folder that exists"),
        ({"source": "bare"}, "it holds 1 images: put a .txt beside each, .* or take their folders with captions=fold"),
        ({"source": "empty"}, "it holds neither images with a .txt beside them"),
        ({"source": "arrow"}, "saved with save_to_disk"),
        ({"source": "lfs"}, "pointer of Git LFS: run `git lfs pull`"),
        ({"source": "hub", "caption_column": "label"}, "column 'label' holds int64, not text"),
        ({"source": "hub", "image_column": "photo"}, "no column 'photo'; its columns are image, text, label"),
        ({"captions": "none.csv"}, "none.csv does not exist"),
        ({"captions": "lfs/train.parquet"}, "must be a file of .csv"),
        ({"captions": "c.csv"}, "no column 'caption' or .*; its columns are image, number; name one by caption_c"),
        ({"captions": "c.csv", "caption_column": "says"}, "no column 'says'"),
        ({"captions": "c.json"}, "no valid JSON"),
        ({"captions": "fifo.csv"}, "captions=fifo.csv is no regular file"),
        ({"captions": "empty.csv"}, "captions=empty.csv is empty"),
        ({"captions": "header.csv"}, "nothing is left to write: there is not a single image"),
        ({"source": "fifo.csv"}, "fifo.csv is no folder that exists"),
        ({"num_workers": 10**9}, "num_workers is 1000000000; it must be from 1 to 1024"),
        ({"captions": "number.json"}, "holds neither COCO captions nor a list of records"),
        ({"captions": "instances.json"}, r"lacks captions .*take COCO's captions_\*\.json"),
        ({"output": "new/"}, "is a folder; add how the shards' names begin"),
        ({"output": "c.csv/train"}, "cannot write c.csv"),
        (
            {"captions_per_image": "all", "resize": -1, "shard_size": 0, "quality": 0},
            "captions_per_image is 'all'; .*resize is -1; .*quality is 0; .*shard_size is 0; it must be 1 or more",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, settings, message):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    os.mkfifo(tmp_path / "fifo.csv")
    hub_data_set(tmp_path / "hub", hub_rows(CAPTIONS[:1]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main([f"{key}={value}" for key, value in ({"source": "hub", "output": "shards/train"} | settings).items()])
    assert not list(tmp_path.glob("shards/*"))
