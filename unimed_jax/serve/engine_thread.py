"""Runs the engine in one thread, to which all requests come: every call of JAX is made there.

Questions of all tasks are answered together, in the engine's slots. Between two of its steps, what
else needs the model (likelihoods, routing) has its turn, one at a time.
"""

import asyncio
import collections
import contextlib
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from unimed_jax.data.layout import PromptTooLong
from unimed_jax.errors import UserError
from unimed_jax.predict.engine import Engine, Piece
from unimed_jax.predict.one_by_one import OneByOne
from unimed_jax.predict.request import Request
from unimed_jax.serve.limits import Refused, wrong

Result = TypeVar("Result")
RETRY_SECONDS = 1.0  # until an engine that could not be made is tried again
STEP = 8  # tokens of each answer between two looks at what has come


class Answer:
    """Gives the pieces of one answer as they are made. Its methods belong to the event loop."""

    def __init__(self, thread: "EngineThread"):
        self._thread, self._loop = thread, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.accepted: asyncio.Future[int] = self._loop.create_future()  # tokens of the prompt
        self.number = -1  # of the engine
        self.over = False

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields what is new, up to a piece that has ended."""
        while not self.over:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                self.over = True
                raise piece
            self.over = piece.ended
            yield piece

    def give_up(self) -> None:
        """Says that nobody waits for the rest any more."""
        if not self.over:
            self.over = True
            self._thread.put(lambda: self._thread.forget(self))

    def tell(self, what: Piece | Exception | int) -> None:
        """Brings a piece, a failure or the prompt's tokens from the engine's thread to the loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._take, what)

    def _take(self, what: Piece | Exception | int) -> None:
        if isinstance(what, int):
            if not self.accepted.done():  # else nobody waits for it any more
                self.accepted.set_result(what)
        elif isinstance(what, Piece) or self.accepted.done():
            self._pieces.put_nowait(what)
        else:
            self.accepted.set_exception(what)


class EngineThread:
    """Owns an engine; `ask` and `call` may be awaited by any task of the event loop."""

    def __init__(self, make: Callable[[], Engine | OneByOne]):
        """Takes what makes the engine: once at the start, and again if it ever fails."""
        self._make = make
        self._engine = make()
        self.sizes = self._engine.sizes
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._longer: collections.deque[Callable[[], None]] = collections.deque()
        self._answers: dict[int, Answer] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def ask(self, request: Request) -> tuple[Answer, int]:
        """Puts a request to those that wait; returns its answer and the tokens of its prompt.

        Raises Refused for a request that the model cannot be asked.
        """
        answer = Answer(self)
        self.put(lambda: self._submit(request, answer))
        try:
            return answer, await answer.accepted
        except BaseException:
            answer.give_up()
            raise

    async def call(self, function: Callable[[], Result]) -> Result:
        """Runs a function of the model between two steps, and returns what it returns."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if not future.done():
                future.set_result(result) if error is None else future.set_exception(error)

        def job() -> None:
            if future.cancelled():
                return
            result, error = None, None
            try:
                result = function()
            except UserError as found:
                error = _refusal(found)
            except Exception as found:
                error = _failed(found)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result, error)

        self.put(lambda: self._longer.append(job))
        return await future

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Ends the thread after the step that it is in."""
        self._jobs.put(None)
        self._thread.join(60)

    # ---- in the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            waits = self._engine.idle and not self._longer
            while True:
                try:
                    job = self._jobs.get(block=waits)
                except queue.Empty:
                    break
                if job is None:
                    return
                job()
                waits = False
            if self._longer:
                self._longer.popleft()()
            if not self._engine.idle:
                self._step()

    def _step(self) -> None:
        try:
            pieces = self._engine.step(STEP)
        except Exception as error:
            failed, self._answers = list(self._answers.values()), {}
            for answer in failed:
                answer.tell(_failed(error))
            self._engine = self._again()
            return
        for piece in pieces:
            waiting = self._answers.get(piece.number)
            if waiting is not None:
                if piece.ended:
                    del self._answers[piece.number]
                waiting.tell(piece)

    def _again(self) -> Engine | OneByOne:
        """Makes another engine, as the state of one that failed is lost; tries until it succeeds."""
        while True:
            try:
                return self._make()
            except Exception as error:
                print_fault(error)
                time.sleep(RETRY_SECONDS)

    def _submit(self, request: Request, answer: Answer) -> None:
        if answer.over:
            return
        try:
            tokens = self._engine.prompt_tokens(request)
            answer.number = self._engine.submit(request)
        except UserError as error:
            answer.tell(_refusal(error))
            return
        except Exception as error:
            answer.tell(_failed(error))
            return
        self._answers[answer.number] = answer
        answer.tell(tokens)

    def forget(self, answer: Answer) -> None:
        # another engine may have given its number to another answer
        if self._answers.get(answer.number) is answer:
            del self._answers[answer.number]
            self._engine.cancel(answer.number)


def _refusal(error: UserError) -> Refused:
    if isinstance(error, PromptTooLong):
        return wrong(
            f"the prompt has {error.tokens} tokens with its images and earlier turns, and the model "
            f"reads {error.most}; shorten the question, or send fewer turns or images.",
            "context_length_exceeded",
        )
    return wrong(str(error))


def _failed(error: Exception) -> Refused:
    """Makes the refusal for a fault of ours; what is printed of it has no words of a request."""
    print_fault(error)
    return Refused(500, "the model failed on this request; ask again.", "internal_error")


def print_fault(error: BaseException) -> None:
    """Prints on stderr which exception was raised where, and not what it says."""
    places = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{place.filename}:{place.lineno}" for place in reversed(places))
    print(f"unimed_jax serve: {type(error).__name__} at {where}", file=sys.stderr, flush=True)
