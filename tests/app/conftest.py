"""The page of the small default in a browser. `make test-app` installs what this needs; other runs leave it out."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import REPOSITORY

CONFIG = "config=configs/showo_tiny_demo.yaml"
SLOW = 120_000  # milliseconds: how long anything may take on a busy machine
WINDOW = {"width": 1180, "height": 800}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="folder in which those of the documentation are renewed")


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of `app.py` with a few options, in a process of its own."""
    folder = tmp_path_factory.mktemp("server")
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    with (folder / "log").open("w+") as log:
        command = [sys.executable, str(REPOSITORY / "app.py"), CONFIG, "device=cpu", "dtype=fp32", "port=0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environment)
        try:
            lines = iter(process.stdout.readline, "")
            address = next(
                (found[1] for line in lines if (found := re.match(r"open (http://127\.0\.0\.1:\d+)", line))), ""
            )
            assert address, (folder / "log").read_text()
            yield address
        finally:
            process.terminate()
            process.wait()
        # The libraries trace visitors who leave in the middle of a file; no error of ours may be among it.
        written = (folder / "log").read_text()
        assert not re.search(rf'File "{re.escape(str(REPOSITORY))}/(?!\.venv/)', written), written[-5000:]


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import expect, sync_playwright

    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no chromium")
    expect.set_options(timeout=SLOW)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def visit(browser, server) -> Iterator[Callable]:
    """Opens the page as one more visitor; in the end nothing must have been asked of any other machine."""
    contexts, addresses = [], []

    def open_page():
        context = browser.new_context(viewport=WINDOW)
        contexts.append(context)
        context.on("request", lambda request: addresses.append(request.url))
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.goto(server)
        page.get_by_role("tab", name="Text to image").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert addresses and [one for one in addresses if not one.startswith((server, "data:", "blob:"))] == []


@pytest.fixture
def screenshot(request) -> Callable:
    def take(page, name: str) -> None:
        if (folder := request.config.getoption("--screenshots")) is None:
            return
        page.mouse.move(1, 1)
        file = Path(folder) / f"app-{name}.png"
        page.screenshot(path=file, animations="disabled")
        with Image.open(file) as image:
            small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        small.save(file, optimize=True)

    return take


@pytest.fixture(scope="session")
def config():
    from common.config import load_config
    from common.schema import AppConfig

    return load_config([CONFIG, "device=cpu", "dtype=fp32"], AppConfig)


@pytest.fixture(scope="session")
def pipeline(config):
    """The same model outside the page."""
    from models import ShowoPipeline

    return ShowoPipeline.from_config(config)
