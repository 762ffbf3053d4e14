"""What the image tokenizer loses: PSNR, SSIM, rFID and codebook use on a folder of images (`reconstruction_images`).

An image is compared as the model sees it: resized and cropped to its resolution, in 8 bits.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError, shown
from common.files import check_file, field, read_json, real_path, visible_files
from common.inputs import required_folder
from evaluation.images import FID, check_fid, fid_metric, need, psnr_and_ssim, side_by_side, square
from evaluation.task import Item, Task, Verdict, ratio
from models.images import load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CODEBOOK_FILE = "codebook.json"
SET_FILE = "set.json"  # figures of the whole set
CODES, RFID = "codebook use, %", "rFID"


class TokenizerTask(Task):
    """Images through the image tokenizer and back; an answer is the file of what came back."""

    reads_root, answers_are_files = False, True

    def files_of(self, item) -> list[str]:
        """The image, and its codes."""
        return [f"images/{item.facts['file']}{suffix}" for suffix in (".png", ".npy")]

    def predict(self, model, items, images, generator) -> list[str]:
        codes = model.encode(images)
        answers = []
        for item, image, own in zip(items, model.decode(codes), codes.cpu().numpy(), strict=True):
            picture, numbers = self.files_of(item)
            answers.append(self.output.save(picture, image))
            with self.output.writing(numbers) as temporary, temporary.open("wb") as file:
                np.save(file, own.astype(np.int32))
        self.output.write_json(CODEBOOK_FILE, {"codebook_size": model.vq_model.config.codebook_size})
        return answers

    def seen(self, item: Item) -> Image.Image:
        """The image as the model sees it."""
        return square(item.open_image(), self.config.dataset.preprocessing.resolution)

    def codes_used(self, answers: Sequence[str]) -> dict[str, float]:
        """How much of the codebook the whole set uses, and 2 to the entropy of its codes."""
        file = self.folder / CODEBOOK_FILE
        size = field(read_json(file), "codebook_size", int, str(file))
        files = ((self.folder / answer).with_suffix(".npy") for answer in answers)
        counts = sum(np.bincount(read_codes(codes, size), minlength=size) for codes in files)
        shares = counts[counts > 0] / counts.sum()
        perplexity = float(2 ** -(shares * np.log2(shares)).sum())
        return {
            CODES: 100 * float((counts > 0).mean()),
            "codes used": float((counts > 0).sum()),
            "perplexity": perplexity,
        }

    def set_figures(self, folder, samples, seed) -> dict[str, np.ndarray]:
        """Without intervals: a resample holds fewer different images, and so fewer codes."""
        file = folder / SET_FILE
        tree = read_json(file)
        return {name: np.array([field(tree, name, float, str(file))]) for name in tree}

    def sheet_image(self, item, answer) -> Image.Image:
        """What the tokenizer made of it and, right of it, the image."""
        return side_by_side(load_image(self.folder / answer), self.seen(item))


class Reconstruction(TokenizerTask):
    name = "reconstruction"
    headline = "PSNR"
    unit = "dB"

    def check(self) -> None:
        need("torchmetrics", "reconstruction", "pip install 'torchmetrics>=1.4'")
        self.network = check_fid(self.config) if self.config.reconstruction_fid else ""

    @property
    def _folder(self) -> Path:
        return required_folder("reconstruction_images", self.config.reconstruction_images)

    @property
    def settings(self):
        """Images may be added to the folder between two starts, but not exchanged for those of another."""
        return super().settings | {"reconstruction_images": shown(real_path(self._folder))}

    def read_items(self) -> list[Item]:
        root, results = self._folder, real_path(self.folder.parent)
        files = [path for path in visible_files(root) if path.suffix.lower() in SUFFIXES]
        files = [path for path in files if not real_path(path).is_relative_to(results)]
        if not files:
            raise UserError(f"reconstruction_images={root} holds no image; expected {', '.join(SUFFIXES)}")
        if self.network:
            fid_metric(self.config)  # an unusable network is noticed before anything is asked
        return [self._item(shown(path.relative_to(root)), path) for path in files]

    def _item(self, name: str, path: Path) -> Item:
        """Its size belongs to the key, so that an image that changed is another item, under another file name."""
        key = f"{name}, {path.stat().st_size} bytes"
        file = hashlib.sha256(key.encode()).hexdigest()[:16]
        return Item(key, "", self.image(path), name, facts={"file": file})

    def judge(self, items, answers) -> list[Verdict]:
        restored = [self.folder / answer for answer in answers]
        verdicts = []
        for item, path in zip(items, restored, strict=True):
            ((psnr, ssim),) = psnr_and_ssim([load_image(path)], [self.seen(item)])
            verdicts.append(Verdict("", psnr, {"SSIM": ssim}))
        figures = self.codes_used(answers)
        if self.network:
            fid = FID(self.config)
            fid.add(len(items), lambda number: self.seen(items[number]), real=True)
            fid.add(len(items), lambda number: load_image(restored[number]), real=False)
            figures[RFID] = fid.value()
        self.output.write_json(SET_FILE, figures)
        return verdicts

    def counts(self, items, verdicts) -> dict[str, float]:
        found = {"PSNR": sum(v.score for v in verdicts), "SSIM": sum(v.facts["SSIM"] for v in verdicts)}
        return found | {"pictures": len(items)}

    def figures(self, sums) -> dict[str, np.ndarray]:
        ssim = 100 * ratio(sums["SSIM"], sums["pictures"])
        return {"PSNR": ratio(sums["PSNR"], sums["pictures"]), "SSIM x 100": ssim}

    def notes(self) -> list[str]:
        size = self.config.dataset.preprocessing.resolution
        found = [f"{size} x {size} pixels: shorter side by PIL's bicubic, centre crop"]
        if self.network:
            found.append(f"rFID at {self.config.fid_size} pixels through {self.network}")
        return found


def read_codes(file: Path, size: int) -> np.ndarray:
    """(N,) the codes of one image, 0 … size − 1; `UserError` if they are damaged."""
    check_file(file)
    try:
        codes = np.load(file)  # pickles are refused
        if codes.ndim == 1 and codes.dtype.kind == "i" and (0 <= codes).all() and (codes < size).all():
            return codes
    except (OSError, ValueError, EOFError):
        pass
    raise UserError(f"{file} is damaged; remove {file.parents[1]} and start again")
