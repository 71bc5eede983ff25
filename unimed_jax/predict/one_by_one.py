"""Answers requests as they come, one after the other, for models whose answers depend on their batch.

It has the methods of `engine.Engine`. Each answer is the plain loop's to that request alone. Its two
programs are compiled for each multiple of `plain.BUCKET` tokens of a prompt and for each temperature,
of which a tenth is the smallest step.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator

from jax.sharding import Mesh

from unimed_jax.config import Config
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.model.sharding import inside
from unimed_jax.model.unimed import UniMed
from unimed_jax.predict.engine import Piece
from unimed_jax.predict.plain import PlainLoop
from unimed_jax.predict.request import Prompts, Request
from unimed_jax.predict.sizes import sizes_for_any
from unimed_jax.predict.text import Spoken


class _Answer:
    """Holds the answer that is being made."""

    def __init__(self, number: int, most: int, ids: Iterator[list[int]], tokenizer: Tokenizer):
        self.number, self.most, self.ids = number, most, ids
        self.tokens: list[int] = []
        self.spoken = Spoken(tokenizer)


class OneByOne:
    """Answers requests with one model; `cancel` belongs to the thread of `step`."""

    def __init__(self, model: UniMed, config: Config, tokenizer: Tokenizer, mesh: Mesh | None = None):
        self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
        self._prompts = Prompts(config, tokenizer, keeps=False)
        self._plain = PlainLoop(model, config, tokenizer, keeps=False)
        with inside(mesh):
            self.sizes = sizes_for_any(config, 1)
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._now: _Answer | None = None
        self._numbers = itertools.count()

    def submit(self, request: Request) -> int:
        """Puts a request at the end of those that wait; raises UserError if it cannot be asked."""
        self._prompts(request)
        number = next(self._numbers)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """Gives a request up; no piece of it comes any more."""
        self._waiting = collections.deque(one for one in self._waiting if one[0] != number)
        if self._now is not None and self._now.number == number:
            self._now = None

    def step(self, tokens: int = 8) -> list[Piece]:
        """Grows one answer by at most `tokens`; returns what is new of it."""
        now = self._now = self._now or self._next(tokens)
        if now is None:
            return []
        with inside(self._mesh):
            found = next(now.ids, None)
        new = (found or [])[: now.most - len(now.tokens)]
        stopped = self._tokenizer.eos in new
        if stopped:
            new = new[: new.index(self._tokenizer.eos) + 1]
        now.tokens += new
        ended = stopped or found is None or len(now.tokens) >= now.most
        text = now.spoken.add(new)
        if ended:
            text += now.spoken.end()
            self._now = None
        return [Piece(now.number, text, len(now.tokens), ended, stopped)]

    def _next(self, tokens: int) -> _Answer | None:
        if not self._waiting:
            return None
        number, request = self._waiting.popleft()
        most = request.max_new_tokens or self._config.evaluate.max_new_tokens
        temperature = request.temperature and max(0.1, round(request.temperature, 1))
        # One length for all, since the programs are made for it; the answer is cut at its own.
        whole = dataclasses.replace(request, max_new_tokens=None, temperature=temperature)
        return _Answer(number, most, self._plain.pieces(whole, tokens), self._tokenizer)

    @property
    def idle(self) -> bool:
        """Says that there is nothing to answer."""
        return self._now is None and not self._waiting

    def prompt_tokens(self, request: Request) -> int:
        """Counts the tokens of a request's prompt, visual ones included."""
        return self._prompts(request).encoded.tokens
