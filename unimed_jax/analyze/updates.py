"""Compares the updates that each task alone would cause in the connector (our definition).

The paper compares gradients (see tug_of_war.py). What changes a model is the step that an optimizer
makes of them, so here each task trains the connector by itself, from the run's weights: a few steps of
the run's Adam, started afresh, at its highest rate and without weight decay, on held-out batches.
The update is the difference of the weights. It is measured on several disjoint parts of a task's
batches, so that the similarity of two tasks can be read beside that of a task to itself.

A Gram matrix here is float64 [U, R, U, R]: inner products of the updates of U units in R repeats.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from unimed_jax import processes
from unimed_jax.analyze.parts import Part, groups_of, parts_of
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import Unit
from unimed_jax.memory import refuse_too_large
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.rules import leaf_rules
from unimed_jax.runs.open import Run
from unimed_jax.train.held_out import HeldOut
from unimed_jax.train.loss import task_losses
from unimed_jax.train.optimizer import Leaves, adam

RESAMPLES = 1000
WHOLE = "connector"  # the group of all its parts


def analyse(run: Run, units: Sequence[Unit], steps: int, repeats: int) -> dict[str, Any]:
    """Measures the updates of each unit in each part of the connector that trains.

    Returned: "names" of the units, "steps", "repeats", "groups" part -> what `similarity` says of its
    updates, and "notes". Raises UserError if less than two units have an image, if one has too few
    examples, or if nothing trains.
    """
    units = [unit for unit in units if any(example.images for example in unit.examples)]
    if len(units) < 2:
        names = ", ".join(unit.name for unit in units) or "no task"
        raise UserError(
            f"only {names} has held-out examples with images; updates are compared between two or more "
            "tasks, so choose another --split, or leave them out with --steps=0."
        )
    config = run.config
    every = parameters(run.model)
    rules = leaf_rules(every, config.train, config.optimizer)
    leaves = {
        path: leaf for path, leaf in every.items() if path.startswith("connector/") and rules[path].train
    }
    if not leaves:
        raise UserError(
            f"{run.folder}: its connector does not train, so that no task updates it; leave updates out "
            "with --steps=0."
        )
    copies = len(units) * repeats
    refuse_too_large(
        4.0 * copies * sum(leaf.size for leaf in leaves.values()),
        f"keeping {copies} updates of the connector",
        "--repeats",
    )
    held_out = [HeldOut(unit, config, run.tokenizer, skip_long=True) for unit in units]
    notes = [
        f"{each.unit.name}: {left_out} examples fit into no row of this run and are left out of updates"
        for each in held_out
        if (left_out := len(each.unit.examples) - len(each.numbers))
    ]
    dealt = [dealt_out(each, config.data.rows, steps, repeats) for each in held_out]
    trainer = _Trainer(run, leaves)
    found: dict[str, list[jax.Array]] = {path: [] for path in leaves}
    with tqdm(
        total=copies * steps, desc="updates", unit=" steps", leave=False, disable=not processes.leads()
    ) as bar:
        for each, own in zip(held_out, dealt, strict=True):
            for batches in own:
                now = trainer.trained(each, batches)
                for path in leaves:
                    found[path].append(now[path] - leaves[path])
                bar.update(steps)
    parts = parts_of({path: leaf.shape for path, leaf in leaves.items()}, config.model)
    products: dict[Part, np.ndarray] = {}
    for path in leaves:
        stacked = jnp.stack(found.pop(path))  # [U * R, *shape]
        for part in (part for part in parts if part.leaf == path):
            updates = jax.vmap(part.of)(stacked).reshape(copies, -1)  # [U * R, n]
            gram = np.asarray(_products(updates), np.float64)  # [U * R, U * R]
            products[part] = gram.reshape((len(units), repeats) * 2)
    groups = {
        name.removeprefix(f"{WHOLE}: "): np.sum([products[part] for part in members], axis=0)
        for name, members in groups_of(parts).items()
    }
    one_set = len({unit.source.id for unit in units}) == 1
    return {
        "names": [unit.task if one_set else f"{unit.source.id}/{unit.task}" for unit in units],
        "steps": steps,
        "repeats": repeats,
        "groups": {name: similarity(gram, config.seed) for name, gram in groups.items()},
        "notes": notes,
    }


def dealt_out(held_out: HeldOut, rows: int, steps: int, repeats: int) -> list[list[list[Any]]]:
    """Deals a unit's rows out: `repeats` disjoint lists of `steps` batches of at most `rows` rows.

    A unit of few rows gets small batches, and sees them again within a repeat. Raises UserError if
    it has less than `repeats` rows.
    """
    planned = held_out.rows
    if len(planned) < repeats:
        raise UserError(
            f"{held_out.unit.name} fills {len(planned)} rows, too few for --repeats={repeats}; give "
            "fewer repeats, another --split, or a higher --limit."
        )
    out = []
    for part in range(repeats):
        own = planned[part::repeats]
        size = min(rows, max(1, len(own) // steps))
        out.append([[own[(step * size + i) % len(own)] for i in range(size)] for step in range(steps)])
    return out


class _Trainer:
    """Trains some leaves of a run's model on batches of one unit, one program for all units."""

    def __init__(self, run: Run, leaves: Leaves):
        config, coordinates, model = run.config, run.tokenizer.coordinate_start, run.model
        every = parameters(run.model)
        self._leaves = dict(leaves)
        self._rest = {path: leaf for path, leaf in every.items() if path not in leaves}
        self._mesh = run.mesh
        self._share = sharding.share_of_process(run.mesh, config.data.rows)
        rules = leaf_rules(every, config.train, config.optimizer)
        rates = {path: config.optimizer.lr * rules[path].lr_scale for path in leaves}
        optimizer = adam(config.optimizer.betas, config.optimizer.eps, skip_unused=False)
        self._init = optimizer.init

        def step(now: Leaves, state: Any, rest: Leaves, batch: Any) -> tuple[Leaves, Any]:
            def loss(now: Leaves) -> jax.Array:
                full = with_parameters(model, {**rest, **now})
                losses, _ = task_losses(full, batch, config.loss, coordinates, None)
                return losses.tasks.sum() / jnp.maximum(losses.weight, 1e-30)

            directions, state = optimizer.update(jax.grad(loss)(now), state)
            return {path: now[path] - rates[path] * directions[path] for path in now}, state

        self._step = jax.jit(step)

    def trained(self, held_out: HeldOut, batches: Sequence[Sequence[Any]]) -> Leaves:
        """Returns the leaves after a step on each batch, given as planned rows."""
        now, state = self._leaves, self._init(self._leaves)
        for rows in batches:
            batch = held_out.batch(rows, self._share.rows)
            arrays = sharding.on_devices(batch, self._mesh, self._share)
            now, state = self._step(now, state, self._rest, arrays)
        return now


@jax.jit
def _products(updates: jax.Array) -> jax.Array:
    """Computes the inner products [K, K] of updates [K, n], in float32 throughout."""
    products = jnp.matmul(updates, updates.T, precision="highest")
    return sharding.constrain(products, None, None)  # every process reads all of it


def similarity(gram: np.ndarray, seed: int) -> dict[str, Any]:
    """Measures how alike updates are, from their Gram matrix [U, R, U, R].

    "cos" [U, U]: the mean cosine of two units' updates over all pairs of their repeats; on the diagonal
    that of a unit's own updates in different repeats, None for one repeat. So all are means over
    single updates, and what the choice of batches alone changes can be read off the diagonal. "ci95"
    [U, U] of [low, high] over resampled repeats, None on the diagonal, and as a whole for one repeat.
    Both are None where an update is zero, which has no direction (an expert that a task's tokens never
    reach). "norm" [U]: the root mean square norm of a unit's updates.
    """
    units, repeats = gram.shape[:2]
    squares = np.maximum(np.einsum("urur->ur", gram), 0)
    length = np.sqrt(squares)[:, :, None, None] * np.sqrt(squares)[None, None]
    cosine = np.where(length > 0, gram / np.where(length > 0, length, 1), 0.0)  # [U, R, U, R]
    moves = (squares > 0).all(axis=1)  # [U]
    both = moves[:, None] & moves[None]
    mean = cosine.mean(axis=(1, 3))
    found = [[float(mean[u, v]) if both[u, v] else None for v in range(units)] for u in range(units)]
    for u in range(units):
        others = cosine[u, :, u, :][~np.eye(repeats, dtype=bool)]
        found[u][u] = float(others.mean()) if repeats > 1 and moves[u] else None
    ends: list[list[list[float] | None]] | None = None
    if repeats > 1:
        rng = np.random.default_rng(seed)
        even = np.full(repeats, 1 / repeats)
        weights = rng.multinomial(repeats, even, size=(RESAMPLES, units)) / repeats
        drawn = np.einsum("nur,urvs,nvs->nuv", weights, cosine, weights, optimize=True)
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        ends = [
            [
                None if u == v or not both[u, v] else [float(low[u, v]), float(high[u, v])]
                for v in range(units)
            ]
            for u in range(units)
        ]
    return {"cos": found, "ci95": ends, "norm": np.sqrt(squares.mean(axis=1)).tolist()}
