"""Measures which experts of the connector the images of each task, set, modality and place go to.

Every image is routed under the token of every visual task, once. What is listed by group uses each
example's own task; what is divided among causes (`CAUSES`) uses all tasks on the same images, so that
tasks with different images do not count as different routing.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unimed_jax import processes
from unimed_jax.analyze.examples import Shown, groups_of, shown_images, table_of_data
from unimed_jax.config import VISUAL_TASKS, Config
from unimed_jax.errors import UserError
from unimed_jax.evaluate.routing import weights_by_task
from unimed_jax.evaluate.statistics import Measure, interval, resample
from unimed_jax.evaluate.tasks import Unit
from unimed_jax.runs.open import Run

BATCH = 64  # images at once
# What the variance of the routing weights is divided among (our measure; the shares sum to 1).
CAUSES = ("task", "place", "image", "task and place", "the rest")
LEAST = 1e-12  # variance per weight below which it counts as none


def has_mixture(config: Config) -> bool:
    """Says whether a connector has two or more experts."""
    return config.model.connector.is_moe and config.model.connector.experts > 1


def refuse_without_mixture(folder: Path, config: Config) -> None:
    """Raises UserError for the settings of a run whose connector has no two experts to compare."""
    connector = config.model.connector
    if not connector.is_moe:
        raise UserError(
            f"{folder}: its connector is {connector.kind!r}, which has no experts; give a run whose "
            "config.model.connector.kind is moe_mlp or moe_linear."
        )
    if connector.experts < 2:
        raise UserError(
            f"{folder}: its connector has one expert, with which nothing can be compared; give a run "
            "of two or more (config.model.connector.experts)."
        )


def analyse(run: Run, units: Sequence[Unit], keys: Sequence[str]) -> dict[str, Any]:
    """Measures the routing of a run's connector; returns what routing.json holds of it.

    keys: of the examples' meta, by which groups are made. Returned, E experts and T visual tokens:
    "groups" kind -> name -> {images, clusters, weights [E], ci95 [E] of [low, high], experts_used};
    "places" task -> {weights [T, E], ci95 [T, E] of [low, high]}; "between_tasks" {names, distance
    [tasks, tasks], ci95}; "causes" cause -> {value, ci95}. Intervals resample clusters; they are None
    where there is one cluster.
    """
    shown = shown_images(units)
    weights, index = routed(run, shown)  # [images, tasks, T, E]
    own = np.stack([weights[i, s.task] for i, s in zip(index, shown, strict=True)])  # [n, T, E]
    clusters = np.array([s.cluster for s in shown])
    resamples, seed = run.config.evaluate.bootstrap, run.config.seed
    groups: dict[str, dict[str, Any]] = {}
    examples, of = [s.example for s in shown], [s.unit for s in shown]
    for kind, name, chosen in groups_of(of, examples, keys):
        mean, ci95 = means(own[chosen].mean(axis=1), clusters[chosen], resamples, seed)
        groups.setdefault(kind, {})[name] = {
            "images": len({s.image for s, yes in zip(shown, chosen, strict=True) if yes}),
            "clusters": len(set(clusters[chosen])),
            "weights": mean,
            "ci95": ci95,
            "experts_used": float(np.exp(_entropy(own[chosen])).mean()),
        }
    places = {}
    for name in dict.fromkeys(s.unit.task for s in shown):
        chosen = np.array([s.unit.task == name for s in shown])
        mean, ci95 = means(own[chosen], clusters[chosen], resamples, seed)
        places[name] = {"weights": mean, "ci95": ci95}
    first = {i: s.cluster for i, s in zip(index, shown, strict=True)}
    of_image = np.array([first[i] for i in range(len(weights))])
    return {
        "experts": weights.shape[-1],
        "examples": table_of_data(units),
        "images": len(weights),
        "groups": groups,
        "places": places,
        "between_tasks": between_tasks(weights, of_image, resamples, seed),
        "causes": causes(weights, of_image, resamples, seed),
    }


def routed(run: Run, shown: Sequence[Shown]) -> tuple[np.ndarray, list[int]]:
    """Routes each distinct image under the token of each visual task.

    Returns the weights, float32 [images, visual tasks, T, E], and for each of `shown` which image is
    its own.
    """
    number = {image: i for i, image in enumerate(dict.fromkeys(s.image for s in shown))}
    first = {s.image: s for s in reversed(shown)}
    keys = list(number)
    found = []
    with tqdm(
        total=len(keys), desc="routing", unit=" images", leave=False, disable=not processes.leads()
    ) as bar:
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            # The last ones are filled up, so that one program serves all.
            filled = (some + some[:1] * BATCH)[: min(BATCH, len(keys))]
            pixels = np.stack([first[key].fitted(run.config) for key in filled])  # [N, H, W, 3]
            found.append(np.asarray(weights_by_task(run.model, pixels))[: len(some)])
            bar.update(len(some))
    return np.concatenate(found), [number[s.image] for s in shown]


def means(
    values: np.ndarray, clusters: Sequence[str] | np.ndarray, resamples: int, seed: int
) -> tuple[list, list | None]:
    """Averages values [n, ...] over n, with 95 % intervals [..., 2] from resampled clusters.

    The intervals are None below two clusters.
    """
    n, *shape = values.shape
    columns = np.concatenate([values.reshape(n, -1), np.ones((n, 1))], axis=1, dtype=np.float64)
    measure = Measure(columns, lambda sums: sums[..., :-1] / sums[..., -1:])
    mean = measure.score(columns.sum(axis=0)).reshape(shape)
    if len(set(clusters)) < 2:
        return mean.tolist(), None
    (draws,) = resample([measure], list(clusters), resamples, seed)  # [resamples, ...]
    ends = np.percentile(draws, [2.5, 97.5], axis=0)  # [2, ...]
    return mean.tolist(), np.moveaxis(ends, 0, -1).reshape(*shape, 2).tolist()


def between_tasks(
    weights: np.ndarray, clusters: Sequence[str] | np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    """Measures how far apart each two tasks route the same images: 0 alike, 1 no expert in common.

    It is half the summed absolute difference of the weights [images, tasks, T, E], averaged over
    visual tokens and images (total variation).
    """
    tasks = weights.shape[1]
    pairs = list(combinations(range(tasks), 2))
    values = np.stack(
        [0.5 * np.abs(weights[:, a] - weights[:, b]).sum(-1).mean(-1) for a, b in pairs], axis=1
    )  # [images, pairs]
    mean, ci95 = means(values, clusters, resamples, seed)
    distance, ends = np.zeros((tasks, tasks)), np.zeros((tasks, tasks, 2))
    for place, (a, b) in enumerate(pairs):
        distance[a, b] = distance[b, a] = mean[place]
        if ci95 is not None:
            ends[a, b] = ends[b, a] = ci95[place]
    return {
        "names": list(VISUAL_TASKS),
        "distance": distance.tolist(),
        "ci95": None if ci95 is None else ends.tolist(),
    }


def causes(
    weights: np.ndarray, clusters: Sequence[str] | np.ndarray, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Divides the variance of the weights [images, tasks, T, E] among what the router could go by.

    An analysis of variance of the balanced table of images x tasks x places, summed over experts:
    the shares of the task alone, the place in the image alone, the image alone, task and place
    together beyond the two, and the rest. They sum to 1. Values are None where nothing varies.
    """
    images, tasks, places, experts = weights.shape
    # Everything below is a function of these sums over images, so that a bootstrap is one product.
    means_of = weights.reshape(images, -1)  # [images, tasks * T * E]
    square = np.square(weights, dtype=np.float64).sum(axis=-1).mean(axis=(1, 2))
    of_image = np.square(weights.mean(axis=(1, 2), dtype=np.float64)).sum(axis=-1)
    columns = np.concatenate(
        [means_of, square[:, None], of_image[:, None], np.ones((images, 1))], axis=1, dtype=np.float64
    )

    def shares(sums: np.ndarray) -> np.ndarray:
        """Computes the shares [..., causes] from sums [..., columns]."""
        average = sums[..., :-1] / sums[..., -1:]
        table = average[..., :-2].reshape(*sums.shape[:-1], tasks, places, experts)
        grand = np.square(table.mean(axis=(-3, -2))).sum(axis=-1)
        task = np.square(table.mean(axis=-2)).sum(axis=-1).mean(axis=-1) - grand
        place = np.square(table.mean(axis=-3)).sum(axis=-1).mean(axis=-1) - grand
        both = np.square(table).sum(axis=-1).mean(axis=(-2, -1)) - grand - task - place
        image = average[..., -1] - grand
        total = average[..., -2] - grand
        parts = np.stack([task, place, image, both, total - task - place - image - both], axis=-1)
        varies = total > LEAST * experts
        safe = np.where(varies, total, 1)[..., None]
        return np.where(varies[..., None], np.maximum(parts, 0) / safe, np.nan)

    measure = Measure(columns, shares)
    value = shares(columns.sum(axis=0))
    draws = np.zeros((0, len(CAUSES)))
    if len(set(clusters)) > 1:
        (draws,) = resample([measure], list(clusters), resamples, seed)
    return {
        cause: {"value": float(value[i]), "ci95": interval(draws[:, i]) if len(draws) else None}
        for i, cause in enumerate(CAUSES)
    }


def _entropy(weights: np.ndarray) -> np.ndarray:
    """Computes the entropy, in nats, of weights [..., E]; its exponential counts the experts in use."""
    weights = weights.astype(np.float64)
    return -(weights * np.log(np.where(weights > 0, weights, 1))).sum(axis=-1)
