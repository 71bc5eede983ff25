"""A real server in threads of this process, with a random model of the squares."""

import base64
import io
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.fake_brain import Squares, tiny_config

from unimed_jax.data.tokenizer import Tokenizer, corpus, train_tokenizer
from unimed_jax.predict.engine import Engine
from unimed_jax.runs.open import Run
from unimed_jax.serve.app import application, names_of
from unimed_jax.serve.limits import Limits
from unimed_jax.serve.server import listening, server_of
from unimed_jax.serve.service import Service
from unimed_jax.settings import from_config_dict

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import serving
from serving_faults import WATCHED

__all__ = ["serving"]
NEW = 12  # tokens of an answer
# Small, so that what exceeds one is made quickly.
LIMITS = Limits(
    NEW,
    bytes=1 << 20,
    pixels=1 << 16,
    queue=24,
    connections=60,
    header_seconds=1,
    body_seconds=1,
    send_seconds=1,
)


class Live:
    """A server that runs, and what it serves."""

    def __init__(self, run: Run):
        self.run, self.stops = run, False
        self.service = Service(run, "squares", LIMITS)
        self.app = application(self.service, names_of("127.0.0.1", "127.0.0.1"))
        self.socket = listening("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        server = server_of(self.app, self.service.limits, lambda: self.stops)
        self.thread = threading.Thread(target=server.run, args=([self.socket],), name="server")
        self.thread.start()
        self.until(lambda: self.service.ready)

    def until(self, holds, seconds=120):
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.01)

    def post(self, path, body, **headers):
        """Returns status, headers and JSON of the answer to a body (bytes as they are)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
        return self.ask(urllib.request.Request(self.url + path, data, headers))

    def get(self, path, **headers):
        return self.ask(urllib.request.Request(self.url + path, headers=headers))

    def ask(self, request):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            found = error.code, error.headers, error.read()
        status, headers, content = found
        kind = headers.get_content_type()
        return status, headers, json.loads(content) if kind == "application/json" else content

    def expected(self, requests) -> list[str]:
        """What the engine says when nobody else asks."""
        run = self.service.run
        return Engine(run.model, run.config, run.tokenizer).answers(requests)


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tokenizer"
    settings = tiny_config()
    settings.evaluate.batch, settings.evaluate.max_new_tokens = 8, NEW
    settings.text.max_prompt = 160
    config = from_config_dict(settings)
    train_tokenizer(corpus(Squares().examples("train"), config.text), config.text, folder)
    model = tiny.sharp_model(config.model)
    jax.config.update("jax_disable_most_optimizations", True)
    found = Live(Run(Path("runs/squares"), config, Tokenizer.load(folder), model, step=0))
    jax.config.update("jax_disable_most_optimizations", False)
    yield found
    found.stops = True
    found.thread.join(30)
    assert not found.thread.is_alive()


@pytest.fixture(autouse=True)
def nothing_is_left_over(request):
    """After each test nobody waits, nothing is held in memory, and no slot is taken."""
    yield
    if "live" in request.fixturenames:
        service = request.getfixturevalue("live").service
        live = request.getfixturevalue("live")
        live.until(lambda: service.open == 0 and service.held == 0 and service.engine._engine.idle, 20)
        assert not service.engine._answers


def png(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def url(content, media: str = "image/png") -> str:
    """A data URL of bytes, or of pixels as a PNG."""
    content = png(content) if isinstance(content, np.ndarray) else content
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def square(number: int) -> np.ndarray:
    return Squares().image(f"test{number}")


class Trace:
    """What threads other than this one open and connect to, between `start` and `stop`."""

    def __init__(self):
        self.events, self._on = [], False
        sys.addaudithook(self._hook)  # for the rest of the process: Python takes none away

    def _hook(self, event, arguments):
        if self._on and event in WATCHED and threading.current_thread() is not threading.main_thread():
            self.events.append((event, *map(str, (*arguments, None)[:2])))

    def __enter__(self):
        self.events, self._on = [], True
        return self.events

    def __exit__(self, *error):
        self._on = False


@pytest.fixture(scope="session")
def trace():
    return Trace()
