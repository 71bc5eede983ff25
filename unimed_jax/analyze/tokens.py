"""Measures how far the visual tokens of different tasks lie apart, before and after the connector.

Visual tokens are what the decoder reads of an image. Before the connector they are the encoder's
joined patches, which no task has touched; after it, they carry the task's token and its experts.
Looked at: each example's own image; the same images under the token of every task, where nothing but
the connector can tell tasks apart; and what is left of these when the mean over the tasks is taken
from each token of each image, which is what the task changes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.spatial.distance import cdist

from unimed_jax.analyze.examples import Shown
from unimed_jax.config import VISUAL_TASKS
from unimed_jax.errors import UserError
from unimed_jax.evaluate.statistics import Measure, interval, with_interval
from unimed_jax.model.connector import aggregate
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import UniMed, normalise
from unimed_jax.runs.open import Run

BATCH = 64  # images at once
PERMUTATIONS = 200
FOLDS = 5  # of clusters, for the linear classifier
ROUNDING = 1e-5  # of the largest number: what tasks change less than this is rounding
# What is drawn and scored -> what it shows.
VIEWS = {
    "before": "before the connector, own images",
    "after": "after the connector, own images",
    "same": "after the connector, the same images under every task",
    "shift": "after the connector, the same images under every task, less their mean over the tasks",
}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Holds visual tokens of one view, with the label, the cluster and the image of each.

    The tokens of one image under one task stand together, `each` of them.
    """

    values: np.ndarray  # float32 [n, channels]
    labels: np.ndarray  # str [n]
    clusters: np.ndarray  # str [n]
    images: np.ndarray  # int [n]: equal numbers are one image
    each: int = 1

    @functools.cached_property
    def _by_count(self) -> list[np.ndarray]:
        """Lists the rows (of `each` tokens) of images: [images, k] for each number k of rows of one."""
        rows: dict[int, list[int]] = {}
        for row, image in enumerate(self.images[:: self.each].tolist()):
            rows.setdefault(image, []).append(row)
        counts = sorted({len(own) for own in rows.values()})
        return [np.array([own for own in rows.values() if len(own) == k]) for k in counts]

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Gives the images the labels of others: str [n]; the tokens of a row keep one label.

        An image that stands under several labels gets as many of another one, in any order. So one
        that stands under every task still does, and only the order within it changes.
        """
        labels = self.labels[:: self.each].copy()
        for rows in self._by_count:
            labels[rows] = rng.permuted(labels[rows][rng.permutation(len(rows))], axis=1)
        return np.repeat(labels, self.each)


@jax.jit
def features(model: UniMed, pixels: Array) -> Float[Array, "N T D"]:
    """Computes the visual tokens before the connector of pixels uint8 [N, H, W, 3]."""
    config = model.config
    patches = model.vision(normalise(pixels, config.vision, config.compute_dtype))
    joined = aggregate(patches, config.connector.aggregation, config.connector.rate)
    return constrain(joined, None, None, None)  # every process reads all of it


@jax.jit
def projected(model: UniMed, pixels: Array, tasks: Int[Array, "N"]) -> Float[Array, "N T O"]:
    """Computes the visual tokens after the connector of pixels [N, H, W, 3] under these tasks."""
    return constrain(model.encode_images(pixels, tasks).tokens, None, None, None)


def views(run: Run, shown: Sequence[Shown], labels: Sequence[str], most: int) -> dict[str, Tokens]:
    """Computes the tokens of each of `VIEWS`, at most `most` of them, the same ones in each.

    labels: of each of `shown`. Tokens are drawn at random, from as many images as possible. The view
    "same" (one token of each image, under every task) and "shift" are there only if the labels are
    tasks, and "shift" only if tasks change tokens by more than rounding.
    """
    if len(shown) > most:
        kept = np.linspace(0, len(shown) - 1, most).round().astype(int)
        shown, labels = [shown[i] for i in kept], [labels[i] for i in kept]
    before, after = [], []
    for start in range(0, len(shown), BATCH):
        some = shown[start : start + BATCH]
        filled = (list(some) + [some[0]] * BATCH)[: min(BATCH, len(shown))]
        pixels = np.stack([s.fitted(run.config) for s in filled])  # [N, H, W, 3]
        tasks = np.array([s.task for s in filled], np.int32)
        before.append(np.asarray(features(run.model, pixels))[: len(some)].astype(np.float32))
        found = np.asarray(projected(run.model, pixels, tasks))
        after.append(found[: len(some)].astype(np.float32))
    rng = np.random.default_rng(run.config.seed)
    joined = {"before": np.concatenate(before), "after": np.concatenate(after)}  # [n, T, channels]
    count, tokens = joined["before"].shape[:2]
    each = max(1, min(tokens, most // count))
    which = np.stack([rng.permutation(tokens)[:each] for _ in range(count)])  # [n, each]
    clusters = np.array([s.cluster for s in shown])
    numbers = {image: number for number, image in enumerate(dict.fromkeys(s.image for s in shown))}
    images = np.array([numbers[s.image] for s in shown])
    out = {}
    for name, values in joined.items():
        picked = np.take_along_axis(values, which[..., None], axis=1)  # [n, each, channels]
        out[name] = Tokens(
            picked.reshape(-1, picked.shape[-1]),
            np.repeat(np.array(labels), each),
            np.repeat(clusters, each),
            np.repeat(images, each),
            each,
        )
    names = list(dict.fromkeys(s.unit.task for s in shown))
    if list(labels) == [s.unit.task for s in shown] and len(names) > 1:
        out["same"] = _same(run, shown, names, most, rng)
        values = out["same"].values.reshape(len(names), -1, out["same"].values.shape[-1])
        shifts = values - values.mean(axis=0, keepdims=True)  # [tasks, images, channels]
        if np.abs(shifts).max() > ROUNDING * np.abs(values).max():
            of_all = shifts.reshape(out["same"].values.shape)
            out["shift"] = dataclasses.replace(out["same"], values=of_all)
    return out


def _same(
    run: Run, shown: Sequence[Shown], names: Sequence[str], most: int, rng: np.random.Generator
) -> Tokens:
    """Computes one token of some images under each task of `names`."""
    distinct = list({s.image: s for s in shown}.values())
    some = [distinct[i] for i in sorted(rng.permutation(len(distinct))[: max(2, most // len(names))])]
    place: np.ndarray | None = None
    values = []
    for name in names:
        number = np.full(BATCH, VISUAL_TASKS.index(name), np.int32)
        parts = []
        for start in range(0, len(some), BATCH):
            part = some[start : start + BATCH]
            filled = (part + part[:1] * BATCH)[: min(BATCH, len(some))]
            pixels = np.stack([s.fitted(run.config) for s in filled])
            found = np.asarray(projected(run.model, pixels, number[: len(filled)]))
            parts.append(found[: len(part)].astype(np.float32))
        tokens = np.concatenate(parts)  # [images, T, channels]
        if place is None:
            place = rng.integers(0, tokens.shape[1], len(some))
        values.append(tokens[np.arange(len(some)), place])
    clusters = np.array([s.cluster for s in some])
    return Tokens(
        np.concatenate(values),
        np.repeat(np.array(names), len(some)),
        np.tile(clusters, len(names)),
        np.tile(np.arange(len(some)), len(names)),
    )


def silhouettes(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Computes the silhouette of each of n tokens from their distances [n, n] (Rousseeuw 1987).

    It is (b - a) / max(a, b), a being a token's mean distance to the others of its label and b the
    smallest mean distance to those of another label.
    """
    names, number = np.unique(labels, return_inverse=True)
    own = np.eye(len(names))[number]  # [n, labels]
    sums, counts = distances @ own, own.sum(axis=0)  # [n, labels], [labels]
    rows = np.arange(len(labels))
    a = sums[rows, number] / np.maximum(counts[number] - 1, 1)
    others = np.where(own > 0, np.inf, sums / counts)
    b = others.min(axis=1)
    largest = np.maximum(a, b)
    return np.where(largest > 0, (b - a) / np.where(largest > 0, largest, 1), 0.0)


def separation(tokens: Tokens, resamples: int, seed: int) -> dict[str, Any]:
    """Scores how far the labels lie apart, in the tokens' own space, by the mean silhouette.

    1 is apart, 0 is mixed, below 0 is nearer to another label. "ci95" resamples clusters, with
    distances as they are; "shuffled" is the 95 % range of the score after images were given the
    labels of others. Raises UserError below two labels of two tokens each.
    """
    names, counts = np.unique(tokens.labels, return_counts=True)
    if len(names) < 2 or counts.min() < 2:
        listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        raise UserError(
            f"there are tokens of {listed or 'nothing'} alone, so that nothing can lie apart; two "
            "groups of two tokens are needed: choose another --by, --task or --split."
        )
    values = tokens.values.astype(np.float64)
    distances = cdist(values, values)
    each = silhouettes(distances, tokens.labels)
    rng = np.random.default_rng(seed)
    shuffled = [silhouettes(distances, tokens.shuffled(rng)).mean() for _ in range(PERMUTATIONS)]
    return {
        "n": len(each),
        **with_interval(Measure.mean(each.tolist()), tokens.clusters.tolist(), resamples, seed),
        "shuffled": interval(np.array(shuffled)),
        "by_label": {name: float(each[tokens.labels == name].mean()) for name in names},
    }


def classified(tokens: Tokens, resamples: int, seed: int) -> dict[str, Any] | None:
    """Scores how well a linear classifier tells the labels apart on clusters that it was not fitted on.

    It is the mean over labels of the share of a label's tokens that get it right (balanced accuracy),
    with "ci95" over clusters; "chance" is one over the number of labels. The classifier is a ridge
    regression in FOLDS folds of clusters. Unlike the silhouette it also sees labels whose tokens are
    spread widely, but apart. None if some label lies in too few clusters to be in every fold's training.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, counts = np.unique(tokens.labels, return_counts=True)
    folds = min(FOLDS, *(len(set(tokens.clusters[tokens.labels == name])) for name in names))
    if folds < 2:
        return None
    data = tokens.values, tokens.labels, tokens.clusters
    # Folds that only balance sizes may hold all clusters of a label, which is then never learned.
    splits = next(
        (
            splits
            for how in (GroupKFold, StratifiedGroupKFold)
            for splits in [list(how(folds).split(*data))]
            if all(len(np.unique(tokens.labels[train])) == len(names) for train, _ in splits)
        ),
        None,
    )
    if splits is None:
        return None
    said = cross_val_predict(
        make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced")),
        tokens.values.astype(np.float64),
        tokens.labels,
        cv=splits,
    )
    own = (tokens.labels[:, None] == names).astype(np.float64)  # [n, labels]
    right = own * (said == tokens.labels)[:, None]

    def balanced(sums: np.ndarray) -> np.ndarray:
        """Averages over labels from sums [..., labels right and labels]."""
        with np.errstate(invalid="ignore"):
            return (sums[..., : len(names)] / sums[..., len(names) :]).mean(axis=-1)

    measure = Measure(np.concatenate([right, own], axis=1), balanced)
    scored = with_interval(measure, tokens.clusters.tolist(), resamples, seed)
    return {**scored, "chance": 1 / len(names)}


def flat(tokens: Tokens, how: str, seed: int) -> tuple[np.ndarray, list[float] | None]:
    """Projects tokens to two dimensions: [n, 2], and the shares of the variance shown (pca alone).

    how: pca (linear: distances keep their meaning) or tsne (neighbours stay neighbours, and
    distances between groups mean nothing). Tokens that are all the same lie on one point.
    """
    if (tokens.values == tokens.values[0]).all():
        return np.zeros((len(tokens.values), 2)), None
    if how == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30, (len(tokens.values) - 1) / 3)
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
            tokens.values
        ), None
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2, random_state=seed)
    points = pca.fit_transform(tokens.values.astype(np.float64))
    return points, pca.explained_variance_ratio_.tolist()


def analyse(
    run: Run, shown: Sequence[Shown], labels: Sequence[str], most: int, how: str
) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Measures and projects the visual tokens of a run.

    Returns what tokens.json holds of it, and for the picture each view's points [n, 2] and labels.
    """
    resamples, seed = run.config.evaluate.bootstrap, run.config.seed
    found: dict[str, Any] = {"images": len({s.image for s in shown}), "projection": how, "views": {}}
    found["notes"] = []
    points = {}
    for name, tokens in views(run, shown, labels, most).items():
        places, shares = flat(tokens, how, seed)
        points[name] = places, tokens.labels
        found["views"][name] = {
            "what": VIEWS[name],
            "separation": separation(tokens, resamples, seed),
            "classified": classified(tokens, resamples, seed),
            "variance_shown": shares,
        }
    if "same" in points and "shift" not in points:
        found["notes"] = [f"this connector makes the same tokens under every task: no {VIEWS['shift']}"]
    return found, points
