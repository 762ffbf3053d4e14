"""Show-o as a model of the lmms-eval harness (0.7 or later), so that its tasks run too.

    pip install lmms-eval
    python3 evaluation/lmms_eval_showo.py --model showo --batch_size 8 --tasks mme,ai2d \\
        --model_args config=configs/showo_demo_512x512.yaml
    accelerate launch --num_processes 2 evaluation/lmms_eval_showo.py --model showo …

All other arguments are the harness's own. `model_args` takes `config=` and any key of it, as in `dtype=fp32`. Where a
task gives several images, the question is about all of them, and comes after the last. The first failure ends the run,
with exit code 2 where it is one of settings or data and 1 otherwise; the harness by itself prints it and exits with 0.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    # Not before the harness is loaded: it needs a library `evaluate`, whose place evaluate.py would take.
    del sys.path[0]
try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
    from lmms_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error.name} is not installed; pip install lmms-eval (it brings torchvision)", file=sys.stderr)
    sys.exit(2)
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch
from accelerate import Accelerator
from PIL import Image

from common.config import InferenceConfig, load_config
from common.errors import UserError, run_cli
from common.progress import progress
from models.pipeline_showo import ShowoPipeline

MAX_NEW_TOKENS = 256  # where a task does not say


class Loss(tuple):
    """(mean loss, whether the continuation is the greedy one). It is false, so that the harness's cache of responses,
    which holds texts only, passes it over."""

    def __bool__(self) -> bool:
        return False


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
        self,
        config: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size=None,
        **settings,
    ) -> None:
        super().__init__()
        self.batch_size = read_batch_size(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        given = {"config": config, **settings, "device": device}
        loaded = load_config([f"{k}={v}" for k, v in given.items() if v is not None], InferenceConfig)
        self.pipeline = ShowoPipeline.from_config(loaded)
        self.generator = self.pipeline.generator(loaded.seed or 0)

    @property
    def device(self) -> torch.device:
        """Where the processes' numbers of requests are compared."""
        return self.pipeline.device

    @property
    def chat_template(self) -> str:
        raise UserError("--apply_chat_template has no effect on Show-o, which has a format of its own; leave it out")

    def generate_until(self, requests) -> list[str]:
        """An answer to each request; those that are decoded in the same way share batches."""
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        answers = [""] * len(requests)
        with progress(total=len(requests), desc="showo", disable=self.rank != 0) as bar:
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
        questions = [question_of(request.args[0]) for request in requests]
        images = [self._images(*request.args[2:6]) for request in requests]
        self.pipeline.check_questions(questions, max_new_tokens=1, num_images=max(map(len, images)))
        answers = self.pipeline.answer_each(
            images,
            questions,
            max_new_tokens=min(int(decoding.get("max_new_tokens") or MAX_NEW_TOKENS), self.pipeline.num_positions),
            temperature=temperature or 1.0,
            top_k=None if temperature else 1,
            top_p=decoding.get("top_p") if temperature else None,
            generator=self.generator,
        )
        answers = [cut(answer, decoding.get("until") or []) for answer in answers]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), answer)
        return answers

    def loglikelihood(self, requests) -> list[GenerationResult]:
        """The `Loss` of each continuation, of which the harness takes the least, in the type that it passes on whole.

        Raises:
            UserError: a request has no image, as those of the metric `acc_mutual_info`.
        """
        found = []
        for request in progress(requests, desc="showo", disable=self.rank != 0):
            context, target, *where = request.args
            if not where:
                raise UserError("acc_mutual_info asks without the image, which Show-o does not answer; leave it out")
            continuation = target if isinstance(target, str) else target(self._doc(*where))
            question, images = question_of(context), self._images(*where)
            self.pipeline.check_questions([question + continuation], max_new_tokens=1, num_images=len(images))
            loss = Loss(self.pipeline.answer_loss(images, question, continuation))
            found.append(GenerationResult(loss))
        return found

    def generate_until_multi_round(self, requests) -> list[str]:
        raise UserError("Show-o was tuned on single questions; tasks of several rounds are not supported")

    def _doc(self, doc_to_visual, doc_id, task: str, split: str) -> dict:
        return self.task_dict[task][split][doc_id]

    def _images(self, doc_to_visual, doc_id, task: str, split: str) -> list[Image.Image]:
        """The images of a document."""
        visuals = doc_to_visual(self._doc(doc_to_visual, doc_id, task, split)) or []
        images = [visual for visual in visuals if isinstance(visual, Image.Image)]
        if not images:
            raise UserError(f"task {task}, document {doc_id}: Show-o answers questions about images; it has none")
        return images


def question_of(context: str) -> str:
    """The question without marks that stand for images."""
    return context.replace("<image>", "").strip()


def cut(answer: str, until: str | list[str]) -> str:
    """The answer up to the first of the texts that end it."""
    for end in [until] if isinstance(until, str) else until:
        answer = answer.split(end)[0] if end else answer
    return answer.strip()


def read_batch_size(given: int | str) -> int:
    """The number of questions in a batch; `UserError` for the harness's `auto`."""
    if not str(given).isdecimal() or not int(given):
        raise UserError(f"--batch_size is {given}; it must be a whole number of 1 or more")
    return int(given)


class Failure(BaseException):
    """Carries an error through the harness, which prints every `Exception`, goes on and exits with 0."""


def main(argv: list[str]) -> None:
    """Makes the model known to the harness and hands over to its command line, which reads `sys.argv`."""
    from lmms_eval import __main__ as harness
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"evaluation.lmms_eval_showo.{ShowoLmms.__name__}"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(model_id="showo", simple_class_path=path), overwrite=True)
    evaluate = harness.cli_evaluate_single

    def evaluate_or_fail(args):
        if not args.tasks:
            raise Failure from UserError("--tasks is not given; --tasks list shows their names")
        try:
            return evaluate(args)
        except Exception as error:
            is_setting = not error.__traceback__.tb_next.tb_next  # raised by the harness's command line itself
            raise Failure from UserError(error) if is_setting and isinstance(error, ValueError) else error

    harness.cli_evaluate_single = evaluate_or_fail
    try:
        harness.cli_evaluate()
    except Failure as failure:
        raise failure.__cause__ from None


if __name__ == "__main__":
    run_cli(main)
