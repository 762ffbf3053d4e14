"""Scores of sampled images, by a function of the user's or at an address, for policy gradients and for making pairs.

- ``module:function``: called as ``function(prompts, images)``, or with ``records=…`` if it has such a parameter:
  B texts, B PIL images, and B dictionaries, whatever the prompts' file says beside each prompt. Returns B numbers.
- ``http://…`` or ``https://…``: gets a POST of JSON ``{"prompts": […], "images": [PNG as base64, …], "records": […]}``
  and answers ``{"scores": […]}``. Once, at the start, all lists are empty: the answer tells that somebody is there.
"""

import base64
import http.client
import io
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import signature
from pkgutil import resolve_name

from PIL import Image

from common.errors import UserError, first_line

Reward = Callable[[Sequence[str], Sequence[Image.Image], Sequence[dict]], list[float]]
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second attempt; it doubles from one to the next, up to a minute
LATER = (408, 429)  # codes of HTTP that ask to come again
UNREACHED = (OSError, ValueError, http.client.HTTPException)  # no connection, no answer in time, or no address
MOST_BYTES = 2**26  # of an answer


def open_reward(setting: str, name: str, timeout: float, retries: int) -> Reward:
    """The function of this name, or the address, as a function of prompts, images and records.

    Args:
        setting: the key to name in messages.
        timeout: seconds that an address has to answer.
        retries: further attempts at an address that does not.

    Raises:
        UserError: there is none. So does the function, if there are not as many finite numbers as images.
    """
    what = f"{setting}={name}"
    is_address = name.startswith(("http://", "https://"))
    score = _Address(what, name, timeout, retries) if is_address else _function(what, name)

    def checked(prompts: Sequence[str], images: Sequence[Image.Image], records: Sequence[dict]) -> list[float]:
        return _numbers(what, score(prompts, images, records), len(images))

    if is_address:
        checked([], [], [])
    return checked


def _numbers(what: str, scores, count: int) -> list[float]:
    try:
        found = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} gave {scores!r:.80}, expected a list of {count} numbers ({error})") from None
    if len(found) != count or not all(map(math.isfinite, found)):
        raise UserError(f"{what} gave {found!r:.80}, expected {count} finite numbers, one for each image")
    return found


def _function(what: str, name: str) -> Reward:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a module of the user's
    takes_records = False
    try:
        function = resolve_name(name)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(f"{what} cannot be imported ({type(error).__name__}: {first_line(error)})") from None
    if ":" not in name or not callable(function):
        raise UserError(f"{what} is no function; give module:function, or an address that begins with http")
    with suppress(ValueError):  # of some built-in functions
        takes_records = "records" in signature(function).parameters

    def score(prompts, images, records):
        try:
            return function(prompts, images, **({"records": records} if takes_records else {}))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{what} failed ({type(error).__name__}: {first_line(error)})") from error

    return score


class _Address:
    """An address that scores images."""

    def __init__(self, what: str, address: str, timeout: float, retries: int):
        self.what, self.address, self.timeout, self.retries = what, address, timeout, retries

    def __call__(self, prompts, images, records):
        body = {"prompts": list(prompts), "images": [_base64(image) for image in images], "records": list(records)}
        request = urllib.request.Request(
            self.address, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(PAUSE * 2 ** min(attempt - 1, 10), LONGEST_PAUSE))
            try:
                return self._scores(self._answer(request))
            except UserError:
                raise
            except urllib.error.HTTPError as error:
                problem = f"answered {error.code} {error.reason}"
                with suppress(OSError):
                    said = error.read(200).decode(errors="replace").strip()
                    problem += f": {said}" if said else ""
                if error.code < 500 and error.code not in LATER:  # another attempt would get the same answer
                    break
            except UNREACHED as error:
                reason = getattr(error, "reason", error)
                problem = "did not answer in time" if isinstance(reason, TimeoutError) else f"is not reached ({reason})"
        attempts = f" in {attempt + 1} attempts" if attempt else ""
        raise UserError(f"{self.what} {problem}{attempts}; start it, or give another")

    def _answer(self, request: urllib.request.Request) -> bytes:
        """What is answered in time; the library's own limit is that of each piece that comes."""
        ends, content = time.monotonic() + self.timeout, b""
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            while part := answer.read1(2**16):
                content += part
                if time.monotonic() > ends:
                    raise TimeoutError
                if len(content) > MOST_BYTES:
                    raise ConnectionError(f"the answer has more than {MOST_BYTES:,} bytes")
            if answer.length:
                raise ConnectionError("the answer was cut off")
        return content

    def _scores(self, answer: bytes):
        try:
            return json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{self.what} answered {answer[:80]!r}, expected {{"scores": […]}}') from None


def _base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
