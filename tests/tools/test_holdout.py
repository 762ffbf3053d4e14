"""`holdout`: which images are kept out of the shards, and where they are."""

import json
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from tests.tools.sets import read_set
from tests.training.tiny import image_bytes
from tools.make_shards import main
from training.data.shards import read_shard


def folder_of(tmp_path: Path, number: int) -> Path:
    """Images with two captions each, and a copy of the first image under another name."""
    source = tmp_path / "photos"
    source.mkdir(exist_ok=True)
    for index in range(number):
        place = source / f"{index:03d}.png"
        place.write_bytes(image_bytes(Image.new("RGB", (8, 8), (4 * index, 0, 0))))
        place.with_suffix(".txt").write_text(f"{index} red\n{index} again")
    (source / "copy.png").write_bytes((source / "000.png").read_bytes())
    (source / "copy.txt").write_text("a copy")
    return source


def run(source: Path, output: Path, **settings) -> tuple[list[str], list[str], dict]:
    """Captions of the set, captions held out, manifest."""
    settings = {"source": source, "output": output, "txt_lines": True} | settings
    main([f"{key}={value}" for key, value in settings.items()])
    _, manifest = read_set(output)
    texts = {name: [] for name in ("shards", "heldout")}
    for name, found in texts.items():
        for entry in manifest[name]:
            samples = list(read_shard(str(output.parent / entry["file"])))
            assert len(samples) == entry["samples"]
            found += [sample["txt"].decode() for sample in samples]
    return texts["shards"], texts["heldout"], manifest


def images_of(texts: list[str]) -> set[str]:
    return {"0" if text == "a copy" else text.split()[0] for text in texts}


def test_a_twentieth_of_the_images_with_all_their_captions(tmp_path, capsys):
    source, output = folder_of(tmp_path, 60), tmp_path / "out/train"
    texts, heldout, manifest = run(source, output, holdout=0.05)
    assert len(images_of(heldout)) == 3 and not images_of(heldout) & images_of(texts)
    assert len(texts) + len(heldout) == 121 and manifest["samples"] == len(texts)
    assert manifest["heldout"][0]["file"] == "train_heldout-000000.tar"
    assert f"{output}_heldout: {len(heldout)} samples held out in 1 shards" in capsys.readouterr().out
    assert [path.name for path in output.parent.glob("train-*.tar")] == ["train-000000.tar"]
    again = run(source, tmp_path / "again/train", holdout=0.05)
    assert again[:2] == (texts, heldout) and again[2]["heldout"] == manifest["heldout"]
    assert images_of(run(source, tmp_path / "other/train", holdout=0.05, seed=1)[1]) != images_of(heldout)


@pytest.mark.parametrize("seed", range(6))
def test_a_copy_goes_where_its_image_goes(tmp_path, seed):
    texts, heldout, _ = run(folder_of(tmp_path, 6), tmp_path / "out/train", holdout=0.5, seed=seed)
    assert len(images_of(heldout)) == 3 and not images_of(heldout) & images_of(texts)


def test_many_held_out_images_fill_several_shards(tmp_path):
    output = tmp_path / "out/train"
    _, heldout, manifest = run(folder_of(tmp_path, 12), output, holdout=0.5, shard_size=5, txt_lines=False)
    assert [entry["samples"] for entry in manifest["heldout"]] == [5, len(heldout) - 5]
    run(tmp_path / "photos", output, txt_lines=False, overwrite=True)  # without: those of before are removed
    assert not list(output.parent.glob("*heldout*")) and json.loads(Path(f"{output}-manifest.json").read_text())


def test_of_a_few_images_one_is_held_out(tmp_path):
    assert len(images_of(run(folder_of(tmp_path, 4), tmp_path / "out/train", holdout=0.01)[1])) == 1


def test_shards_without_a_manifest_are_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train_heldout-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="train_heldout-000000.tar is there already"):
        run(folder_of(tmp_path, 4), tmp_path / "out/train", holdout=0.5)


def test_nothing_held_out_is_an_error(tmp_path):
    source = folder_of(tmp_path, 1)
    for index in range(8):  # unreadable ones count as images of the source
        (source / f"broken{index}.png").write_bytes(b"no image")
        (source / f"broken{index}.txt").write_text("x")
    with pytest.raises(UserError, match="holdout=0.01 of 1 images is none; give a larger share"):
        run(source, tmp_path / "out/train", holdout=0.01, seed=2)


def test_a_set_of_before_the_setting_held_nothing_out(tmp_path):
    source, output = folder_of(tmp_path, 4), tmp_path / "out/train"
    run(source, output)
    manifest = Path(f"{output}-manifest.json")
    content = json.loads(manifest.read_text())
    del content["settings"]["holdout"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="another data set"):
        run(source, output, holdout=0.5)
    run(source, output)
