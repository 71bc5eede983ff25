"""Compares the variants of a sweep with its baseline, on the items that all runs answered.

Scores are averaged over seeds. Differences are paired by item and seed; intervals and p-values come
from clusters of items and from seeds (statistics.paired).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from unimed_jax.analyze.compare import DECODING, Side, UnitKey, check_comparable, read_folder
from unimed_jax.analyze.sweep.plan import Plan, SweepRun
from unimed_jax.config import Task
from unimed_jax.errors import UserError
from unimed_jax.evaluate.metrics import NotComputed, Record, of_task
from unimed_jax.evaluate.statistics import LEVEL, Difference, Measure, Ranked, paired, verdicts
from unimed_jax.runs.checkpoint import Checkpoints

RESAMPLES = 2000  # of the clusters, for every difference
# The five pairs of columns of the published ablation: one task of two sets, by name or reader.
PAIRS = (
    ("vqa", "slake", "path_vqa"),
    ("refer", "slake", "samed"),
    ("identify", "slake", "samed"),
    ("caption", "mimic_cxr", "medpix"),
    ("cls", "dermamnist", "organsmnist"),
)


@dataclasses.dataclass(frozen=True)
class Column:
    """Names what is compared: a metric of one task of a data set."""

    unit: UnitKey
    metric: str

    @property
    def label(self) -> str:
        return f"{self.unit[0]} {self.unit[2]} {self.metric}"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Holds the measures of all runs of a sweep, over the same clusters of items."""

    columns: tuple[Column, ...]
    clusters: tuple[str, ...]
    # variant -> seed -> one for each column, whose rows are clusters
    measures: Mapping[str, Mapping[int, tuple[Measure, ...]]]
    items: Mapping[Column, int]
    notes: tuple[str, ...]


def read_scores(plan: Plan, finished: Mapping[str, Sequence[int]]) -> Scores:
    """Reads and scores the answers of the finished seeds of each variant.

    Raises UserError for runs that share no item, or whose scores are not comparable.
    """
    runs = [run for run in plan.runs if run.seed in finished.get(run.name, ())]
    sides = {(run.name, run.seed): read_folder(run.folder, run.title) for run in runs}
    _refuse_unlike(runs, list(sides.values()))
    return score_sides(sides, plan.sweep.baseline, plan.sweep.scores)


def _refuse_unlike(runs: Sequence[SweepRun], sides: Sequence[Side]) -> None:
    """Raises UserError if one run was scored in another way than the rest, as happens by hand.

    That is at another checkpoint than the last one (all may be scored at their best ones), or with
    other settings of decoding than its own (all may have the same other ones).
    """
    common: set[str] | None = None  # ways in which all runs so far may have been scored
    for run, side in zip(runs, sides, strict=True):
        checkpoints = Checkpoints(run.folder / "checkpoints", read_only=True)
        steps = {"its last step": checkpoints.latest(), "its best step": checkpoints.best()}
        checkpoints.close()
        step = side.about["step"]
        ways = {name for name, kept in steps.items() if kept == step} or {f"step {step}"}
        own = {key: getattr(run.config.evaluate, key) for key in DECODING}
        if changed := {key: value for key, value in side.decoding.items() if value != own[key]}:
            ways = {f"{way} with config.evaluate {changed}" for way in ways}
        common = ways if common is None else common & ways
        if not common:
            raise UserError(
                f"{run.folder} was scored at {' or '.join(sorted(ways))}, unlike {runs[0].folder}; "
                f"score it again (evaluate --run={run.folder})."
            )


def score_sides(
    sides: Mapping[tuple[str, int], Side], baseline: str, metrics: Mapping[Task, Sequence[str]]
) -> Scores:
    """Scores the items that all sides answered; metrics: of a task, if not its primary one."""
    first = next(side for (name, _), side in sides.items() if name == baseline)
    units, notes = _shared_items(list(sides.values()), first)
    columns: list[Column] = []
    found: dict[tuple[str, int], list[Measure]] = {key: [] for key in sides}
    items: dict[Column, int] = {}
    kept = {unit: [first.records[unit][name] for name in names] for unit, names in units.items()}
    every = [_cluster(unit, record) for unit, records in kept.items() for record in records]
    clusters = {name: number for number, name in enumerate(dict.fromkeys(every))}
    for unit, names in units.items():
        rows = np.array([clusters[_cluster(unit, record)] for record in kept[unit]])
        answers = {key: [side.records[unit][name] for name in names] for key, side in sides.items()}
        named = metrics.get(cast(Task, unit[2]), ())
        for metric in of_task(unit[2], named) if named else (first.metrics[unit],):
            column = Column(unit, metric.name)
            try:
                of_items = {key: metric(records) for key, records in answers.items()}
            except NotComputed as missing:
                notes.append(f"{column.label} is left out, because it is {missing}")
                continue
            if not all(np.isfinite(measure.value) for measure in of_items.values()):
                notes.append(f"{column.label} is left out, because no item counts for it")
                continue
            columns.append(column)
            items[column] = int(np.any([measure.counts for measure in of_items.values()], axis=0).sum())
            for key, measure in of_items.items():
                found[key].append(_by_cluster(measure, rows, len(clusters)))
    if not columns:
        raise UserError(f"{first.place}: {notes[-1]}, and there is no other score to compare.")
    of_variant: dict[str, dict[int, tuple[Measure, ...]]] = {}
    for (name, seed), of_run in found.items():
        of_variant.setdefault(name, {})[seed] = tuple(of_run)
    return Scores(tuple(columns), tuple(clusters), of_variant, items, tuple(notes))


def _shared_items(sides: Sequence[Side], first: Side) -> tuple[dict[UnitKey, list[str]], list[str]]:
    """Returns by unit the ids that all sides answered, and notes on what was left out."""
    units: dict[UnitKey, list[str]] = {}
    notes: list[str] = []
    split = first.about["split"]
    for unit in [unit for unit in first.records if unit[1] == split]:
        names = [n for n in first.records[unit] if all(n in s.records.get(unit, {}) for s in sides)]
        if names:
            units[unit] = names
    for unit in dict.fromkeys(unit for side in sides for unit in side.records if unit[1] == split):
        lost = len(set().union(*(side.records.get(unit, {}) for side in sides))) - len(
            units.get(unit, ())
        )
        if lost:
            notes.append(f"{'/'.join(unit)}: {lost} items that not all runs answered")
    if not units:
        other = _farthest(first, sides, split)
        raise UserError(
            f"{first.place} and {other.place} share no item of split {split!r}; score both on the same "
            "data sets and split."
        )
    for side in sides:
        for unit in units:
            check_comparable(first, side, unit, notes)
    return units, list(dict.fromkeys(notes))


def _farthest(first: Side, sides: Sequence[Side], split: str) -> Side:
    """Returns the side that shares the fewest items with the first one."""

    def shared(side: Side) -> int:
        return sum(len(of & side.records.get(unit, {}).keys()) for unit, of in ours.items())

    ours = {unit: set(found) for unit, found in first.records.items() if unit[1] == split}
    return min(sides, key=shared)


def _cluster(unit: UnitKey, record: Record) -> str:
    """Names what resampling keeps together; sets never share it."""
    return f"{unit[0]}/{record['cluster'] or record['id']}"


def _by_cluster(measure: Measure, rows: np.ndarray, count: int) -> Measure:
    """Turns a measure of items into one of `count` clusters; `rows` are the items' clusters."""
    if isinstance(measure, Ranked):
        there = np.bincount(rows[measure.counts], minlength=count) > 0  # [count]
        return Ranked(
            there[:, None].astype(np.float64),
            lambda drawn: np.apply_along_axis(lambda row: measure.drawn(row[rows]), -1, drawn),
        )
    sums = np.zeros((count, measure.items.shape[1]))
    np.add.at(sums, rows, measure.items)
    return Measure(sums, measure.score)


# ---------------------------------------------------------------------------------------------
# Differences
# ---------------------------------------------------------------------------------------------


def differences(scores: Scores, baseline: str) -> dict[str, Any]:
    """Compares every variant with the baseline, over the seeds that both have.

    {"counted": labels of the columns in the mean change, "outside": {label: why it is not in it},
    "variants": {variant: {seeds, scores: {label: {value, seeds}}, columns: {label: {value, ci95}},
    change: {value, ci95, seeds, error, p, p_holm, verdict, detectable}}}}; the baseline has seeds and
    scores alone. change: the mean over columns of the change in per cent of the baseline's score.
    """
    # A change in per cent needs a baseline's score above 0, on the seeds of each comparison too.
    common = [[s for s in seeds if s in scores.measures[baseline]] for seeds in scores.measures.values()]
    wanted = _counted(scores.columns)
    above_0 = [i for i in wanted if all(_mean(scores, baseline, i, some) > 0 for some in common if some)]
    counted = _in_several_clusters(scores, above_0) or above_0
    found: dict[str, Any] = {}
    changes: dict[str, Difference] = {}
    for variant, seeds in scores.measures.items():
        found[variant] = {
            "seeds": list(seeds),
            "scores": {
                column.label: {
                    "value": _mean(scores, variant, i, list(seeds)),
                    "seeds": [measures[i].value for measures in seeds.values()],
                }
                for i, column in enumerate(scores.columns)
            },
        }
        shared = [seed for seed in seeds if seed in scores.measures[baseline]]
        if variant == baseline or not shared:
            continue
        ours, theirs = ([scores.measures[name][seed] for seed in shared] for name in (variant, baseline))
        found[variant]["columns"] = {
            column.label: _plain(
                _paired([run[i] for run in ours], [run[i] for run in theirs], scores), "value", "ci95"
            )
            for i, column in enumerate(scores.columns)
        }
        if counted:
            means = [_mean(scores, baseline, i, shared) for i in counted]
            weights = [100 / (len(counted) * mean) for mean in means]
            new, old = ([_joined(run, counted, weights) for run in side] for side in (ours, theirs))
            groups = _groups([*ours, *theirs], counted)
            change = _paired(new, old, scores, groups)
            # The baseline's mean, by which is divided, is not known exactly either: to first order its
            # items weigh as much more as the variant scores more. This spread lies around 0.
            ratios = [_mean(scores, variant, i, shared) / m for i, m in zip(counted, means, strict=True)]
            weights = [weight * ratio for weight, ratio in zip(weights, ratios, strict=True)]
            moved = _paired(new, [_joined(run, counted, weights) for run in theirs], scores, groups)
            changes[variant] = _with_wider_interval(change, moved)
            found[variant]["change"] = {
                **_plain(changes[variant], "value", "ci95", "p", "error", "freedom"),
                "seeds": [a.value - b.value for a, b in zip(new, old, strict=True)],
            }
    # one seed tells two runs apart, not two variants
    enough = {name: len(found[name]["change"]["seeds"]) > 1 for name in changes}
    chances = {name: change.p if enough[name] else None for name, change in changes.items()}
    compared = max(1, sum(p is not None for p in chances.values()))
    judged = verdicts(list(changes.values()), list(chances.values()))
    for (name, change), verdict in zip(changes.items(), judged, strict=True):
        several = chances[name] is not None
        found[name]["change"] |= {
            **verdict,
            "detectable": change.detectable(LEVEL / compared) if several else None,
        }
    outside = {
        column.label: "not among the published ten"
        if i not in wanted
        else "the baseline scores 0"
        if i not in above_0
        else "its items are one cluster"
        for i, column in enumerate(scores.columns)
        if i not in counted
    }
    return {
        "counted": [scores.columns[i].label for i in counted],
        "outside": outside,
        "variants": found,
    }


def _counted(columns: Sequence[Column]) -> list[int]:
    """Returns the columns of the mean change: the published ten where they all are, else all."""
    published = [i for pair in published_pairs(columns) for i in pair]
    return published or list(range(len(columns)))


def published_pairs(columns: Sequence[Column]) -> list[tuple[int, int]]:
    """Returns the five pairs of columns of the published ablation, or none if one of the ten lacks."""
    places = {(column.unit[2], column.unit[0]): i for i, column in enumerate(columns)}
    if len(places) < len(columns):  # several metrics of a task
        return []
    wanted = [((task, one), (task, two)) for task, one, two in PAIRS]
    if not all(one in places and two in places for one, two in wanted):
        return []
    return [(places[one], places[two]) for one, two in wanted]


def _mean(scores: Scores, variant: str, i: int, seeds: Sequence[int]) -> float:
    return float(np.mean([scores.measures[variant][seed][i].value for seed in seeds]))


def _joined(run: Sequence[Measure], places: Sequence[int], weights: Sequence[float]) -> Measure:
    """Makes one measure of several: their weighted sum."""
    parts = [run[i] for i in places]
    if any(isinstance(part, Ranked) for part in parts):
        counts = np.any([part.counts for part in parts], axis=0)  # [n]
        return Ranked(
            counts[:, None].astype(np.float64),
            lambda drawn: np.sum(
                [weight * part.drawn(drawn) for weight, part in zip(weights, parts, strict=True)], axis=0
            ),
        )
    ends = np.cumsum([part.items.shape[1] for part in parts])[:-1]

    def score(sums: np.ndarray) -> np.ndarray:
        split = np.split(sums, ends, axis=-1)
        scored = zip(weights, parts, split, strict=True)
        return np.sum([weight * part.score(own) for weight, part, own in scored], axis=0)

    return Measure(np.concatenate([part.items for part in parts], axis=1), score)


def _in_several_clusters(scores: Scores, places: Sequence[int]) -> list[int]:
    """Leaves out the columns that are a sample of one cluster, from which no interval can be taken."""
    if not places:
        return []
    runs = [run for seeds in scores.measures.values() for run in seeds.values()]
    groups = np.array(_groups(runs, places))
    sizes = np.bincount(groups)  # clusters of each group; group 0 has no items
    own = {i: groups[np.any([run[i].counts for run in runs], axis=0)] for i in places}
    return [i for i in places if sizes[own[i]].min(initial=2) > 1]


def _with_wider_interval(change: Difference, other: Difference) -> Difference:
    """Makes the interval of a change as wide as that of another difference, if that is wider."""
    if change.ci95 is None or other.ci95 is None:
        return change
    half = max(high - low for low, high in (change.ci95, other.ci95)) / 2
    return dataclasses.replace(change, ci95=[change.value - half, change.value + half])


def _groups(runs: Sequence[Sequence[Measure]], places: Sequence[int]) -> list[int]:
    """Numbers the groups of clusters [n] whose items no column has in common with another group.

    Such as text questions beside images: each group is a sample of its own. Clusters without an item
    that counts in any run have the number 0.
    """
    # [columns, n]
    having = np.array([np.any([run[i].counts for run in runs], axis=0) for i in places])
    groups = np.zeros(having.shape[1], int)
    number, left = 0, list(having)
    while left:
        number += 1
        group = left.pop()
        while joining := [i for i, other in enumerate(left) if (other & group).any()]:
            group = group | np.any([left.pop(i) for i in reversed(joining)], axis=0)
        groups[group] = number
    return groups.tolist()


def _paired(
    ours: Sequence[Measure], theirs: Sequence[Measure], scores: Scores, groups: Sequence[int] = ()
) -> Difference:
    return paired(ours, theirs, scores.clusters, RESAMPLES, 0, groups)


def _plain(difference: Difference, *names: str) -> dict[str, Any]:
    return {name: getattr(difference, name) for name in names}
