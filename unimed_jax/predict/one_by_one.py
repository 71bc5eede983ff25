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
from unimed_jax.predict.request import Picture, Prompts, Request, at_least_one
from unimed_jax.predict.sizes import check_room, sizes_for_any
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
        self._tokenizer, self._mesh = tokenizer, mesh
        self._prompts = Prompts(config, tokenizer, keeps=False)
        self._plain = PlainLoop(model, config, tokenizer, keeps=False)
        with inside(mesh):
            self.sizes = sizes_for_any(config, 1)
        # the number, the tokens of the answer at most, and what the plain loop is asked
        self._waiting: collections.deque[tuple[int, int, Request]] = collections.deque()
        self._now: _Answer | None = None
        self._numbers = itertools.count()

    def submit(self, request: Request) -> int:
        """Puts a request at the end of those that wait; raises UserError if it cannot be asked.

        Images that are no pictures are read now, as the engine reads them.
        """
        prompt = self._prompts(request)
        check_room(prompt, "tokens in its answer", prompt.most, self.sizes.answer)
        images = request.images
        if not all(isinstance(image, Picture) for image in prompt.images):
            images = self._prompts.pixels(prompt)
        temperature = request.temperature and max(0.1, round(request.temperature, 1))
        # One length for all, since the programs are made for it; the answer is cut at its own.
        whole = dataclasses.replace(request, images=images, max_new_tokens=None, temperature=temperature)
        number = next(self._numbers)
        self._waiting.append((number, prompt.most, whole))
        return number

    def cancel(self, number: int) -> None:
        """Gives a request up; no piece of it comes any more."""
        self._waiting = collections.deque(one for one in self._waiting if one[0] != number)
        if self._now is not None and self._now.number == number:
            self._now = None

    def step(self, tokens: int = 8) -> list[Piece]:
        """Grows one answer by at most `tokens`; returns what is new of it.

        Raises UserError for a picture that cannot be read: no piece comes of the request about it.
        """
        now = self._now = self._now or self._next(at_least_one("tokens", tokens))
        if now is None:
            return []
        try:
            with inside(self._mesh):
                found = next(now.ids, None)
        except BaseException:
            self._now = None  # what failed would end as an empty answer
            raise
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
        number, most, request = self._waiting.popleft()
        return _Answer(number, most, self._plain.pieces(request, tokens), self._tokenizer)

    @property
    def idle(self) -> bool:
        """Says that there is nothing to answer."""
        return self._now is None and not self._waiting

    def prompt_tokens(self, request: Request) -> int:
        """Counts the tokens of a request's prompt, visual ones included."""
        return self._prompts(request).encoded.tokens
