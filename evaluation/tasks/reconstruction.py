"""What the image tokenizer loses: PSNR, SSIM, rFID and codebook use on a folder of images (`reconstruction_images`).

An image is compared as the model sees it: resized and cropped to its resolution, in 8 bits.
"""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from common.inputs import required_path
from evaluation.images import FID, check_fid, fid_metric, need, psnr_and_ssim, save, side_by_side, square
from evaluation.official_files import field, read_json, write_json
from evaluation.task import Item, Task, Verdict, ratio
from models.images import load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CODEBOOK_FILE = "codebook.json"
SET_FILE = "set.json"  # figures of the whole set
CODES, RFID = "codebook use, %", "rFID"


class Reconstruction(Task):
    name = "reconstruction"
    headline = "PSNR"
    unit = "dB"

    def __init__(self, config, root, folder) -> None:
        super().__init__(config, root, folder)
        need("torchmetrics", "reconstruction", "pip install 'torchmetrics>=1.4'")
        self.network = check_fid(config) if config.reconstruction_fid else ""

    @property
    def _folder(self) -> Path:
        return required_path("reconstruction_images", self.config.reconstruction_images)

    @property
    def settings(self):
        """Images may be added to the folder between two starts, but not exchanged for those of another."""
        return super().settings | {"reconstruction_images": str(self._folder.resolve())}

    def read_items(self) -> list[Item]:
        root = self._folder
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"reconstruction_images={root} holds no image; expected {', '.join(SUFFIXES)}")
        if self.network:
            fid_metric(self.config)  # an unusable network is noticed before anything is asked
        return [self._item(str(path.relative_to(root)), path) for path in files]

    def _item(self, name: str, path: Path) -> Item:
        """Its size belongs to the key, so that an image that changed is another item, under another file name."""
        key = f"{name}, {path.stat().st_size} bytes"
        file = hashlib.sha256(key.encode()).hexdigest()[:16]
        return Item(key, "", partial(load_image, path), name, facts={"file": file})

    def predict(self, model, items, images, generator) -> list[str]:
        codes = model.encode(images)
        answers = []
        for item, image, own in zip(items, model.decode(codes), codes.cpu().numpy(), strict=True):
            answers.append(save(self.folder, f"images/{item.facts['file']}.png", image))
            np.save((self.folder / answers[-1]).with_suffix(".npy"), own.astype(np.int32))
        write_json(self.folder / CODEBOOK_FILE, {"codebook_size": model.vq_model.config.codebook_size})
        return answers

    def judge(self, items, answers) -> list[Verdict]:
        restored = [self.folder / answer for answer in answers]
        verdicts = []
        for item, path in zip(items, restored, strict=True):
            ((psnr, ssim),) = psnr_and_ssim([load_image(path)], [self._seen(item)])
            verdicts.append(Verdict("", psnr, {"SSIM": ssim}))
        figures = self._codes([path.with_suffix(".npy") for path in restored])
        if self.network:
            fid = FID(self.config)
            fid.add(len(items), lambda number: self._seen(items[number]), real=True)
            fid.add(len(items), lambda number: load_image(restored[number]), real=False)
            figures[RFID] = fid.value()
        write_json(self.folder / SET_FILE, figures)
        return verdicts

    def _seen(self, item: Item) -> Image.Image:
        """The image as the model sees it."""
        return square(item.open_image(), self.config.dataset.preprocessing.resolution)

    def _codes(self, files) -> dict[str, float]:
        """How much of the codebook the whole set uses, and 2 to the entropy of its codes."""
        file = self.folder / CODEBOOK_FILE
        size = field(str(file), read_json(file, dict, "the tokenizer's codebook size"), "codebook_size", int)
        counts = sum(np.bincount(np.load(codes), minlength=size) for codes in files)
        shares = counts[counts > 0] / counts.sum()
        perplexity = float(2 ** -(shares * np.log2(shares)).sum())
        return {
            CODES: 100 * float((counts > 0).mean()),
            "codes used": float((counts > 0).sum()),
            "perplexity": perplexity,
        }

    def counts(self, items, verdicts) -> dict[str, float]:
        found = {"PSNR": sum(v.score for v in verdicts), "SSIM": sum(v.facts["SSIM"] for v in verdicts)}
        return found | {"pictures": len(items)}

    def figures(self, sums) -> dict[str, np.ndarray]:
        ssim = 100 * ratio(sums["SSIM"], sums["pictures"])
        return {"PSNR": ratio(sums["PSNR"], sums["pictures"]), "SSIM x 100": ssim}

    def set_figures(self, folder, samples, seed) -> dict[str, np.ndarray]:
        """Without intervals: a resample holds fewer different images, and so fewer codes."""
        tree = read_json(folder / SET_FILE, dict, "figures of the whole set")
        return {name: np.array([field(str(folder / SET_FILE), tree, name, (int, float))]) for name in tree}

    def sheet_image(self, item, answer) -> Image.Image:
        """What the tokenizer made of it and, right of it, the image."""
        return side_by_side(load_image(self.folder / answer), self._seen(item))

    def notes(self) -> list[str]:
        size = self.config.dataset.preprocessing.resolution
        found = [f"{size} x {size} pixels: shorter side by PIL's bicubic, centre crop"]
        if self.network:
            found.append(f"rFID at {self.config.fid_size} pixels through {self.network}")
        return found
