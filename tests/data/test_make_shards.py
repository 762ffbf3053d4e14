"""Shards out of every form in which people keep pictures with captions."""

import csv
import errno
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from common.errors import UserError
from tests.training.tiny import CAPTIONS, image_bytes, picture
from training.data.captioned import split_of
from training.data.make_shards import checked_image, main
from training.data.shard_writing import in_order, sha256, write_shard
from training.data.shards import read_shard


@pytest.fixture
def pets(tmp_path) -> Path:
    """Twelve pictures with a text beside each, in two folders."""
    for index, caption in enumerate(CAPTIONS):
        place = tmp_path / "pets" / ("a" if index % 2 else "b") / f"pet.{index:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image_bytes(picture(caption)))
        place.with_name(f"pet.{index:02d}.txt").write_text(f" {caption}\n")
    return tmp_path / "pets"


def arguments(source: Path, **settings) -> list[str]:
    values = {"source": source, "output": source.parent / "shards" / "train"} | settings
    return [f"{key}={value}" for key, value in values.items()]


def run(source: Path, **settings) -> tuple[list[dict], dict]:
    """The samples in their order, and the manifest, which must tell the truth about the shards."""
    main(arguments(source, **settings))
    prefix = Path(settings.get("output", source.parent / "shards" / "train"))
    manifest = json.loads(prefix.with_name(f"{prefix.name}-manifest.json").read_text())
    shards = sorted(prefix.parent.glob(f"{prefix.name}-*.tar"))
    samples = [list(read_shard(str(shard))) for shard in shards]
    expected = [
        {"file": shard.name, "samples": len(content), "sha256": sha256(shard)}
        for shard, content in zip(shards, samples, strict=True)
    ]
    assert manifest["shards"] == expected and manifest["samples"] == sum(map(len, samples))
    assert not list(prefix.parent.glob(".*"))  # nothing is left aside
    return [sample for content in samples for sample in content], manifest


def texts(samples: list[dict]) -> list[str]:
    return [sample["txt"].decode() for sample in samples]


# ---- every form of source ----


def test_texts_beside_the_pictures(pets, capsys):
    samples, manifest = run(pets, shard_size=5)
    assert sorted(texts(samples)) == sorted(CAPTIONS) and texts(samples) != sorted(texts(samples))
    assert all(sample["png"] == image_bytes(picture(sample["txt"].decode())) for sample in samples)  # byte for byte
    assert len({sample["__key__"] for sample in samples}) == 12 and not any("json" in sample for sample in samples)
    assert [shard["samples"] for shard in manifest["shards"]] == [5, 5, 2] and manifest["skipped"] == {}
    assert "12 samples in 3 shards" in capsys.readouterr().out


def test_lines_of_a_text_can_be_captions_of_their_own(pets):
    (pets / "a" / "pet.01.txt").write_text("one\n\ntwo\n")
    assert "one\n\ntwo" in texts(run(pets)[0])
    assert {"one", "two"} < set(texts(run(pets, txt_lines=True, overwrite=True)[0]))


@pytest.mark.parametrize("delimiter", [",", "|", "\t"])
def test_a_csv_whose_rows_repeat_a_picture(pets, delimiter):
    with (pets.parent / "captions.txt").open("w", newline="") as file:  # as Flickr8k and Flickr30k have it
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["image_name", "number", "comment"])
        writer.writerows([f"a/pet.{i:02d}.png", n, f"{n}, of {i}"] for i in (1, 3) for n in range(2))
    samples, _ = run(pets, captions=pets.parent / "captions.txt", shuffle=False, metadata=True)
    assert texts(samples) == ["0, of 1", "1, of 1", "0, of 3", "1, of 3"]
    assert samples[0]["png"] == samples[1]["png"] != samples[2]["png"]
    assert json.loads(samples[0]["json"]) == {"image_name": "a/pet.01.png", "number": "0"}


def test_jsonl_with_lines_that_cannot_be_read(pets):
    lines = ['{"image": "a/pet.01.png", "caption": "one", "id": 7}', "{broken", "[1]", '{"image": 3, "caption": "x"}']
    lines += ['{"image": "a/pet.07.png", "caption": "half \\ud83d"}', '{"image": "a\\u0000b.png", "caption": "x"}']
    lines += ['{"image": "a/pet.03.png", "caption": null}', '{"image": "a/pet.05.png", "caption": 5}', ""]
    (pets.parent / "c.jsonl").write_text("\n".join(lines))
    samples, manifest = run(pets, captions=pets.parent / "c.jsonl", metadata=True)
    assert texts(samples) == ["one"] and json.loads(samples[0]["json"])["id"] == 7
    assert manifest["skipped"] == {"malformed_item": 5, "no_caption": 1, "missing_file": 1}


@pytest.mark.parametrize("content", [[{"path": "a/pet.01.png", "text": "one"}], {"a/pet.01.png": "one"}])
def test_json_records_and_json_that_maps_files(pets, content):
    (pets.parent / "c.json").write_text(json.dumps(content))
    assert texts(run(pets, captions=pets.parent / "c.json")[0]) == ["one"]


@pytest.fixture
def coco(pets) -> Path:
    images = [{"id": 10 + index, "file_name": f"a/pet.{index:02d}.png"} for index in (1, 3, 5)]
    notes = [{"image_id": 10 + i, "id": n, "caption": f"{n} of {i} "} for n in range(5) for i in (1, 3)]
    (pets.parent / "captions_val.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return pets.parent / "captions_val.json"


def test_coco_gives_a_sample_for_each_caption_or_one_for_each_picture(pets, coco):
    samples, manifest = run(pets, captions=coco)
    assert sorted(texts(samples)) == sorted(f"{n} of {i}" for n in range(5) for i in (1, 3))
    assert manifest["skipped"] == {"no_caption": 1}
    settings = {"captions": coco, "overwrite": True, "shuffle": False}
    assert texts(run(pets, captions_per_image="first", **settings)[0]) == ["0 of 1", "0 of 3"]
    joined = texts(run(pets, captions_per_image="join", **settings)[0])
    assert joined == [f"0 of {i} 1 of {i} 2 of {i} 3 of {i} 4 of {i}" for i in (1, 3)]


def test_an_imagefolder_with_metadata(pets):
    for folder, names in (("a", (1, 3)), ("b", (2,))):
        rows = [{"file_name": f"pet.{i:02d}.png", "text": f"{folder}{i}"} for i in names]
        (pets / folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(texts(run(pets)[0])) == ["a1", "a3", "b2"]  # each relative to its own folder


def hub_data_set(folder: Path, rows: list[dict], name: str = "train-00000-of-00001") -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / ".cache").mkdir(exist_ok=True)
    (folder / ".cache" / "other.parquet").write_bytes(b"hidden")
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=4)
    return folder


def hub_rows(captions=CAPTIONS) -> list[dict]:
    return [
        {"image": {"bytes": image_bytes(picture(text)), "path": None}, "text": text, "label": index}
        for index, text in enumerate(captions)
    ]


def test_folders_named_after_their_classes(tmp_path):
    for number, name in enumerate(("n01440764", "kite", "n01440764")):
        file = tmp_path / "classes" / "train" / name / f"{number}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(picture(CAPTIONS[number]), "JPEG"))
    (tmp_path / "classes" / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    samples, _ = run(tmp_path / "classes", captions="folders", metadata=True, shuffle=False)
    assert texts(samples) == ["kite", "tench", "tench"] and "jpg" in samples[0]
    assert json.loads(samples[1]["json"]) == {"file_name": "n01440764/0.JPEG"}
    with pytest.raises(UserError, match="it holds 3 images: .* or take their folders with captions=folders"):
        main(arguments(tmp_path / "classes"))


def test_a_hub_data_set_in_parquet(tmp_path):
    folder = hub_data_set(tmp_path / "hub", hub_rows())
    samples, _ = run(folder, metadata=True)
    assert sorted(texts(samples)) == sorted(CAPTIONS) and texts(samples)[:4] != CAPTIONS[:4]
    assert all(sample["png"] == image_bytes(picture(sample["txt"].decode())) for sample in samples)
    assert all(CAPTIONS[json.loads(s["json"])["label"]] == s["txt"].decode() for s in samples)
    assert texts(run(folder, metadata=True, shuffle=False, overwrite=True)[0]) == CAPTIONS


def test_parquet_with_plain_bytes_lists_of_captions_and_paths(tmp_path):
    rows = [{"photo": image_bytes(picture(CAPTIONS[0])), "says": ["one", "two"]}, {"photo": None, "says": ["x"]}]
    samples, manifest = run(hub_data_set(tmp_path / "bytes", rows), caption_column="says", shuffle=False)
    assert texts(samples) == ["one", "two"] and manifest["skipped"] == {"malformed_item": 1}
    (tmp_path / "paths" / "data").mkdir(parents=True)
    (tmp_path / "paths" / "data" / "x.png").write_bytes(rows[0]["photo"])
    folder = hub_data_set(tmp_path / "paths", [{"image": {"bytes": None, "path": "x.png"}, "caption": "by path"}])
    assert texts(run(folder, overwrite=True)[0]) == ["by path"]


def test_a_caption_that_is_no_utf_8_is_skipped(tmp_path):
    folder = hub_data_set(tmp_path / "hub", hub_rows(CAPTIONS[:2]))
    file = folder / "data/train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file), file, compression="none", use_dictionary=False)
    file.write_bytes(file.read_bytes().replace(CAPTIONS[1].encode(), b"\xff" * len(CAPTIONS[1])))
    samples, manifest = run(folder)
    assert texts(samples) == CAPTIONS[:1] and manifest["skipped"] == {"malformed_item": 1}


def test_a_hub_data_set_of_several_splits_wants_one_named(tmp_path):
    folder = hub_data_set(tmp_path / "hub", hub_rows(CAPTIONS[:3]))
    hub_data_set(folder, hub_rows(CAPTIONS[3:5]), "validation-00000-of-00001")
    with pytest.raises(UserError, match="holds the splits train, validation; choose one"):
        main(arguments(folder))
    with pytest.raises(UserError, match="split=test: source=.* has train, validation"):
        main(arguments(folder, split="test"))
    assert sorted(texts(run(folder, split="validation")[0])) == sorted(CAPTIONS[3:5])
    assert split_of("val/a/metadata.csv") == "validation" and split_of("trains/values.parquet") == ""
    assert split_of("data/restval-00001-of-00002.parquet") == "restval"


# ---- bad data ----


def test_what_cannot_be_read_is_left_out_counted_and_told(pets, capsys):
    whole = (pets / "a" / "pet.01.png").read_bytes()
    (pets / "a" / "pet.01.png").write_bytes(whole[:-30])
    (pets / "a" / "pet.03.png").write_bytes(b"")
    (pets / "a" / "pet.05.txt").write_text(" \n")
    (pets / "a" / "pet.07.txt").unlink()
    (pets / "a" / "pet.09.txt").write_bytes(b"\xff\xfe\xfa")
    (pets / "a" / "pet.11.png").unlink()
    (pets / "a" / "pet.11.png").symlink_to("nowhere.png")
    samples, manifest = run(pets)
    assert len(samples) == 6
    kinds = {"unreadable_image": 2, "empty_text": 1, "no_caption": 1, "malformed_item": 1, "missing_file": 1}
    assert manifest["skipped"] == kinds
    told = capsys.readouterr().out
    assert "skipped 6 of 12 samples (50.0%)" in told and "no pet.07.txt beside it" in told and "pet.11.png" in told


def test_nothing_left_is_an_error_and_leaves_nothing(pets):
    for file in pets.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match="nothing is left to write: skipped 12 of 12 .* 12 unreadable_image"):
        main(arguments(pets))
    assert not list((pets.parent / "shards").iterdir())


# ---- pictures ----


def test_pictures_keep_their_bytes_unless_no_flow_reads_them():
    image = picture(CAPTIONS[0])
    for form, suffix in (("JPEG", "jpg"), ("WEBP", "webp"), ("PNG", "png")):
        assert checked_image(image_bytes(image, form), 0, 95) == (suffix, image_bytes(image, form))
        assert checked_image(image_bytes(image, form), 32, 95)[1] == image_bytes(image, form)  # not larger
    suffix, data = checked_image(image_bytes(image, "BMP"), 0, 95)
    assert suffix == "png" and Image.open(io.BytesIO(data)).tobytes() == image.tobytes()


@pytest.mark.parametrize(("size", "form", "new"), [((64, 100), "JPEG", (16, 25)), ((90, 40), "PNG", (36, 16))])
def test_larger_pictures_are_scaled_in_their_own_format(size, form, new):
    image = picture(CAPTIONS[0]).resize(size)
    _, data = checked_image(image_bytes(image, form), 16, 90)
    small = Image.open(io.BytesIO(data))
    assert small.size == new and small.format == form
    expected = Image.open(io.BytesIO(image_bytes(image, form))).resize(new, Image.Resampling.BICUBIC)
    if form == "PNG":
        assert small.tobytes() == expected.tobytes()


# ---- whole or absent, the same again ----


def test_the_same_settings_write_the_same_bytes(pets):
    _, manifest = run(pets, num_workers=1)
    assert run(pets, num_workers=5)[1] == manifest
    other = run(pets, seed=1, output=pets.parent / "other" / "train")[1]
    assert [shard["sha256"] for shard in other["shards"]] != [shard["sha256"] for shard in manifest["shards"]]


def test_another_data_set_is_not_overwritten_unless_told(pets):
    run(pets, shard_size=5)
    with pytest.raises(UserError, match=r"train-manifest.json belongs to another data set \(shard_size=5\)"):
        main(arguments(pets, shard_size=6))
    (pets.parent / "shards" / "train-manifest.json").unlink()
    with pytest.raises(UserError, match="train-000000.tar is there already, without a manifest"):
        main(arguments(pets, shard_size=5))
    samples, manifest = run(pets, shard_size=12, overwrite=True)
    assert len(samples) == 12 and len(manifest["shards"]) == 1  # the surplus shards are gone


def test_what_was_there_survives_a_run_that_fails(pets):
    _, manifest = run(pets)
    hub = hub_data_set(pets.parent / "hub", hub_rows())
    file = hub / "data" / "train-00000-of-00001.parquet"
    data = bytearray(file.read_bytes())
    data[200:1200] = bytes(1000)  # inside a row group; the footer is whole
    file.write_bytes(data)
    with pytest.raises(UserError, match="row group ., is damaged"):
        main(arguments(hub, output=pets.parent / "shards" / "train", overwrite=True))
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

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    results = in_order(lambda number: number**2, items(), threads=3, ahead=6)
    assert next(results) == 0 and len(taken) <= 7
    assert list(results) == [number**2 for number in range(1, 40)]


# ---- mistakes ----


def test_mistakes_are_named(pets, coco, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "x.png").write_bytes(b"")
    (tmp_path / "c.csv").write_text("image,number\nx.png,1\n")
    (tmp_path / "c.json").write_text("{")
    instances = json.loads(coco.read_text())
    for note in instances["annotations"]:
        del note["caption"]
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    lfs = tmp_path / "lfs"
    lfs.mkdir()
    (lfs / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    label = hub_data_set(tmp_path / "label", hub_rows())
    (tmp_path / "arrow").mkdir()
    (tmp_path / "arrow" / "data-00000-of-00001.arrow").write_bytes(b"")
    for values, message in (
        ({"source": tmp_path / "none"}, "none is no folder that exists"),
        ({"source": tmp_path / "bare"}, "no captions found; it holds 1 images: put a .txt beside each"),
        ({"source": tmp_path / "arrow"}, "saved with save_to_disk"),
        ({"source": lfs}, "pointer of Git LFS: run `git lfs pull`"),
        ({"source": label, "caption_column": "label"}, "column 'label' holds int64, not text"),
        ({"source": label, "image_column": "photo"}, "no column 'photo'; its columns are image, text, label"),
        ({"captions": tmp_path / "none.csv"}, "none.csv does not exist"),
        ({"captions": tmp_path / "pets"}, "does not exist"),
        (
            {"captions": tmp_path / "c.csv"},
            "no column that can be taken for caption_column; its columns are",
        ),
        ({"captions": tmp_path / "c.csv", "caption_column": "says"}, "no column 'says'"),
        ({"captions": tmp_path / "c.json"}, "no valid JSON"),
        ({"captions": tmp_path / "instances.json"}, r"lacks captions .*take COCO's captions_\*\.json"),
        ({"output": f"{tmp_path}/new/"}, "is a folder; add how the shards' names begin"),
        ({"output": tmp_path / "c.csv" / "train"}, "cannot write .*c.csv"),
        (
            {"captions_per_image": "all", "resize": -1, "shard_size": 0},
            "is 'all'.*resize is -1.*shard_size is 0",
        ),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments(**({"source": pets} | values)))
    with pytest.raises(UserError, match="source and output not given"):
        main([])
    assert not list(tmp_path.glob("shards/*"))
