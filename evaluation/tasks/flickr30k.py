"""Flickr30k: captions of the 1,000 test images of Karpathy's split, scored by CIDEr against five people's.

`flickr30k/dataset_flickr30k.json` (Karpathy's) and `flickr30k/flickr30k-images/`.
"""

from functools import partial
from pathlib import Path

import numpy as np

from common.errors import UserError
from evaluation.caption_tokens import cider, tokenizer_name
from evaluation.official_files import check_images, field, read_json, unique_keys, write_json
from evaluation.task import Item, Paper, QuestionTask, Verdict, cell, ratio
from models.images import load_image

FILE = "dataset_flickr30k.json"


class Flickr30k(QuestionTask):
    name = "flickr30k"
    headline = "CIDEr"
    unit = "CIDEr x 100"
    official_size = 1000
    max_new_tokens = 64
    paper = Paper(62.5, 67.6, "the paper's prompt is unknown (flickr30k_prompt sets ours); Karpathy's test split")

    def __init__(self, config, root: Path, folder: Path) -> None:
        super().__init__(config, root, folder)
        tokenizer_name()  # a library that is not there is seen before anything is asked

    def read_items(self) -> list[Item]:
        file = self.root / "flickr30k" / FILE
        records = field(str(file), read_json(file, dict, "Karpathy's split of Flickr30k"), "images", list)
        items = []
        for number, record in enumerate(records):
            place = f"{file}, image {number}"
            if field(place, record, "split", str, ("train", "val", "test")) == "test":
                items.append(self._item(place, record))
        if not items:
            raise UserError(f"{file}: no image has 'test' in the field 'split'; expected Karpathy's 1,000")
        unique_keys([item.key for item in items], file, "imgid")
        named = {item.image: item.key for item in items}
        check_images(
            [self._folder / item.image for item in items],
            lambda path: f"field 'filename' of imgid {named[path.name]} in {FILE}",
            f"Flickr30k's images in {self._folder}",
        )
        return items

    @property
    def _folder(self) -> Path:
        return self.root / "flickr30k/flickr30k-images"

    def _item(self, place: str, record: dict) -> Item:
        key, image = field(place, record, "imgid", int), field(place, record, "filename", str)
        sentences = field(place, record, "sentences", list)
        captions = [field(f"{place}, field 'sentences'", sentence, "raw", str) for sentence in sentences]
        if not captions:
            raise UserError(f"{place}: field 'sentences' is empty; expected the captions that people wrote")
        opened, facts = partial(load_image, self._folder / image), {"captions": captions}
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

    def write_submission(self, folder, items, answers):
        """`flickr30k_test_results.json`, in the form of COCO's caption results."""
        file = folder / "flickr30k_test_results.json"
        pairs = zip(items, answers, strict=True)
        write_json(file, [{"image_id": int(item.key), "caption": cell(answer)} for item, answer in pairs])
