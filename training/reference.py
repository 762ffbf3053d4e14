"""The frozen reference of a run: the model as it was when the run began, which teaches it or keeps it in place."""

from common.errors import UserError
from models import Showo
from models.loading import initial_showo


def load_reference(config, device) -> Showo:
    """The weights that a run begins with, frozen, in evaluation mode.

    They are read anew whenever the run is continued, so that the reference stays what it was.

    Raises:
        UserError: the run begins with random weights, or with those of a language model.
    """
    model, start = config.model, config.experiment.init_from
    if start is None and (model.showo.pretrained_model_path is None or not model.showo.load_from_showo):
        raise UserError(
            f"task={config.task} needs a trained Show-o to begin with, which is its reference, too; give "
            "experiment.init_from"
        )
    settings = {"clip_vit_name": model.clip_vit_name, "attn_implementation": config.attn_implementation}
    return initial_showo(model.showo, start, **settings).requires_grad_(False).eval().to(device)
