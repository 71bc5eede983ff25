"""Holds what all requests to one server share: the model, its limits, and who waits."""

import asyncio
import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http

from unimed_jax.config import Config
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.model_card import passports_of, trained_tasks
from unimed_jax.model import decoding
from unimed_jax.parsing import parse_json
from unimed_jax.predict.engine import Engine, Piece
from unimed_jax.predict.one_by_one import OneByOne
from unimed_jax.predict.request import Request
from unimed_jax.runs.open import Run
from unimed_jax.serve.counts import Counts
from unimed_jax.serve.engine_thread import Answer, EngineThread
from unimed_jax.serve.limits import Limits, Refused, wrong
from unimed_jax.serve.measures import likelihood_of, routing_of
from unimed_jax.serve.question import Asked

Result = TypeVar("Result")
DECODERS = 2  # threads that parse bodies and decode pictures


class Ticket:
    """Counts one request among those that are open, until it leaves, and bounds its time."""

    def __init__(self, service: "Service"):
        self._service, self._inside = service, True
        service.open += 1
        self._end = time.monotonic() + service.limits.seconds  # the event loop's clock, too

    @contextlib.asynccontextmanager
    async def within(self) -> AsyncIterator[None]:
        """Raises Refused (504) inside if the request's time is over."""
        try:
            async with asyncio.timeout_at(self._end):
                yield
        except TimeoutError:
            raise Refused(
                504,
                f"the answer took more than {self._service.limits.seconds:g} seconds; ask for fewer "
                "tokens, or later.",
                "timeout",
            ) from None

    def leave(self) -> None:
        if self._inside:
            self._inside = False
            self._service.open -= 1


def trained(config: Config) -> set[str]:
    """Names the tasks that a model was trained for; all of them where its sources do not say it.

    Only readers of this library are asked: the module of another one, which a foreign model's settings
    may name, is not imported.
    """
    asked = tuple(s for s in config.data.sources if not s.tasks and "." not in s.name)
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=asked))
    return trained_tasks(config, passports_of(own))


class Service:
    """Answers with one run's model. Its methods belong to the event loop."""

    def __init__(self, run: Run, name: str, limits: Limits, slots: int | None = None):
        """Opens the engine; raises UserError if memory cannot hold the answers.

        name: of the model, for clients; slots: how many answers are made at once at most.
        """
        config = run.config
        run.tokenizer.keep_no_words()
        evaluate = dataclasses.replace(config.evaluate, max_new_tokens=limits.max_tokens)
        self.run = dataclasses.replace(run, config=dataclasses.replace(config, evaluate=evaluate))
        self.name, self.counts = name, Counts()
        self.trained = trained(config)
        self.open = self.held = 0  # requests; bytes of bodies that are in memory
        self.ready = self.stops = False
        self.failed = ""  # why the first answers could not be made

        def made() -> Engine | OneByOne:
            with run.inside():
                decoding.prepare(run.model)  # it only answers from here on
            parts = run.model, self.run.config, run.tokenizer, run.mesh
            if config.model.answers_depend_on_batch:  # then each is made alone
                return OneByOne(*parts)
            return Engine(*parts, slots=slots)

        self.engine = EngineThread(made)
        sizes = self.engine.sizes
        fitting = (config.text.max_prompt - 1) // config.model.tokens_per_image
        self.limits = dataclasses.replace(
            limits, images=max(0, min(limits.images, sizes.images, fitting))
        )
        self._threads = ThreadPoolExecutor(DECODERS, "reader")

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.run.tokenizer

    async def warm(self) -> None:
        """Compiles all programs by first questions, after which the server is ready.

        What goes wrong is kept in `failed`, at which the server stops.
        """
        try:
            await self._first_answers()
        except Exception as error:
            self.failed = str(error) or type(error).__name__
        else:
            self.ready = True

    async def _first_answers(self) -> None:
        size = self.config.model.vision.image_size
        black = np.zeros((size, size, 3), np.uint8)
        most = min(2, self.limits.max_tokens)
        requests = [Request("qa", "?", max_new_tokens=most)]
        if self.limits.images:
            requests.append(Request("vqa", "?", (black,), max_new_tokens=most))
        for request in requests:
            answer, _ = await self.engine.ask(request)
            async for _ in answer.pieces():
                pass
            await self.engine.call(functools.partial(likelihood_of, self.run, request, ["?"]))
        await self.engine.call(lambda: routing_of(self.run, requests[-1]))

    def close(self) -> None:
        self.engine.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- who may come in ---------------------------------------------------------------------

    def enter(self) -> Ticket:
        """Admits a request to those that wait; raises Refused (429) if there are too many."""
        if self.stops:
            raise Refused(503, "the server is stopping; ask again in a moment.", "stopping",
                          {"Retry-After": "5"})  # fmt: skip
        if self.open >= self.limits.queue:
            raise self._busy(f"{self.open} requests are waiting or being answered")
        return Ticket(self)

    def _busy(self, why: str) -> Refused:
        seconds = 1 + self.counts.whole.mean * self.open / self.engine.sizes.slots
        return Refused(
            429,
            f"the server is full ({why}); ask again after the seconds that Retry-After names.",
            "rate_limit_exceeded",
            {"Retry-After": str(round(min(60, seconds)))},
        )

    async def body(self, http: Http) -> bytes:
        """Reads a body within its limits of bytes and time; the caller lets go of `len` in `held`."""
        limits = self.limits
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            words = "the body must be JSON; send Content-Type: application/json."
            raise Refused(415, words, "unsupported_media_type")
        if http.headers.get("content-encoding", "identity").lower() != "identity":
            words = "the body is compressed; send it as it is, without Content-Encoding."
            raise Refused(415, words, "unsupported_encoding")
        too_long = Refused(
            413,
            f"the body has more than the {limits.bytes} bytes that are read; send a smaller image.",
            "body_too_large",
        )
        declared = http.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limits.bytes:
            raise too_long
        found = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in http.stream():
                    found += chunk
                    self.held += len(chunk)
                    if len(found) > limits.bytes:
                        raise too_long
                    if self.held > limits.held * limits.bytes:
                        raise self._busy("too many large bodies are being read")
        except BaseException as error:
            self.held -= len(found)
            if isinstance(error, TimeoutError):
                raise Refused(
                    408,
                    f"the body did not come within {limits.body_seconds:g} seconds; send it faster.",
                    "timeout",
                    {"Connection": "close"},
                ) from None
            raise
        return bytes(found)

    async def read(self, http: Http, understand: Callable[[Any], Result]) -> tuple[Result, Ticket]:
        """Reads a request's JSON and makes something of it in another thread, once it is admitted.

        The caller lets the ticket leave. Raises Refused.
        """
        content = await self.body(http)
        try:
            ticket = self.enter()
            try:
                async with ticket.within():
                    loop = asyncio.get_running_loop()
                    return await loop.run_in_executor(
                        self._threads, lambda: understand(self._parsed(content))
                    ), ticket
            except BaseException:
                ticket.leave()
                raise
        finally:
            self.held -= len(content)

    def _parsed(self, content: bytes) -> Any:
        if sum(map(content.count, (b",", b"[", b"{"))) > self.limits.values:
            raise wrong(f"the body has more than {self.limits.values} values; send fewer.", "too_many")
        try:
            return parse_json(content, "the body", "send JSON")
        except UserError as error:
            raise wrong(str(error), "invalid_json") from None

    # ---- answers -----------------------------------------------------------------------------

    async def ask(self, asked: Asked, ticket: Ticket) -> "Spoken":
        """Puts a question to the model; raises Refused if it cannot be asked."""
        started = time.monotonic()
        async with ticket.within():
            answer, tokens = await self.engine.ask(asked.request)
        self.counts.prompt_tokens += tokens
        return Spoken(self, asked.request, ticket, answer, tokens, started)


class Spoken:
    """Gives an answer's text piece by piece, and counts it."""

    def __init__(
        self,
        service: Service,
        request: Request,
        ticket: Ticket,
        answer: Answer,
        tokens: int,
        started: float,
    ):
        self._counts, self._request, self._ticket = service.counts, request, ticket
        self._answer, self._started = answer, started
        self.prompt_tokens, self.tokens = tokens, 0
        self.text, self.finish = "", "cancelled"

    def give_up(self) -> None:
        """Says that nobody waits for the rest any more."""
        self._answer.give_up()

    async def pieces(self) -> AsyncGenerator[str]:
        """Yields texts that are not empty; what is not read to its end is given up."""
        counts, first = self._counts, True
        try:
            source = self._answer.pieces()
            while True:
                async with self._ticket.within():
                    piece: Piece | None = await anext(source, None)
                if piece is None:
                    break
                if first:
                    first = False
                    counts.first_piece.add(time.monotonic() - self._started)
                self.tokens = piece.tokens
                self.text += piece.text
                if piece.ended:
                    whole = piece.tokens >= (self._request.max_new_tokens or 0)
                    self.finish = "length" if whole and not piece.stopped else "stop"
                if piece.text:
                    yield piece.text
        finally:
            self._answer.give_up()
            counts.answers[self._request.task, self.finish] += 1
            counts.answer_tokens += self.tokens
            counts.whole.add(time.monotonic() - self._started)

    async def whole(self) -> str:
        async for _ in self.pieces():
            pass
        return self.text

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": total,
        }


async def unless_gone(http: Http, work: Awaitable[Result]) -> Result:
    """Awaits something, and gives it up if the client leaves first (ClientDisconnect)."""
    doing = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({doing, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return await doing
    finally:
        for task in (doing, watch):
            task.cancel()
        await asyncio.gather(doing, watch, return_exceptions=True)


async def _left(http: Http) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def new_id(kind: str) -> str:
    """Makes an id that says nothing."""
    return f"{kind}-{secrets.token_hex(12)}"
