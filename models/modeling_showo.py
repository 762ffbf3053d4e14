"""Show-o: one transformer that reads and generates, with omni-attention and three losses (spec §4, §5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from models.backbones import DEFAULT_LLM, Backbone, backbone_config, find_backbone, has_qk_norm, read_llm_config
from models.checkpoint_io import (
    CheckpointMixin,
    check_state_dict,
    load_state_dict_folder,
    resize_rows,
    resolve_folder,
)
from models.generation import ShowoGeneration
from models.head_loss import TASKS, Supervised, head_loss
from models.omni_attention import OmniMask
from models.packing import PACKED_SDPA, Packing
from models.step_plan import StepPlan
from models.vocabulary import IMAGE_FEATURE_ID, Vocabulary

# B rows, L positions, H hidden size, V vocabulary, S supervised positions
# renamed in transformers 5.24, which warns of the old name and will drop it in 5.40
CACHE_ARGUMENT = (
    "cache" if "cache" in signature(find_backbone({}).model_class.forward).parameters else "past_key_values"
)


class ShowoConfig(PreTrainedConfig):
    """Sizes of a Show-o; the keyword names are those of the published `config.json` (spec §12).

    Args:
        llm_model_path: hub name or folder of the language model whose architecture is used, of one of the families in
            `models/backbones.py`. The default's is built in and needs no network.
        vocab_size: text ids + new special tokens + image codes + mask token.
        llm_vocab_size, num_new_special_tokens, codebook_size: the parts of the vocabulary (spec §1).
        num_vq_tokens: N, image tokens of an image.
        w_clip_vit: understanding from CLIP features through `mm_projector` instead of image codes.
        clip_feature_size: width of those features.
        load_from_showo: published key, kept for the record; weights are chosen by the caller.
        llm_config: the language model's own configuration; found by `llm_model_path` when absent. Its `model_type` is
            the family, so a saved folder says which language model it holds.
        qk_norm: whether queries and keys are normalised; default: as the family has it, added to the default's.

    Raises:
        ValueError: the sizes do not add up, or the language model or a published key's value does not work here.
    """

    model_type = "showo"

    def __init__(
        self,
        llm_model_path: str = DEFAULT_LLM,
        vocab_size: int = 58498,
        llm_vocab_size: int = 50295,
        num_new_special_tokens: int = 10,
        codebook_size: int = 8192,
        num_vq_tokens: int = 256,
        w_clip_vit: bool = False,
        clip_feature_size: int = 1024,
        load_from_showo: bool = True,
        llm_config: dict | None = None,
        mask_token_id: int | None = None,
        qk_norm: bool | None = None,
        **kwargs,
    ):
        self.llm_model_path = llm_model_path
        self.vocab_size = vocab_size
        self.llm_vocab_size = llm_vocab_size
        self.num_new_special_tokens = num_new_special_tokens
        self.codebook_size = codebook_size
        self.num_vq_tokens = num_vq_tokens
        self.w_clip_vit = w_clip_vit
        self.clip_feature_size = clip_feature_size
        self.load_from_showo = load_from_showo
        self.llm_config = llm_config if llm_config is not None else read_llm_config(llm_model_path)
        self.qk_norm = has_qk_norm(self.llm_config, qk_norm, llm_model_path)
        expected = self.vocabulary.vocab_size
        if vocab_size != expected:
            raise ValueError(
                f"vocab_size is {vocab_size}, but llm_vocab_size {llm_vocab_size} + num_new_special_tokens "
                f"{num_new_special_tokens} + codebook_size {codebook_size} + 1 mask token = {expected}"
            )
        if mask_token_id not in (None, vocab_size - 1):
            raise ValueError(f"mask_token_id is {mask_token_id}; the mask token is vocab_size - 1 = {vocab_size - 1}")
        self.mask_token_id = vocab_size - 1
        self.backbone_config()  # refuses attention that does not work here before any weights are made
        super().__init__(**kwargs)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.llm_vocab_size, self.num_new_special_tokens, self.codebook_size)

    @property
    def backbone(self) -> Backbone:
        """What is particular to the language model's family."""
        return find_backbone(self.llm_config, self.llm_model_path)

    def backbone_config(self) -> PreTrainedConfig:
        """The language model's own configuration with the joint vocabulary."""
        return backbone_config(self.llm_config, self.vocab_size, self.qk_norm, self.llm_model_path)


@dataclass
class ShowoOutput(ModelOutput):
    """logits (B, L, V), absent when labels were given and `return_logits` was not asked for; losses are scalars.

    loss: with `loss_coefficients`, their weighted sum; then it has a graph, and the single losses have none.

    With `return_statistics`, for each task present: `statistics["correct_t2i"]` and `statistics["supervised_t2i"]`, the
    supervised positions (of t2i: image codes) whose likeliest token is right and all of them; and ``row_loss_t2i``
    (B_t2i,), each row's mean. All are detached.
    """

    loss: torch.Tensor | None = None
    loss_t2i: torch.Tensor | None = None
    loss_lm: torch.Tensor | None = None
    loss_mmu: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    statistics: dict[str, torch.Tensor] | None = None


class Showo(CheckpointMixin, ShowoGeneration, PreTrainedModel):
    """A causal language model over one sequence of text and image tokens.

    State-dict names are the published ones: ``showo.model.*``, ``showo.lm_head.*`` and, with `w_clip_vit`,
    ``mm_projector.{0,2}.*``.
    """

    config_class = ShowoConfig
    base_model_prefix = ""
    published_class_name = "Showo"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ShowoConfig):
        super().__init__(config)
        llm_config = config.backbone_config()
        llm_config._attn_implementation = self.config._attn_implementation
        self.showo = config.backbone.model_class(llm_config)
        self._no_split_modules = [config.backbone.layer_class]  # where FSDP and `device_map` may cut
        if config.w_clip_vit:
            size = llm_config.hidden_size
            self.mm_projector = nn.Sequential(
                nn.Linear(config.clip_feature_size, size), nn.GELU(), nn.Linear(size, size)
            )
        self.post_init()

    @property
    def vocabulary(self) -> Vocabulary:
        return self.config.vocabulary

    def get_input_embeddings(self):
        return self.showo.get_input_embeddings()

    def get_output_embeddings(self):
        return self.showo.get_output_embeddings()

    def first_new_rows(self) -> dict[str, int]:
        """Name of each parameter that the language model did not bring, or not whole → its first new row.

        Rows of embedding and head are new from the first id on that the text tokenizer does not have.
        """
        head = self.get_output_embeddings()
        shared = {id(parameter) for parameter in (self.get_input_embeddings().weight, head.weight, head.bias)}
        added = (*self.config.backbone.qk_norm_names, "mm_projector")
        return {
            name: self.config.llm_vocab_size if id(parameter) in shared else 0
            for name, parameter in self.named_parameters()
            if id(parameter) in shared or any(part in name for part in added)
        }

    @classmethod
    def _adapt_state_dict(cls, state_dict, config):
        """Resizes the vocabulary to the configuration's: kept rows stay, new ones are initialised (SPEC §4, §12)."""
        std = config.backbone_config().initializer_range
        new_row_std = {"model.embed_tokens.weight": std, "lm_head.weight": std, "lm_head.bias": 0.0}
        stored = {f"showo.{name}": row_std for name, row_std in new_row_std.items() if f"showo.{name}" in state_dict}
        sizes = {len(state_dict[name]) for name in stored}
        if sizes == {config.vocab_size} or len(sizes) > 1:  # sizes that disagree are damage: the key check names them
            return state_dict
        resized = {name: resize_rows(state_dict[name], config.vocab_size, row_std) for name, row_std in stored.items()}
        return state_dict | resized

    @classmethod
    def from_llm(cls, config: ShowoConfig, llm_model_path: str | None = None, **kwargs) -> "Showo":
        """A new start from a language model's weights in fp32 (`load_from_showo: False`, spec §4).

        The logits of its own ids stay what they were on text rows, unless QK-norm is added. Added norms and
        `mm_projector` have their initialisation; spare rows of the language model's matrices are kept.

        Raises:
            UserError: no such folder or hub name, damaged weights, or weights of another architecture.
        """
        path = llm_model_path or config.llm_model_path
        stored = load_state_dict_folder(resolve_folder(path))
        state_dict = {f"showo.{k}": v.float() for k, v in stored.items() if not k.endswith("rotary_emb.inv_freq")}
        state_dict = cls._adapt_state_dict(state_dict, config)
        model = cls._from_config(config, **kwargs)
        fresh = (*config.backbone.qk_norm_names, "mm_projector", *model.all_tied_weights_keys)
        expected = {k: v for k, v in model.state_dict().items() if k in state_dict or not any(f in k for f in fresh)}
        check_state_dict(str(path), expected, state_dict)
        model.load_state_dict(state_dict, strict=False)
        return model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: OmniMask | torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        batch_size_t2i: int = 0,
        batch_size_lm: int = 0,
        batch_size_mmu: int = 0,
        max_seq_length: int = 128,
        image_features: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        return_logits: bool | None = None,
        return_statistics: bool = False,
        loss_coefficients: Sequence[float] | None = None,
        plan: StepPlan | None = None,
    ) -> ShowoOutput:
        """Logits without labels, losses with them.

        Args:
            input_ids: (B, L) int64, rows in the order t2i, lm, mmu; −200 where an image feature goes.
            attention_mask: `OmniMask` or bool (B, 1, L, L), True = may attend; None reads it off the ids.
            labels: (B, L) int64, −100 where nothing is supervised.
            batch_size_t2i, batch_size_lm, batch_size_mmu: rows of each task; they add up to B when labels are given.
            max_seq_length: M; the t2i loss starts at position M + 1.
            image_features: (images, features, clip_feature_size) raw CLIP features, spliced in order.
            label_smoothing: as in `torch.nn.functional.cross_entropy`.
            return_logits: default: only without labels, since the losses need the head at supervised positions alone.
            return_statistics: also how many tokens were predicted right, see `ShowoOutput`.
            loss_coefficients: of t2i, lm and mmu, for one weighted `loss` with a graph in place of three, which needs
                the head's gradient once only.
            plan: what the labels supervise and how rows are packed, found on the host beforehand, so that nothing here
                waits for a GPU; labels are not read then.

        Raises:
            ValueError: row counts, mask or features do not fit the ids.
        """
        if attention_mask is None:
            attention_mask = OmniMask.from_ids(input_ids, self.vocabulary)
        supervised = plan.supervised if plan is not None else None
        packing = plan.packing if plan is not None else None
        if plan is None and labels is not None:
            supervised = Supervised.of(labels, (batch_size_t2i, batch_size_lm, batch_size_mmu), max_seq_length)
        if packing is not None and (return_logits or supervised is None):
            raise ValueError("packed rows give losses only; leave the packing out for logits")
        hidden = self.hidden_states(  # (B, L, H), or packed (R, C, H)
            input_ids, attention_mask, image_features=image_features, packing=packing, check_features=plan is None
        )
        output = ShowoOutput()
        if supervised is not None:
            places = supervised.index if packing is None else packing.place[supervised.index]
            output.statistics = {} if return_statistics else None
            self._losses(hidden.flatten(0, 1)[places], supervised, loss_coefficients, label_smoothing, output)
            if return_statistics and batch_size_t2i:
                rows = supervised.index[: supervised.counts[0]] // input_ids.shape[1]
                output.statistics["row_loss_t2i"] = _means(output.statistics.pop("losses_t2i"), rows, batch_size_t2i)
        if return_logits or (return_logits is None and supervised is None):
            output.logits = self.showo.lm_head(hidden)
        return output

    def hidden_states(
        self,
        input_ids,
        attention_mask,
        *,
        image_features=None,
        position_ids=None,
        past_key_values=None,
        packing: Packing | None = None,
        check_features: bool = True,
    ):
        """Final hidden states (B, Q, H) of the given positions; appends to `past_key_values` when passed.

        With `packing` (R, C, H): of the rows as they run.
        """
        num_keys = input_ids.shape[1] if past_key_values is None else None  # a cache checks for itself
        embeds, more = self.embed(input_ids, image_features, check_features), {}
        if packing is None:
            mask = self._spell_mask(attention_mask, input_ids.shape, num_keys)
        else:
            embeds, position_ids = packing.gather(embeds), packing.position_ids
            if self.showo.config._attn_implementation == PACKED_SDPA:
                mask, more = None, {"pieces": packing.lengths(), "piece_masks": packing.piece_masks()}
            else:
                mask = self._spell_mask(packing.mask, packing.index.shape)
        return self.showo.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None,
            **({} if past_key_values is None else {CACHE_ARGUMENT: past_key_values}),
            **more,
        ).last_hidden_state

    def embed(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None, check_features: bool = True
    ) -> torch.Tensor:
        """Token embeddings (B, L, H) with projected image features at the positions whose id is −200, row by row.

        Args:
            check_features: whether to look if they fit, which waits for a GPU; else `check_image_features` has.
        """
        if check_features:
            check_image_features(input_ids, image_features)
        is_feature = input_ids == IMAGE_FEATURE_ID
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_feature, 0))
        if image_features is None:
            return embeds
        if not self.config.w_clip_vit:
            raise ValueError("image_features need a model with w_clip_vit=True")
        projected = self.mm_projector(image_features.to(self.mm_projector[0].weight.dtype)).to(embeds.dtype)
        return embeds.masked_scatter(is_feature[..., None], projected)

    def _spell_mask(self, mask: OmniMask | torch.Tensor, shape: tuple[int, int], num_keys: int | None = None):
        """The mask in the form the attention back end understands; each takes another one without complaint."""
        if isinstance(mask, torch.Tensor) and (mask.dtype != torch.bool or mask.ndim != 4):
            raise ValueError(
                f"attention_mask must be an OmniMask or bool (B, 1, L, L); got {mask.dtype} {tuple(mask.shape)}"
            )
        batch_size, length = shape
        if tuple(mask.shape) != (batch_size, 1, length, num_keys or mask.shape[3]):
            raise ValueError(f"attention_mask of shape {tuple(mask.shape)} does not fit ids {tuple(shape)}")
        implementation = self.showo.config._attn_implementation
        if implementation == "flex_attention":
            return mask.block_mask() if isinstance(mask, OmniMask) else _block_mask_of(mask)
        dense = mask.dense() if isinstance(mask, OmniMask) else mask
        if implementation == "eager":  # adds the mask to the scores, so a bool one would be wrong without a word
            dtype = self.showo.lm_head.weight.dtype
            return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill(
                ~dense, torch.finfo(dtype).min
            )
        return dense

    def _losses(
        self,
        hidden: torch.Tensor,
        supervised: Supervised,
        coefficients: Sequence[float] | None,
        label_smoothing: float,
        output: ShowoOutput,
    ) -> None:
        """Mean cross-entropy of each task over its positions and the whole vocabulary; 0 if absent.

        Args:
            hidden: (S, H) at the supervised positions.
            output: takes the losses and, where there is room for them, the statistics.
        """
        statistics, counts = output.statistics, supervised.counts
        parts = hidden, supervised.labels, supervised.factors(coefficients or (1.0, 1.0, 1.0))
        pieces = [parts] if coefficients else zip(*(part.split(counts) for part in parts), strict=True)
        settings = {"label_smoothing": label_smoothing, "predict": statistics is not None}
        found = [
            # The zero keeps every parameter in the graph of a distributed step.
            head_loss(self.showo.lm_head, *piece, **settings) if len(piece[0]) else ((hidden * 0.0).sum(), None, None)
            for piece in pieces
        ]
        losses = torch.cat([losses for _, losses, _ in found if losses is not None] or [hidden.new_empty(0)])
        means = [part.mean() if len(part) else part.sum() for part in losses.split(counts)]
        if coefficients:
            output.loss = found[0][0]
        else:
            means = [total for total, _, _ in found]
        output.loss_t2i, output.loss_lm, output.loss_mmu = means
        if statistics is None:
            return
        statistics["losses_t2i"] = losses[: counts[0]]
        if not len(losses):
            return
        right = torch.cat([predicted for _, _, predicted in found if predicted is not None]) == supervised.labels
        counted = torch.ones_like(right)  # but <soi> and <eoi>, which are no feat
        counted[: counts[0]] = supervised.labels[: counts[0]] >= self.vocabulary.image_offset
        for task, hits, considered in zip(TASKS, (right & counted).split(counts), counted.split(counts), strict=True):
            if len(hits):
                statistics[f"correct_{task}"], statistics[f"supervised_{task}"] = hits.sum(), considered.sum()


def check_image_features(input_ids: torch.Tensor, image_features: torch.Tensor | None) -> None:
    """Whether rows (B, L) have room for image features (images, features, size), and for whole images each.

    Raises:
        ValueError: they have not.
    """
    is_feature = input_ids == IMAGE_FEATURE_ID
    num_positions = int(is_feature.sum())
    num_features = 0 if image_features is None else image_features.shape[:-1].numel()
    if num_positions != num_features:
        raise ValueError(f"the rows have room for {num_positions} image features (id -200), got {num_features}")
    if image_features is None:
        return
    torn = is_feature.sum(1) % image_features.shape[-2]  # (B,), nonzero where a row holds a part of an image
    if torn.any():
        raise ValueError(
            f"row {int(torn.argmax())} does not hold whole images: each has {image_features.shape[-2]} features"
        )


def _means(values: torch.Tensor, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(num_groups,): mean of the values (S,) of each group, 0 where there are none."""
    sums = values.new_zeros(num_groups).index_add_(0, groups, values)
    return sums / values.new_zeros(num_groups).index_add_(0, groups, torch.ones_like(values)).clamp(min=1)


def _block_mask_of(dense: torch.Tensor):
    """A dense (B, 1, L, L) mask as `BlockMask`: FlexAttention crashes on tensors."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch_size, _, num_queries, num_keys = dense.shape
    return create_block_mask(
        lambda batch, head, query, key: dense[batch, 0, query, key],
        batch_size,
        None,
        num_queries,
        num_keys,
        device=dense.device,
    )


AutoConfig.register(ShowoConfig.model_type, ShowoConfig)
AutoModel.register(ShowoConfig, Showo)
