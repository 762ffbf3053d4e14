"""Questions with a picture each, in batches; `ShowoPipeline.answer` asks all questions about all pictures."""

from collections.abc import Sequence

import torch
from PIL import Image

from models import ShowoPipeline


class Answerer(ShowoPipeline):
    """A pipeline that answers one question about each picture. Both understanding branches come with it."""

    def answer_each(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = 1,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """One batch of answers, without outer blanks, as `answer` gives them.

        Args:
            images: a picture for each question; one and the same object is encoded once.
        """
        assert len(images) == len(questions), f"{len(images)} pictures, {len(questions)} questions"
        shown = list({id(image): image for image in images}.values())
        place = {id(image): index for index, image in enumerate(shown)}
        inputs = self._question_rows(shown, [place[id(image)] for image in images], list(questions))
        new_ids = self.model.mmu_generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eot_token=self.prompting.eos_id,
            generator=generator,
        )
        return [text.strip() for text in self.prompting.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
