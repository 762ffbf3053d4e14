"""Wrong and missing files: which file, which field, what was expected. Nothing is asked, no weights are read."""

import json
from pathlib import Path

import pytest

import evaluate
from common.errors import UserError
from evaluation import official_files as files
from evaluation.official_files import field
from models import ShowoPipeline
from tests.evaluation.conftest import Evaluation
from tests.evaluation.official import MMMU_ROWS, WRITERS, write_parquet


@pytest.mark.parametrize(
    ("record", "kind", "allowed", "message"),
    [
        ({}, str, None, "p: field 'x' is missing (it has none); expected text"),
        ([1], str, None, "p holds [1]; expected a record with the field 'x'"),
        ({"x": "maybe"}, str, ("yes", "no"), "p: field 'x' is \"maybe\"; expected 'yes' or 'no'"),
        ({"x": "1"}, int, None, "field 'x' is \"1\"; expected a whole number"),
        ({"x": True}, int, None, "field 'x' is true; expected a whole number"),
        ({"x": 1}, bool, None, "field 'x' is 1; expected true or false"),
        ({"x": None}, (int, float), None, "field 'x' is null; expected a whole number or a number"),
        ({"x": "a" * 99}, list, None, f"field 'x' is \"{'a' * 56}...; expected a list"),
    ],
)
def test_fields(record, kind, allowed, message):
    with pytest.raises(UserError) as error:
        field("p", record, "x", kind, allowed)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("call", "text", "message"),
    [
        (lambda p: files.read_json(p, dict, "a set"), None, "does not exist; expected a set (docs/evaluation.md says"),
        (lambda p: files.read_json(p, dict, "a set"), b"{", "cannot be read as JSON"),
        (lambda p: files.read_json(p, dict, "a set"), b"[]", "holds []; expected a group of fields: a set"),
        (lambda p: list(files.read_json_lines(p, "x")), b"{}\n\n[\n", "line 3 is no JSON"),
        (lambda p: list(files.read_json_lines(p, "x")), b"\xff", "cannot be read as text"),
        (lambda p: files.check_filled([], p, "a set"), b"", "is empty; expected a set"),
        (lambda p: files.unique_keys(["1", "2", "1"], p, "id"), b"", "field 'id' has the value 1 twice"),
    ],
)
def test_whole_files(tmp_path, call, text, message):
    path = tmp_path / "file.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError) as error:
        call(path)
    assert message in str(error.value) and str(error.value).startswith(str(path))


def test_missing_images_are_counted_once(tmp_path):
    (tmp_path / "a.png").touch()
    named = [(tmp_path / f"{name}.png", f"row {number}") for number, name in enumerate("abbc")]
    with pytest.raises(UserError, match=r"2 of 3 images are missing, the first is .*b.png, named by row 1; expected x"):
        files.check_images(named, "x")


def test_only_a_newline_ends_a_line(tmp_path):
    """Other separators of Unicode stand in texts as they are: `json.dumps` escapes none of them."""
    text = "one\u2028two\u2029three\x85four"
    files.write_json_lines(tmp_path / "lines.jsonl", [{"text": text}, {"text": "x"}])
    found = list(files.read_json_lines(tmp_path / "lines.jsonl", "lines"))
    assert [record["text"] for _, record in found] == [text, "x"] and found[1][0].endswith("line 2")


@pytest.fixture
def refused(places, tmp_path, monkeypatch):
    """Writes a benchmark, damages it, and returns the one line of the refusal."""
    monkeypatch.setattr(ShowoPipeline, "from_config", None)
    evaluation = Evaluation(places["demo"], tmp_path / "data", tmp_path / "out")
    evaluation.root.mkdir()

    def run(task: str, damage, *more: str) -> str:
        if writer := WRITERS.get("emoji" if task.startswith("emoji") else task):
            writer(evaluation.root)
        damage(evaluation.root)
        with pytest.raises(UserError) as error:
            evaluate.main(evaluation.arguments(task, *more))
        message = str(error.value)
        assert "\n" not in message and len(message) < 900 and not evaluation.folder.exists()
        return message

    return run


def edited(name: str, edit):
    """Changes one JSON file."""

    def damage(root: Path) -> None:
        tree = json.loads((root / name).read_text())
        edit(tree)
        (root / name).write_text(json.dumps(tree))

    return damage


def written(name: str, text: str):
    return lambda root: (root / name).write_text(text)


def removed(name: str):
    return lambda root: (root / name).unlink()


def row(**change):
    return lambda root: write_parquet(root / MATH, [MMMU_ROWS["Accounting"][0] | change])


MME = "mme/MME_Benchmark_release_version"
VQA = "vqav2/v2_mscoco_val2014_annotations.json"
FLICKR = "flickr30k/dataset_flickr30k.json"
MATH = "mmmu/Math/validation-00000-of-00001.parquet"
COCO = "coco/annotations/captions_val2014.json"
EMOJI = "emoji_world/manifest.json"


@pytest.mark.parametrize(
    ("task", "damage", "message"),
    [
        ("pope", removed("coco/val2014/COCO_val2014_000000000001.jpg"), "by field 'image' of coco_pope_random.json"),
        ("mme", removed(f"{MME}/count/000.jpg"), "count/000.txt has no image; expected"),
        ("mme", written(f"{MME}/color/001.txt", "Is it?\tYes\n"), "color/001.txt has 1 lines; expected two lines"),
        ("mme", written(f"{MME}/color/001.txt", "Is it?\tYes\nOr?\n"), "001.txt, line 2: the answer is ''; expected"),
        ("mme", lambda r: [p.unlink() for p in (r / MME / "OCR").glob("*.txt")], "OCR holds no .txt file"),
        ("mme", lambda r: (r / MME / "OCR/000.txt").write_bytes(b"\xff"), "000.txt cannot be read as text"),
        ("vqav2", edited(VQA, lambda t: t["annotations"][0]["answers"].pop()), "has 9 answers; expected 10"),
        ("vqav2", edited(VQA, lambda t: t["annotations"].pop()), "question 2: field 'question_id' is 9003"),
        ("flickr30k", edited(FLICKR, lambda t: t["images"][2]["sentences"].clear()), "'sentences' is empty"),
        ("flickr30k", edited(FLICKR, lambda t: t["images"].clear()), "no image has 'test' in the field 'split'"),
        ("mmmu", written(MATH, "x"), "cannot be read as parquet"),
        ("mmmu", row(answer="E"), "row 0: field 'answer' is 'E'; expected one of the letters ['A', 'B', 'C']"),
        ("mmmu", row(options="one, two"), "field 'options' is 'one, two'; expected a list of texts"),
        ("mmmu", lambda root: write_parquet(root / MATH, [{"id": "1"}]), "field 'image_1' is missing; expected an"),
        ("coco", removed("coco/val2014/COCO_val2014_000000000012.jpg"), "'file_name' (COCO_val2014_000000000012.jpg)"),
        ("coco", edited(COCO, lambda t: t["annotations"][0].update(image_id=9)), "annotation 0: field 'image_id' is 9"),
        ("reconstruction", lambda r: [p.unlink() for p in r.rglob("images/**/*.*")], "images holds no image; expected"),
        ("emoji_naming", edited(EMOJI, lambda t: t["pictures"][0].update(name="y")), "field 'name' is 'y'; expected"),
        ("emoji_drawing", removed("emoji_world/images/leaf_noto.png"), "'key' of manifest.json (leaf_noto)"),
        ("unknown", lambda root: None, "tasks holds 'unknown'; name one or more of pope,mme"),
    ],
)
def test_benchmarks(refused, task, damage, message):
    assert message in refused(task, damage)


@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        ("gqa", "vqav2_split=dev", "vqav2_split is 'dev'; allowed: val, test-dev, test"),
        ("gqa", "max_items=0", "max_items is 0; it must be 1 or more"),
        ("gqa", "compare=a", "compare is 'a'; give two"),
        ("gqa", "tasks=", "tasks is not given"),
        ("gqa", "flickr30k_prompt=", "flickr30k_prompt is empty"),
        ("mmmu", "mmmu_split=dev", "holds no dev-*.parquet"),
        ("coco", "coco_scores=fid,x", "coco_scores is 'fid,x'; allowed: fid, clip or fid,clip"),
        ("coco", "fid_features=null", "FID needs torch-fidelity, which is not installed; pip install"),
        ("coco", "fid_features=nowhere.pt", "fid_features=nowhere.pt does not exist"),
        ("reconstruction", "reconstruction_images=null", "reconstruction_images is not given"),
        ("geneval", "geneval_repository=nowhere", "nowhere/evaluation/evaluate_images.py does not exist"),
    ],
)
def test_settings(refused, task, setting, message):
    assert message in refused(task, lambda root: None, setting)
