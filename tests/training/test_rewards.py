"""Scores by a function or at an address, and what is said where there are none."""

import base64
import io
import json
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from common.errors import UserError
from training import rewards
from training.rewards import open_reward

IMAGES = [Image.new("RGB", (4, 4), colour) for colour in ("black", "white")]
GIVEN = ["a", "b"], IMAGES, [{"n": 1}, {"n": 2}]


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """A module in the current folder."""
    (tmp_path / "own_rewards.py").write_text(
        "def light(prompts, images):\n"
        "    return [image.getpixel((0, 0))[0] / 255 for image in images]\n"
        "def known(prompts, images, records):\n"
        "    return [record['n'] for record in records]\n"
        "def few(prompts, images):\n    return [1.0]\n"
        "def none(prompts, images):\n    return None\n"
        "def infinite(prompts, images):\n    return [1.0, float('inf')]\n"
        "def fails(prompts, images):\n    raise KeyError('no such thing')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards, "PAUSE", 0.01)


@pytest.mark.parametrize(("name", "expected"), [("light", [0.0, 1.0]), ("known", [1.0, 2.0])])
def test_a_function_of_prompts_and_images_and_perhaps_records(name, expected):
    assert open_reward("policy.reward", f"own_rewards:{name}", 1, 0)(*GIVEN) == expected


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("no_such_module:f", "policy.reward=no_such_module:f cannot be imported (ModuleNotFoundError"),
        ("own_rewards:no_such", "cannot be imported (AttributeError"),
        ("own_rewards", "is no function; give module:function"),
        ("own_rewards:number", "is no function; give module:function"),
        ("own_rewards:few", "gave [1.0], expected 2 finite numbers, one for each image"),
        ("own_rewards:none", "gave None, expected a list of 2 numbers"),
        ("own_rewards:infinite", "gave [1.0, inf], expected 2 finite numbers"),
        ("own_rewards:fails", "policy.reward=own_rewards:fails failed (KeyError: 'no such thing')"),
    ],
)
def test_a_wrong_function(name, part):
    with pytest.raises(UserError) as error:
        open_reward("policy.reward", name, 1, 0)(*GIVEN)
    assert part in str(error.value)


@contextmanager
def server(*answers):
    """An address that gives one (status, body) after another, the last one for ever; yields it and what it got."""
    got, waiting = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body(got[-1]) if callable(body) else body)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/score", got
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def by_number(body: dict) -> bytes:
    return json.dumps({"scores": [record["n"] for record in body["records"]]}).encode()


def test_an_address_gets_all_of_it_and_may_fail_for_a_while():
    with server((200, by_number), (503, b"loading"), (500, b""), (200, by_number)) as (address, got):
        assert open_reward("policy.reward", address, 5, 3)(*GIVEN) == [1.0, 2.0]
    assert got[0] == {"prompts": [], "images": [], "records": []} and len(got) == 4
    assert got[1] == got[2] == got[3] and got[3]["prompts"] == ["a", "b"]
    image = Image.open(io.BytesIO(base64.b64decode(got[3]["images"][1])))
    assert image.tobytes() == IMAGES[1].tobytes()


@pytest.mark.parametrize(
    ("answers", "part", "requests"),
    [
        ([(404, b"no such page")], "answered 404 Not Found: no such page; start it, or give another", 1),
        ([(500, b"broken")], "answered 500 Internal Server Error: broken in 3 attempts", 3),
        ([(200, b"<html>")], "answered b'<html>', expected {\"scores\": […]}", 1),
        ([(200, b'{"scores": 3}')], "gave 3, expected a list of 0 numbers", 1),
        ([(200, b'{"scores": []}')], "gave [], expected 2 finite numbers", 2),
    ],
)
def test_an_address_that_gives_no_scores(answers, part, requests):
    with server(*answers) as (address, got), pytest.raises(UserError) as error:
        open_reward("policy.reward", address, 5, 2)(*GIVEN)
    assert part in str(error.value)
    assert f"policy.reward={address}" in str(error.value) and len(got) == requests


def serve_raw(*pieces: bytes, pause: float = 0.0):
    """A socket that answers any request with these bytes, piece by piece, and closes."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    connection.recv(2**20)
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(pause)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(2**16):  # or the client would see a reset connection
                        pass

    threading.Thread(target=serve, daemon=True).start()
    return listening


HEAD = b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "pause", "message"),
    [
        ((b"SSH-2.0-OpenSSH\r\n",), 0, "is not reached .*; start it, or give another"),
        ((HEAD, b"[" * 10), 0, "is not reached .the answer was cut off.* in 2 attempts"),
        ((HEAD, *[b"["] * 50), 0.05, "did not answer in time in 2 attempts"),
    ],
    ids=["no-http", "cut-off", "drips"],
)
def test_an_address_that_does_not_speak_or_end(pieces, pause, message, monkeypatch):
    monkeypatch.setattr("training.rewards.PAUSE", 0.01)
    with closing(serve_raw(*pieces, pause=pause)) as listening, pytest.raises(UserError, match=message):
        open_reward("policy.reward", f"http://127.0.0.1:{listening.getsockname()[1]}", 0.3, 1)


def test_nobody_is_at_the_address_or_answers_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match="did not answer in time in 2 attempts; start it, or give another"):
            open_reward("policy.reward", address, 0.05, 1)
    with pytest.raises(UserError, match=f"policy.reward={address} is not reached .*; start it, or give another"):
        open_reward("policy.reward", address, 1, 0)
