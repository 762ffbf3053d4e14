"""The scene world: exact truth, what is held out, the same bytes for the same seed, files that the flows read."""

import hashlib
import io
import json
import re
from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from examples.scenes import make, parts, words, world
from examples.scenes.parts import CHANGES, PARTS, change, sample, stream
from examples.scenes.words import caption, plural, questions, wrong_answer
from examples.scenes.world import (
    COLOURS,
    GROUNDS,
    ICONS,
    SPLITS,
    Scene,
    Thing,
    generator,
    held_out,
    holds,
    is_possible,
    is_reserved,
    png_of,
    render,
    sample_scene,
)
from tests.training.tiny import build_flows, config_of, write_world
from training.data.json_records import JsonRecords

SCENE_PARTS = [part for part in PARTS if part != "texts"]
COUNTS = {"captions": 60, "questions": 8, "texts": 60, "held_out": 4, "shard_size": 40, "size": 64}
COUNTS |= dict.fromkeys(("classes", "crowds", "edits", "stories", "several", "pairs"), 12)


def thing(text: str, x: int = 0, y: int = 0) -> Thing:
    size, colour, icon = text.split(maxsplit=2)
    return Thing(icon, colour, size, x, y)


def scene_of(*things: Thing, ground: str = "white") -> Scene:
    return Scene(ground, things)


# ---- the rules, stated once more ----

NUMBER = {icon: number for number, icon in enumerate(sorted(ICONS))}
COLOUR_NUMBER = {colour: number for number, colour in enumerate(COLOURS)}
NOUNS = {plural(icon): icon for icon in ICONS} | {icon: icon for icon in ICONS}
NOUN = "|".join(sorted(NOUNS, key=len, reverse=True))
COLOUR = "|".join(COLOURS)
TOLD = (rf"\b({COLOUR}) ({NOUN})\b", rf"\b({NOUN}) (?:is |turns |became |)({COLOUR})\b", rf"\b({NOUN}) can be (.*)\.")


def rules_broken(part: str, one) -> set[str]:
    """The rules that a training sample breaks in its images, in its texts, or in what both show together."""
    texts, broken = texts_of(part, one.said), set()
    kinds = {item.kind for scene in one.scenes for item in scene.things}
    shown = [{item.icon for item in scene.things} for scene in one.scenes]
    groups = list(shown)
    for text in texts:
        for pattern in TOLD:
            for match in re.findall(pattern, text):
                icon = next(NOUNS[word] for word in match if word in NOUNS)
                kinds |= {(icon, colour) for word in match for colour in COLOURS if re.search(rf"\b{colour}\b", word)}
        said = {NOUNS[word] for word in re.findall(rf"\b(?:{NOUN})\b", text)}
        groups += [said | icons for icons in shown] if part in ("captions", "questions", "pairs") else [said]
    if any((5 * NUMBER[icon] + 3 * COLOUR_NUMBER[colour]) % 11 == 0 for icon, colour in kinds):
        broken.add("colours")
    for group in groups:
        numbers = sorted(NUMBER[icon] for icon in group)
        if any((7 * low + 11 * high) % 10 == 0 for low, high in combinations(numbers, 2)):
            broken.add("pairs")
    if any(
        len(group) > 1 and max(group.values()) > 2 for group in (Counter(t.icon for t in s.things) for s in one.scenes)
    ):
        broken.add("counts")
    return broken


def texts_of(part: str, said: dict) -> list[str]:
    """Everything that a sample says in words."""
    if part == "questions":
        return [f"{one['question']} {one['answer']}" for one in said["questions"]] + [said["caption"]]
    if part == "pairs" and said["kind"] == "answer":
        return [f"{said['question']} {said['chosen']}", f"{said['question']} {said['rejected']}"]
    keys = ("class", "caption", "instruction", "question", "answer", "content")
    return [said[key] for key in keys if key in said] + said.get("texts", [])


@pytest.mark.parametrize("part", PARTS)
def test_no_training_sample_breaks_a_rule_in_image_or_text(part):
    for one in islice(stream(part), 250):
        assert rules_broken(part, one) == set(), one
        assert not any(map(is_reserved, one.scenes)), "those of the split `seen`"


@pytest.mark.parametrize(
    ("rule", "function", "part"),
    [
        ("colours", "colour_held_out", "captions"),
        ("colours", "colour_held_out", "questions"),
        ("colours", "colour_held_out", "texts"),
        ("pairs", "pair_held_out", "questions"),
        ("pairs", "pair_held_out", "edits"),
        ("counts", "count_held_out", "edits"),
    ],
)
def test_a_rule_that_is_not_kept_is_noticed(monkeypatch, rule, function, part):
    for module in (world, words, parts):
        if hasattr(module, function):
            monkeypatch.setattr(module, function, lambda *_: False)
    assert {broken for one in islice(stream(part), 250) for broken in rules_broken(part, one)} == {rule}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_breaks_its_own_rule_and_no_other(split):
    scenes = [one.scenes[0] for one in islice(stream("captions", split=split), 60)]
    expected = set() if split in ("train", "seen") else {split}
    assert all(held_out(scene.things) == expected for scene in scenes)
    assert all(is_possible(scene) for scene in scenes)
    if not expected:
        assert all(is_reserved(scene) == (split == "seen") for scene in scenes)
    if split == "colours":
        assert all(held_out([item]) for scene in scenes for item in scene.things)
    assert scenes != [one.scenes[0] for one in islice(stream("captions", split="seen", seed=1), 60)]


# ---- the same everywhere ----


def test_samples_are_a_function_of_their_number():
    told = [
        (one.key, one.said, [scene.as_json() for scene in one.scenes])
        for part in PARTS
        for one in islice(stream(part), 20)
    ]
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16] == "25311778a930ddae"
    for part in PARTS:
        assert sample(part, 7, seed=3, cells=16) == next(stream(part, seed=3, cells=16, start=7))
        assert sample(part, 7, seed=3) != sample(part, 7, seed=4)


@pytest.mark.parametrize("cells", [8, 12, 16])
def test_scenes_survive_json_and_images_png(cells):
    scene = sample_scene(generator("json", cells), cells)
    assert Scene.from_json(json.loads(json.dumps(scene.as_json()))) == scene
    image = render(scene)
    assert image.shape == (8 * cells, 8 * cells, 3)
    assert (np.asarray(Image.open(io.BytesIO(png_of(image)))) == image).all()


# ---- truth ----


def test_places_and_relations():
    car, tree = thing("small red car", 0, 0), thing("large blue tree", 7, 1)
    scene = scene_of(car, tree)
    assert scene.place(car) == "top left" and scene.place(tree) == "top right"
    assert scene.relation(car, tree) == "left of" and scene.relation(tree, car) == "right of"
    assert scene.related(car, "left of", tree) and not scene.related(car, "above", tree)
    fish = thing("small pink fish", 9, 9)
    assert scene.relation(car, fish) == "", "neither beside nor below"
    middle = thing("small green key", 4, 0)
    assert scene_of(car, middle, tree).is_between(middle, car, tree)
    assert not scene_of(car, middle, tree).is_between(car, middle, tree)


def test_what_is_in_front_is_drawn_last_and_must_touch():
    heart, star = thing("large red heart", 2, 2), thing("small blue star", 5, 4)
    scene, turned = scene_of(heart, star), scene_of(star, heart)
    assert scene.in_front(star, heart) and not scene.in_front(heart, star) and turned.in_front(heart, star)
    assert (render(scene) != render(turned)).any()
    apart = scene_of(heart, thing("small blue star", 9, 9))
    assert not apart.in_front(apart.things[1], heart)


@pytest.mark.parametrize(
    ("things", "possible"),
    [
        (["small red car", "small blue tree"], False),  # at one place
        (["large red heart"], True),
        ([], False),
    ],
)
def test_impossible_scenes(things, possible):
    assert is_possible(scene_of(*map(thing, things))) == possible


def test_too_close_and_outside_is_impossible():
    heart = thing("large red heart", 2, 2)
    assert is_possible(scene_of(heart, thing("small blue star", 5, 4)))
    assert not is_possible(scene_of(heart, thing("small red star", 5, 4))), "one colour runs together"
    assert not is_possible(scene_of(heart, thing("small blue star", 3, 3))), "too much is hidden"
    assert not is_possible(scene_of(thing("small blue star", 10, 3))), "outside"


def test_claims_hold_for_their_scene_and_not_for_others():
    car, tree = thing("small red car", 0, 0), thing("large blue tree", 7, 1)
    claims = {"ground": "white", "things": [{"icon": "tree"}, {"icon": "car", "colour": "red"}]}
    claims["relations"] = [[1, "left of", 0]]
    assert holds(claims, scene_of(car, tree)) and holds(claims, scene_of(tree, car))
    assert not holds(claims, scene_of(car, tree, ground="sky"))
    assert not holds(claims, scene_of(car)) and not holds(claims, scene_of(car, tree, thing("small red car", 0, 8)))
    assert not holds(claims, scene_of(thing("small pink car"), tree))
    assert not holds(claims, scene_of(thing("small red car", 9, 8), thing("large blue tree")))
    assert holds(claims | {"things": [{}, {"place": "top left"}]}, scene_of(car, tree))


def test_captions_say_what_holds_in_many_wordings():
    texts = []
    for number in range(150):
        rng = generator("caption", number)
        scene = sample_scene(rng)
        said = caption(scene, rng)
        assert holds(said.claims, scene), said
        others = sum(holds(said.claims, sample_scene(generator("other", number, n))) for n in range(10))
        assert others == 0, said
        texts.append(said.text)
    for wording in (
        "to the left of",
        "above",
        "between",
        "in front of",
        "three",
        "small",
        "at the top left",
        "ground with",
    ):
        assert any(wording in text for text in texts), wording


def test_answers_are_true_and_yes_is_as_frequent_as_no():
    counts = Counter()
    for number in range(150):
        rng = generator("question", number)
        scene = sample_scene(rng)
        by_icon = {item.icon: item for item in scene.things}
        icons = Counter(item.icon for item in scene.things)
        for one in questions(scene, rng):
            counts[one.kind, one.answer if one.kind == "yes-no" else ""] += 1
            assert wrong_answer(one, scene, rng) != one.answer
            match one.text.rstrip("?").split():
                case ["what", "colour", "is", "the", *icon] if icons[" ".join(icon)] == 1:
                    assert one.answer == by_icon[" ".join(icon)].colour
                case ["where", "is", "the", *icon] if icons[" ".join(icon)] == 1:
                    assert one.answer == scene.place(by_icon[" ".join(icon)])
                case ["how", "many", "things", "are", "there"]:
                    assert words.NUMBERS.index(one.answer) == len(scene.things)
                case ["is", "there", _, *icon]:
                    colour, _, rest = " ".join(icon).partition(" ")
                    kinds = {item.kind for item in scene.things}
                    there = (rest, colour) in kinds if colour in COLOURS else " ".join(icon) in icons
                    assert one.answer == ("yes" if there else "no"), (one, scene)
    assert counts["yes-no", "yes"] == counts["yes-no", "no"] > 130
    assert {kind for kind, _ in counts} == {"what", "colour", "count", "place", "compare", "yes-no"}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_edit_changes_what_it_says_and_keeps_the_rest(kind):
    for number in range(40):
        rng = generator("edit", kind, number)
        before = sample_scene(rng, counts=(2, 3, 4))
        if kind == "swap" and not words.named(before):
            continue
        try:
            done = change(before, generator("edit", kind, number), kinds=(kind, "ground"))
        except IndexError:
            continue
        if done.kind != kind:
            continue
        after = done.scene
        assert is_possible(after) and not held_out(after.things)
        lost, gained = (
            Counter(one.things) - Counter(other.things) for one, other in ((before, after), (after, before))
        )
        touched = {"ground": (0, 0), "add": (0, 1), "remove": (1, 0), "swap": (2, 2)}.get(kind, (1, 1))
        assert (lost.total(), gained.total()) == touched
        assert (before.ground == after.ground) == (kind != "ground")
        kept = [item for item in before.things if item not in lost]
        assert [item for item in after.things if item not in gained] == kept, "order, too"
        if kind in ("colour", "replace", "size"):
            (old,), (new,) = lost, gained
            parts_changed = {name for name in ("icon", "colour", "size") if getattr(old, name) != getattr(new, name)}
            assert parts_changed == {{"replace": "icon"}.get(kind, kind)}
            if kind == "colour":
                assert done.instruction == f"make the {words.named(before)[old]} {new.colour}"


def test_the_text_of_a_step_tells_what_happens_and_nothing_else():
    for one in islice(stream("stories"), 200):
        texts, kinds, scenes = one.said["texts"], one.said["kinds"], one.scenes
        assert 2 <= len(texts) == len(kinds) == len(scenes) <= 4
        for before, after, text, kind in zip(scenes, scenes[1:], texts[1:], kinds[1:], strict=False):
            changed = {item.icon for item in set(before.things) ^ set(after.things)}
            assert {NOUNS[word] for word in re.findall(rf"\b(?:{NOUN})\b", text)} == changed
            grounds = set(re.findall(rf"\b(?:{'|'.join(GROUNDS)})\b", text))
            assert grounds == ({after.ground} if kind == "ground" else set())
            if kind in ("remove", "move", "size"):
                told = next(iter(set(before.things) - set(after.things)))
                alike = [item for item in before.things if item.icon == told.icon]
                assert len(alike) > 1 or not re.search(rf"\b(?:{COLOUR})\b", text), text


def test_the_worse_image_is_wrong_and_the_better_is_right():
    wrong = Counter()
    for one in islice(stream("pairs"), 0, 400, 2):
        assert one.said["kind"] == "image"
        better, worse = one.scenes
        assert holds(one.said["claims"], better) and not holds(one.said["claims"], worse)
        wrong[one.said["wrong"]] += 1
    assert set(wrong) >= {"colour", "replace", "add", "remove", "ground", "move"}


def test_questions_on_several_images():
    for one in islice(stream("several"), 150):
        said = one.said
        if said["kind"] == "find":
            asked = re.fullmatch(r"in which image is an? (\w+) (.*)\?", said["question"])
            shown = [any(item.kind == (asked[2], asked[1]) for item in scene.things) for scene in one.scenes]
            assert shown.count(True) == 1 and said["answer"] == f"the {parts.ORDINALS[shown.index(True)]}"
        elif said["kind"] == "count":
            numbers = [len(scene.things) for scene in one.scenes]
            assert said["answer"] == f"the {parts.ORDINALS[numbers.index(max(numbers))]}" and numbers[0] != numbers[1]
        else:
            assert one.scenes[0] != one.scenes[1]


# ---- files ----


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "scenes"
    make.main([f"output_dir={folder}", *(f"{key}={value}" for key, value in COUNTS.items())])
    return folder


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_manifest_knows_every_file(made):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["counts"]["captions"] == {"train": 60, "seen": 4, "colours": 4, "pairs": 4, "counts": 4}
    assert manifest["source"]["licence"] == "Apache-2.0" and manifest["icons"] == list(ICONS)
    found = {
        name: hashlib.sha256(data).hexdigest() for name, data in files_of(made).items() if not name.endswith(".png")
    }
    del found["manifest.json"]
    assert manifest["sha256"] == found
    assert not (made / ".partial").exists()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(made, tmp_path):
    settings = [f"{key}={value}" for key, value in COUNTS.items()]
    make.main([f"output_dir={tmp_path / 'again'}", *settings])
    assert files_of(tmp_path / "again") == files_of(made)
    make.main([f"output_dir={tmp_path / 'again'}", *settings, "seed=1", "edits=0"])
    other = files_of(tmp_path / "again")
    assert other["captions/train-000000.tar"] != files_of(made)["captions/train-000000.tar"]
    assert not any(name.startswith("edits/") for name in other), "the old world is gone"


def test_nothing_that_is_not_ours_is_replaced_and_nothing_is_left_half_done(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "manifest.json").write_text('{"arguments": {}}')
    with pytest.raises(UserError, match="holds files that no scene world wrote"):
        make.main([f"output_dir={tmp_path}", "size=64"])
    monkeypatch.setattr(make.Writer, "write_captions", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make.main([f"output_dir={tmp_path / 'new'}", "size=64", "classes=1", "captions=1"])
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("argument", ["size=100", "captions=-1", "sise=96"])
def test_wrong_settings_are_named(tmp_path, argument):
    with pytest.raises(UserError, match=argument.partition("=")[0]):
        make.main([f"output_dir={tmp_path / 'world'}", argument])
    assert not (tmp_path / "world").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world") / "tiny")


READ = {
    "captions": ("t2i", {"dataset.gen_type": "t2i"}, "captions/train-*.tar"),
    "classes": ("t2i", {"dataset.gen_type": "imagenet1k"}, "classes"),
    "captions to understand": ("mmu", {"dataset.und_type": "captioning"}, "captions/train-*.tar"),
    "questions": ("mmu", {"dataset.und_type": "llava_tuning"}, "questions/train.json"),
    "texts": ("lm", {}, "texts/train.jsonl"),
    "all texts": ("lm", {}, "texts/train.txt"),
}


@pytest.mark.parametrize("name", READ)
def test_every_flow_reads_its_part(made, tiny, name):
    flow, settings, files = READ[name]
    settings = settings | {f"dataset.params.train_{flow}_shards_path_or_url": made / files}
    settings |= {f"training.batch_size_{other}": 0 for other in ("t2i", "lm", "mmu") if other != flow}
    settings |= {"dataset.preprocessing.resolution": 64, "dataset.preprocessing.max_seq_length": 200}
    if name == "questions":
        settings["dataset.params.train_mmu_image_root"] = made / "questions" / "images"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "llm")
    read = build_flows(config_of(tiny, overrides=settings), tokenizer=tokenizer)[flow]
    items = [item for _ in range(8) for item in next(read)]
    if flow == "lm":
        assert all(isinstance(item, str) and len(item) > 3 for item in items)
        return
    assert all(item["image"].shape == (3, 64, 64) for item in items)
    if name == "questions":
        assert all((item["labels"] != -100).any() for item in items)
        return
    captions = {one.said["caption"] for one in islice(stream("captions", cells=8), 60)}
    assert {re.sub("^USER: \n.* ASSISTANT: ", "", item["text"]) for item in items} <= (
        set(ICONS) if name == "classes" else captions
    )


def test_documents_pairs_and_records_on_several_images(made):
    for part in ("edits", "stories"):
        records = [json.loads(line) for line in (made / part / "train.jsonl").read_text().splitlines()]
        assert len(records) == 12 and len(JsonRecords(str(made / part / "train.jsonl"))) == 12
        for record, one in zip(records, stream(part, cells=8), strict=False):
            images = [segment["image"] for segment in record["segments"] if "image" in segment]
            for image, scene in zip(images, one.scenes, strict=True):
                assert (made / part / image).read_bytes() == png_of(render(scene))
            assert record["segments"][-1]["loss"] is True and record["segments"][0]["loss"] is False
    several = json.loads((made / "several" / "train.json").read_text())
    for record in several:
        human, answer = record["conversations"]
        assert human["value"].count("<image>\n") == len(record["image"]) >= 2 and answer["from"] == "gpt"
        assert all((made / "several" / "images" / image).is_file() for image in record["image"])
    for line in (made / "pairs" / "train.jsonl").read_text().splitlines():
        record = json.loads(line)
        images = [record["chosen"], record["rejected"]] if record["kind"] == "image" else [record["image"]]
        assert all((made / "pairs" / image).is_file() for image in images) and record["chosen"] != record["rejected"]
