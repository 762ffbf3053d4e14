"""Wrong and missing files: which file, which field, what was expected. Nothing is asked, no weights are read."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from evaluation import official_files as files
from evaluation.output import Output
from models import ShowoPipeline
from tests.evaluation.official import MME, MMMU_ROWS, WRITERS, write_parquet


def test_a_field_with_known_values():
    assert files.choice({"x": "yes"}, "x", ("yes", "no"), "p") == "yes"
    with pytest.raises(UserError, match="p: field 'x' is \"maybe\", expected 'yes' or 'no'"):
        files.choice({"x": "maybe"}, "x", ("yes", "no"), "p")


def test_missing_images_are_counted_once(tmp_path):
    (tmp_path / "a.png").touch()
    named = [(tmp_path / f"{name}.png", f"row {number}") for number, name in enumerate("abbc")]
    with pytest.raises(UserError, match=r"2 of 3 images are missing, the first is .*b.png, named by row 1; expected x"):
        files.check_images(named, "x")


def test_only_a_newline_ends_a_line(tmp_path):
    """Other separators of Unicode stand in texts as they are: `json.dumps` escapes none of them."""
    text = "one\u2028two\u2029three\x85four"
    Output(tmp_path).write_json_lines("lines.jsonl", [{"text": text}, {"text": "x"}])
    found = list(files.read_json_lines(tmp_path / "lines.jsonl", "lines"))
    assert [record["text"] for _, record in found] == [text, "x"] and found[1][0].endswith("line 2")


def damage(file: Path, change) -> None:
    """Removes a file, replaces its content (bytes, or rows of a table), or edits its JSON."""
    if change is None:
        file.unlink()
    elif isinstance(change, bytes):
        file.write_bytes(change)
    elif isinstance(change, list):
        write_parquet(file, change)
    else:
        tree = json.loads(file.read_text())
        change(tree)
        file.write_text(json.dumps(tree))


@pytest.fixture
def refuse(own, monkeypatch):
    """Writes a benchmark, damages it, and checks the one line of the refusal."""
    monkeypatch.setattr(ShowoPipeline, "from_config", None)

    def refuse(message: str, task: str, *more: str, pattern: str = "nothing", change=None) -> None:
        if writer := WRITERS.get(task.partition("_")[0]):
            writer(own.root)
        for file in list(own.root.glob(pattern)):
            damage(file, change)
        with pytest.raises(UserError) as error:
            own.run(task, *more)
        told = str(error.value)
        assert message in told and "\n" not in told and len(told) < 900 and not own.folder.exists()

    return refuse


GQA = "gqa/testdev_balanced_questions.json"
POPE = "pope/coco_pope_random.json"
QUESTIONS = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
VQA = "vqav2/v2_mscoco_val2014_annotations.json"
FLICKR = "flickr30k/dataset_flickr30k.json"
MATH = "mmmu/Math/validation-00000-of-00001.parquet"
COCO = "coco/annotations/captions_val2014.json"
EMOJI = "emoji_world/manifest.json"


ROW = MMMU_ROWS["Accounting"][0]


@pytest.mark.parametrize(
    ("task", "pattern", "change", "message"),
    [
        ("gqa", GQA, None, "(GQA's questions by their ids, see docs/evaluation.md) does not exist"),
        ("gqa", GQA, b"{", "is no valid JSON"),
        ("gqa", GQA, b"[]", "holds a list of 0, expected an object"),
        ("gqa", GQA, b"{}", "is empty; expected"),
        ("pope", POPE, b"\n[\n", "line 2 is no valid JSON"),
        ("pope", POPE, b"\xff", "is no UTF-8 text"),
        ("pope", "coco/val2014/COCO_val2014_000000000001.jpg", None, "by field 'image' of coco_pope_random.json"),
        ("mme", f"{MME}/count/000.jpg", None, "count/000.txt has no image; expected"),
        ("mme", f"{MME}/color/001.txt", b"Is it?\tYes\n", "color/001.txt has 1 lines; expected two lines"),
        ("mme", f"{MME}/color/001.txt", b"Is it?\tYes\nOr?\n", "001.txt, line 2: the answer is ''; expected"),
        ("mme", f"{MME}/OCR/*.txt", None, "OCR holds no .txt file"),
        ("mme", f"{MME}/OCR/000.txt", b"\xff", "000.txt is no UTF-8 text"),
        ("vqav2", VQA, lambda t: t["annotations"][0]["answers"].pop(), "has 9 answers; expected 10"),
        ("vqav2", QUESTIONS, lambda t: t["questions"].append(t["questions"][0]), "has the value 9001 twice"),
        ("vqav2", VQA, lambda t: t["annotations"].pop(), "question 2: field 'question_id' is 9003"),
        ("flickr30k", FLICKR, lambda t: t["images"][2]["sentences"].clear(), "'sentences' is empty"),
        ("flickr30k", FLICKR, lambda t: t["images"].clear(), "no image has 'test' in the field 'split'"),
        ("mmmu", MATH, b"x", "cannot be read as parquet"),
        ("mmmu", MATH, [ROW | {"answer": "E"}], "row 0: field 'answer' is 'E'; expected one of the letters ['A', 'B',"),
        ("mmmu", MATH, [ROW | {"options": "one, two"}], "field 'options' is 'one, two'; expected a list of texts"),
        ("mmmu", MATH, [ROW | {"options": "[]"}], "field 'options' is empty"),
        ("mmmu", MATH, [ROW | {"options": "[" * 10_000}], "expected a list of texts"),
        ("gqa", GQA, lambda t: t.update({"9": 5}), "question 9 holds 5, expected an object"),
        ("gqa", GQA, lambda t: t["201"].update(question="half \ud83d"), "is no valid JSON"),
        ("emoji_naming", EMOJI, lambda t: t["pictures"][0].update(key="../x"), "'key' is '../x'; expected"),
        ("mmmu", MATH, [{"id": "1"}], "field 'image_1' is missing; expected an"),
        ("coco", "coco/val2014/*12.jpg", None, "'file_name' (COCO_val2014_000000000012.jpg)"),
        ("coco", COCO, lambda t: t["annotations"][0].update(image_id=9), "annotation 0: field 'image_id' is 9"),
        ("reconstruction", "images/**/*.*", None, "images holds no image; expected"),
        ("emoji_naming", EMOJI, lambda t: t["pictures"][0].update(name="y"), "field 'name' is 'y'; expected"),
        ("emoji_drawing", "emoji_world/images/leaf_noto.png", None, "'key' of manifest.json (leaf_noto)"),
    ],
)
def test_benchmarks(refuse, task, pattern, change, message):
    refuse(message, task, pattern=pattern, change=change)


@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        ("gqa", "compare=a", "compare is 'a'; give two"),
        ("gqa", "tasks=", "tasks is not given"),
        ("gqa", "tasks=unknown", "tasks holds 'unknown'; name one or more of pope,mme"),
        ("gqa", "flickr30k_prompt=", "flickr30k_prompt is empty"),
        ("mmmu", "mmmu_split=dev", "holds no dev-*.parquet"),
        ("coco", "coco_scores=fid,x", "coco_scores is 'fid,x'; allowed: fid, clip or fid,clip"),
        ("coco", "fid_features=null", "FID needs torch-fidelity, which is not installed; pip install"),
        ("coco", "fid_features=nowhere.pt", "fid_features=nowhere.pt does not exist"),
        ("reconstruction", "reconstruction_images=null", "reconstruction_images is not given"),
        ("geneval", "geneval_repository=nowhere", "nowhere/evaluation/evaluate_images.py does not exist"),
    ],
)
def test_settings(refuse, task, setting, message):
    refuse(message, task, setting)
