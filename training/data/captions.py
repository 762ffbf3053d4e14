"""The text of an image: its own or one from elsewhere, with an instruction or shortened (spec §15)."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from training.data.json_records import JsonTable
from training.data.skipping import EMPTY_TEXT, MALFORMED_ITEM, SkipSample, checked_text

CAPTION_INSTRUCTIONS = (
    "Describe this image.",
    "What does the picture show?",
    "Give a short description of the image.",
    "Please caption this picture.",
    "Tell me what you see in this image.",
    "What can be seen here?",
    "Write a caption for the image.",
    "Summarise the content of this picture.",
    "Explain what is in this image.",
    "What is depicted in the picture?",
    "Describe the scene.",
    "What is going on in this image?",
    "Put this picture into words.",
    "How would you describe this picture?",
    "Provide a description of the picture.",
    "Could you say what this image shows?",
    "Describe the picture for someone who cannot see it.",
    "What would be a good caption for this?",
    "Name the main things in this image.",
    "Give a clear account of the image.",
    "Look at the picture and describe it.",
    "What do you notice in this picture?",
    "Say what the image is about.",
    "Please describe what is shown.",
    "Compose a caption that fits this image.",
    "What is the subject of this picture?",
    "Can you describe the image?",
    "Report what is visible in the picture.",
    "Characterise this image in words.",
    "I would like a description of this image.",
    "Which objects and surroundings does the picture show?",
    "Translate this image into a sentence.",
    "Sum up the picture.",
    "Tell a reader what the picture contains.",
)
OPENINGS = (  # of machine-made captions; before any that are their prefixes
    "The image features ",
    "The image shows ",
    "The image displays ",
    "The image contains ",
    "The image depicts ",
    "The picture shows ",
    "The picture features ",
    "The photo shows ",
    "The scene shows ",
    "This image features ",
    "This image shows ",
    "In this image, there is ",
    "In this image, ",
    "In this picture, ",
    "In the photo, ",
)
TEXT_SUFFIXES = ("text", "txt", "caption")


@dataclass(frozen=True)
class ExternalCaptions:
    """Captions that replace the samples' own ones; the first rule that matches a sample wins.

    Args:
        folder: `external_caption_path`, for keys with ``SA1B``: ``{folder}/{name}.txt``.
        laion, cc12m: for shards whose address holds the word: ``{laion}/{shard}/{key}.caption`` and
            ``{cc12m}/{shard}/{name}.caption``.
        journeydb: key → one caption or several.
    """

    folder: str
    laion: str | None = None
    cc12m: str | None = None
    journeydb: JsonTable | None = None

    def file_of(self, key: str, url: str) -> Path | None:
        """Where the caption of a sample lies, if the first three rules say so."""
        name, shard = key.rpartition("/")[2], url.rpartition("/")[2].partition(".")[0]
        if "SA1B" in key:
            return Path(self.folder, f"{name}.txt")
        if self.laion and "laion" in url:
            return Path(self.laion, shard, f"{key}.caption")
        if self.cc12m and "cc12m" in url:
            return Path(self.cc12m, shard, f"{name}.caption")
        return None


@dataclass(frozen=True)
class Captions:
    """Raw sample → text.

    Args:
        external: captions from elsewhere.
        instructions: put ``USER: \\n{instruction} ASSISTANT: `` before the text.
        shorten: for generation: of captions from the first three places elsewhere, half are cut to their first
            sentence, and the openings are removed.
    """

    external: ExternalCaptions | None = None
    instructions: bool = False
    shorten: bool = False

    def __call__(self, raw: dict, rng: random.Random) -> str:
        """The text of one sample.

        Raises:
            SkipSample: there is none, or it is empty or no UTF-8.
        """
        text = self._text(raw, rng).strip()
        if not text:
            raise SkipSample(EMPTY_TEXT, str(raw.get("__key__", "")))
        return f"USER: \n{rng.choice(CAPTION_INSTRUCTIONS)} ASSISTANT: {text}" if self.instructions else text

    def _text(self, raw: dict, rng: random.Random) -> str:
        key, url = raw.get("__key__", ""), raw.get("__url__", "")
        file = self.external and self.external.file_of(key, url)
        if file:
            text = _first_line(file)
            return _shortened(text, rng) if self.shorten else text
        found = self.external and self.external.journeydb and self.external.journeydb.get(key)
        return own_text(raw, rng) if found is None else _one_of(found, key, rng)


def own_text(raw: dict, rng: random.Random) -> str:
    """The caption a sample brings along; one of several by chance."""
    key = raw.get("__key__", "")
    value = next((raw[suffix] for suffix in TEXT_SUFFIXES if suffix in raw), None)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SkipSample(MALFORMED_ITEM, f"{key}: the caption is no UTF-8 ({error})") from None
    return _one_of(value, key, rng)


def _one_of(value, key: str, rng: random.Random) -> str:
    if isinstance(value, list) and value:
        value = rng.choice(value)
    if value is None or value == []:
        raise SkipSample(EMPTY_TEXT, key)
    return checked_text(value, f"caption of {key}")


def _first_line(file: Path) -> str:
    try:
        with open(file, encoding="utf-8") as lines:
            return lines.readline().rstrip("\r\n")
    except FileNotFoundError:
        raise SkipSample(EMPTY_TEXT, f"{file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SkipSample(MALFORMED_ITEM, f"{file}: {error}") from None


def _shortened(text: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        text = re.split(r"[.!?](?:\s|$)", text.strip(), maxsplit=1)[0]
    for opening in OPENINGS:
        text = text.replace(opening, "")
    return text
