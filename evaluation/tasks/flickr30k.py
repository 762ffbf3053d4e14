"""Flickr30k: captions of the 1,000 test images of Karpathy's split, scored by CIDEr against five people's.

`flickr30k/dataset_flickr30k.json` (Karpathy's) and `flickr30k/flickr30k-images/`.

CIDEr is computed as in COCO's evaluation: Penn-Treebank tokens in lower case, punctuation dropped. The scorer is
pycocoevalcap's. Its tokenizer is a Java program, which is used where `java` is found; elsewhere the rule written out
here. `test_flickr30k.py` compares the two.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import field
from evaluation.official_files import choice, read_official, records_of, unique_keys
from evaluation.task import Item, Paper, QuestionTask, Verdict, cell, ratio

FILE = "dataset_flickr30k.json"
JAVA = "Stanford's PTBTokenizer 3.4.1 (Java)"
PYTHON = "the Python rule for Penn-Treebank tokens (no Java here)"
CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
JOINED = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
JOINED |= {"gimme": "gim me", "y'all": "y' all", "rock'n'roll": "rock 'n' roll", "'tis": "'t is", "'twas": "'t was"}
SIGNS = {"’": "'", "‘": "'", "“": '"', "”": '"', "–": " -- ", "—": " -- ", "…": "...", "£": "#", "€": "$"}
SIGNS |= {"¢": " cents", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
SIGNS = str.maketrans(SIGNS)
AMPERSAND = re.compile("(?<![A-Z])&|&(?![A-Z])")  # AT&T is a word, salt&pepper is three
NO_TOKENS = re.compile("[\ufe0f\U00010000-\U0010ffff]")  # emoji
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", '"': "''", "{": "-lcb-", "}": "-rcb-"}
TOKEN = re.compile(
    r"""
    (?:https?://|www\.)\S*\w | [\w.+-]+@[\w-]+\.[\w.]*\w                # addresses
    | (?:[a-z]\.){2,} | ph\.d\. | [a-z]\.(?!\w) | no\.(?=\s+\d)       # u.s., an initial, no. 7
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|ltd|co|corp|prof|ave|blvd|mt|sgt|capt|gen|lt|col|ft|rd|rev|gov|sen)\.
    | (?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri)\.
    | n't(?!\w) | '(?:s|m|d|re|ve|ll|em|til|t|\d0s)(?!\w) | 'n' | y' | '\d\d(?!\S)
    | \d+(?::\d\d)+ | [-+]?\d+(?:[.,]\d+)+ | [-+]?\.\d+ | [-+]\d+     # 5:30, 1,000, 2.5, .5, -5
    | \d+(?=') | \#[^\W\d]\w* | c\+\+ | c\#                            # 5'10", #tag
    | @?\w+(?:[-/'&.]\w+)*                                              # up-to-date, black/white, o'clock
    | \.{3} | -+ | [!?]+ | \S
    """,
    re.VERBOSE,
)


class Flickr30k(QuestionTask):
    name = "flickr30k"
    headline = "CIDEr"
    unit = "CIDEr x 100"
    official_size = 1000
    max_new_tokens = 64  # as in lmms-eval
    images_expected = "Flickr30k's images in flickr30k/flickr30k-images"
    paper = Paper(62.5, 67.6, "the paper's prompt is unknown (flickr30k_prompt sets ours); Karpathy's test split")

    def check(self) -> None:
        tokenizer_name()

    def read_items(self) -> list[Item]:
        file = self.root / "flickr30k" / FILE
        tree = read_official(file, "Karpathy's split of Flickr30k")
        items = [
            self._item(place, record)
            for place, record in records_of(file, tree, "images")
            if choice(record, "split", ("train", "val", "test"), place) == "test"
        ]
        if not items:
            raise UserError(f"{file}: no image has 'test' in the field 'split'; expected Karpathy's 1,000")
        unique_keys([item.key for item in items], file, "imgid")
        return items

    def named_images(self, items):
        return ((self._folder / item.image, f"field 'filename' of imgid {item.key} in {FILE}") for item in items)

    @property
    def _folder(self) -> Path:
        return self.root / "flickr30k/flickr30k-images"

    def _item(self, place: str, record: dict) -> Item:
        key, image = field(record, "imgid", int, place), field(record, "filename", str, place)
        sentences = field(record, "sentences", list, place)
        captions = [field(sentence, "raw", str, f"{place}, field 'sentences'") for sentence in sentences]
        if not captions:
            raise UserError(f"{place}: field 'sentences' is empty; expected the captions that people wrote")
        opened, facts = self.image(self._folder / image), {"captions": captions}
        return Item(str(key), self.config.flickr30k_prompt, opened, image, facts=facts, expected=captions[0])

    def judge(self, items, answers) -> list[Verdict]:
        tokens, scores = cider(answers, [item.facts["captions"] for item in items])
        return [Verdict(text, float(score)) for text, score in zip(tokens, scores, strict=True)]

    def counts(self, items, verdicts) -> dict[str, float]:
        return {"pictures": len(verdicts), "cider": sum(verdict.score for verdict in verdicts)}

    def figures(self, sums) -> dict[str, np.ndarray]:
        return {"CIDEr": 100 * ratio(sums["cider"], sums["pictures"])}

    def notes(self) -> list[str]:
        return [f"tokenised by {tokenizer_name()}"]

    def write_submission(self, items, answers):
        """`flickr30k_test_results.json`, in the form of COCO's caption results."""
        file = "submission/flickr30k_test_results.json"
        pairs = zip(items, answers, strict=True)
        self.output.write_json(file, [{"image_id": int(item.key), "caption": cell(answer)} for item, answer in pairs])


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[float]]:
    """The captions' tokens, and CIDEr (1 = 100 of the tables) of each image.

    Args:
        captions: one an image.
        references: human captions of each; word frequencies are counted over all of them.
    """
    Cider = _library("cider.cider").Cider
    lines = [*captions, *(reference for several in references for reference in several)]
    tokens = tokenize(lines)
    ours, theirs = tokens[: len(captions)], iter(tokens[len(captions) :])
    right = {number: [next(theirs) for _ in several] for number, several in enumerate(references)}
    _, scores = Cider().compute_score(right, {number: [text] for number, text in enumerate(ours)})
    return ours, [float(score) for score in scores]


def tokenizer_name() -> str:
    """Which tokenizer is used here; `UserError` where the library is missing."""
    _library("cider.cider")
    return JAVA if shutil.which("java") else PYTHON


def tokenize(captions: Sequence[str]) -> list[str]:
    """Tokens parted by blanks, one string a caption."""
    library = _library("tokenizer.ptbtokenizer")
    flat = [" ".join(caption.split()) for caption in captions]
    found = java_tokens(flat, library) if shutil.which("java") else [python_tokens(caption) for caption in flat]
    dropped = set(library.PUNCTUATIONS)
    return [" ".join(token for token in tokens if token not in dropped) for tokens in found]


def java_tokens(captions: Sequence[str], library) -> list[list[str]]:
    """What pycocoevalcap's `PTBTokenizer` asks Java for; that class writes into its own folder, which may be locked."""
    jar = Path(library.__file__).with_name(library.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"],
        input="".join(f"{caption}\n" for caption in captions),
        capture_output=True,
        encoding="utf-8",
    )
    lines = done.stdout.split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):
        reason = " ".join(done.stderr.split())[-200:]
        raise UserError(f"java does not run the caption tokenizer ({reason}); fix it, or take java off the PATH")
    return [line.split() for line in lines]


def python_tokens(caption: str) -> list[str]:
    """The same rule without Java, for English captions."""
    text = NO_TOKENS.sub(" ", AMPERSAND.sub(" & ", caption.translate(SIGNS))).lower()
    text = " ".join(JOINED.get(word.rstrip(".,!?;:"), word) for word in text.split())
    tokens = TOKEN.findall(CLITICS.sub(r" \1", text))
    return [BRACKETS.get(token, token) for token in tokens]


def _library(name: str):
    if find_spec("pycocoevalcap") is None:
        raise UserError(
            "flickr30k needs pycocoevalcap, which is not installed: pip install --no-deps pycocoevalcap==1.2"
        )
    return import_module(f"pycocoevalcap.{name}")
