"""How MMMU's official evaluation reads free text as a letter, or as words and numbers (mmmu/utils/eval_utils.py)."""

import random
import re
from collections.abc import Mapping, Sequence

ENDS = ",.!?;:'"  # stripped from both ends of a response, one kind after the other
TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.5, .5
)


def parse_letter(response: str, options: Mapping[str, str], rng: random.Random) -> str:
    """The letter a response chooses.

    First bracketed letters count, then letters between blanks, then, in responses of more than five words, the options'
    own texts; of several the last one. If there is none, the official code picks one at random.

    Args:
        options: letter → text, in order.
        rng: for that draw.
    """
    for mark in ENDS:
        response = response.strip(mark)
    response = f" {response} "
    for form in ("({})", " {} "):
        if found := [letter for letter in options if form.format(letter) in response]:
            return max(found, key=lambda letter: response.rfind(form.format(letter)))
    lower = response.lower()
    if len(response.split()) > 5:
        if found := [letter for letter, text in options.items() if text.lower() in lower]:
            return max(found, key=lambda letter: lower.rfind(options[letter].lower()))
    return rng.choice(list(options))


def parse_open(response: str) -> list[str | float]:
    """Candidate answers in a response: the ends of its sentences after words such as "is", and the numbers in them."""
    tails = _key_parts(response)
    numbers = [number for tail in tails for pattern in NUMBERS for number in pattern.findall(tail)]
    parsed = [value for text in (*tails, *numbers) for value in normalize(text)]
    return list(dict.fromkeys(parsed))


def open_is_right(expected: str | Sequence[str], parsed: Sequence[str | float]) -> bool:
    """Whether a right text is part of a parsed one, or a right number equals one."""
    answers = [expected] if isinstance(expected, str) else expected
    right = [value for answer in answers for value in normalize(answer)]
    texts = [value for value in right if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in right for value in parsed)


def normalize(text: str) -> list[str | float]:
    """A number rounded to two decimals, or lower-cased text; a single letter must have a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_parts(response: str) -> list[str]:
    """The shortest text after an indicator in each line; the whole response if there is none."""
    response = response.strip().strip(".").lower()
    # Faithful: the official pattern also splits before capitals, of which the lower-cased text has none.
    lines, tails = response.split("\n"), []
    for number, line in enumerate(lines, 1):
        indicators = (*INDICATORS, "=") if number == len(lines) else INDICATORS
        found = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        shortest = ""
        for tail in found:  # Faithful: an empty tail gives way to the next one
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in TRIVIAL:
            tails.append(shortest)
    return tails or [response]
