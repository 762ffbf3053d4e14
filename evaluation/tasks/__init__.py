"""The benchmarks by name. A new one is a subclass of `Task` and one line here."""

from pkgutil import resolve_name

from evaluation.task import Task

TASKS = {  # name -> module:class, imported when the task is asked for
    "pope": "evaluation.tasks.yes_no:POPE",
    "mme": "evaluation.tasks.yes_no:MME",
    "flickr30k": "evaluation.tasks.flickr30k:Flickr30k",
    "vqav2": "evaluation.tasks.vqa:VQAv2",
    "gqa": "evaluation.tasks.vqa:GQA",
    "mmmu": "evaluation.tasks.mmmu:MMMU",
    "geneval": "evaluation.tasks.text_to_image:GenEval",
    "coco": "evaluation.tasks.text_to_image:COCO",
    "reconstruction": "evaluation.tasks.reconstruction:Reconstruction",
    "editing": "evaluation.tasks.editing:Editing",
    "emoji_drawing": "examples.emoji_world.benchmark:EmojiDrawing",
    "emoji_naming": "examples.emoji_world.benchmark:EmojiNaming",
    "emoji_yes_no": "examples.emoji_world.benchmark:EmojiYesNo",
    "emoji_style": "examples.emoji_world.benchmark:EmojiStyle",
    "scenes_drawing": "examples.scenes.benchmark:SceneDrawing",
    "scenes_answers": "examples.scenes.benchmark:SceneAnswers",
    "scenes_reconstruction": "examples.scenes.benchmark:SceneReconstruction",
    "scenes_inpainting": "examples.scenes.benchmark:SceneInpainting",
    "scenes_extrapolation": "examples.scenes.benchmark:SceneExtrapolation",
    "scenes_editing": "examples.scenes.document_benchmark:SceneEditing",
    "scenes_stories": "examples.scenes.document_benchmark:SceneStories",
    "scenes_several": "examples.scenes.document_benchmark:SceneSeveral",
}
SCENES = tuple(name for name in TASKS if name.startswith("scenes_"))
EMOJI = tuple(name for name in TASKS if name.startswith("emoji_"))
GROUPS = {"emoji": EMOJI, "scenes": SCENES[:5], "scenes_documents": SCENES[5:]}  # several tasks by one name


def task_class(name: str) -> type[Task]:
    return resolve_name(TASKS[name])
