"""Answers requests batch by batch, by the plain loop of model/generate.py.

The engine takes its place wherever an answer does not depend on the others in its batch.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from unimed_jax.config import Config
from unimed_jax.data import fitting, layout
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.memory import check_answering
from unimed_jax.model.generate import Sampling, generate, stream
from unimed_jax.model.unimed import UniMed
from unimed_jax.predict.request import Prompt, Prompts, Request
from unimed_jax.predict.text import text_of

BUCKET = 32  # prompt lengths are rounded up to multiples, so that few shapes are compiled


class PlainLoop:
    """Answers requests with one model, in batches that begin and end together."""

    def __init__(self, model: UniMed, config: Config, tokenizer: Tokenizer, keeps: bool = True):
        """Takes whether the ids of texts are kept for the next time."""
        self._model, self._config, self._tokenizer = model, config, tokenizer
        self._prompts = Prompts(config, tokenizer, keeps)

    def answers(self, requests: Sequence[Request], batch: int) -> list[str]:
        """Answers all requests, in order, `batch` at a time.

        Consecutive requests share a batch if they have the same temperature and length of the
        answer, so batches depend on the order given.
        """
        prompts = [self._prompts(request) for request in requests]
        texts: list[str] = []
        while len(texts) < len(prompts):
            rest = prompts[len(texts) : len(texts) + batch]
            kinds = [(prompt.most, prompt.temperature) for prompt in rest]
            alike = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), len(rest))
            texts += self._together(rest[:alike], batch)
        return texts

    def pieces(self, request: Request, chunk: int) -> Iterator[list[int]]:
        """Yields the ids of the answer as they come."""
        prompts = [self._prompts(request)]
        rows = self._rows(prompts, 1)
        for found in stream(self._model, rows, **self._how(prompts, 1), chunk=chunk):
            yield found[0].tolist()

    def _together(self, prompts: Sequence[Prompt], batch: int) -> list[str]:
        rows = self._rows(prompts, batch)
        how = self._how(prompts, len(rows["tokens"]))
        tokens = np.asarray(generate(self._model, rows, **how))
        return [text_of(self._tokenizer, row) for row in tokens[: len(prompts)]]

    def _rows(self, prompts: Sequence[Prompt], batch: int) -> layout.Batch:
        groups = [layout.Group((prompt.encoded,), self._prompts.pixels(prompt)) for prompt in prompts]
        rows = rows_of(groups, self._config, self._tokenizer.pad, batch)
        count, tokens = rows["tokens"].shape
        check_answering(self._config.model, self._model, count, tokens + prompts[0].most)
        return rows

    def _how(self, prompts: Sequence[Prompt], rows: int) -> dict:
        """Returns the arguments of `generate` for prompts of one kind and copies of the first."""
        key = None
        if prompts[0].temperature:
            seeds = [prompt.seed % 2**32 for prompt in prompts]
            seeds += seeds[:1] * (rows - len(seeds))
            first = jax.random.key(self._config.seed)
            key = jax.vmap(jax.random.fold_in, (None, 0))(first, np.array(seeds, np.uint32))
        return {
            "max_new_tokens": prompts[0].most,
            "eos": self._tokenizer.eos,
            "pad": self._tokenizer.pad,
            "sampling": Sampling(prompts[0].temperature, self._config.evaluate.top_p),
            "key": key,
        }


def prompt_batch(
    encoder: layout.Encoder,
    config: Config,
    pad: int,
    examples: Sequence[Example],
    pixels: Sequence[Sequence[np.ndarray]],
    batch: int | None = None,
) -> layout.Batch:
    """Makes left-padded prompts, one a row, with copies of the first as `rows_of` adds them.

    pixels: of each example its images, uint8 [H, W, 3]; batch: the most rows (default:
    `config.evaluate.batch`).
    """
    vision = config.model.vision
    groups = [
        layout.Group(
            (encoder.prompt(example),), tuple(fitting.fit(one, config.data.fit, vision) for one in own)
        )
        for example, own in zip(examples, pixels, strict=True)
    ]
    return rows_of(groups, config, pad, batch or config.evaluate.batch)


def rows_of(groups: list[layout.Group], config: Config, pad: int, batch: int) -> layout.Batch:
    """Lays prompts with their images into rows, and copies the first up to a power of two rows.

    batch: the most rows. There are no copies where experts have a limited capacity at evaluation: those
    would take places of the prompts' own tokens, and make more of them.
    """
    moe = config.model.moe
    if not moe.experts or moe.eval_capacity_factor is None:
        rows = min(batch, 1 << (len(groups) - 1).bit_length())
        groups = groups + groups[:1] * (rows - len(groups))
    longest = max(group.questions[0].tokens for group in groups)
    shape = layout.RowShape(
        tokens=-(-longest // BUCKET) * BUCKET,
        images=max(len(group.images) for group in groups),
        answers=0,
        tokens_per_image=config.model.tokens_per_image,
        image_size=config.model.vision.image_size,
    )
    return layout.prompt_batch(groups, shape, pad)
