"""CIDEr of captions as COCO's evaluation computes it: Penn-Treebank tokens in lower case, punctuation dropped.

The scorer is pycocoevalcap's. Its tokenizer is a Java program, which is used where `java` is found; elsewhere the rule
is written out here. `test_caption_tokens.py` compares the two.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from common.errors import UserError

JAVA = "Stanford's PTBTokenizer 3.4.1 (Java)"
PYTHON = "the Python rule for Penn-Treebank tokens (no Java here)"
CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
JOINED = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
JOINED |= {"gimme": "gim me", "y'all": "y' all", "rock'n'roll": "rock 'n' roll"}
SIGNS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "£": "#", "€": "$", "¢": " cents"})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", '"': "''", "{": "-lcb-", "}": "-rcb-"}
TOKEN = re.compile(
    r"""
    (?:https?://|www\.)\S*\w | [\w.+-]+@[\w-]+\.[\w.]*\w                # addresses
    | (?:[a-z]\.){2,} | [a-z]\.(?!\w) | no\.(?=\s+\d)                # u.s., an initial, no. 7
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|ltd|co|corp|prof|ave|blvd|mt|sgt|capt|gen|lt|col|ft)\.
    | n't(?!\w) | '(?:s|m|d|re|ve|ll|em|til|tis|twas|\d0s)(?!\w) | 'n' | y'
    | \d+(?::\d\d)+ | \d+(?:[.,]\d+)+                                   # 5:30, 1,000, 2.5
    | @?\w+(?:[-/'&.]\w+)*                                              # up-to-date, black/white, o'clock
    | \.{3} | -+ | [!?]+ | \S
    """,
    re.VERBOSE,
)


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
        raise UserError(f"java does not run the caption tokenizer ({reason}); mend it, or take java off the PATH")
    return [line.split() for line in lines]


def python_tokens(caption: str) -> list[str]:
    """The same rule without Java, for English captions."""
    text = caption.translate(SIGNS).lower()
    text = " ".join(JOINED.get(word.rstrip(".,!?;:"), word) for word in text.split())
    tokens = TOKEN.findall(CLITICS.sub(r" \1", text))
    return [BRACKETS.get(token, token) for token in tokens]


def _library(name: str):
    if find_spec("pycocoevalcap") is None:
        raise UserError(
            "flickr30k needs pycocoevalcap, which is not installed: pip install --no-deps pycocoevalcap==1.2"
        )
    return import_module(f"pycocoevalcap.{name}")
