"""Measures how the connector routes by task: the same images under each task's token."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unimed_jax.config import VISUAL_TASKS, Config
from unimed_jax.data import fitting
from unimed_jax.evaluate.statistics import Measure, with_interval
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import UniMed


@jax.jit
def weights_by_task(model: UniMed, pixels: jax.Array) -> jax.Array:
    """Computes the expert weights of images under the token of each task.

    The images are [N, H, W, 3], the weights [N, visual tasks, T, E].
    """
    tasks = jnp.arange(len(VISUAL_TASKS), dtype=jnp.int32)
    each = jnp.tile(tasks, len(pixels))
    repeated = pixels.repeat(len(tasks), axis=0)  # [N * tasks, H, W, 3]
    routing = model.encode_images(repeated, each).routing
    assert routing is not None
    routing = constrain(routing, None, None, None)  # every process reads all of it
    return routing.reshape(len(pixels), len(tasks), *routing.shape[1:])  # [N, tasks, T, E]


def total_variation(weights: np.ndarray) -> np.ndarray:
    """Measures how far apart the tasks route each image: 0 is alike, 1 is without a common expert.

    It is half the summed absolute difference of two tasks' expert weights, averaged over pairs of
    tasks and visual tokens: [N, tasks, T, E] -> [N].
    """
    pairs = combinations(range(weights.shape[1]), 2)
    return np.mean(
        [0.5 * np.abs(weights[:, a] - weights[:, b]).sum(-1).mean(-1) for a, b in pairs], axis=0
    )


def routing_report(
    trained: UniMed,
    initial: UniMed,
    config: Config,
    keys: Sequence[Any],
    read: Callable[[Any], np.ndarray],
    clusters: Sequence[str],
    batch: int = 64,
) -> dict | None:
    """Measures what evaluate/report shows of the routing.

    Returns None for a connector without experts.

    `read(key)` gives an image, uint8 [H, W, 3]; only `batch` of them are held at once, at the
    model's size. `tv_token_router` is measured too: the trained weights without the router's task
    half, if it has one.
    """
    connector = config.model.connector
    if not connector.is_moe:
        return None
    models = {"trained": trained, "step0": initial}
    if connector.router in ("soft", "sparse") and connector.router_input != "task":
        models["token_router"] = without_task_half(trained)
    apart: dict[str, list[np.ndarray]] = {name: [] for name in models}
    total: np.ndarray = np.zeros(())
    for start in range(0, len(keys), batch):
        fitted = [
            fitting.fit(read(key), config.data.fit, config.model.vision)
            for key in keys[start : start + batch]
        ]
        pixels = np.stack(fitted)  # [N, H, W, 3]
        for name, model in models.items():
            weights = np.asarray(weights_by_task(model, pixels))
            apart[name].append(total_variation(weights))
            if name == "trained":
                total = total + weights.sum(axis=0, dtype=np.float64)  # [tasks, T, E]
    maps = total / len(keys)  # [tasks, T, E]
    measured = {
        name: _measured(np.concatenate(values), clusters, config) for name, values in apart.items()
    }
    report = {
        "images": len(keys),
        "tv_trained": measured["trained"],
        "tv_step0": measured["step0"],
        "mean_weights": maps.mean(axis=1).tolist(),
        "maps": maps,
    }
    if "token_router" in measured:
        report["tv_token_router"] = measured["token_router"]["value"]
    return report


def without_task_half(model: UniMed) -> UniMed:
    """Makes a copy of the model whose router reads only visual tokens; the arrays are shared."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    router = copy.connector.router
    assert router is not None
    router.task_kernel = None
    return copy


def _measured(values: np.ndarray, clusters: Sequence[str], config: Config) -> dict:
    return with_interval(Measure.mean(values.tolist()), clusters, config.evaluate.bootstrap, config.seed)
