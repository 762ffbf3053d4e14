"""The frozen reference of a run: the model as it was when the run began, which teaches it or keeps it in place."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import UserError
from models import Showo
from models.adapters import adapter_disabled
from models.loading import initial_showo


class Reference:
    """The weights that a run begins with, frozen: in a model of their own, or those under the adapter that is trained.

    They are read again whenever the run is continued, so that the reference stays what it was.

    Args:
        config: of the run.
        device: of the model.

    Raises:
        UserError: the run begins with random weights, or with those of a language model.
    """

    def __init__(self, config, device):
        model, start = config.model, config.experiment.init_from
        if start is None and (model.showo.pretrained_model_path is None or not model.showo.load_from_showo):
            raise UserError(
                f"task={config.task} needs a trained Show-o to begin with, which is its reference, too; give "
                "experiment.init_from"
            )
        self.copy = None
        if config.training.trainable != "lora":
            settings = {"clip_vit_name": model.clip_vit_name, "attn_implementation": config.attn_implementation}
            self.copy = initial_showo(model.showo, start, **settings).requires_grad_(False).eval().to(device)

    @contextmanager
    def __call__(self, model: Showo) -> Iterator[Showo]:
        """A context with the reference of `model`, the one that is trained."""
        if self.copy is not None:
            yield self.copy
        else:
            with adapter_disabled(model):
                yield model
