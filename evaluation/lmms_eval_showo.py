"""Show-o as a model of the lmms-eval harness (0.7 or later), so that its tasks run too.

    pip install lmms-eval
    python3 evaluation/lmms_eval_showo.py --model showo --batch_size 8 --tasks mme,ai2d \
        --model_args config=configs/showo_demo_512x512.yaml

All other arguments are the harness's own. `model_args` takes `config=` and any key of it, as in `dtype=fp32`. One
image is shown of each question: where a task gives several, the first.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    # Not before the harness is loaded: it needs a library `evaluate`, whose place evaluate.py would take.
    del sys.path[0]
try:
    from lmms_eval.api.model import lmms
    from lmms_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error.name} is not installed; pip install lmms-eval (it brings torchvision)", file=sys.stderr)
    sys.exit(2)
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from common.config import InferenceConfig, load_config
from common.errors import run_cli
from models.pipeline_showo import ShowoPipeline

MAX_NEW_TOKENS = 256  # where a task does not say


@register_model("showo")
class ShowoLmms(lmms):
    """The harness's interface over `ShowoPipeline`.

    Args:
        config: one of the YAMLs in configs/.
        batch_size: questions answered at once.
        device: default: a GPU if there is one; with several processes each takes its own.
        max_batch_size: the harness gives it; not used.
        settings: further keys of the config.

    Raises:
        UserError: the settings or the checkpoints are unusable.
    """

    is_simple = True

    def __init__(
        self, config: str, batch_size: int | str = 1, device: str | None = None, max_batch_size=None, **settings
    ) -> None:
        super().__init__()
        given = [f"config={config}", *(f"{key}={value}" for key, value in settings.items())]
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        loaded = load_config([*given, *([f"device={device}"] if device else [])], InferenceConfig)
        self.pipeline = ShowoPipeline.from_config(loaded)
        self.batch_size, self.generator = int(batch_size), self.pipeline.generator(loaded.seed or 0)
        self.has_warned = False

    def generate_until(self, requests) -> list[str]:
        """An answer to each request; those that are decoded in the same way share batches."""
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="showo", disable=self.rank != 0) as bar:
            for indices in alike.values():
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    for index, answer in zip(batch, self._answer([requests[i] for i in batch]), strict=True):
                        answers[index] = answer
                    bar.update(len(batch))
        return answers

    def _answer(self, requests) -> list[str]:
        decoding = dict(requests[0].args[1])
        temperature = float(decoding.get("temperature") or 0)
        answers = self.pipeline.answer_each(
            [self._image(*request.args[2:6]) for request in requests],
            [question_of(request.args[0]) for request in requests],
            max_new_tokens=int(decoding.get("max_new_tokens") or MAX_NEW_TOKENS),
            temperature=temperature or 1.0,
            top_k=None if temperature else 1,
            top_p=decoding.get("top_p") if temperature else None,
            generator=self.generator,
        )
        answers = [cut(answer, decoding.get("until") or []) for answer in answers]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), answer)
        return answers

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """(mean loss of the continuation, whether it is the greedy one) each; the harness takes the least."""
        found = []
        for request in tqdm(requests, desc="showo", disable=self.rank != 0):
            context, target, *where = request.args
            doc = self.task_dict[where[2]][where[3]][where[1]]
            continuation = target if isinstance(target, str) else target(doc)
            found.append(self.pipeline.answer_loss(self._image(*where), question_of(context), continuation))
        return found

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError("Show-o was tuned on single questions; tasks of several rounds are not supported")

    def _image(self, doc_to_visual, doc_id, task: str, split: str) -> Image.Image:
        """The first image of a document; says once that there are others."""
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        images = [visual for visual in visuals if isinstance(visual, Image.Image)]
        if not images:
            raise NotImplementedError(f"task {task}, document {doc_id}: Show-o answers questions about one image each")
        if len(images) > 1 and not self.has_warned:
            self.has_warned = True
            text = f"task {task}, document {doc_id} has {len(images)} images; of each document the first is shown"
            tqdm.write(f"warning: {text}", file=sys.stderr)
        return images[0].convert("RGB")


def question_of(context: str) -> str:
    """The question without marks that stand for images."""
    return context.replace("<image>", "").strip()


def cut(answer: str, until: str | list[str]) -> str:
    """The answer up to the first of the texts that end it."""
    for end in [until] if isinstance(until, str) else until:
        answer = answer.split(end)[0] if end else answer
    return answer.strip()


def main(argv: list[str]) -> None:
    """Makes the model known to the harness and hands over to its command line, which reads `sys.argv`."""
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"evaluation.lmms_eval_showo.{ShowoLmms.__name__}"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(model_id="showo", simple_class_path=path), overwrite=True)
    cli_evaluate()


if __name__ == "__main__":
    run_cli(main)
