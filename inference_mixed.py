"""Documents of texts and images: edits by instruction, stories, and whatever the model makes of one (docs/mixed.md).

    python3 inference_mixed.py config=configs/showo_tiny_demo.yaml mode=edit image_path=car.png \\
        prompt='make the car blue *** remove the car'
    python3 inference_mixed.py config=configs/showo_tiny_demo.yaml mode=story num_images=3 prompt='a red car'
    python3 inference_mixed.py config=configs/showo_tiny_demo.yaml mode=free max_images=4 documents=begun.jsonl

- `mode=edit`: the image after each instruction of `prompt`, for each image of `image_path` (a folder, too).
- `mode=story`: for each first text of `prompt`, its image, the next text, its image, … up to `num_images`.
- `mode=free`: the model decides what comes after an image, a text, or an image with a text, and when it ends.

`documents` is a jsonl of documents that are gone on with instead, ``{"segments": [{"text": …}, {"image": path}, …]}`` a
line; paths are relative to the file. Adds the new images `0000.png` …, `results.jsonl` with a line for each document,
and `grid.png`, in which each is a row, to `output_dir` (default: `{experiment.output_dir}/{mode}`), or with
`overwrite=true` replaces those of earlier runs; logs the panel `mixed_modal` to wandb.
"""

from itertools import product
from pathlib import Path
from random import Random

from PIL import Image

from common.config import MixedInferenceConfig, load_config
from common.contact_sheet import contact_sheet
from common.errors import UserError, run_cli, shown
from common.inputs import required_path, rotation_note, split_pieces
from common.progress import progress
from common.results import MAX_COLUMNS, ResultFolder
from common.tracking import Tracker
from inference_mmu import find_images

Document = list[str | Path]  # texts and files of images, in order


def find_documents(config) -> list[Document]:
    """What is given: the documents of a file, or each image with each prompt.

    Raises:
        UserError: something is missing, unusable, or has no effect on the mode.
    """
    mode = config.mode
    if config.documents:
        if config.prompt or config.image_path:
            raise UserError("documents holds whole documents; leave prompt and image_path out, or documents")
        return read_documents(config)
    if mode == "story" and config.image_path:
        raise UserError("image_path has no effect on mode=story, which begins with a text; give mode=free or documents")
    if mode == "free" and not (config.prompt or config.image_path):
        raise UserError("nothing to go on with is given; add prompt='…', image_path=PATH or documents=FILE.jsonl")
    prompts = split_pieces("prompt", config.prompt) if config.prompt or mode != "free" else [None]
    images: list[Path | None] = [None]
    if config.image_path or mode == "edit":
        pieces = split_pieces("image_path", config.image_path)
        images = [path for piece in pieces for path in find_images(config, "image_path", piece)]
    return [[segment for segment in pair if segment is not None] for pair in product(images, prompts)]


def read_documents(config) -> list[Document]:
    """The documents of a file; `UserError` names the first that is unusable or that the mode cannot go on with."""
    from models.images import ImageOptions, has_rotation, load_image, resized_size
    from training.data.documents import TurnWords, located, record_of, segments_of
    from training.data.json_records import JsonRecords, RecordUnits
    from training.data.sources import Skipped

    options, resolution = ImageOptions(**config.image), config.dataset.preprocessing.resolution
    units = RecordUnits([JsonRecords(str(required_path("documents", config.documents)))])
    documents, rotated = [], 0
    for number in range(len(units)):
        document: Document = []
        try:
            (raw,) = units.read(number, Random(0))
            if isinstance(raw, Skipped):
                raise raw
            record, name = record_of(raw), raw["__key__"]
            if "segments" not in record:
                raise UserError(f"{name} has no segments; give {{'segments': [{{'text': …}}, {{'image': path}}, …]}}")
            for segment in segments_of(record, name, TurnWords()):
                if "text" in segment:
                    document.append(segment["text"])
                elif isinstance(segment["image"], str):
                    document.append(Path(located(segment["image"], raw, None)["image"]))
                    image = load_image(document[-1], options)
                    resized_size(image.size, resolution, shown(document[-1]))
                    rotated += has_rotation(image)
                else:
                    raise UserError(f"{name}: an image is no text; give the path of its file")
        except Skipped as skipped:
            raise UserError(f"documents={config.documents}: {skipped.detail}") from None
        if not document:
            raise UserError(f"{name} has no segment; give a text or an image to go on with")
        if config.mode != "free" and not isinstance(document[-1], str):
            raise UserError(f"{name} ends with an image; mode={config.mode} goes on after a text, mode=free after both")
        if config.mode == "edit" and not any(isinstance(segment, Path) for segment in document):
            raise UserError(f"{name} has no image to edit; give one, or mode=story")
        documents.append(document)
    if not documents:
        raise UserError(f"documents={config.documents} holds no document; write one a line")
    if rotated:
        print(rotation_note(rotated), flush=True)
    return documents


def main(argv: list[str]) -> None:
    config = load_config(argv, MixedInferenceConfig)
    if config.mode is None:
        raise UserError("mode is not given; add mode=edit, mode=story, mode=free")
    if config.model.showo.w_clip_vit:
        raise UserError(
            "model.showo.w_clip_vit is true, but documents need a model that sees images as codes; give such a config"
        )
    from models.loading import check_sizes
    from models.pipeline_inputs import check_texts

    check_sizes(config.model.showo, config.dataset.preprocessing.resolution, config.model.vq_model.vq_model_name)
    results = ResultFolder(config.output_dir or Path(config.experiment.output_dir) / config.mode, config.overwrite)
    documents = find_documents(config)
    check_texts(segment for document in documents for segment in document if isinstance(segment, str))

    from models import ShowoPipeline

    pipeline = ShowoPipeline.from_config(config)
    if results.note:
        print(results.note, flush=True)
    run, output_dir = f"{config.experiment.name}_mixed_{config.mode}", results.folder
    with Tracker(config.experiment.project, run, output_dir, config=config, wandb_config=config.wandb) as tracker:
        generate_all(pipeline, config, documents, results, tracker)
    written = f"documents written to {shown(results.lines)}: {len(documents)}, with new images: {results.count}"
    print(f"{written}; overview: {shown(results.write_grid())}")


def plan_of(config) -> list[str] | None:
    """The kinds of the segments to come; None: the model decides."""
    if config.mode == "free":
        return None
    return ["image"] + ["text", "image"] * (config.num_images - 1 if config.mode == "story" else 0)


def generate_all(pipeline, config, documents: list[Document], results: ResultFolder, tracker: Tracker) -> None:
    """Goes on with all documents, each with a generator of its own; writes and logs batch by batch."""
    import torch

    from models import SamplingParameters
    from models.pipeline_inputs import batches, image_seed

    plan, first = plan_of(config), pipeline.generator(config.seed).initial_seed()
    for batch in batches(range(len(documents)), config.batch_size):
        given, seeds = [documents[number] for number in batch], [image_seed(first, number) for number in batch]
        steps = plan and len(given) * plan.count("image") * config.generation_timesteps
        with progress(total=steps, desc="generating", leave=False) as bar:
            made = pipeline.generate(
                given,
                plan=plan,
                max_images=config.max_images,
                max_new_tokens=config.max_new_tokens,
                text_temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                timesteps=config.generation_timesteps,
                temperature=config.generation_temperature,
                sampling=SamplingParameters(**config.sampling),
                guidance_scale=config.guidance_scale,
                null=config.null or ("text" if config.mode == "edit" else "all"),
                text_guidance_scale=config.text_guidance_scale,
                image_guidance_scale=config.image_guidance_scale,
                generator=seeds,
                on_new=lambda document, segment, value, bar=bar: bar.update(isinstance(value, torch.Tensor)),
            )
        panel, start = [], results.count
        for document, new, seed in zip(given, made, seeds, strict=True):
            names = [write(results, segment) for segment in new]
            known = [told(segment) for segment in document]
            segments = [one | {"new": False} for one in known] + [one | {"new": True} for one in names]
            files = [one["image"] for one in names if "image" in one]
            results.add(files=files, mode=config.mode, segments=segments, seed=seed)
            words = f"{in_words(known)} → {in_words(names)}"
            print(shown(words), flush=True)
            row = [
                (segment, "") if isinstance(segment, str) else (pipeline.view(segment), "given") for segment in document
            ]
            row += [(segment, "") for segment in new]
            results.show_row(row)
            cells, captions = zip(*row, strict=True)
            panel.append((contact_sheet(cells, captions, columns=min(len(cells), MAX_COLUMNS)), words))
        sheets, texts = zip(*panel, strict=True)
        tracker.log_images("mixed_modal", list(sheets), list(texts), start, save=False)


def told(segment: str | Path) -> dict[str, str]:
    """A given segment in a line of the results."""
    return {"text": segment} if isinstance(segment, str) else {"image": shown(segment.name)}


def write(results: ResultFolder, segment: str | Image.Image) -> dict[str, str]:
    """A new segment in a line of the results; an image is saved."""
    return {"text": segment} if isinstance(segment, str) else {"image": results.save(segment)}


def in_words(segments: list[dict[str, str]]) -> str:
    """Segments in one line."""
    return " ".join(" ".join(one["text"].split()) if "text" in one else f"[{one['image']}]" for one in segments)


if __name__ == "__main__":
    run_cli(main)
