"""Flickr30k: Penn-Treebank tokens of captions, by Java and by rule, and CIDEr by hand."""

import math
import shutil

import pytest

from common.errors import UserError
from evaluation.tasks import flickr30k
from evaluation.tasks.flickr30k import cider, java_tokens, python_tokens, tokenize
from tests.evaluation.official import write_flickr30k

EXPECTED = {
    "Two young guys , with shaggy hair , look at their hands .": "two young guys with shaggy hair look at their hands",
    "A man's dog isn't running; it's \"sitting\" (down)... here": "a man 's dog is n't running it 's sitting -lrb- "
    "down -rrb- here",
    "The U.S. Army vs. Mr. Smith at 5:30pm, on St. John St.": "the u.s. army vs. mr. smith at 5:30 pm on st. john st.",
    "He cannot go, she's gonna wanna.": "he can not go she 's gon na wan na",
    "1,000 people ran 2.5 miles for $3.50 & 50% off #1": "1,000 people ran 2.5 miles for $ 3.50 & 50 % off # 1",
    "black/white T-shirt up-to-date -- dash - word": "black/white t-shirt up-to-date dash word",
    "wait...what ?! yes!! no,yes a.b end.": "wait what ?! yes !! no yes a.b end",
    "a dogs' toys James' car the girl's": "a dogs toys james car the girl 's",
    "A café – en dash ‘quoted’ “double” it’s": "a café en dash quoted double it 's",
    "two.three four,five six;seven A. man": "two.three four five six seven a. man",
    "We're 10 o'clock y'all, they've 4x4s, 1990s, 2nd": "we 're 10 o'clock y' all they 've 4x4s 1990s 2nd",
    "3 p.m. man 's wo n't 'em": "3 p.m. man 's wo n't 'em",
    "wait… what…now": "wait what now",
    "1½ cups, ¾ full": "1 1/2 cups 3/4 full",
    "5'10\" tall, or 5'10": "5 10 tall or 5 '10",
    "a #tag and #1": "a #tag and # 1",
    "he writes c++, C#.": "he writes c++ c#",
    "it is -5, +5 or .5, 1+1": "it is -5 +5 or .5 1 +1",
    "a Ph.D. and an M.D. in Jan.": "a ph.d. and an m.d. in jan.",
    "1990–1995, salt&pepper of AT&T": "1990 1995 salt & pepper of at&t",
    "a 🐶 dog 😀": "a dog",
    "": "",
}


def test_the_rule_in_python(monkeypatch):
    monkeypatch.setattr(flickr30k.shutil, "which", lambda name: None)
    assert tokenize(list(EXPECTED)) == list(EXPECTED.values())
    assert "Python" in flickr30k.tokenizer_name()
    monkeypatch.setattr(flickr30k, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps pycocoevalcap==1.2"):
        tokenize([""])


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
def test_the_rule_is_that_of_java():
    library = flickr30k._library("tokenizer.ptbtokenizer")
    dropped = set(library.PUNCTUATIONS)
    for caption, tokens in zip(EXPECTED, java_tokens(list(EXPECTED), library), strict=True):
        ours = [token for token in python_tokens(caption) if token not in dropped]
        assert ours == [token for token in tokens if token not in dropped], caption


def test_length_is_penalised():
    """A 2-gram too many: the factor is exp(-1 / (2 * 36))."""
    _, scores = cider(["x y x", "p"], [["x y"], ["q"]])
    unigrams = (1 * 1 + 1 * 1) / (math.sqrt(5) * math.sqrt(2))  # counts are clipped to the reference's
    bigrams = 1 / math.sqrt(2)
    assert scores[0] == pytest.approx(10 * (unigrams + bigrams) / 4 * math.exp(-1 / 72))


def test_cider_by_hand(own):
    """Two images, so a word of one image has idf ln 2. "x y" against "x y" is alike in 1- and 2-grams and has no
    3- and 4-grams: 10 * (1 + 1 + 0 + 0) / 4 = 5; "p q" against "p z" only in half its unigrams: 1.25."""
    write_flickr30k(own.root, {"0.jpg": ["x y"], "1.jpg": ["p z"]})
    assert own.answer("flickr30k", {"0": "X, y!", "1": "p\nq"}) == {"CIDEr": pytest.approx(312.5)}
    lines = own.lines("flickr30k/predictions.jsonl")
    assert [(line["parsed"], line["score"]) for line in lines] == [("x y", 5.0), ("p q", 1.25)]
    results = own.json("flickr30k/submission/flickr30k_test_results.json")
    assert results == [{"image_id": 0, "caption": "X, y!"}, {"image_id": 1, "caption": "p q"}]
    assert "tokenised by" in own.text("results.md")
