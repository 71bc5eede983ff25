"""Measures the weights of the connector's experts: norms, distances, and moves since the start.

Experts are lists of numbers, and two that differ only in the order of their hidden units compute the
same function at a distance. So two distances are given: of the weights, and of what the experts make
of the same visual tokens.

Shapes: E experts, N images, T visual tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unimed_jax.analyze.examples import Shown
from unimed_jax.analyze.tokens import features
from unimed_jax.errors import UserError
from unimed_jax.evaluate.statistics import Measure, interval, resample
from unimed_jax.model.parameters import parameters
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import UniMed
from unimed_jax.runs.open import Run, initial_leaves

BATCH = 64  # images at once
EXPERTS = "connector/experts/"
OTHERS = {"router": "connector/router/", "task tokens": "connector/task_tokens"}


def of_expert(path: str, leaf: Array, experts: int) -> Float[Array, "E n"]:
    """Cuts a leaf that all experts share (model/connector.py) into one row for each expert."""
    if path.endswith("/up"):  # [C, E * H]
        leaf = leaf.reshape(leaf.shape[0], experts, -1).swapaxes(0, 1)  # [E, C, H]
    return leaf.reshape(experts, -1)  # up_bias [E * H], down [E * H, O], bias [E, O]


@jax.jit
def _squares(rows: Float[Array, "E n"], start: Float[Array, "E n"]) -> tuple[Array, Array, Array]:
    """Computes squared norms [E], squared distances [E, E], and products of the moves [E, E]."""
    norms = jnp.square(rows).sum(axis=1)
    # Subtracted, not from products: equal rows are then at distance 0.
    distances = jax.lax.map(lambda row: jnp.square(rows - row[None]).sum(axis=1), rows)
    moves = rows - start
    products = jax.lax.map(lambda move: (moves * move[None]).sum(axis=1), moves)
    # every process reads all of it
    return constrain(norms, None), constrain(distances, None, None), constrain(products, None, None)


def start_of(run: Run) -> tuple[dict[str, Any] | None, str]:
    """Makes or reads again the connector's leaves before the first step.

    Returns None and the reason where they are not to be had, as for an exported model.
    """
    if run.step == 0:
        return None, f"{run.folder} was opened at step 0, so nothing has moved"
    try:
        return initial_leaves(run.config, run.tokenizer, run.mesh, ("connector/*",))[0], ""
    except UserError as error:
        return None, f"the start of the weights was not found: {error}"


def weights(now: Mapping[str, Any], start: Mapping[str, Any] | None, experts: int) -> dict[str, Any]:
    """Measures leaves of a connector, and how far they are from those of its start.

    "norm" [E], "distance" [E, E] and "relative_distance" [E, E] (over the root of the mean of the two
    squared norms: 0 for equal experts, 1.41 for unrelated ones of equal norm); with a start "moved"
    [E], "moved_relative" [E] (over the norm at the start), "distance_at_start" [E, E], and
    "move_cosine" [E, E] (whether two experts moved the same way; NaN where one did not move). "leaves":
    norm and moved of each
    kind of leaf; "others": of router and task tokens as a whole.
    """
    norms, distances, moves = np.zeros(experts), np.zeros((experts,) * 2), np.zeros((experts,) * 2)
    first, apart = np.zeros(experts), np.zeros((experts,) * 2)
    leaves = {}
    for path, leaf in now.items():
        if not path.startswith(EXPERTS):
            continue
        rows = of_expert(path, leaf, experts)
        before = rows if start is None else of_expert(path, start[path], experts)
        squares, far, products = (np.asarray(x, np.float64) for x in _squares(rows, before))
        norms, distances, moves = norms + squares, distances + far, moves + products
        leaves[path.removeprefix(EXPERTS)] = {"norm": np.sqrt(squares).tolist()}
        if start is not None:
            at_first, far_first, _ = (np.asarray(x, np.float64) for x in _squares(before, before))
            first, apart = first + at_first, apart + far_first
            leaves[path.removeprefix(EXPERTS)]["moved"] = _root(np.diagonal(products)).tolist()
    mean = (norms[:, None] + norms[None]) / 2
    found: dict[str, Any] = {
        "norm": np.sqrt(norms).tolist(),
        "distance": np.sqrt(distances).tolist(),
        "relative_distance": np.sqrt(distances / np.where(mean > 0, mean, 1)).tolist(),
        "leaves": leaves,
        "others": _others(now, start),
    }
    if start is not None:
        moved = _root(np.diagonal(moves))
        length = np.outer(moved, moved)
        found |= {
            "moved": moved.tolist(),
            "moved_relative": (moved / np.sqrt(np.where(first > 0, first, 1))).tolist(),
            "distance_at_start": np.sqrt(apart).tolist(),
            "move_cosine": (moves / np.where(length > 0, length, np.nan)).tolist(),
        }
    return found


def _others(now: Mapping[str, Any], start: Mapping[str, Any] | None) -> dict[str, dict[str, float]]:
    """Measures router and task tokens: norm, and with a start how far they moved."""
    found = {}
    for name, prefix in OTHERS.items():
        paths = [path for path in now if path.startswith(prefix)]
        if not paths:
            continue
        found[name] = {"norm": _length([now[path] for path in paths])}
        if start is not None:
            first = _length([start[path] for path in paths])
            moved = _length([now[path] - start[path] for path in paths])
            found[name] |= {"moved": moved, "moved_relative": moved / max(first, 1e-30)}
    return found


def _length(leaves: Sequence[Array]) -> float:
    return float(np.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in leaves)))


def _root(squares: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(squares, 0))


@jax.jit
def _outputs(model: UniMed, x: Float[Array, "N T D"]) -> tuple[Array, Array]:
    """Computes of each expert's output the squared norm [N, E] and the squared distances [N, E, E]."""
    experts = model.connector.experts
    assert experts is not None
    rows = jnp.eye(experts.count, dtype=jnp.float32)

    def one(row: Array) -> Array:
        routing = jnp.broadcast_to(row[None, None], (len(x), 1, experts.count))
        return experts(x, routing).astype(jnp.float32)  # [N, T, O]

    outputs = jax.lax.map(one, rows)  # [E, N, T, O]
    norms = jnp.square(outputs).sum(axis=-1).mean(axis=-1)  # [E, N]
    apart = jax.lax.map(lambda y: jnp.square(outputs - y[None]).sum(axis=-1).mean(axis=-1), outputs)
    return constrain(norms.T, None, None), constrain(apart.transpose(2, 0, 1), None, None, None)


def outputs(run: Run, shown: Sequence[Shown]) -> dict[str, Any]:
    """Measures how different the experts' outputs for the same visual tokens are.

    "norm" [E]: root of the mean squared norm; "relative_distance" [E, E]: root of the mean squared
    distance over the mean of the two mean squared norms, with "ci95" from resampled clusters (None
    below two). 0: the same function; 1.41: unrelated outputs of equal size.
    """
    first = {s.image: s for s in reversed(shown)}
    distinct = list(first.values())
    norms, apart = [], []
    for start in range(0, len(distinct), BATCH):
        some = distinct[start : start + BATCH]
        filled = (some + some[:1] * BATCH)[: min(BATCH, len(distinct))]
        x = features(run.model, np.stack([s.fitted(run.config) for s in filled]))
        found = _outputs(run.model, x)
        norms.append(np.asarray(found[0], np.float64)[: len(some)])
        apart.append(np.asarray(found[1], np.float64)[: len(some)])
    norm, far = np.concatenate(norms), np.concatenate(apart)  # [N, E], [N, E, E]
    count = norm.shape[1]
    columns = np.concatenate([norm, far.reshape(len(far), -1)], axis=1)

    def relative(sums: np.ndarray) -> np.ndarray:
        """Computes relative distances [..., E * E] from sums [..., E + E * E]."""
        size = sums[..., :count]
        mean = (size[..., :, None] + size[..., None, :]) / 2
        ratio = sums[..., count:] / np.where(mean > 0, mean, 1).reshape(*sums.shape[:-1], -1)
        return np.sqrt(np.maximum(ratio, 0))

    clusters = [s.cluster for s in distinct]
    value, ends = relative(columns.sum(axis=0)), None
    if len(set(clusters)) > 1:
        resamples, seed = run.config.evaluate.bootstrap, run.config.seed
        (draws,) = resample([Measure(columns, relative)], clusters, resamples, seed)
        ends = [[interval(draws[:, a * count + b]) for b in range(count)] for a in range(count)]
    return {
        "images": len(distinct),
        "norm": np.sqrt(norm.mean(axis=0)).tolist(),
        "relative_distance": value.reshape(count, count).tolist(),
        "ci95": ends,
    }


def analyse(run: Run, shown: Sequence[Shown]) -> dict[str, Any]:
    """Measures weights and outputs of the experts of a run's connector."""
    experts = run.config.model.connector.experts
    now = {path: x for path, x in parameters(run.model).items() if path.startswith("connector/")}
    start, reason = start_of(run)
    return {
        "experts": experts,
        "weights": weights(now, start, experts),
        "outputs": outputs(run, shown),
        "notes": [reason] if reason else [],
    }
