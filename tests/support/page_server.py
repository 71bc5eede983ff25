"""Serves the page by the real server, whose answers are written here instead of made by a model."""

import asyncio
import threading
import time

from unimed_jax.predict.engine import Piece
from unimed_jax.predict.request import Request
from unimed_jax.runs.open import Run
from unimed_jax.serve.app import application, names_of
from unimed_jax.serve.limits import Limits, Refused
from unimed_jax.serve.question import Asked
from unimed_jax.serve.server import listening, server_of
from unimed_jax.serve.service import Service, Spoken, Ticket

SAID = {
    "vqa": "an axial slice",
    "refer": "{<25><50><75><100>}",
    "identify": "left hippocampus",
    "caption": "An axial slice. The hippocampi are in the middle.",
    "cls": "axial",
    "qa": "Diseases of the nervous system",
}
SLOW = "speak slowly"  # a question whose answer has no end
FULL = "come when the server is full"
BYTES = 200_000


class Script(Service):
    """Answers each task by `SAID`; likelihoods and routing are the run's own."""

    def __init__(self, run: Run):
        super().__init__(run, "scripted", Limits(max_tokens=12, bytes=BYTES))
        self.asked: list[Request] = []

    async def warm(self) -> None:
        self.ready = True

    async def ask(self, asked: Asked, ticket: Ticket) -> Spoken:
        request = asked.request
        if request.question == FULL:
            raise Refused(429, "the server is full; ask again in a moment.", "rate_limit_exceeded")
        self.asked.append(request)
        words = [f"{word} " for word in SAID[request.task].split(" ")]
        words[-1] = words[-1].rstrip()
        slow = request.question == SLOW
        answer = Words(["word "] * 10_000 if slow else words, 0.03 if slow else 0.0)
        return Spoken(self, request, ticket, answer, 7, time.monotonic())  # type: ignore[arg-type]


class Words:
    """Gives an answer word by word, as `serve.engine_thread.Answer` does."""

    def __init__(self, texts: list[str], wait: float):
        self.texts, self.wait = texts, wait

    async def pieces(self):
        for number, text in enumerate(self.texts, 1):
            await asyncio.sleep(self.wait)
            yield Piece(0, text, number, number == len(self.texts), True)

    def give_up(self) -> None:
        pass


class PageServer:
    """Runs in a thread for as long as a with block lasts."""

    def __init__(self, run: Run, token: str = ""):
        self.service, self._stops = Script(run), False
        app = application(self.service, names_of("127.0.0.1", "127.0.0.1"), token)
        self._socket = listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        server = server_of(app, self.service.limits, lambda: self._stops)
        self._thread = threading.Thread(target=server.run, args=([self._socket],), name="page server")

    def __enter__(self) -> "PageServer":
        self._thread.start()
        end = time.monotonic() + 30
        while not self.service.ready:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_) -> None:
        self._stops = True
        self._thread.join(30)
        assert not self._thread.is_alive()
