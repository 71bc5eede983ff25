"""Answers requests with a model, all together or one of them streamed.

Evaluation, the verb `predict` and everything that serves answers go through the engine (engine.py);
models whose answers depend on their batch by definition keep the plain loop (plain.py).
"""

import contextlib
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from unimed_jax.config import Config
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.model.sharding import inside
from unimed_jax.model.unimed import UniMed
from unimed_jax.predict.engine import Engine
from unimed_jax.predict.plain import PlainLoop
from unimed_jax.predict.request import Request, at_least_one
from unimed_jax.predict.text import Spoken


class Predictor:
    """Turns requests into texts with one model.

    Give the `mesh` over which the model lies, or call it inside `run.inside()`. With several
    processes all of them make the same calls and get the same texts.
    """

    def __init__(self, model: UniMed, config: Config, tokenizer: Tokenizer, mesh: Mesh | None = None):
        self._model, self._config, self._tokenizer, self._mesh = model, config, tokenizer, mesh
        self._plain = None
        if config.model.answers_depend_on_batch:
            self._plain = PlainLoop(model, config, tokenizer)

    def answers(self, requests: Sequence[Request], batch: int | None = None) -> list[str]:
        """Answers all requests, in order, at most `batch` at once (default: `config.evaluate.batch`).

        Raises UserError for a request that does not fit its task or whose prompt is longer than
        `text.max_prompt`.
        """
        batch = at_least_one("batch", self._config.evaluate.batch if batch is None else batch)
        if not requests:
            return []
        if self._plain is None:
            return self._engine(requests, batch).answers(requests)
        with self._inside():
            return self._plain.answers(requests, batch)

    def stream(self, request: Request, chunk: int = 1) -> Iterator[str]:
        """Yields the answer in pieces as its tokens are picked, `chunk` tokens at a time.

        Joined, the pieces are `answers([request])[0]`. Raises as `answers` does.
        """
        at_least_one("chunk", chunk)
        if self._plain is None:
            yield from self._streamed(request, chunk)
            return
        spoken = Spoken(self._tokenizer)
        parts = self._plain.pieces(request, chunk)
        while True:
            # Not around the yield: the caller's code must not run inside the mesh's context.
            with self._inside():
                found = next(parts, None)
            if piece := spoken.end() if found is None else spoken.add(found):
                yield piece
            if found is None:
                return

    def _streamed(self, request: Request, chunk: int) -> Iterator[str]:
        engine = self._engine([request])
        engine.submit(request)
        while not engine.idle:
            for piece in engine.step(chunk):
                if piece.text:
                    yield piece.text

    def _engine(self, requests: Sequence[Request], slots: int | None = None) -> Engine:
        return Engine(self._model, self._config, self._tokenizer, self._mesh, requests, slots)

    def _inside(self) -> contextlib.AbstractContextManager:
        return inside(self._mesh)
