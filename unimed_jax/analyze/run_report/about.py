"""Writes the sections about training, routing, tug-of-war, the data and how the run was made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.analyze.run_report.facts import AUDIT, Data, Facts, flat, names_of
from unimed_jax.analyze.run_report.markup import Markup, details, facts, joined, prose, table, tag
from unimed_jax.analyze.run_report.plots import Series, curve, finite, heat
from unimed_jax.analyze.run_report.scores import cases, number_of, signed
from unimed_jax.analyze.tug_of_war_report import TITLES
from unimed_jax.audit.report import MEANING
from unimed_jax.config import VISUAL_TASKS
from unimed_jax.evaluate.report.markdown import ABOUT_PROTOCOLS, routing_line
from unimed_jax.verdicts import with_interval

MOST_CURVES = 36
# what a log holds that is drawn in the open, in this order; the rest is folded
_FIRST = ("train/loss", "loss/", "valid/", "train/grad_norm", "train/lr")


# ---- curves ----------------------------------------------------------------------------------------
def curves(runs: Sequence[Facts]) -> Markup:
    """Draws every logged value, those of all runs in one figure."""
    keys = dict.fromkeys(key for run in runs for line in (*run.log[:1], *run.log[-1:]) for key in line)
    drawn: dict[str, Markup] = {}
    for key in keys:
        series = []
        for run in runs:
            steps, values = finite(run.log, key)
            if len(values):
                label = f"{run.sign}, " if run.sign else ""
                series.append(Series(number_of(run), label, steps, values))
        if series and key not in ("step", "epoch"):
            drawn[key] = curve(key, series)
    if not drawn:
        return tag("p", "No log of the training lies beside the scores.")
    first = [key for start in _FIRST for key in drawn if key == start or key.startswith(start)]
    first = list(dict.fromkeys(first))[:MOST_CURVES]
    routed = [key for key in drawn if key.startswith("routing/")][:MOST_CURVES]
    rest = [key for key in drawn if key not in first and key not in routed][:MOST_CURVES]
    return joined(
        (
            tag("p", "Point at a curve to read a step's value."),
            tag("div", *(drawn[key] for key in first), class_="curves"),
            details("Routing while training", _grid(drawn, routed)),
            details("Speed, memory and other logged values", _grid(drawn, rest)),
        )
    )


def _grid(drawn: Mapping[str, Markup], keys: Sequence[str]) -> Markup:
    return tag("div", *(drawn[key] for key in keys), class_="curves") if keys else Markup("")


# ---- routing ---------------------------------------------------------------------------------------
def routing(runs: Sequence[Facts]) -> Markup:
    """Shows the mean weight of each expert by task."""
    parts = []
    for run in runs:
        found = run.metrics.get("routing")
        if not found:
            continue
        weights = found["mean_weights"]
        head = [f"expert {i}" for i in range(len(weights[0]))]
        rows = dict(zip(VISUAL_TASKS, weights, strict=False))
        caption = f"{run.sign} Mean routing weight by task".strip()
        most = max(max(line) for line in weights)
        parts.append(tag("div", heat(head, rows, caption, most=most), prose(f"{routing_line(found)}.")))
    if not parts:
        return tag("p", "The connector has no experts.")
    about = (
        "The same images, routed under each task's token. Total variation is 0 where two tasks use the "
        "experts alike, and 1 where they have none in common."
    )
    return joined((tag("p", about), *parts))


# ---- tug-of-war ------------------------------------------------------------------------------------
def tug_of_war(runs: Sequence[Facts]) -> Markup:
    """Shows how the tasks' gradients agree, where that was measured."""
    parts = []
    for run in runs:
        if run.tug_of_war is None:
            command = f"python -m unimed_jax.main analyze tug-of-war --run={run.folder}"
            parts.append(tag("p", signed(run), " Not measured; ", tag("code", command), " measures it."))
            continue
        parts += [signed(run), _gradients(run.tug_of_war["runs"])]
    about = (
        "Gradients of each task's mean loss on held-out batches, at the same parameters. A cosine below "
        "0 is a conflict: a step for one task undoes some of the other."
    )
    return joined((tag("p", about), *parts))


_MATRICES = (("cos", "cosine", -1.0), ("magnitude", "magnitude similarity", 0.0))


def _gradients(measured: Sequence[Mapping[str, Any]]) -> Markup:
    """Shows both matrices of each run that was measured together, then the indices of all."""
    titles = names_of([Path(one["run"]) for one in measured])
    parts, found = [], {}
    for title, one in zip(titles, measured, strict=True):
        group, units = next(iter(one["units"].items()))
        names = units["names"]
        tables = [
            heat(names, dict(zip(names, units[key], strict=True)), f"{group}: {words}", least, 1.0)
            for key, words, least in _MATRICES
        ]
        found[title] = units["indices"]
        parts.append(tag("h3", f"{title} ({one['connector']}, step {one['step']})"))
        parts.append(tag("div", *tables, class_="side"))
        if units["absent"]:
            parts.append(tag("p", f"No gradient there: {', '.join(units['absent'])}."))
    rows = [
        [words, *(with_interval(indices.get(name)) for indices in found.values())]
        for name, words in TITLES.items()
    ]
    return joined((*parts, table(("index of all pairs [95 %]", *found), rows, "Tug-of-war in numbers")))


# ---- data ------------------------------------------------------------------------------------------
def sheet(runs: Sequence[Facts], data: Data) -> Markup:
    """Writes a sheet for each set that was scored: passport, splits, and what leaks between them."""
    first: dict[str, tuple[Facts, Mapping[str, Any]]] = {}
    for run in runs:
        for name, entry in run.metrics["data"].items():
            first.setdefault(name, (run, entry))
    parts = []
    for name, (run, entry) in first.items():
        parts += [
            tag("h3", name),
            tag("p", entry["note"], class_="note") if entry.get("note") else "",
            facts(
                [
                    ("Licence", entry.get("licence") or "not stated"),
                    ("Citation", entry.get("citation")),
                    ("Checksum", tag("code", entry.get("checksum", "")[:16])),
                    ("Intervals over", f"{entry.get('cluster_word', 'example')}s"),
                ]
            ),
            table(("split", "examples", "by task"), data.counts(name), f"{name}: splits"),
            _leaks(name, run, entry),
        ]
    if data.missing:
        parts.append(tag("p", f"The data did not open here, so splits are not counted: {data.missing}."))
    return joined(parts)


def _leaks(name: str, run: Facts, entry: Mapping[str, Any]) -> Markup:
    """Lists what one split gives away of another, as the audit of the data found."""
    found = (run.audit or {}).get("sets", {}).get(name)
    if found is None:
        out = (run.folder / AUDIT).parent
        command = f"python -m unimed_jax.main data check --config=FILE --out={out}"
        words = " looks for leaks between splits and sets, and the next report shows them."
        return tag("p", "Not audited: ", tag("code", command), words)
    stale = found.get("checksum") != entry.get("checksum")
    between = sorted({pair for counts in found["leaks"].values() for pair in counts})
    reasons = found.get("by_design", {})
    rows = []
    for kind, counts in found["leaks"].items():
        if any(counts.values()):
            words = MEANING.get(kind, kind).format(cluster=found.get("cluster", "example"))
            design = f" (by design: {reasons[kind]})" if kind in reasons else ""
            rows.append([words + design, *(counts.get(pair, 0) for pair in between)])
    arrows = [pair.replace("_", " → ", 1) for pair in between]
    head = ("of the later split, given away by the earlier", *arrows)
    note = "The audit is of another state of this set." if stale else ""
    return joined(
        (
            tag("p", note, class_="note") if note else "",
            table(head, rows, f"{name}: leaks between splits")
            or tag("p", "The audit found nothing that one split gives away of another."),
        )
    )


# ---- how it was made -------------------------------------------------------------------------------
def made(runs: Sequence[Facts]) -> Markup:
    """Writes environment, command, checksums, settings and protocols."""
    return joined(
        (
            *(_made(run) for run in runs),
            details("Settings that differ", _differing(runs), opened=True) if len(runs) > 1 else "",
            *(
                details(
                    joined((signed(run), " All settings")),
                    table(("setting", "value"), flat(run.settings).items(), "Settings"),
                )
                for run in runs
            ),
            details("Protocols", _protocols(runs), prose(ABOUT_PROTOCOLS)),
        )
    )


def _made(run: Facts) -> Markup:
    metrics, last = run.metrics, run.environment[-1] if run.environment else {}
    packages = ", ".join(f"{name} {version}" for name, version in last.get("packages", {}).items())
    cost = run.cost or {}
    inputs = (run.inputs or {}).get("inputs", {})
    changes = (run.inputs or {}).get("changes", [])
    accepted = "; ".join(f"{change['name']} after step {change['step']}" for change in changes)
    minutes = f"{cost['seconds'] / 60:.1f} minutes of work" if "seconds" in cost else None
    again = f"python -m unimed_jax.main evaluate --run={run.folder}"
    return joined(
        (
            tag("h3", signed(run), " ", run.name),
            facts(
                [
                    ("Steps", metrics.get("step")),
                    ("Seed", metrics.get("seed")),
                    ("Fidelity", metrics.get("fidelity")),
                    ("Time", minutes),
                    ("Code", tag("code", metrics.get("code_version"))),
                    ("Settings", tag("code", metrics.get("config_hash"))),
                    ("Data", tag("code", str(metrics.get("data_checksum"))[:16])),
                    ("Trained with", joined(_checksum(name, state) for name, state in inputs.items())),
                    ("Accepted changes", accepted),
                    ("Python", last.get("python")),
                    ("System", last.get("system")),
                    ("Devices", last.get("devices")),
                    ("Packages", packages),
                ]
            ),
            tag("p", "To train again:") if last.get("command") else "",
            tag("pre", tag("code", last["command"]), tabindex="0") if last.get("command") else "",
            tag("p", "To score again:"),
            tag("pre", tag("code", again), tabindex="0"),
        )
    )


def _checksum(name: str, state: str) -> Markup:
    return joined((tag("code", f"{name} {state[:8]}"), " "))


def _differing(runs: Sequence[Facts]) -> Markup:
    every = [flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for one in every for key in one)
    rows = [
        [key, *(one.get(key, "-") for one in every)]
        for key in keys
        if len({one.get(key) for one in every}) > 1
    ]
    if not rows:
        return tag("p", "None.")
    return table(("setting", *(joined((signed(run), " ", run.name)) for run in runs)), rows, "Settings")


def _protocols(runs: Sequence[Facts]) -> Markup:
    rows = []
    for name, task, scored in cases(runs):
        ids: dict[tuple[str, str], list[str]] = {}
        for run, entry in scored:
            every = entry.get("protocols") or {entry["primary"]: entry.get("protocol")}
            for score, protocol in every.items():
                ids.setdefault((score, protocol), []).append(run.sign)
        for (score, protocol), signs in ids.items():
            whose = [" ".join(signs)] if len(runs) > 1 else []
            rows.append([name, task, score, f"`{protocol}`", *whose])
    head = ("set", "task", "score", "protocol", *(["runs"] if len(runs) > 1 else []))
    return table(head, rows, "Protocols")
