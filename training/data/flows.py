"""What a data flow reads, by its settings: files → source of raw samples → transform → `Flow` (spec §15, docs/data.md).

A flow has a name, which its settings are called by (`training.batch_size_{name}`, `dataset.params.train_{name}_…`), and
a subclass of `FlowReader`. A sample is ``{"image": (3, res, res) float32 in [-1, 1], "text": str, "key": str}``; with
``"codes"``, (N,) int64, in place of the image where shards hold codes, ``"pixel_values"``, (3, S, S), in the CLIP-ViT
branch, and ``"input_ids"`` and ``"labels"``, (L,) int64, in place of the text where it is a conversation. A language
sample is a text.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from common.errors import UserError
from common.files import resolve_path, visible_folders
from llava import ChatFormat, encode_conversation, encode_plain
from models.images import ImageOptions
from training.data.documents import DocumentSample, TurnWords, document_length, open_documents
from training.data.image_text import (
    PIXELS_ONLY,
    Captions,
    ExternalCaptions,
    ImageTextSample,
    ImageTransform,
    PixelTransform,
    image_sample,
)
from training.data.imagenet import ImageFolder
from training.data.json_records import JsonTable
from training.data.language import Documents, text_sample
from training.data.llava import LlavaRecords, LlavaSample
from training.data.parquet import IMAGE_COLUMNS, TEXT_COLUMNS, ParquetUnits
from training.data.paths import (
    JSON,
    PARQUET,
    SHARDS,
    TABLES,
    TEXT,
    existing_folder,
    expand_paths,
    has_suffix,
    is_address,
)
from training.data.shards import ShardUnits, check_codes, manifests, promised_samples, read_shards, tokenizer_sha256
from training.data.sources import Epochs, Resampled, Source, Units
from training.data.streams import Flow, Transform

SORTS = (SHARDS, PARQUET, JSON + TEXT + TABLES)  # the files of a flow are all of one of these kinds
LLAVA = ("llava_pretrain", "llava_tuning")


@dataclass(frozen=True)
class Reading:
    """How a process reads its flows.

    Args:
        process, num_processes: which share of the data it reads.
        tokenizer: of the model; flows of conversations cannot be read without one.
        image_processor: CLIP's, for the images of the mmu flow in the CLIP-ViT branch.
        text_length: tokens that a conversation has room for; None: `dataset.preprocessing.max_seq_length`.
        end_together: every flow begins its next epoch when the shortest, in steps, has ended one (`min_size`).
    """

    process: int = 0
    num_processes: int = 1
    tokenizer: Any = None
    image_processor: Any = None
    text_length: int | None = None
    end_together: bool = False


class FlowReader:
    """One flow of one split. A subclass says which files it takes, and how a raw sample becomes a sample.

    Args:
        config: of the run.
        name: of the flow.
        split: ``train``, or ``eval``: held-out data, in an order that is the same in every run, not augmented.
    """

    formats: tuple[str, ...] = SHARDS + PARQUET

    def __init__(self, config, name: str, split: str = "train"):
        self.config, self.name, self.split = config, name, split
        self.params, self.training = config.dataset.params, split == "train"

    # ---- its settings ----

    @property
    def setting(self) -> str:
        """The key of its files in `dataset.params`."""
        return f"{self.split}_{self.name}_shards_path_or_url"

    @property
    def batch_size(self) -> int:
        return self.config.training[f"batch_size_{self.name}"]

    @property
    def max_samples(self) -> int | None:
        """Length of an epoch; None: all."""
        return None

    @property
    def title(self) -> str:
        """The flow in messages."""
        return f"the {self.name} flow"

    @property
    def is_on(self) -> bool:
        """Whether the run reads it."""
        return bool(self.batch_size and (self.training or self.params[self.setting]))

    # ---- its files ----

    def checks(self) -> list[Callable]:
        """Calls that raise `UserError` if paths are not set or missing; nothing is read."""
        return [lambda: self.files]

    @cached_property
    def files(self) -> list[str]:
        """The existing files of the flow, all of one sort; looked up once, as folders may be large and far away;
        `UserError` if there are none, some are missing, or of another sort."""
        setting = f"dataset.params.{self.setting}"
        paths = expand_paths(setting, self.params[self.setting], self.formats)
        strange = [path for path in paths if not _is_readable(path, self.formats)]
        sorts = [of_sort for sort in SORTS if (of_sort := [path for path in paths if has_suffix(path, sort)])]
        if strange or len(sorts) > 1:
            got = strange[0] if strange else f"{sorts[0][0]} and {sorts[1][0]}"
            fetch = "; only shards can be read from an address: fetch it first" if strange and is_address(got) else ""
            raise UserError(
                f"{setting}: {self.title} reads files of one sort of {', '.join(self.formats)}; got {got}{fetch}"
            )
        return paths

    # ---- its samples ----

    def source(self, reading: Reading) -> Source:
        """The raw samples. Shards are drawn with replacement in training, everything else in epochs."""
        paths = self.files
        if not has_suffix(paths[0], SHARDS) and not is_address(paths[0]):
            return Epochs(self.units(paths), self.max_samples)
        check_codes(paths, self.code_sizes(), self.refuses_codes(reading))
        promised = promised_samples(paths)
        if not self.training:
            return Epochs(ShardUnits(paths, promised))
        return Resampled(partial(read_shards, paths, self.params.shuffle_buffer_size, promised), self.max_samples)

    def units(self, paths: list[str]) -> Units:
        """The data set of files that are no shards; parquet."""
        return ParquetUnits(paths, *self.columns(), self.params.shuffle_buffer_size)

    def columns(self) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Parquet columns, and the keys that name them."""
        image, text = self.params.image_column, self.params.text_column
        names = {"image": (image,) if image else IMAGE_COLUMNS, "text": (text,) if text else TEXT_COLUMNS}
        return names, {key: f"dataset.params.{key}_column" for key in names}

    def code_sizes(self) -> dict[str, int]:
        """The values that a manifest of codes must have."""
        model, resolution = self.config.model.showo, self.config.dataset.preprocessing.resolution
        sizes = {"resolution": resolution, "num_vq_tokens": model.num_vq_tokens, "codebook_size": model.codebook_size}
        return sizes | asdict(self.image_options())

    def image_options(self) -> ImageOptions:
        return ImageOptions(self.config.image.exif, self.config.image.background)

    def refuses_codes(self, reading: Reading) -> str:
        """Why the flow cannot use codes in place of images; empty if it can."""
        return ""

    def transform(self, reading: Reading) -> Transform:
        """The transform of raw samples to samples."""
        raise NotImplementedError

    def flow(self, source: Source, reading: Reading) -> Flow:
        """The endless batches of this process."""
        params = self.params
        return Flow(
            source,
            self.transform(reading),
            self.batch_size,
            seed=f"{self.config.training.seed or 0}/{self.name}" if self.training else f"eval/{self.name}",
            process=reading.process,
            num_processes=reading.num_processes,
            num_workers=params.num_workers if self.training else 0,
            name=self.name,
            max_skipped_fraction=params.max_skipped_fraction,
            pin_memory=params.pin_memory,
            persistent_workers=params.persistent_workers,
        )


def open_flows(readers: Sequence[FlowReader], reading: Reading) -> dict[str, Flow]:
    """The flows by name; `UserError` if paths are missing, or data are of another form."""
    sources = dict(zip(readers, all_or_problems(partial(reader.source, reading) for reader in readers), strict=True))
    if reading.end_together:
        end_together({source: reader.batch_size for reader, source in sources.items()})
    return {reader.name: reader.flow(source, reading) for reader, source in sources.items()}


def end_together(batch_sizes: dict[Source, int]) -> None:
    """Shortens the epochs of all sources to as many steps as the shortest has."""
    steps = [source.samples / size for source, size in batch_sizes.items() if source.samples]
    for source, size in batch_sizes.items():
        if steps:
            source.samples = max(1, round(min(steps) * size))


def check_data(readers: Iterable[FlowReader]) -> None:
    """Whether all paths exist; reads none of them; `UserError` if paths are not set or missing, all of them in one
    message."""
    all_or_problems(check for reader in readers for check in reader.checks())


def check_tokenizer(readers: Iterable[FlowReader], vq_model) -> None:
    """Raises `UserError` if shards of codes were made with another image tokenizer than the run's, as far as their
    manifests tell."""
    made_with = {}
    for reader in readers:
        for file, manifest in manifests(reader.files).items():
            if found := manifest.get("tokenizer_sha256"):
                made_with[file] = found
    own = tokenizer_sha256(vq_model) if made_with else None
    if wrong := sorted(file for file, found in made_with.items() if found != own):
        raise UserError(
            f"{wrong[0]}: these codes were made with another image tokenizer than model.vq_model names; encode the "
            "images again with tools/encode_images.py, or name that tokenizer"
        )


def all_or_problems(calls: Iterable[Callable[[], Any]]) -> list:
    """The results of all calls; `UserError` with the problems of all of them in one message."""
    results, problems = [], []
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return results


def _is_readable(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a flow of files with these suffixes can open it; only WebDataset opens URLs."""
    if is_address(path):
        return SHARDS[0] in suffixes and not has_suffix(path, PARQUET + JSON + TEXT)
    return has_suffix(path, suffixes)


# ---- images alone ----


class ImageReader(FlowReader):
    """Images of shards or parquet files; their texts are not read."""

    @property
    def setting(self) -> str:
        return f"{self.split}_shards"

    @property
    def batch_size(self) -> int:
        return self.config.training.batch_size

    @property
    def title(self) -> str:
        return "the tokenizer"

    def columns(self):
        column, usual = self.params.image_column, tuple(name for name in IMAGE_COLUMNS if name != "codes")
        names = (column,) if column else usual
        return {"image": names}, {"image": "dataset.params.image_column"}

    def code_sizes(self) -> dict[str, int]:
        return {}

    def refuses_codes(self, reading: Reading) -> str:
        return PIXELS_ONLY

    def transform(self, reading: Reading) -> Transform:
        params, augmented = self.params, self.training
        flip, options = params.random_flip and augmented, self.image_options()
        images = PixelTransform(params.resolution, 0, 0, flip=flip, options=options)
        return partial(image_sample, images=images, max_shift=params.max_shift if augmented else 0)


# ---- the flows of Show-o ----


class LanguageReader(FlowReader):
    """Plain texts."""

    formats = PARQUET + TEXT

    def units(self, paths: list[str]) -> Units:
        return super().units(paths) if has_suffix(paths[0], PARQUET) else Documents(paths, self.params.lm_column)

    def columns(self):
        return {"text": (self.params.lm_column,)}, {"text": "dataset.params.lm_column"}

    def transform(self, reading: Reading) -> Transform:
        return text_sample


class ShowoImageReader(FlowReader):
    """A flow with images, which may be files that are named by the data."""

    @property
    def max_samples(self) -> int | None:
        return self.config.experiment[f"max_train_examples_{self.name}"] if self.training else None

    def checks(self) -> list[Callable]:
        key = self._root_key()
        return super().checks() + ([partial(existing_folder, f"dataset.params.{key}", self.params[key])] if key else [])

    def _root_key(self) -> str:
        """The key of the folder that image file names are relative to; empty if none is given, or no names are read."""
        keys = (f"{split}_{self.name}_image_root" for split in (self.split, "train"))
        return next((key for key in keys if self.params[key]), "")

    def refuses_codes(self, reading: Reading) -> str:
        return self.images(reading).refuses_codes()

    def images(self, reading: Reading, **settings) -> ImageTransform:
        """The transform of the images; `settings` of `ImageTransform`."""
        preprocessing, model, root = self.config.dataset.preprocessing, self.config.model.showo, self._root_key()
        sizes = preprocessing.resolution, model.num_vq_tokens, model.codebook_size
        settings = {"flip": preprocessing.random_flip and self.training, "options": self.image_options()} | settings
        return ImageTransform(*sizes, root=_resolved(self.params[root]) if root else None, **settings)


class ImageTextReader(ShowoImageReader):
    """Images with texts, of the kind that a setting names."""

    kind_key: ClassVar[str]
    suffixes: ClassVar[dict[str, tuple[str, ...]]]  # of each kind

    def __init__(self, config, name: str, split: str = "train"):
        super().__init__(config, name, split)
        self.kind = config.dataset[self.kind_key]
        self.formats = self.suffixes[self.kind]

    @property
    def title(self) -> str:
        return f"dataset.{self.kind_key} {self.kind!r}"

    def checks(self) -> list[Callable]:
        checks = super().checks()
        return [*checks, self._check_captions] if self._has_captions() else checks

    def _root_key(self) -> str:
        return super()._root_key() if self.kind in LLAVA or self.kind.endswith("_parquet") else ""

    def _has_captions(self) -> bool:
        """Whether its texts are captions, which may come from elsewhere."""
        return self.kind in ("t2i", "captioning")

    def _check_captions(self) -> None:
        """The external captions; only the first key switches them on."""
        params = self.params
        places = (f"external_{place}caption_path" for place in ("", "laion12m_", "cc12m_", "journeydb_"))
        keys = [key for key in places if params[key]]
        if keys and not params.external_caption_path:
            named = ", ".join(f"dataset.params.{key}" for key in keys)
            raise UserError(f"{named} has no effect without dataset.params.external_caption_path; give that one, too")
        kinds = ((key, expand_paths if "journeydb" in key else existing_folder) for key in keys)
        all_or_problems(partial(check, f"dataset.params.{key}", params[key]) for key, check in kinds)

    def _captions(self) -> ExternalCaptions | None:
        params = self.params
        if not params.external_caption_path or not self._has_captions():
            return None
        folders = [params[f"external_{key}caption_path"] for key in ("", "laion12m_", "cc12m_")]
        table = _resolved(params.external_journeydb_caption_path)
        return ExternalCaptions(*map(_resolved, folders), JsonTable(table) if table else None)

    def transform(self, reading: Reading) -> Transform:
        return self.sample(self.images(reading), Captions(self._captions(), shorten=True), reading)

    def sample(self, images: ImageTransform, captions: Captions, reading: Reading) -> Transform:
        return ImageTextSample(images, captions, reading.tokenizer, self.config.dataset.preprocessing.max_seq_length)


class T2IReader(ImageTextReader):
    """Images to generate, with captions or the names of their classes."""

    kind_key = "gen_type"
    suffixes = {"imagenet1k": SHARDS, "t2i": SHARDS, "t2i_parquet": PARQUET}

    def checks(self) -> list[Callable]:
        names = self.params.class_names_path
        if self.kind != "imagenet1k" or not names:
            return super().checks()
        return [*super().checks(), partial(expand_paths, "dataset.params.class_names_path", names)]

    @cached_property
    def files(self) -> list[str]:
        """As ever, or the folder of an ImageNet."""
        value = self.params[self.setting]
        if self.kind == "imagenet1k" and isinstance(value, str):
            folder = resolve_path(value)
            if folder.is_dir() and visible_folders(folder):
                return [str(folder)]
        return super().files

    def units(self, paths: list[str]) -> Units:
        if Path(paths[0]).is_dir():
            return ImageFolder(paths[0], _resolved(self.params.class_names_path))
        return super().units(paths)


class MmuReader(ImageTextReader):
    """Images to understand, with captions or conversations."""

    kind_key = "und_type"
    suffixes = {"captioning": SHARDS, "captioning_parquet": PARQUET} | dict.fromkeys(LLAVA, JSON + SHARDS)

    def units(self, paths: list[str]) -> Units:
        return LlavaRecords(paths) if self.kind in LLAVA else super().units(paths)

    def images(self, reading: Reading) -> ImageTransform:
        preprocessing = self.config.dataset.preprocessing
        flip = (preprocessing.random_flip or preprocessing.und_random_flip) and self.training
        jitter = preprocessing.und_jitter if self.training else 0.0
        return super().images(reading, flip=flip, jitter=jitter, processor=reading.image_processor)

    def transform(self, reading: Reading) -> Transform:
        images = self.images(reading)
        if self.kind not in LLAVA:
            return self.sample(images, Captions(self._captions(), self.params.add_caption_prompt), reading)
        plain = self.kind == "llava_pretrain" and reading.image_processor is not None
        encode = encode_plain if plain else encoder_of(self.config, reading)
        room = reading.text_length or self.config.dataset.preprocessing.max_seq_length
        return LlavaSample(images, encode, reading.tokenizer, room)


def encoder_of(config, reading: Reading) -> Callable:
    """The function from the turns of a conversation and a tokenizer to ids and labels, as `conversation` says."""
    if config.conversation != "chat":
        return encode_conversation
    try:
        return ChatFormat.of(reading.tokenizer).encode
    except ValueError as error:
        raise UserError(f"conversation=chat: {error}") from None


class MixedReader(ShowoImageReader):
    """Documents, in which texts and images take turns, in any of the forms of `training.data.documents`."""

    formats = SHARDS + PARQUET + JSON + TABLES

    def units(self, paths: list[str]) -> Units:
        return open_documents(paths, self.params.shuffle_buffer_size)

    def images(self, reading: Reading) -> ImageTransform:
        return super().images(reading, flip=False)  # a text may say left

    def transform(self, reading: Reading) -> Transform:
        try:
            words = TurnWords.of(self.config.conversation, reading.tokenizer)
        except ValueError as error:
            raise UserError(f"conversation=chat: {error}") from None
        return DocumentSample(self.images(reading), reading.tokenizer, words, self.max_length, self.is_clean)

    @property
    def is_clean(self) -> bool:
        """Whether images that are learned stand twice in a row."""
        return self.config.mixed.history == "clean"

    @property
    def max_length(self) -> int:
        """Most tokens of a document."""
        if self.config.mixed.max_length is not None:
            return self.config.mixed.max_length
        one = [{"text": "", "loss": True}, {"loss": True}]
        lengths = [self.config.dataset.preprocessing.max_seq_length - 2, self.config.model.showo.num_vq_tokens]
        return document_length(one * 4, lengths * 4, self.is_clean)


def _resolved(path: str | None) -> str | None:
    return str(resolve_path(path)) if path else None
