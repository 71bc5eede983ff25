"""Writes what a sweep found: numbers, a page with its tables, and a picture."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unimed_jax import files, processes
from unimed_jax.analyze import cost, params
from unimed_jax.analyze.chain import finished
from unimed_jax.analyze.compare_report import chance
from unimed_jax.analyze.sweep.compare import (
    RESAMPLES,
    Column,
    Scores,
    differences,
    published_pairs,
    read_scores,
)
from unimed_jax.analyze.sweep.picture import draw
from unimed_jax.analyze.sweep.plan import Plan, SweepRun
from unimed_jax.analyze.sweep.run import duration, failure
from unimed_jax.config import Config
from unimed_jax.errors import UserError
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.evaluate.statistics import LEVEL
from unimed_jax.parsing import read_json
from unimed_jax.provenance import plain
from unimed_jax.train.flops import useful_flops
from unimed_jax.verdicts import number

NAMES = ("sweep.png", "sweep.md", "sweep.json")
EQUAL = 0.005  # relative difference up to which counts are called equal


def write_table(plan: Plan) -> None:
    """Compares the finished runs and writes sweep.md, sweep.json and sweep.png into the sweep's folder.

    Raises UserError if there is `nothing_to_compare`.
    """
    found = result(plan)
    if not processes.leads():
        return
    with files.written_together(plan.folder, NAMES) as place:
        draw(place / NAMES[0], found)
        files.write_text(place / NAMES[1], page(found))
        files.write_json(place / NAMES[2], found)
    processes.say(f"{main_table(found)}\n\n{power(found)}")
    processes.say(f"wrote {', '.join(str(plan.folder / name) for name in NAMES)}")


def _finished_seeds(plan: Plan) -> dict[str, list[int]]:
    """Returns the seeds of each variant that has a finished run."""
    done = {name: [run.seed for run in plan.of(name) if finished(run)] for name in plan.variants}
    return {name: seeds for name, seeds in done.items() if seeds}


def nothing_to_compare(plan: Plan) -> str:
    """Says what is missing if no run of the baseline, or of any other variant, is finished; else ""."""
    done, baseline = _finished_seeds(plan), plan.sweep.baseline
    if baseline in done and len(done) > 1:
        return ""
    lacking = "the baseline" if baseline not in done else "another variant than the baseline"
    return (
        f"sweep {plan.sweep.name!r} in {plan.folder} has no finished run of {lacking} {baseline!r}; "
        "there is nothing to compare yet."
    )


def result(plan: Plan) -> dict[str, Any]:
    """Gathers the content of sweep.json from the runs that are finished."""
    if lacks := nothing_to_compare(plan):
        raise UserError(lacks)
    seeds, baseline = _finished_seeds(plan), plan.sweep.baseline
    scores = read_scores(plan, seeds)
    pairs = published_pairs(scores.columns)
    shown = {name: next(run for run in plan.of(name)).config for name in plan.variants}
    found = differences(scores, baseline)
    for name, entry in found["variants"].items():
        entry["settings"] = dict(plan.sweep.variants[name])
        entry["size"] = size(shown[name])
        entry["cost"] = _cost([run for run in plan.of(name) if run.seed in seeds[name]])
    failed = {run.title: sentence for run in plan.runs if (sentence := failure(run))}
    return plain(
        {
            "name": plan.sweep.name,
            "base": plan.sweep.base,
            "settings": dict(plan.sweep.settings),
            "baseline": baseline,
            "level": LEVEL,
            "columns": [_described(column, scores) for column in scores.columns],
            "clusters": len(scores.clusters),
            "pairs": pairs,
            **found,
            "failed": failed,
            "missing": [r.title for r in plan.runs if not finished(r) and r.title not in failed],
            "notes": [*scores.notes, *_versions(plan)],
        }
    )


def _described(column: Column, scores: Scores) -> dict[str, Any]:
    name, split, task = column.unit
    where = {"label": column.label, "set": name, "split": split, "task": task}
    return {**where, "metric": column.metric, "n": scores.items[column]}


def size(config: Config) -> dict[str, float]:
    """Counts what a variant trains and computes; task tokens that nothing reads are left out."""
    modules, c = params.count(config)["modules"], config.model.connector
    routed = c.is_moe and c.router in ("soft", "sparse")
    nothing = {"total": 0, "trainable": 0}
    tokens = modules.get("connector/task tokens", nothing)
    unread = nothing if routed and c.router_input != "token" else tokens
    connector = modules["connector"]["total"] - unread["total"]
    router = modules.get("connector/router", nothing)["total"] + tokens["total"] - unread["total"]
    return {
        "trained": modules["all"]["trainable"] - unread["trainable"],
        "connector": connector,
        "connector without router": connector - router,
        "activated connector": modules["connector"]["activated"] - unread["total"],
        "flops": sum(useful_flops(config).values()),
        "steps": config.train.steps,
    }


def _cost(runs: Sequence[SweepRun]) -> dict[str, float] | None:
    """Returns the mean cost of some runs, as far as it is known."""
    known = [found for run in runs if (found := cost.kept(run.folder))]
    return {key: sum(found[key] for found in known) / len(known) for key in known[0]} if known else None


def _versions(plan: Plan) -> list[str]:
    """Says if runs were scored by several versions of the code."""
    scored = (run.folder / "metrics.json" for run in plan.runs if not run.is_stage)
    found = sorted({str(read_json(file).get("code_version")) for file in scored if file.is_file()})
    return [f"scored by several versions of the code: {', '.join(found)}"] if len(found) > 1 else []


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def page(found: Mapping[str, Any]) -> str:
    """Writes sweep.md."""
    variants, baseline = found["variants"], found["baseline"]
    sets = ", ".join(f"{c['set']} {c['task']} {c['n']}" for c in found["columns"])
    outside = ", ".join(f"{label} ({reason})" for label, reason in found["outside"].items())
    parts = [
        f"# Sweep {found['name']}: variants of `{found['base']}` against {baseline}",
        main_table(found),
        power(found),
        f"Scores are means over seeds ({_seeds(variants)}), on split "
        f"{found['columns'][0]['split']!r} (items: {sets}; {found['clusters']} clusters). *Change* is "
        "the mean over the columns of the change in per cent of the baseline's score"
        + (f", without {outside}" if outside else "")
        + ". It is paired by seed and item; its interval and p-value count the spread over clusters of "
        f"items ({RESAMPLES} resamples) and over seeds (Student's t). Verdicts are corrected for the "
        f"number of variants (Holm, {100 * found['level']:g} %): *undecided* says that these runs "
        "cannot tell, and such variants have no order. *Detectable* is the true change that this "
        "comparison would have found four times out of five. Variants are listed as in the config.",
        f"## Size and cost\n\n{size_table(found)}\n\n{equal_sizes(found)}",
        f"## Differences from {baseline}, column by column\n\n{column_table(found)}\n\n"
        "Intervals of 95 %, each by itself: not corrected for their number.",
        *(f"- {title} failed: {sentence}" for title, sentence in found["failed"].items()),
        *([f"Not finished: {', '.join(found['missing'])}."] if found["missing"] else []),
        *(f"- {note}." for note in found["notes"]),
        "Research software, not a medical device.",
    ]
    return "\n\n".join(parts) + "\n"


def _seeds(variants: Mapping[str, Any]) -> str:
    """Lists the seeds, of each variant by itself where they differ: then its change is over fewer."""
    lists = {name: ", ".join(map(str, entry["seeds"])) for name, entry in variants.items()}
    if len(set(lists.values())) == 1:
        return next(iter(lists.values()))
    each = "; ".join(f"{name} {seeds}" for name, seeds in lists.items())
    return f"{each}; a change is over those that a variant shares with the baseline"


def main_table(found: Mapping[str, Any]) -> str:
    """Makes a row for each variant: mean scores, change against the baseline, and verdict."""
    heads, cells = _score_columns(found)
    rows = []
    for name, entry in found["variants"].items():
        change = entry.get("change")
        shared = len(change["seeds"]) if change else len(entry["seeds"])
        fewer = f" ({shared} shared)" if shared < len(entry["seeds"]) else ""
        row = [name, f"{len(entry['seeds'])}{fewer}", *cells(entry)]
        if change is None:
            rows.append([*row, "", "", _without_change(name, found), ""])
            continue
        value = _percent(change)
        rows.append([
            *row,
            value if change["verdict"] == "undecided" else f"**{value}**",
            chance(change["p_holm"]),
            change["verdict"],
            "-" if change["detectable"] is None else f"{change['detectable']:.1f} %",
        ])  # fmt: skip
    for title, sentence in _failed_variants(found).items():
        rows.append([title, "0", *[""] * (len(heads) + 2), f"failed: {sentence}", ""])
    head = ("variant", "seeds", *heads, "change, % [95 %]", "p (Holm)", "verdict", "detectable")
    return markdown_table(head, rows)


def _without_change(name: str, found: Mapping[str, Any]) -> str:
    """Says why a variant has no change in per cent."""
    if name == found["baseline"]:
        return "baseline"
    # a variant that shares seeds with the baseline has differences at least
    return "the baseline scores 0" if "columns" in found["variants"][name] else "no common seed"


def _failed_variants(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns the variants without any finished run, and why they failed."""
    names = {title.partition("/")[0]: sentence for title, sentence in found["failed"].items()}
    return {name: sentence for name, sentence in names.items() if name not in found["variants"]}


def _score_columns(found: Mapping[str, Any]) -> tuple[list[str], Callable[[Mapping], list[str]]]:
    """Returns headings of the scores and a function that makes their cells of a variant's entry.

    The five published pairs come first, two sets in a column, where they are complete.
    """
    columns = found["columns"]
    several = len({column["set"] for column in columns}) > 1
    metrics = len(columns) > len({(column["set"], column["task"]) for column in columns})
    groups = [*found["pairs"]]
    groups += [(i,) for i in range(len(columns)) if not any(i in pair for pair in groups)]

    def head(group: Sequence[int]) -> str:
        own = [columns[i] for i in group]
        names = f"{' / '.join(c['set'] for c in own)} " if several else ""
        return f"{names}{own[0]['task']}" + (f" {own[0]['metric']}" if metrics else "")

    def cells(entry: Mapping) -> list[str]:
        values = [entry["scores"][column["label"]]["value"] for column in columns]
        return [" / ".join(number(values[i]) for i in group) for group in groups]

    return [head(group) for group in groups], cells


def _percent(change: Mapping[str, Any]) -> str:
    ends = change["ci95"]
    shown = "no interval" if ends is None else ", ".join(f"{end:+.1f}" for end in ends)
    return f"{change['value']:+.1f} [{shown}]"


def power(found: Mapping[str, Any]) -> str:
    """Says how large a change the sweep could have seen, and what it excludes."""
    known = {
        name: entry["change"] for name, entry in found["variants"].items()
        if entry.get("change") and entry["change"]["detectable"] is not None
    }  # fmt: skip
    if not found["counted"]:
        return "Power: not known; no change in per cent can be taken of a baseline that scores 0."
    if not known:
        return (
            "Power: not known; it takes two seeds, and two clusters that do not all show the same "
            "difference, to say how large a change could have been seen."
        )
    seen = {name: change["detectable"] for name, change in known.items()}
    low, high = min(seen, key=seen.__getitem__), max(seen, key=seen.__getitem__)
    ends = f"{seen[low]:.1f} % ({low})" + (f" to {seen[high]:.1f} % ({high})" if low != high else "")
    text = (
        f"Power: a true mean change of {ends} against {found['baseline']} would have been found with a "
        "probability of 80 %, at the level of the corrected verdicts."
    )
    undecided = {n: c["ci95"] for n, c in known.items() if c["verdict"] == "undecided" and c["ci95"]}
    if undecided:
        text += " Of the undecided variants, the 95 % intervals exclude "
        text += "; ".join(
            f"for {name} gains above {high:+.1f} % and losses below {low:+.1f} %"
            for name, (low, high) in undecided.items()
        )
        text += "."
    return text


SIZES: Mapping[str, str] = {
    "trained": "parameters trained",
    "connector": "of the connector",
    "connector without router": "without router and task tokens",
    "activated connector": "activated",
    "flops": "FLOPs a step",
}


def size_table(found: Mapping[str, Any]) -> str:
    """Makes a row for each variant: parameters, FLOPs of a training step, time and disk of a run."""
    rows = []
    for name, entry in found["variants"].items():
        counts = [
            f"{value:.4g}" if key == "flops" else f"{value:,}"
            for key in SIZES
            for value in [entry["size"][key]]
        ]
        spent = entry["cost"]
        shown = [duration(spent["seconds"]), f"{spent['bytes'] / 1e6:.0f} MB"] if spent else ["-", "-"]
        rows.append([name, str(entry["size"]["steps"]), *counts, *shown])
    return markdown_table(("variant", "steps", *SIZES.values(), "time of a run", "disk"), rows)


def equal_sizes(found: Mapping[str, Any]) -> str:
    """Says which variants have equally many parameters or FLOPs."""
    sentences = []
    for key, words in SIZES.items():
        groups: list[list[str]] = []
        sizes = {name: entry["size"][key] for name, entry in found["variants"].items()}
        for name, value in sizes.items():
            near = functools.partial(_near, value)
            group = next((g for g in groups if near(sizes[g[0]])), None)
            if group is None:
                groups.append([name])
            else:
                group.append(name)
        same = [" = ".join(group) for group in groups if len(group) > 1]
        sentences.append(f"- {words}: {'; '.join(same) or 'all differ'}")
    return (
        f"Equal within {100 * EQUAL:g} %:\n\n"
        + "\n".join(sentences)
        + (
            "\n\nEvery expert of a connector runs, whatever the router; *activated* counts those whose "
            "weight is not 0, which under the routers soft and constant are all of them."
        )
    )


def _near(one: float, two: float) -> bool:
    return abs(one - two) <= EQUAL * max(one, two)


def column_table(found: Mapping[str, Any]) -> str:
    """Makes a row for each variant: the difference of each column, with its interval."""
    labels = [column["label"] for column in found["columns"]]
    rows = []
    for name, entry in found["variants"].items():
        if "columns" in entry:
            rows.append([name, *(_points(entry["columns"][label]) for label in labels)])
    return markdown_table(("variant", *labels), rows)


def _points(entry: Mapping[str, Any]) -> str:
    ends = entry["ci95"]
    shown = "no interval" if ends is None else ", ".join(f"{end:+.3f}" for end in ends)
    return f"{entry['value']:+.3f} [{shown}]"
