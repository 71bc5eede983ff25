"""Measures what an answer rests on: likelihoods of texts, and where the connector's experts look.

All of it calls the model, so it runs in the engine's thread.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from unimed_jax.config import VISUAL_TASKS
from unimed_jax.evaluate.report.pictures import token_grid
from unimed_jax.model.unimed import UniMed
from unimed_jax.predict.likelihood import Asked as Texts
from unimed_jax.predict.likelihood import Likelihood, Likelihoods
from unimed_jax.predict.request import Request, as_example
from unimed_jax.runs.open import Run


def likelihood_of(run: Run, request: Request, texts: Sequence[str]) -> Likelihood:
    """Measures how likely each text is as the answer to a request, end of text included.

    Raises UserError for a prompt that is too long.
    """
    asked = Texts(as_example(request), tuple(texts), request.history)
    with run.inside():
        measure = Likelihoods(run.model, run.config, run.tokenizer, [[asked]], few_programs=True)
        return measure.of([asked], [request.images])[0]  # type: ignore[list-item]  # arrays already


def confidence(found: Likelihood, stopped: bool) -> float | None:
    """Averages the probabilities of an answer's tokens; its end counts if the model ended it."""
    tokens = found.each[0] if stopped else found.each[0][:-1]
    return float(np.exp(tokens).mean()) if len(tokens) else None


def compared(texts: Sequence[str], found: Likelihood) -> list[dict[str, Any]]:
    """Lists texts with log-likelihoods, and with probabilities that sum to 1 over them."""
    sums = np.array(found.sums)
    shares = np.exp(sums - sums.max())
    return [
        {"text": text, "probability": float(share), "log_likelihood": float(value)}
        for text, share, value in zip(texts, shares / shares.sum(), sums, strict=True)
    ]


def routing_of(run: Run, request: Request) -> dict[str, Any] | None:
    """Maps how much each expert of the connector weighs at each visual token of the first picture.

    Returns None for a connector without experts and for text alone.
    """
    if not request.images or not run.config.model.connector.is_moe:
        return None
    with run.inside():
        pixels = np.asarray(request.images[0])[None]  # [1, H, W, 3]
        weights = np.asarray(_weights(run.model, pixels, np.array([VISUAL_TASKS.index(request.task)])))
    maps = weights[0].T.reshape(-1, *token_grid(run.config))  # [E, rows, columns]
    rounded = np.round(maps.astype(np.float64), 5)
    return {"experts": [{"mean": float(one.mean()), "map": one.tolist()} for one in rounded]}


@jax.jit
def _weights(model: UniMed, pixels: jax.Array, tasks: jax.Array) -> jax.Array:
    """Computes the connector's routing weights [N, T, E] of images [N, H, W, 3] under one task each."""
    routing = model.encode_images(pixels, tasks).routing
    assert routing is not None
    return routing
