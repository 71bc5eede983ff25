"""Writes the sections about scores: what they say in words, the tables, and reliance on the image."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unimed_jax.analyze import reliance_report
from unimed_jax.analyze.run_report.facts import Facts, command
from unimed_jax.analyze.run_report.markup import (
    VERDICTS,
    Markup,
    cell,
    details,
    escaped,
    joined,
    prose,
    table,
    tag,
)
from unimed_jax.analyze.run_report.plots import Mark, axis
from unimed_jax.evaluate.report.markdown import (
    ABOUT_BASELINES,
    ABOUT_CHOICES,
    BASELINES,
    CHOICES,
    CORRECTED,
    FURTHER,
    GAINS,
    PEERS,
    POOLED,
    PUBLISHED,
    TEMPLATES,
    Table,
    about_margin,
    about_published,
    rows_of,
)
from unimed_jax.verdicts import number, reliance_verdict, verdict, with_interval

LETTER = "run"  # the head of the column that tells several runs apart


def signed(run: Facts) -> Markup:
    """Makes the round sign of a run, in its colour; nothing if there is only one."""
    if not run.sign:
        return Markup("")
    return tag("span", run.sign, class_=f"sign run{number_of(run)}", title=run.name)


def not_measured(run: Facts, analysis: str) -> Markup:
    """Says that an analysis was not made and, of a folder that holds a model, what makes it."""
    if not run.settings:
        return tag("p", signed(run), " Not measured.")
    words = command("analyze", analysis, f"--run={run.folder}")
    return tag("p", signed(run), " Not measured; ", tag("code", words), " measures it.")


def number_of(run: Facts) -> int:
    """Returns the place of a run on the page, from 0."""
    return ord(run.sign) - ord("A") if run.sign else 0


def cases(
    runs: Sequence[Facts], split: str | None = None
) -> list[tuple[str, str, list[tuple[Facts, Mapping[str, Any]]]]]:
    """Lists (set, task, scores of each run that has them), in the order of the first run.

    split: default the one that leads. All sets together stand there only for tasks that several of
    them have.
    """
    found: dict[tuple[str, str], list[tuple[Facts, Mapping[str, Any]]]] = {}
    for run in runs:
        rows = rows_of(run.metrics, split or run.split)
        tasks = Counter(task for _, task, _ in rows)
        for name, task, entry in rows:
            if name != POOLED or tasks[task] > 2:
                found.setdefault((name, task), []).append((run, entry))
    return [(name, task, scored) for (name, task), scored in found.items()]


# ---- in words --------------------------------------------------------------------------------------
def summary(run: Facts) -> Markup:
    """Says in a few sentences what the scores of a run allow."""
    rows = [row for row in rows_of(run.metrics, run.split) if row[0] != POOLED]
    several = len({name for name, *_ in rows}) > 1
    verdicts: dict[str, list[str]] = {}
    ahead: list[str] = []
    for name, task, entry in rows:
        title = f"{task} ({name})" if several else task
        verdicts.setdefault(verdict(entry["margin"]), []).append(title)
        peer = entry.get("peer_margin")
        if peer and verdict(peer) == "below blind":
            ahead.append(
                f"{peer['baseline']} answers {title} better than the model, from the same text "
                f"({number(entry['peers'][peer['baseline']][entry['primary']])} against "
                f"{number(entry['corrected'][entry['primary']]['value'])})"
            )
    words = {
        "above blind": "Better than the best guess without the image",
        "undecided": "Not shown to be better than the best guess without the image",
        "below blind": "Worse than the best guess without the image",
        "no verdict": "Not compared with a guess without the image",
    }
    lines = [
        joined(
            (tag("span", f"{said}: ", class_=f"dot {VERDICTS[key]}"), tag("b", ", ".join(titles)), ".")
        )
        for key, said in words.items()
        if (titles := verdicts.get(key))
    ]
    lines += [escaped(f"{one}.") for one in ahead]
    if run.reliance and run.reliance_is_its_own:
        relies: dict[str, list[str]] = {}
        for name, task, entry in reliance_report.rows_of(run.reliance):
            said = reliance_verdict(entry["scores"].get("visual_reliance_score"))
            if said != "-":
                relies.setdefault(said, []).append(f"{task} ({name})" if several else task)
        lines += [_sentence(f"{said[0].upper()}{said[1:]}", titles) for said, titles in relies.items()]
    return tag("ul", *(tag("li", line) for line in lines), class_="summary")


def _sentence(said: str, titles: Sequence[str]) -> Markup:
    return joined((said, ": ", tag("b", ", ".join(titles)), "."))


def tiles(run: Facts) -> Markup:
    """Shows the primary score of each task large, with the best guess without the image below it."""
    shown = []
    rows = [row for row in rows_of(run.metrics, run.split) if row[0] != POOLED]
    several = len({name for name, *_ in rows}) > 1
    for name, task, entry in rows:
        primary, margin = entry["primary"], entry["margin"]
        score = entry["corrected"][primary]
        blind = "no baseline"
        if margin:
            blind = f"best without the image {number(entry['blind'][margin['baseline']][primary])}"
        title = f"{name} · {task}" if several else task
        if score.get("value") is None:
            continue
        shown.append(
            tag(
                "div",
                tag("div", title, class_="task"),
                tag("div", number(score["value"]), class_="big"),
                axis(list(_marks(entry, "run0")), _most([entry])),
                tag("div", primary, class_="small"),
                tag("div", blind, class_="small"),
                cell(verdict(margin)),
                class_="tile",
            )
        )
    return tag("div", *shown, class_="tiles")


# ---- tables ----------------------------------------------------------------------------------------
def scores(runs: Sequence[Facts]) -> Markup:
    """Writes corrected scores beside blind baselines, then all other tables of report.md."""
    lines = []
    for name, task, scored in cases(runs):
        most = _most([entry for _, entry in scored])
        ids = {entry.get("protocol") for _, entry in scored}
        for run, entry in scored:
            (line,) = CORRECTED.cells(entry)
            count, primary, value, best, *rest = line
            figure, _, whose = best.partition(" (")
            best = joined((figure, tag("br"), tag("small", whose.removesuffix(")"))))
            plot = axis(list(_marks(entry, f"run{number_of(run)}")), most)
            other = tag("span", "other protocols", class_="chip open") if len(ids) > 1 else ""
            first = joined((_case(name, task, primary, count), other))
            lines.append([first, *_sign(run, runs), plot, value, best, *rest])
    head = ("set and task", *_head(runs), "from 0 to 1", "value [95 %]")
    caption = f"Corrected scores on {runs[0].split}"
    resamples = runs[0].metrics["evaluate"]["bootstrap"]
    return joined(
        (
            table((*head, "best blind", "margin [95 %]", "verdict"), lines, caption),
            _key(runs),
            prose(about_margin(resamples)),
            _more("All baselines", BASELINES, runs, ABOUT_BASELINES),
            _more("Learned baselines that read the same text", PEERS, runs),
            _more("By question template", TEMPLATES, runs),
            _more("As published", PUBLISHED, runs, _about_published(runs)),
            _more("Further corrected scores", FURTHER, runs),
            _choices(runs),
            *(_more(f"Split {split}", CORRECTED, runs, split=split) for split in _others(runs)),
        )
    )


def _case(name: str, task: str, metric: str, count: int) -> Markup:
    """Names a set and task, and below them how it is scored and on how many examples."""
    return joined((f"{name} ", tag("b", task), tag("br"), tag("small", f"{metric}, n {count}")))


def _choices(runs: Sequence[Facts]) -> Markup:
    """Writes what the likelihoods of known answers say, where they were measured."""
    if not any("likelihood" in entry for *_, scored in cases(runs) for _, entry in scored):
        return Markup("")
    tables = [_table(one, runs) for one in (CHOICES, GAINS)]
    return details("Classes and choices by likelihood", *tables, prose(ABOUT_CHOICES))


def _others(runs: Sequence[Facts]) -> list[str]:
    splits = dict.fromkeys(split for run in runs for split in run.metrics["pooled"])
    return [split for split in splits if split != runs[0].split]


def _more(
    title: str, one: Table, runs: Sequence[Facts], about: str = "", split: str | None = None
) -> Markup:
    found = _table(one, runs, title, split)
    return details(title, found, prose(about)) if found and about else details(title, found)


def _table(one: Table, runs: Sequence[Facts], caption: str = "", split: str | None = None) -> Markup:
    """Writes a table of report.md with the lines of all runs, those of one task together."""
    rows = [
        [name, task, *_sign(run, runs), *line]
        for name, task, scored in cases(runs, split)
        for run, entry in scored
        for line in one.cells(entry)
    ]
    return table(("set", "task", *_head(runs), *one.head), rows, caption)


def _about_published(runs: Sequence[Facts]) -> str:
    config = next((run.config for run in runs if run.config is not None), None)
    return about_published(config) if config else ""


def _head(runs: Sequence[Facts]) -> tuple[str, ...]:
    return (LETTER,) if len(runs) > 1 else ()


def _sign(run: Facts, runs: Sequence[Facts]) -> tuple[Markup, ...]:
    return (signed(run),) if len(runs) > 1 else ()


def _key(runs: Sequence[Facts]) -> Markup:
    """Explains the signs of the small plots."""
    return tag(
        "p",
        tag("span", "", class_="key model"),
        "the model with its 95 % interval ",
        tag("span", "", class_="key blind"),
        "the best baseline that does not see the image",
        class_="legend",
    )


def _most(entries: Sequence[Mapping[str, Any]]) -> float:
    """Returns the end of the axis: 1, or the highest value where a metric goes beyond."""
    highest = [1.0]
    for entry in entries:
        score = entry["corrected"].get(entry["primary"]) or {}
        highest += [value for value in (score.get("value"), *(score.get("ci95") or ())) if value]
    return max(highest)


def _marks(entry: Mapping[str, Any], look: str) -> Iterator[Mark]:
    score, margin = entry["corrected"].get(entry["primary"]) or {}, entry["margin"]
    yield Mark("model", score.get("value"), score.get("ci95"), look)
    if margin:
        best = entry["blind"][margin["baseline"]][entry["primary"]]
        yield Mark(f"best blind: {margin['baseline']}", best, None, "blind")


# ---- reliance on the image -------------------------------------------------------------------------
def reliance(runs: Sequence[Facts]) -> Markup:
    """Writes what answers do without the image, with a blank one and with another case's."""
    parts = []
    for run in runs:
        if run.reliance is None:
            parts.append(not_measured(run, "reliance"))
        else:
            parts.append(_passes(run, run.reliance, len(runs) > 1))
    kept = next((run.reliance for run in runs if run.reliance), None)
    if kept:
        said = [tag("li", text) for text in kept["definitions"].values()]
        parts.append(details("What these scores are", tag("ul", *said)))
    return joined(parts)


def _passes(run: Facts, found: Mapping[str, Any], several: bool) -> Markup:
    rows = []
    for name, task, entry in reliance_report.rows_of(found):
        passes = {key: entry["passes"].get(key) for key in reliance_report.PASSES}
        if not any(part for key, part in passes.items() if key != "own_image"):
            continue
        best = entry["best_blind"]
        marks = [
            Mark(words, part["value"], part["ci95"], key.replace("_", "-"))
            for key, (words, *_) in reliance_report.PASSES.items()
            if (part := passes[key])
        ]
        if best:
            marks.append(Mark(f"best blind: {best}", entry["blind"][best]["value"], None, "blind"))
        score = entry["scores"].get("visual_reliance_score")
        rows.append(
            [_case(name, task, entry["metric"], entry["n"]), axis(marks)]
            + [number(part["value"]) if part else "-" for part in passes.values()]
            + [with_interval(score, "+"), reliance_verdict(score)]
        )
    names = [words for words, *_ in reliance_report.PASSES.values()]
    head = ("set and task", "from 0 to 1", *names, "own less other image [95 %]", "verdict")
    keys = joined(
        joined((tag("span", "", class_=f"key {key.replace('_', '-')}"), f"{words} "))
        for key, (words, *_) in reliance_report.PASSES.items()
    )
    stale = ""
    if not run.reliance_is_its_own:
        stale = tag(
            "p", "Measured after another step, or on other data, than the scores above.", class_="note"
        )
    title = f"{run.sign} " if several else ""
    return joined(
        (
            table(head, rows, f"{title}Scores with and without the image, split {found['split']}"),
            tag("p", keys, tag("span", "", class_="key blind"), "best blind baseline", class_="legend"),
            stale,
        )
    )
