"""Wrong and missing files: which file, which field, what was expected. Nothing is asked, no weights are read."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import evaluate
from common.errors import UserError
from models import ShowoPipeline
from tests.evaluation.conftest import Evaluation
from tests.evaluation.official import MMMU_ROWS, WRITERS


@pytest.fixture
def refused(places, tmp_path, monkeypatch):
    """Writes a benchmark, damages it, and returns the one line of the refusal."""
    monkeypatch.setattr(ShowoPipeline, "from_config", None)
    evaluation = Evaluation(places["demo"], tmp_path / "data", tmp_path / "out")
    evaluation.root.mkdir()

    def run(task: str, damage, *more: str) -> str:
        if (writer := WRITERS.get("emoji" if task.startswith("emoji") else task)) is not None:
            writer(evaluation.root)
        damage(evaluation.root)
        with pytest.raises(UserError) as error:
            evaluate.main(evaluation.arguments(task, *more))
        message = str(error.value)
        assert "\n" not in message and len(message) < 900
        assert not evaluation.folder.exists()
        return message

    return run


def edited(name: str, edit):
    """Changes one JSON file."""

    def damage(root: Path) -> None:
        tree = json.loads((root / name).read_text())
        edit(tree)
        (root / name).write_text(json.dumps(tree))

    return damage


def line_edited(name: str, number: int, **fields):
    """Changes fields of one line (None removes one)."""

    def damage(root: Path) -> None:
        texts = (root / name).read_text().splitlines()
        record = json.loads(texts[number]) | fields
        texts[number] = json.dumps({key: value for key, value in record.items() if value is not None})
        (root / name).write_text("\n".join(texts))

    return damage


def written(name: str, text: str):
    return lambda root: (root / name).write_text(text)


def without_rows(name: str):
    return lambda root: pq.write_table(pq.read_table(root / name)[:0], root / name)


def removed(name: str):
    return lambda root: (root / name).unlink()


POPE = "pope/coco_pope_popular.json"
GQA = "gqa/testdev_balanced_questions.json"
QUESTIONS = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "vqav2/v2_mscoco_val2014_annotations.json"
FLICKR = "flickr30k/dataset_flickr30k.json"
GENEVAL = "geneval/evaluation_metadata.jsonl"
COCO = "coco/annotations/captions_val2014.json"
EMOJI = "emoji_world/manifest.json"
MATH = "mmmu/Math/validation-00000-of-00001.parquet"
MME = "mme/MME_Benchmark_release_version"


@pytest.mark.parametrize(
    ("task", "damage", "parts"),
    [
        ("pope", removed(POPE), [POPE, "does not exist; expected POPE's popular questions"]),
        ("pope", line_edited(POPE, 1, label="maybe"), [f"{POPE}, line 2: field 'label' is \"maybe\"", "'yes' or 'no'"]),
        ("pope", line_edited(POPE, 2, text=None), ["line 3: field 'text' is missing", "expected text"]),
        ("pope", line_edited(POPE, 0, question_id="1"), ["field 'question_id' is \"1\"; expected a whole number"]),
        ("pope", line_edited(POPE, 0, question_id=2), ["'question_id' has the value popular-2 twice"]),
        ("pope", written(POPE, "[\n"), [f"{POPE}, line 1 is no JSON", "one JSON object a line"]),
        ("pope", written(POPE, "\n"), [f"{POPE} is empty; expected POPE's popular questions"]),
        ("pope", written(POPE, "[1]\n"), ["line 1 holds [1]; expected a record with the field 'question_id'"]),
        (
            "pope",
            removed("coco/val2014/COCO_val2014_000000000001.jpg"),
            ["1 of 2 images are missing", "000000000001.jpg, named by field 'image' of coco_pope_random.json"],
        ),
        ("mme", removed(f"{MME}/count/000.jpg"), ["count/000.txt has no image; expected", "count/000.jpg or .png"]),
        ("mme", written(f"{MME}/color/001.txt", "Is it?\tYes\n"), ["color/001.txt has 1 lines; expected two lines"]),
        ("mme", written(f"{MME}/color/001.txt", "Is it?\tYes\nOr?\n"), ["001.txt, line 2: the answer is ''; expected"]),
        (
            "mme",
            lambda root: (root / MME / "OCR").rename(root / "x"),
            ["OCR does not exist; expected the folder of MME"],
        ),
        ("gqa", written(GQA, "{"), [f"{GQA} cannot be read as JSON"]),
        ("gqa", written(GQA, "{}"), [f"{GQA} is empty; expected GQA's questions by their ids"]),
        ("gqa", written(GQA, "[]"), ["holds []; expected a group of fields: GQA's questions"]),
        ("gqa", edited(GQA, lambda t: t["202"].pop("imageId")), ["question 202: field 'imageId' is missing"]),
        ("gqa", edited(GQA, lambda t: t["202"]["types"].clear()), ["field 'types': field 'structural' is missing"]),
        ("gqa", removed("gqa/images/n2.jpg"), ["named by field 'imageId' of question 203"]),
        ("vqav2", removed(ANNOTATIONS), [ANNOTATIONS, "expected VQAv2's annotations"]),
        ("vqav2", edited(QUESTIONS, lambda t: t.pop("questions")), ["field 'questions' is missing", "expected a list"]),
        (
            "vqav2",
            edited(QUESTIONS, lambda t: t.update(questions=[])),
            [f"{QUESTIONS}: field 'questions' is empty; expected VQAv2's questions of val2014"],
        ),
        (
            "vqav2",
            edited(ANNOTATIONS, lambda t: t["annotations"][0]["answers"].pop()),
            ["annotation 0: field 'answers' has 9 answers; expected 10"],
        ),
        (
            "vqav2",
            edited(ANNOTATIONS, lambda t: t["annotations"].pop()),
            ["question 2: field 'question_id' is 9003", "expected annotations of the same split"],
        ),
        (
            "vqav2",
            edited(ANNOTATIONS, lambda t: t["annotations"][1].update(answer_type="x")),
            ["annotation 1: field 'answer_type' is \"x\"; expected 'yes/no' or 'number' or 'other'"],
        ),
        ("flickr30k", edited(FLICKR, lambda t: t["images"][0].update(split="TEST")), ["image 0: field 'split'"]),
        ("flickr30k", edited(FLICKR, lambda t: t["images"][2]["sentences"].clear()), ["'sentences' is empty"]),
        ("flickr30k", edited(FLICKR, lambda t: t.update(images=[])), ["no image has 'test' in the field 'split'"]),
        ("flickr30k", removed("flickr30k/flickr30k-images/3.jpg"), ["3.jpg, named by field 'filename' of imgid 2"]),
        ("mmmu", lambda root: (root / "mmmu").rename(root / "x"), ["mmmu does not exist; expected MMMU's subjects"]),
        ("mmmu", without_rows(MATH), [f"{MATH} is empty; expected MMMU's questions about Math"]),
        ("mmmu", written(MATH, "x"), ["cannot be read as parquet"]),
        ("geneval", removed(GENEVAL), [GENEVAL, "does not exist; expected GenEval's prompts"]),
        (
            "geneval",
            line_edited(GENEVAL, 1, tag="colour"),
            ["line 2: field 'tag' is \"colour\"; expected 'single_object'"],
        ),
        ("geneval", line_edited(GENEVAL, 0, include=None), ["line 1: field 'include' is missing", "expected a list"]),
        ("geneval", written(GENEVAL, ""), ["evaluation_metadata.jsonl is empty; expected GenEval's prompts"]),
        ("coco", removed(COCO), [COCO, "does not exist; expected COCO's captions of val2014"]),
        (
            "coco",
            edited(COCO, lambda t: t["annotations"][1].pop("caption")),
            ["annotation 1: field 'caption' is missing"],
        ),
        (
            "coco",
            edited(COCO, lambda t: t["annotations"][0].update(image_id=9)),
            ["annotation 0: field 'image_id' is 9"],
        ),
        ("coco", edited(COCO, lambda t: t["images"][0].pop("file_name")), ["image 0: field 'file_name' is missing"]),
        (
            "coco",
            removed("coco/val2014/COCO_val2014_000000000012.jpg"),
            ["1 of 3 images are missing", "named by field 'file_name' (COCO_val2014_000000000012.jpg)"],
        ),
        (
            "reconstruction",
            lambda root: [path.unlink() for path in (root / "pictures").rglob("*.*")],
            ["pictures holds no image; expected .png, .jpg"],
        ),
        ("emoji_naming", removed(EMOJI), [EMOJI, "does not exist; expected the manifest", "make data-emoji"]),
        ("emoji_naming", edited(EMOJI, lambda t: t.pop("pictures")), ["field 'pictures' is missing"]),
        ("emoji_style", edited(EMOJI, lambda t: t["pictures"][1].update(style="oil")), ["picture 1: field 'style' is"]),
        ("emoji_yes_no", edited(EMOJI, lambda t: t["names"][0].update(group="x")), ["name 0: field 'group' is \"x\""]),
        (
            "emoji_drawing",
            edited(EMOJI, lambda t: t["pictures"][0].update(name="y")),
            ["field 'name' is 'y'; expected"],
        ),
        ("emoji_drawing", edited(EMOJI, lambda t: t["pictures"][0].update(held_out=1)), ["expected true or false"]),
        ("emoji_drawing", removed("emoji_world/images/leaf_noto.png"), ["1 of 4 images are missing", "leaf_noto"]),
        ("unknown", lambda root: None, ["tasks holds 'unknown'; name one or more of pope,mme"]),
    ],
)
def test_files(refused, task, damage, parts):
    message = refused(task, damage)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"answer": "E"}, ["row 0: field 'answer' is 'E'; expected one of the letters ['A', 'B', 'C']"]),
        ({"options": "one, two"}, ["field 'options' is 'one, two'; expected a list of texts"]),
        ({"question_type": "short"}, ["field 'question_type' is \"short\"; expected 'multiple-choice' or 'open'"]),
        ({"id": None}, ["row 0: field 'id' is null; expected text"]),
    ],
)
def test_rows_of_mmmu(refused, change, parts):
    def damage(root: Path) -> None:
        table = pa.Table.from_pylist([MMMU_ROWS["Accounting"][0] | change])
        pq.write_table(table, root / "mmmu/Accounting/validation-00000-of-00001.parquet")

    message = refused("mmmu", damage)
    assert all(part in message for part in parts), message


def test_a_library_that_is_not_there(refused, monkeypatch):
    monkeypatch.setattr("evaluation.tasks.flickr30k.find_spec", lambda name: None)
    message = refused("flickr30k", lambda root: None)
    assert "pip install --no-deps pycocoevalcap==1.2" in message


def test_a_split_that_is_not_there(refused):
    message = refused("mmmu", lambda root: None, "mmmu_split=dev")
    assert "holds no dev-*.parquet" in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("vqav2_split=dev", "vqav2_split is 'dev'; allowed: val, test-dev, test"),
        ("max_items=0", "max_items is 0; it must be 1 or more"),
        ("bootstrap_samples=10", "bootstrap_samples is 10; it must be 100 or more"),
        ("data_root=nowhere", "data_root=nowhere does not exist"),
        ("compare=a", "compare is 'a'; give two"),
        ("tasks=", "tasks is not given"),
        ("bach_size=2", "unknown key bach_size"),
    ],
)
def test_settings(refused, setting, message):
    assert message in refused("gqa", lambda root: None, setting)
