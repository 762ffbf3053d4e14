"""Show-o: one transformer that reads and generates, with omni-attention and three losses (spec §4, §5)."""

from collections.abc import Callable
from dataclasses import dataclass

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
from models.compat import PublishedGeneration
from models.config_fields import SHOWO_FIELDS, check_fields
from models.omni_attention import OmniMask, dense_for_attention
from models.vocabulary import IMAGE_FEATURE_ID, Vocabulary

# B rows, L positions, H hidden size, V vocabulary


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
        check_fields({**locals(), **kwargs}, SHOWO_FIELDS)
        self.llm_model_path = llm_model_path
        self.vocab_size = vocab_size
        self.llm_vocab_size = llm_vocab_size
        self.num_new_special_tokens = num_new_special_tokens
        self.codebook_size = codebook_size
        self.num_vq_tokens = num_vq_tokens
        self.w_clip_vit = w_clip_vit
        self.clip_feature_size = clip_feature_size
        self.load_from_showo = load_from_showo
        if not isinstance(llm_config, dict | None):
            raise ValueError(f"llm_config is a {type(llm_config).__name__}; it must be a group of keys")
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
    """What `Showo.forward` returns: without labels logits (B, L, V), with labels scalar losses in fp32.

    losses: by flow. loss: their weighted sum, where the training objective has coefficients; then it has a graph, and
    the single losses have none. statistics: further detached figures that the objective was asked for.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    statistics: dict[str, torch.Tensor] | None = None

    @property
    def loss_t2i(self) -> torch.Tensor:
        return self.losses["t2i"]

    @property
    def loss_lm(self) -> torch.Tensor:
        return self.losses["lm"]

    @property
    def loss_mmu(self) -> torch.Tensor:
        return self.losses["mmu"]


class Showo(CheckpointMixin, PublishedGeneration, PreTrainedModel):
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
        self.step_caches: dict | None = None  # see compile_steps

    def compile_steps(self) -> None:
        """Compiles generation steps for fixed shapes by `torch.compile`; on a GPU they become CUDA graphs.

        The first step of a shape takes its time: image side, batch size and the next multiple of 64 positions count.
        """
        self.step_caches = {}  # caches that no runner uses now, see Runner

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
        """Resizes the vocabulary to the configuration's: kept rows stay, new ones are initialised (spec §4, §12)."""
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
        state_dict = cls._adapt_state_dict({f"showo.{key}": tensor.float() for key, tensor in stored.items()}, config)
        skeleton = cls._skeleton(config)
        fresh = (*config.backbone.qk_norm_names, "mm_projector", *skeleton.all_tied_weights_keys)
        expected = {k: v for k, v in skeleton.state_dict().items() if k in state_dict or not any(f in k for f in fresh)}
        check_state_dict(str(path), expected, state_dict)
        model = cls.from_config(config, **kwargs)
        model.load_state_dict(state_dict, strict=False)
        return model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: OmniMask | torch.Tensor | None = None,
        labels: torch.Tensor | Callable[..., ShowoOutput] | None = None,
        batch_size_t2i: int = 0,
        batch_size_lm: int = 0,
        batch_size_mmu: int = 0,
        max_seq_length: int | None = None,
        image_features: torch.Tensor | None = None,
    ) -> ShowoOutput:
        """Logits without labels, losses with them.

        Args:
            input_ids: (B, L) int64, rows in the order t2i, lm, mmu; −200 where an image feature goes.
            attention_mask: `OmniMask` or bool (B, 1, L, L), True = may attend; None reads it off the ids.
            labels: (B, L) int64, −100 where nothing is supervised. Or an objective, such as `training.loss.Objective`:
                its result for (model, input_ids, attention_mask, image_features) is returned, so that a loss of any
                kind runs inside this call, as DDP, DeepSpeed and FSDP2 need it.
            batch_size_t2i, batch_size_lm, batch_size_mmu: rows of each task; they add up to B. For tensor labels only.
            max_seq_length: M; the t2i loss starts at position M + 1, which is that of ``<soi>``. Default: where the
                t2i rows have it. For tensor labels only.
            image_features: (images, features, clip_feature_size) raw CLIP features, spliced in order.

        Raises:
            ValueError: row counts, mask or features do not fit the ids.
        """
        if attention_mask is None:
            attention_mask = OmniMask.from_ids(input_ids, self.vocabulary)
        if labels is None:
            hidden = self.hidden_states(input_ids, attention_mask, image_features=image_features)  # (B, L, H)
            return ShowoOutput(logits=self.get_output_embeddings()(hidden))
        if isinstance(labels, torch.Tensor):
            # Imported here because losses belong to training, which imports the model; inference never needs them.
            from training.loss import Objective

            check_image_features(input_ids, image_features)
            rows = (batch_size_t2i, batch_size_lm, batch_size_mmu)
            if max_seq_length is None:
                max_seq_length = self._text_length(input_ids[:batch_size_t2i]) if sum(rows) == len(input_ids) else 0
            labels = Objective.from_labels(labels, rows, max_seq_length)
        return labels(self, input_ids, attention_mask, image_features)

    def _text_length(self, rows: torch.Tensor) -> int:
        """M of t2i rows (B, L): their ``<soi>`` is at position M + 1; 0 without rows."""
        starts = (rows == self.vocabulary.soi_id).nonzero()  # (B, 2), row and position
        if len(rows) == 0:
            return 0
        if len(starts) != len(rows) or (starts[:, 1] != starts[0, 1]).any():
            raise ValueError("each t2i row needs one <soi>, all at one position, or max_seq_length says where it is")
        return int(starts[0, 1]) - 1

    def hidden_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: OmniMask | torch.Tensor | None = None,
        *,
        image_features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **attention_arguments,
    ) -> torch.Tensor:
        """Final hidden states (B, L, H).

        Args:
            input_ids, image_features: as in `forward`, or instead
            inputs_embeds: (B, L, H), what `embed` made of them.
            attention_mask: `OmniMask` or bool (B, 1, L, L); None only where `attention_arguments` say who sees whom.
            position_ids: (B, L) int64 for the rotary embedding; default: 0 … L − 1.
            attention_arguments: handed on to an attention implementation that takes more than a mask.

        Raises:
            ValueError: no mask, or one that does not fit. A language model left to itself would be causal everywhere.
        """
        if attention_mask is None and not attention_arguments:
            raise ValueError("attention_mask is missing; OmniMask.from_ids reads it off the ids")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, image_features)
        mask = None if attention_mask is None else self._mask_for_attention(attention_mask, inputs_embeds.shape[:2])
        return self.showo.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=False,
            **attention_arguments,
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

    def _mask_for_attention(self, mask: OmniMask | torch.Tensor, shape: tuple[int, int]):
        """The mask of rows (B, L) in the form that the attention implementation takes."""
        if isinstance(mask, torch.Tensor) and (mask.dtype != torch.bool or mask.ndim != 4):
            raise ValueError(
                f"attention_mask must be an OmniMask or bool (B, 1, L, L); got {mask.dtype} {tuple(mask.shape)}"
            )
        batch_size, length = shape
        if tuple(mask.shape) != (batch_size, 1, length, length):
            raise ValueError(f"attention_mask of shape {tuple(mask.shape)} does not fit ids {tuple(shape)}")
        form = self.showo.config._attn_implementation, self.get_input_embeddings().weight.dtype
        return mask.for_attention(*form) if isinstance(mask, OmniMask) else dense_for_attention(mask, *form)


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


AutoConfig.register(ShowoConfig.model_type, ShowoConfig)
AutoModel.register(ShowoConfig, Showo)
