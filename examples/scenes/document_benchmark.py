"""The scene world's documents as benchmarks: edits, stories, and questions about several images.

    python3 evaluate.py config=CONFIG tasks=scenes_documents seed=1 scenes_samples=100

For models that were trained on documents (docs/mixed.md); the rest is as in `examples/scenes/benchmark.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from evaluation.images import side_by_side
from evaluation.task import Item, QuestionTask
from examples.scenes.benchmark import CHANGED, KEPT, OTHERS, RIGHT, SEEN, DrawnTask, SceneAnswers, SceneTask, image_of
from examples.scenes.parts import CHANGES, Change, change, sample
from examples.scenes.words import described
from examples.scenes.world import Scene, Thing, generator, holds, sample_scene
from models.images import load_image

EDITED_SPLITS = (SEEN, "colours", "pairs")  # scenes of the split `counts` leave no room
IN_PLACE = ("colour", "replace", "swap", "ground", "remove")  # changes after which all places are known to the cell
LATER, ALONE = "step with its history", "step, its own text alone"


class DocumentTask(DrawnTask):
    """Images that are generated after other segments of a document; its `prompt` is its last text."""

    def document_of(self, item: Item) -> list:
        """Texts and images."""
        raise NotImplementedError

    def generated_by(self, model, items, generator):
        documents = [self.document_of(item) for item in items]
        made = model.generate(documents, plan=["image"], null="text", generator=generator, **self.generation)
        return [image for (image,) in made]

    def sheet_image(self, item, answer):
        """The images before, the generated one, and a right one."""
        before = [segment for segment in self.document_of(item) if not isinstance(segment, str)]
        return side_by_side(*before, load_image(self.folder / answer), self.true_image(item))


class SceneEditing(DocumentTask):
    """A scene and an instruction: what was asked must have changed, and the rest must be as before."""

    name = "scenes_editing"
    kinds = {"edit": EDITED_SPLITS}
    parts = (CHANGED, KEPT, *CHANGES)  # a kind of change: what is right of the edits that ask for it

    def items_of(self, kind, split, number) -> list[Item]:
        rng = generator(self.name, split, self._seed, self.cells, number)
        wanted = tuple(CHANGES)[number % len(CHANGES)]
        before, done = changed_scene(rng, self.cells, split, wanted)
        facts = {"kind": kind, "split": split, "before": before, "scene": done.scene, "change": wanted}
        key = f"{wanted}-{split}-{number:04d}"
        return [Item(key, done.instruction, stratum=f"{kind}, {split}", facts=facts, expected=described(done.scene))]

    def document_of(self, item) -> list:
        return [image_of(item.facts["before"]), item.prompt]

    def rate(self, item, scenes) -> dict[str, bool]:
        found = rate_edit(item.facts["before"], item.facts["scene"], item.facts["change"], scenes[0])
        return found | {item.facts["change"]: found[RIGHT]}


def changed_scene(rng, cells: int, split: str, kind: str) -> tuple[Scene, Change]:
    """A scene of a split and a change of this kind, which not every scene allows."""
    counts = (1, 2) if kind == "add" else (2, 2, 3, 3)
    while True:
        before = sample_scene(rng, cells, split, counts)
        for _ in range(8):
            done = change(before, rng, split)
            if done.kind == kind:
                return before, done


def rate_edit(before: Scene, after: Scene, kind: str, read: Scene) -> dict[str, bool]:
    """Whether what was asked has changed, whether all else is as it was, and both.

    A place that the change does not fix to the cell, of a thing that was added, moved or resized, is one of nine.
    """
    rest = set(before.things) & set(after.things)
    new = tuple(thing for thing in after.things if thing not in rest)
    seen = tuple(thing for thing in read.things if thing not in rest)
    if kind in IN_PLACE:
        shown = set(seen) == set(new)
    else:
        shown = holds({"things": claims_of(after, new)}, replace(read, things=seen))
    same_ground = read.ground == after.ground
    kept = rest <= set(read.things) and (same_ground or kind == "ground")
    shown = shown and (same_ground or kind != "ground")
    return {RIGHT: shown and kept, CHANGED: shown, KEPT: kept}


def claims_of(scene: Scene, things: Sequence[Thing]) -> list[dict]:
    """All that is said of these things, with one of nine places."""
    return [
        {"icon": thing.icon, "colour": thing.colour, "size": thing.size, "place": scene.place(thing)}
        for thing in things
    ]


class SceneStories(DocumentTask):
    """Steps of stories: the first image from its text, a later one from all before it, and from its own text alone.

    A text tells what happens and nothing else, so only the history tells the rest. Later steps are given the true
    images before them, and are right if icon, colour, size and place (of nine) of every thing are, and the ground.
    """

    name = "scenes_stories"
    kinds = dict.fromkeys(("first step", LATER, ALONE), EDITED_SPLITS)
    parts = ("2nd step", "3rd step", "4th step")

    def items_of(self, kind, split, number) -> list[Item]:
        story = sample("stories", number, self._seed, split, self.cells)
        last = len(story.scenes) - 1
        step = 0 if kind == "first step" else 1 + number % last
        texts = story.said["texts"]
        facts = {"kind": kind, "split": split, "scene": story.scenes[step], "step": step}
        facts |= {"texts": texts[: step + 1], "history": story.scenes[:step]}
        key = f"{kind.replace(' ', '-').replace(',', '')}-{split}-{number:04d}"
        return [Item(key, texts[step], stratum=f"{kind}, {split}", facts=facts, expected=described(story.scenes[step]))]

    def document_of(self, item) -> list:
        facts = item.facts
        if facts["kind"] == ALONE:
            return [item.prompt]
        told = zip(facts["texts"], facts["history"], strict=False)
        return [segment for text, scene in told for segment in (text, image_of(scene))] + [item.prompt]

    def rate(self, item, scenes) -> dict[str, bool]:
        true, step = item.facts["scene"], item.facts["step"]
        right = holds({"things": claims_of(true, true.things), "ground": true.ground}, scenes[0])
        return {RIGHT: right} | ({self.parts[step - 1]: right} if step else {})

    def notes(self) -> list[str]:
        return [*super().notes(), "later steps are given the true images before them"]


class SceneSeveral(SceneTask, QuestionTask):
    """Questions about two or three images at once; an answer must be exactly the right one."""

    name = "scenes_several"
    kinds = dict.fromkeys(("change", "find", "count"), (SEEN, *OTHERS))
    max_new_tokens = 32
    judge = SceneAnswers.judge

    def items_of(self, kind, split, number) -> list[Item]:
        index = tuple(self.kinds).index(kind)
        one = sample("several", 3 * number + index, self._seed, split, self.cells)  # their kinds come in turn
        assert one.said["kind"] == kind
        images = partial(images_of, one.scenes)
        facts = {"kind": kind, "split": split}
        return [Item(one.key, one.said["question"], images, one.key, "", f"{kind}, {split}", facts, one.said["answer"])]

    def sheet_image(self, item, answer):
        return side_by_side(*item.open_image())


def images_of(scenes: Sequence[Scene]) -> list:
    return [image_of(scene) for scene in scenes]
