"""How the connector routes by task: the same images under each task's token."""

from collections.abc import Sequence
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np

from unimed_jax.config import VISUAL_TASKS, Config
from unimed_jax.data import images
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import UniMed


def task_weights(model: UniMed, config: Config, pixels: Sequence[np.ndarray], batch: int = 64) -> np.ndarray:
    """Expert weights [images, visual tasks, T, E] of every image (uint8 [H, W, 3]) under every task's token."""
    stacked = np.stack([images.fit(p, config.data.fit, config.model.vision) for p in pixels])  # [N, H, W, 3]
    tasks = jnp.arange(len(VISUAL_TASKS), dtype=jnp.int32)

    @jax.jit
    def weights(model: UniMed, pixels):
        each = jnp.tile(tasks, len(pixels))
        repeated = pixels.repeat(len(tasks), axis=0)  # [N * tasks, H, W, 3]
        routing = model.encode_images(repeated, each).routing
        assert routing is not None
        routing = constrain(routing, None, None, None)  # every process reads all of it
        return routing.reshape(len(pixels), len(tasks), *routing.shape[1:])  # [N, tasks, T, E]

    return np.concatenate([np.asarray(weights(model, stacked[i : i + batch])) for i in range(0, len(stacked), batch)])


def total_variation(weights: np.ndarray) -> np.ndarray:
    """Per image, the mean over pairs of tasks and visual tokens of half the summed absolute difference of the
    two tasks' expert weights: 0 where tasks route alike, 1 where they share no expert. [N, tasks, T, E] -> [N]."""
    pairs = combinations(range(weights.shape[1]), 2)
    return np.mean([0.5 * np.abs(weights[:, a] - weights[:, b]).sum(-1).mean(-1) for a, b in pairs], axis=0)


def with_interval(values: np.ndarray, clusters: Sequence[str], resamples: int, seed: int) -> dict:
    """Mean of `values` [N] and its bootstrap 95 % interval, whole clusters resampled."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return {"value": float(values.mean()), "ci95": [float(v) for v in np.percentile(means, [2.5, 97.5])]}


def routing_report(
    trained: UniMed, initial: UniMed, config: Config, pixels: Sequence[np.ndarray], clusters: Sequence[str]
) -> dict | None:
    """What evaluate/report.py shows of the routing; None for a connector without experts.

    `tv_token_router` is measured too: the trained weights without the router's task half, where it has one.
    """
    connector = config.model.connector
    if not connector.is_moe:
        return None
    weights = task_weights(trained, config, pixels)
    report = {
        "images": len(pixels),
        "tv_trained": _measured(weights, clusters, config),
        "tv_step0": _measured(task_weights(initial, config, pixels), clusters, config),
        "mean_weights": weights.mean(axis=(0, 2)).tolist(),
        "maps": weights.mean(axis=0),
    }
    if connector.router in ("soft", "sparse") and connector.router_input != "task":
        router = trained.connector.router
        assert router is not None
        task_kernel, router.task_kernel = router.task_kernel, None
        blind = total_variation(task_weights(trained, config, pixels))
        router.task_kernel = task_kernel
        report["tv_token_router"] = float(blind.mean())
    return report


def _measured(weights: np.ndarray, clusters: Sequence[str], config: Config) -> dict:
    return with_interval(total_variation(weights), clusters, config.evaluate.bootstrap, config.seed)
