"""What a pipeline consists of: how it is loaded and saved, where it runs, and what it says about itself."""

import logging
import math
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi

from common.errors import UserError
from common.launch import use_physical_cores
from llava import QuestionFormat
from models import adapters
from models.checkpoint_io import resolve_folder
from models.clip_encoder import CLIPVisionTower
from models.generation.sampling import Schedule, get_mask_schedule
from models.images import DEFAULT, ImageOptions
from models.loading import (
    PIPELINE_FILES,
    check_sizes,
    choose_device,
    choose_dtype,
    find_adapter,
    find_parts,
    in_python,
    load_parts,
    located,
    save_parts,
)
from models.modeling_magvitv2 import MAGVITv2
from models.modeling_showo import Showo
from models.prompting import UniversalPrompting
from models.quantization import is_quantized

logger = logging.getLogger(__name__)


class PipelineParts:
    """A Show-o model, its text and image tokenizers and, for `w_clip_vit` models, the CLIP vision tower.

    Args:
        model: on its device, in its dtype. `vq_model` and `clip` may have another.
        prompting: the text tokenizer with Show-o's special tokens; `max_text_len` limits a prompt, in tokens.
        resolution: side of an image in pixels; default: the one that gives the model's `num_vq_tokens` tokens.
        noise_schedule: mask schedule of image generation, see `get_mask_schedule`.
        conversation: prompt format of questions: ``vicuna``, as published, or ``chat``, the tokenizer's chat template.
        image_options: how images and masks are read, see `ImageOptions`.

    Raises:
        ValueError: the resolution is not a multiple of the image tokenizer's downsampling factor, or a `w_clip_vit`
            model comes without `clip`.
    """

    def __init__(
        self,
        model: Showo,
        vq_model: MAGVITv2,
        prompting: UniversalPrompting,
        resolution: int | None = None,
        clip: CLIPVisionTower | None = None,
        noise_schedule: str | Schedule = "cosine",
        conversation: str = "vicuna",
        image_options: ImageOptions = DEFAULT,
    ):
        factor = vq_model.downsampling_factor
        self.resolution = resolution or factor * math.isqrt(model.config.num_vq_tokens)
        self.window = self.resolution // factor  # W
        if self.resolution % factor:
            raise ValueError(f"resolution is {resolution}, expected a multiple of {factor}")
        if model.config.w_clip_vit and clip is None:
            raise ValueError("a model with w_clip_vit=True sees images through CLIP; pass clip=CLIPVisionTower(…)")
        self.model, self.vq_model, self.clip = model.eval(), vq_model.eval(), clip
        self.prompting, self.noise_schedule, self.image_options = prompting, noise_schedule, image_options
        self.conversation = conversation
        self.question_format = QuestionFormat.of(conversation, prompting.tokenizer, model.config.w_clip_vit)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **settings) -> "PipelineParts":
        """Loads a pipeline from the hub (`showlab/show-o`) or a folder.

        Args:
            name_or_path: what `save_pretrained` wrote, a Showo checkpoint, or a folder with sub-folders `showo/`,
                `magvitv2/`, `llm/` (tokenizer and config.json of the language model) and, with CLIP-ViT, `clip/`.
            settings: `vq_model`, `llm`, `clip` (folder or hub name; default: the sub-folder, or the published one),
                `max_seq_length` (default: as saved, or 128), `resolution`, `device` (default: a GPU if there is one),
                `dtype` or `torch_dtype` of all parts (torch's, or `fp32`, `bf16`, `fp16`; default: fp32, but on a GPU
                bf16 for the model), `attn_implementation`, `compile`, `cpu_kernels`, `conversation`, `noise_schedule`,
                `image_options`, `adapter` (see `load_adapter`), `quantization` (int8, int4 or nf4, into which an
                adapter is merged); None: the default.

        Raises:
            UserError: a component is missing, broken, or does not match the others.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        if "torch_dtype" in given:
            given["dtype"] = given.pop("torch_dtype")
        image_options = given.pop("image_options", DEFAULT)
        try:
            folder = resolve_folder(located(name_or_path), PIPELINE_FILES)
            parts = load_parts(**find_parts(folder) | given)
        except UserError as error:
            raise UserError(in_python(error)) from error.__cause__
        return cls(**parts, image_options=image_options).to(dtype=given.get("dtype"))

    @classmethod
    def from_config(cls, config) -> "PipelineParts":
        """Loads the components that a script's config (`InferenceConfig`) names; its sizes must match the checkpoint.

        Raises:
            UserError: as `from_pretrained`. Cheap checks run before any weights are read.
        """
        from common.schema import mask_schedule_of  # needs OmegaConf, which the networks do without (`make gpu-check`)

        showo, vq_model, images = config.model.showo, config.model.vq_model, config.dataset.preprocessing
        check_sizes(showo, images.resolution, vq_model.vq_model_name)
        name, parameters = mask_schedule_of(config)
        try:
            schedule = get_mask_schedule(name, **parameters)
        except (ValueError, TypeError) as error:
            raise UserError(f"mask_schedule: {error}") from None
        how = ("device", "dtype", "attn_implementation", "compile", "cpu_kernels", "conversation")
        how += ("adapter", "quantization")
        parts = load_parts(
            showo.pretrained_model_path,
            vq_model=vq_model.vq_model_name,
            llm=showo.llm_model_path,
            clip=config.model.clip_vit_name,
            vq_weights=vq_model.pretrained_model_path,
            max_seq_length=images.max_seq_length,
            resolution=images.resolution,
            noise_schedule=schedule if parameters else name,
            section=showo,
            **{key: config[key] for key in how},
        )
        pipeline = cls(**parts, image_options=ImageOptions(**config.image))
        if pipeline.device.type == "cpu":  # scripts alone: other programs decide about their threads themselves
            use_physical_cores()
        return pipeline

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes all parts and settings, of which `from_pretrained` makes the same pipeline.

        The folder is whole or absent. A pipeline that was saved there is replaced; other files in it stay.

        Raises:
            UserError: the folder holds anything else, or cannot be written.
        """
        settings = {"max_seq_length": self.prompting.max_text_len, "resolution": self.resolution}
        settings |= {"conversation": self.conversation, "noise_schedule": self.noise_schedule}
        if not isinstance(self.noise_schedule, str):
            del settings["noise_schedule"]
            logger.warning("noise_schedule is a function, which %s does not hold; give it again on loading", folder)
        save_parts(folder, self.model, self.vq_model, self.prompting, self.clip, settings)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Uploads what `save_pretrained` writes to a model repository, new or there already; returns its address."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)

    def load_adapter(self, name_or_path: str | Path) -> None:
        """Puts a LoRA adapter on the model, which everything that the pipeline does then goes through.

        Args:
            name_or_path: a run with `training.trainable=lora`, one of its checkpoints, what PEFT saved, or a hub name.

        Raises:
            UserError: it is missing, damaged, made for another model, or the model has one already.
        """
        adapters.load_adapter(self.model, find_adapter(name_or_path))
        self._recompile_steps()

    def merge_adapter(self) -> None:
        """Adds the adapter to the weights: as fast as without one, but for good. `UserError` if they are quantised."""
        adapters.merge_adapter(self.model)
        self._recompile_steps()

    def unload_adapter(self) -> None:
        """Takes the adapter off; `models.adapters.adapter_disabled` switches it off for a while."""
        adapters.unload_adapter(self.model)
        self._recompile_steps()

    def _recompile_steps(self) -> None:
        """Compiles steps again, if they are compiled, since they are of other weights."""
        if self.model.step_caches is not None:
            self.model.compile_steps()

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: str | torch.dtype | None = None
    ) -> "PipelineParts":
        """Moves all parts to a device, or changes the dtype of their weights; returns the pipeline itself.

        Raises:
            UserError: there is no such device, or it is no dtype of weights; or they are quantised, and so stay.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = self.device if device is None else choose_device(device)
        dtype = None if dtype is None else choose_dtype(dtype, device)
        if is_quantized(self.model) and (device != self.device or dtype not in (None, self.dtype)):
            raise UserError("quantised weights stay on their device and in their dtype; load the pipeline with others")
        for part in filter(None, (self.model, self.vq_model, self.clip)):
            part.to(device)
            # what is stored; the other buffers, of rotary embeddings, are too coarse in half precision
            for tensor in part.state_dict(keep_vars=True).values():
                if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    tensor.data = tensor.data.to(dtype)
        self._recompile_steps()
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        return self.model.dtype

    def __repr__(self) -> str:
        config, vocabulary = self.model.showo.config, self.model.vocabulary
        layers = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
        text = f"{vocabulary.llm_vocab_size:,} ids, prompts of up to {self.prompting.max_text_len}"
        factor = self.vq_model.downsampling_factor
        image = f"{vocabulary.codebook_size:,} codes of {factor} x {factor} pixels"
        lines = [
            f"model: {type(self.model.showo).__name__}, {layers}, {_facts(self.model)}",
            f"image tokenizer: {image}, {_facts(self.vq_model)}",
            f"text tokenizer: {text}",
            f"images: {self.resolution} x {self.resolution} pixels, {self.window} x {self.window} tokens",
        ]
        if self.clip is not None:
            lines.append(f"CLIP: {self.clip.num_features} features of an image, {_facts(self.clip)}")
        return "ShowoPipeline(\n  " + "\n  ".join(lines) + "\n)"


def _facts(part: torch.nn.Module) -> str:
    parameter = next(part.parameters())
    count = sum(one.numel() for one in part.parameters())
    return f"{count:,} parameters in {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
