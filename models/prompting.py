"""The sequence formats: text ids, image ids and special tokens → input ids, labels and attention mask (spec §2)."""

from dataclasses import dataclass

import torch

from models.backbones import complete_tokenizer
from models.documents import HISTORIES, DocumentFormat, learned_images, right_padded
from models.omni_attention import OmniMask
from models.vocabulary import IGNORE_ID, IMAGE_FEATURE_ID, PAD_TOKEN, SPECIAL_TOKENS, Vocabulary

# B rows, M = max_text_len, N image tokens, L row length


@dataclass
class Rows:
    """A batch of rows: ids (B, L) int64, labels (B, L) int64 or None (generation), and the attention mask.

    position_ids: (B, L) int64 for the rotary embedding where they are not 0, 1, …; else None.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    attention_mask: OmniMask
    position_ids: torch.Tensor | None = None


class UniversalPrompting:
    """Builds the rows of every task from texts and image ids.

    Args:
        tokenizer: the language model's tokenizer. The pad and the nine special tokens are added to it, and a bos token
            if it has none (see `complete_tokenizer`).
        max_text_len: M, the most text ids of a row, bos and eos included.
        ignore_id: label of unsupervised positions.
        cond_dropout_prob: probability that a t2i training text is replaced by the empty text, which trains the
            unconditional model of classifier-free guidance. All texts of a document are replaced together.
        history: what the later segments of a document see of an image that is learned. ``clean``: the image stands
            twice in the row, masked, where it is learned and nothing later sees it, and clean, where all later ones do,
            so that each segment is learned as it is generated; ``masked``: once, masked, as in the paper; ``prefix``:
            once; the images before a random one are clean and not learned, as in Show-o2.
        history_dropout_prob: probability that a document whose texts are left out loses, for each image that is
            learned, all segments before it, too.

    Raises:
        ValueError: the tokenizer has no bos or eos token, or has some of the special tokens at other ids; no such
            history.
    """

    def __init__(
        self,
        tokenizer,
        max_text_len: int = 128,
        ignore_id: int = IGNORE_ID,
        cond_dropout_prob: float = 0.1,
        history: str = "clean",
        history_dropout_prob: float = 0.5,
    ):
        if history not in HISTORIES:
            raise ValueError(f"history is {history!r}, expected one of {', '.join(HISTORIES)}")
        complete_tokenizer(tokenizer)
        known = tokenizer.get_vocab()
        llm_vocab_size = known.get(PAD_TOKEN, len(tokenizer))
        self.vocabulary = Vocabulary(llm_vocab_size)  # the codebook's size only affects later ids
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        for token, expected in self.special_token_ids.items():
            if tokenizer.convert_tokens_to_ids(token) != expected:
                raise ValueError(f"{token} has id {tokenizer.convert_tokens_to_ids(token)} here, expected {expected}")
        self.tokenizer = tokenizer
        self.max_text_len = max_text_len
        self.ignore_id = ignore_id
        self.cond_dropout_prob = cond_dropout_prob
        self.history, self.history_dropout_prob = history, history_dropout_prob
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Ids of the pad and the nine special tokens, by token."""
        names = {token: self.vocabulary.special_token_id(token) for token in SPECIAL_TOKENS}
        return names | {PAD_TOKEN: self.vocabulary.pad_id}

    def __call__(self, inputs: tuple, task: str, generator: torch.Generator | None = None) -> Rows:
        """Builds the rows of one task.

        Args:
            inputs: by task; image ids include the vocabulary's image offset.
                ``"t2i"``: (texts, image_ids (B, N), labels (B, N)), for training;
                ``"t2i_gen"``: (texts, image_ids (B, N)), for generation;
                ``"lm"``: (texts, L), for training;
                ``"mmu"``: (image_ids (B, N), texts), for training;
                ``"mmu_gen"``: (image_ids (B, N), texts), prompts for `mmu_generate`;
                ``"mmu_vit"``: (texts, num_features, system_prompt or None, the number of images of each text, by
                default one), prompts with the placeholder id −200 where CLIP features go.
                ``"mixed"``: (documents, masking rule of images (K, N) such as `training.masking.MaskingNoise`), for
                training. A document is a list of segments ``{"text": str, "loss": bool}`` or ``{"image_ids": (N,)
                int64, "loss": bool}`` in any order; `loss` (default: true) says whether it is learned. Texts that
                follow each other are one text. Without a rule no token is masked, and all of them are labels;
                ``"mixed_gen"``: (documents, whether their last text goes on, by default it does not), prompts for
                `document_generate`.
                Prompts have no eos; they are padded on the right, and the mask hides the pads.
            generator: of the dropout of ``"t2i"``, which draws one number per sample, and of ``"mixed"``.

        Raises:
            ValueError: unknown task, or different numbers of texts and images.
        """
        builders = {
            "t2i": self._t2i,
            "t2i_gen": self._t2i_gen,
            "lm": self._lm,
            "mmu": self._mmu,
            "mmu_gen": self._mmu_gen,
            "mmu_vit": self._mmu_vit,
            "mixed": self._mixed,
            "mixed_gen": self._mixed_gen,
        }
        if task not in builders:
            raise ValueError(f"unknown task {task!r}; known: {', '.join(builders)}")
        return builders[task](*inputs, **({"generator": generator} if task in ("t2i", "mixed") else {}))

    # ---- text ----

    def text_ids(self, text: str, truncation: bool = False) -> list[int]:
        """Ids of a text, starting with exactly one bos."""
        # `verbose=False`: what is too long is cut or refused here, with words of our own.
        ids = self.tokenizer(text, truncation=truncation, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def fits(self, prompt: str) -> bool:
        """Whether a prompt has room in a row of text to image; a longer one is cut."""
        return len(self.text_ids(prompt)) < self.max_text_len

    def _pad_right(self, ids: list[int], length: int) -> list[int]:
        return ids + [self.vocabulary.pad_id] * (length - len(ids))

    def _labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.masked_fill(input_ids == self.vocabulary.pad_id, self.ignore_id)

    # ---- text to image ----

    def _t2i_text(self, text: str, drop: bool) -> list[int]:
        """``pad… <t2i> bos text eos``: M + 1 ids, since M does not count the task token."""
        text_ids = [self.bos_id] if drop else self.text_ids(text)
        ids = [self.vocabulary.t2i_id, *text_ids, self.eos_id]
        if len(ids) > self.max_text_len + 1:
            ids = [*ids[: self.max_text_len], self.eos_id]
        return [self.vocabulary.pad_id] * (self.max_text_len + 1 - len(ids)) + ids

    def _t2i_rows(self, texts: list[str], image_ids: torch.Tensor, dropped: list[bool]) -> Rows:
        _check_pairs(len(texts), image_ids)
        device = image_ids.device
        text = torch.tensor([self._t2i_text(t, d) for t, d in zip(texts, dropped, strict=True)], device=device)
        input_ids = _with_image(text, image_ids, self.vocabulary)  # (B, M+1+N+2)
        num_pads = (text == self.vocabulary.pad_id).sum(1)
        mask = OmniMask.t2i(num_pads, self.max_text_len + 1, input_ids.shape[1])
        return Rows(input_ids, None, mask)

    def _t2i(self, texts, image_ids, labels, generator=None) -> Rows:
        dropped = (torch.rand(len(texts), generator=generator) < self.cond_dropout_prob).tolist()
        rows = self._t2i_rows(texts, image_ids, dropped)
        text_length = self.max_text_len + 1
        rows.labels = self._labels(rows.input_ids)
        rows.labels[:, text_length + 1 : -1] = labels.to(rows.labels.device)
        return rows

    def _t2i_gen(self, texts, image_ids) -> Rows:
        return self._t2i_rows(texts, image_ids, [False] * len(texts))

    # ---- language modelling ----

    def _lm(self, texts, length: int) -> Rows:
        ids = [[*self.text_ids(text, truncation=True), self.eos_id][:length] for text in texts]
        input_ids = torch.tensor([self._pad_right(row, length) for row in ids])
        return Rows(input_ids, self._labels(input_ids), OmniMask.lm(len(texts), length))

    # ---- understanding ----

    def _image_prefix(self, image_ids: torch.Tensor) -> torch.Tensor:
        """``<mmu> <soi>`` image ids ``<eoi>``, (B, N+3)."""
        task = image_ids.new_full((len(image_ids), 1), self.vocabulary.mmu_id)
        return _with_image(task, image_ids, self.vocabulary)

    def _mmu(self, image_ids, texts) -> Rows:
        """Image prefix, bos, text, eos, pads: N + 3 + M ids, of which only the text is supervised."""
        _check_pairs(len(texts), image_ids)
        prefix = self._image_prefix(image_ids)
        text = []
        for one in texts:
            ids = [*self.text_ids(one), self.eos_id]
            if len(ids) > self.max_text_len:
                ids = [*ids[: self.max_text_len - 1], self.eos_id]
            text.append(self._pad_right(ids, self.max_text_len))
        text_ids = torch.tensor(text, device=image_ids.device)
        input_ids = torch.cat([prefix, text_ids], dim=1)
        labels = torch.cat([torch.full_like(prefix, self.ignore_id), self._labels(text_ids)], dim=1)
        return Rows(input_ids, labels, OmniMask.from_ids(input_ids, self.vocabulary))

    def _mmu_gen(self, image_ids, texts) -> Rows:
        _check_pairs(len(texts), image_ids)
        prefix = self._image_prefix(image_ids).tolist()
        return self._prompts([p + self.text_ids(t) for p, t in zip(prefix, texts, strict=True)], image_ids.device)

    def _mmu_vit(self, texts, num_features: int, system_prompt: str | None = None, num_images=None) -> Rows:
        """``<mmu>`` system prompt ``<soi>`` features ``<eoi>`` text. No bos, as in LLaVA (spec §2)."""

        def ids_of(text):
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

        prefix = [self.vocabulary.mmu_id, *ids_of(system_prompt)]
        image = [self.vocabulary.soi_id, *[IMAGE_FEATURE_ID] * num_features, self.vocabulary.eoi_id]
        numbers, text_ids = num_images or [1] * len(texts), [ids_of(text) for text in texts]
        rows = self._prompts([prefix + image * n + ids for n, ids in zip(numbers, text_ids, strict=True)])
        begin = torch.tensor([len(prefix) + len(image) * n for n in numbers])[:, None]
        is_text = (torch.arange(rows.input_ids.shape[1]) >= begin) & (rows.input_ids != self.vocabulary.pad_id)
        rows.labels = torch.where(is_text, rows.input_ids, self.ignore_id)
        return rows

    # ---- documents ----

    @property
    def document_format(self) -> DocumentFormat:
        return DocumentFormat(self.vocabulary, self.bos_id, self.eos_id, lambda text: self.text_ids(text)[1:])

    def _mixed(self, documents, noise=None, generator=None) -> Rows:
        learned = [learned_images(document, self.history, generator) for document in documents]
        without_text, without_history = torch.rand(2, len(documents), generator=generator)
        images = [
            document[number]["image_ids"]
            for document, numbers in zip(documents, learned, strict=True)
            for number in numbers
        ]
        noised = labels = torch.stack(images) if images else torch.zeros(0, 0, dtype=torch.long)  # (K, N)
        if noise is not None and images:
            masked = noise(noised)
            noised, labels = masked.input_ids, masked.labels
        pairs = zip(noised.tolist(), labels.tolist(), strict=True)
        rows = []
        for number, (document, numbers) in enumerate(zip(documents, learned, strict=True)):
            drop = bool(numbers) and bool(without_text[number] < self.cond_dropout_prob)
            rows.append(
                self.document_format.row(
                    document,
                    {segment: next(pairs) for segment in numbers},
                    history=self.history,
                    without_text=drop,
                    without_history=drop and bool(without_history[number] < self.history_dropout_prob),
                )
            )
        input_ids, labels, position_ids, mask = right_padded(rows, self.vocabulary.pad_id)
        return Rows(input_ids, labels, mask, position_ids)

    def _mixed_gen(self, documents, open_text: bool = False) -> Rows:
        return self._prompts([self.document_format.prompt(document, open_text) for document in documents])

    def _prompts(self, rows: list[list[int]], device=None) -> Rows:
        """Pads prompts on the right, so that a common prefix has the same positions in all rows and is encoded once."""
        length = max(map(len, rows))
        input_ids = torch.tensor([self._pad_right(row, length) for row in rows], device=device)
        mask = OmniMask.from_ids(input_ids, self.vocabulary).hide(input_ids == self.vocabulary.pad_id)
        return Rows(input_ids, None, mask)


def _with_image(before: torch.Tensor, image_ids: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """`before` ``<soi>`` image ids ``<eoi>``."""
    soi = image_ids.new_full((len(image_ids), 1), vocabulary.soi_id)
    eoi = image_ids.new_full((len(image_ids), 1), vocabulary.eoi_id)
    return torch.cat([before, soi, image_ids, eoi], dim=1)


def _check_pairs(num_texts: int, image_ids: torch.Tensor) -> None:
    if image_ids.ndim != 2 or len(image_ids) != num_texts:
        raise ValueError(f"{num_texts} texts need image ids of shape ({num_texts}, N); got {tuple(image_ids.shape)}")
