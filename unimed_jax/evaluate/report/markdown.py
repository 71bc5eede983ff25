"""Writes the tables and the text of report.md."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from unimed_jax.config import Config
from unimed_jax.data.forms import form_of
from unimed_jax.evaluate.classes import BINS
from unimed_jax.verdicts import number, verdict, with_interval

POOLED = "all sets"
# (set, task, scores) of one split, pooled ones last.
Rows = Sequence[tuple[str, str, Mapping[str, Any]]]


# ---------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Makes a table in Markdown; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines
    )


def score_line(name: str, task: str, entry: Mapping[str, Any]) -> str:
    """Makes the line for the terminal that gives a task's score and margin.

    An example: "brain vqa       exact_match  0.912  +0.401 over majority_per_question".
    """
    value, margin = entry["corrected"][entry["primary"]]["value"], entry["margin"]
    over = f"{number(margin['value'], '+')} over {margin['baseline']}" if margin else "no blind baseline"
    return f"{name} {task:9s} {entry['primary']:12s} {number(value)}  {over}"


def routing_line(routing: Mapping) -> str:
    """Says how far apart the tasks route.

    It gives the measure as trained, at step 0, and without the router's task half.
    """
    parts = [
        f"{name} {with_interval(routing[key])}"
        for key, name in (("tv_trained", "trained"), ("tv_step0", "at step 0"))
        if routing.get(key)
    ]
    if routing.get("tv_token_router") is not None:
        parts.append(f"router that reads only tokens {routing['tv_token_router']:.3f}")
    return "Mean total variation between tasks: " + "; ".join(parts)


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def rows_of(metrics: Mapping[str, Any], split: str) -> Rows:
    """Lists (set, task, scores) of one split, and the pooled scores if there are several sets."""
    rows = [
        (name, task, entry)
        for name, splits in metrics["sets"].items()
        for task, entry in splits.get(split, {}).items()
    ]
    if len({name for name, *_ in rows}) > 1:
        pooled = metrics["pooled"].get(split, {}).items()
        rows += [(POOLED, task, entry) for task, entry in pooled if "primary" in entry]
    return rows


class Table(NamedTuple):
    """Names the columns of a table after set and task, and yields a row's lines of cells."""

    head: tuple[str, ...]
    cells: Callable[[Mapping], Iterator[Sequence[Any]]]

    def lines(self, rows: Rows) -> list[list[Any]]:
        """Lists the lines of all rows, each with its set and task in front."""
        return [[name, task, *line] for name, task, entry in rows for line in self.cells(entry)]

    def markdown(self, rows: Rows) -> str:
        return markdown_table(("set", "task", *self.head), self.lines(rows))


def _corrected(entry: Mapping) -> Iterator[Sequence[Any]]:
    margin, primary = entry["margin"], entry["primary"]
    best = (
        f"{number(entry['blind'][margin['baseline']][primary])} ({margin['baseline']})"
        if margin
        else "-"
    )
    value = with_interval(entry["corrected"].get(primary))
    yield entry["n"], primary, value, best, with_interval(margin, "+"), verdict(margin)


def _published(entry: Mapping) -> Iterator[Sequence[Any]]:
    listed = ", ".join(f"{name} {number(value)}" for name, value in entry["published"].items())
    yield entry["n"], listed or "no published rule"


def _baselines(entry: Mapping) -> Iterator[Sequence[Any]]:
    for kind, word in (("blind", "blind"), ("peers", "peer")):
        for name, values in entry[kind].items():
            yield name, word, entry["primary"], number(values[entry["primary"]])


def _peers(entry: Mapping) -> Iterator[Sequence[Any]]:
    margin, primary = entry["peer_margin"], entry["primary"]
    if not margin:
        return
    wins = {"above blind": "the model", "below blind": margin["baseline"]}.get(
        verdict(margin), "undecided"
    )
    best = f"{number(entry['peers'][margin['baseline']][primary])} ({margin['baseline']})"
    yield number(entry["corrected"][primary]["value"]), best, with_interval(margin, "+"), wins


def _templates(entry: Mapping) -> Iterator[Sequence[Any]]:
    for template, part in entry["templates"].items():
        margin = part["margin"]
        best = f"{number(part['blind'][margin['baseline']])} ({margin['baseline']})" if margin else "-"
        yield template, part["n"], with_interval(part), best, with_interval(margin, "+"), verdict(margin)


def _further(entry: Mapping) -> Iterator[Sequence[Any]]:
    for name, value in entry["corrected"].items():
        if name != entry["primary"]:
            yield name, value.get("why") or with_interval(value)


def _choices(entry: Mapping) -> Iterator[Sequence[Any]]:
    """Yields the scores of labels: of all questions and, where there are several groups, of each."""
    if "likelihood" not in entry:
        return
    whole = entry["likelihood"]
    for group, part in {"all": whole, **whole["groups"]}.items():
        for kind, word in (
            ("sum", "likelihood"),
            ("per_token", "likelihood per token"),
            ("generated", "generated answer"),
        ):
            scores = part[kind]
            values = [scores[name]["value"] if name in scores else None for name in _CHOICE_SCORES[1:]]
            yield group, part["n"], word, with_interval(scores["accuracy"]), *map(number, values)


def _gains(entry: Mapping) -> Iterator[Sequence[Any]]:
    if "likelihood" in entry:
        found = entry["likelihood"]
        margin = found["gain"]
        low, high = margin["ci95"] or (0.0, 0.0)
        better = "likelihood" if low > 0 else "generated answer" if high < 0 else "undecided"
        yield with_interval(margin, "+"), better, found["left_out"]


def _protocols(entry: Mapping) -> Iterator[Sequence[Any]]:
    for name, protocol in entry["protocols"].items():
        yield name, f"`{protocol}`"


_CHOICE_SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "ece")
_VERDICT = ("best blind", "margin [95 %]", "verdict")

CORRECTED = Table(("n", "primary metric", "value [95 % interval]", *_VERDICT), _corrected)
PUBLISHED = Table(("n", "scores by the published rules"), _published)
BASELINES = Table(("baseline", "kind", "metric", "value"), _baselines)
PEERS = Table(("model", "best peer", "model - peer [95 %]", "ahead"), _peers)
TEMPLATES = Table(("template", "n", "value [95 %]", *_VERDICT), _templates)
FURTHER = Table(("metric", "value [95 %]"), _further)
CHOICES = Table(
    ("questions", "n", "answer chosen by", "accuracy [95 %]")
    + ("balanced accuracy", "macro-F1", "AUC", "ECE"),
    _choices,
)
GAINS = Table(
    ("accuracy: likelihood - generated [95 %]", "ahead", "questions without known labels"), _gains
)
PROTOCOLS = Table(("score", "protocol"), _protocols)


# ---------------------------------------------------------------------------------------------
# What the tables mean
# ---------------------------------------------------------------------------------------------

MEDICAL = "Research software, not a medical device: not for diagnosis or treatment."
ABOUT_BASELINES = (
    "A blind baseline never looks at the image. A peer reads all that the model reads (qa, "
    "whose text is all)."
)
ABOUT_PROTOCOLS = (
    "Scores whose ids are equal can be compared, others cannot. The ids of "
    "`published` and `likelihood` are completed by the name of the score."
)
ABOUT_CHOICES = (
    "Of questions whose possible answers are known, the answer with the highest log-likelihood, its "
    "sum over the tokens or its mean per token, beside the one that the generated answer names; a "
    "generated answer that names none, or several, is wrong. AUC: each class against the others of "
    f"its group, averaged. ECE: expected calibration error in {BINS} bins of equal width; chance "
    "alone makes it positive, the more the fewer questions there are."
)


def about_margin(resamples: int) -> str:
    """Says what a margin is and when a model is above blind."""
    return (
        "The margin is the model minus the best blind baseline, a paired bootstrap over clusters "
        f"of test items ({resamples} resamples); *above blind* means that its lower end is above 0. "
        "From few clusters an interval of 95 % is too narrow: it holds the true mean of normally "
        "distributed differences in 50 % of cases with 2 clusters, 73 % with 3, 85 % with 5, 90 % with "
        "10, 93 % with 40."
    )


def about_published(config: Config) -> str:
    """Says by whose rules the published scores are."""
    of_vqa = form_of(config.text).published
    system = "Uni-Med's" + (f" (vqa: {of_vqa}'s)" if of_vqa != "Uni-Med" else "")
    return f"By the rules of {system} evaluation, flaws included, to compare with the papers."


# ---------------------------------------------------------------------------------------------
# report.md
# ---------------------------------------------------------------------------------------------


def markdown(
    again: str, config: Config, metrics: Mapping[str, Any], pictures: Sequence[str], note: str
) -> str:
    """Writes the text of report.md.

    again: the argument of `evaluate` that makes the same scores.
    """
    leading = metrics["split"]
    rows = rows_of(metrics, leading)
    parts = [
        f"# {metrics['name'] or 'Run'}: evaluation",
        *data_notes(metrics),
        MEDICAL,
        *_leading(config, rows, leading),
        *_notes(metrics, rows),
        f"## Baselines on {leading}\n\n{BASELINES.markdown(rows)}\n\n{ABOUT_BASELINES}",
        *_peer_section(rows),
        f"## By question template on {leading}\n\n{TEMPLATES.markdown(rows)}",
        *_further_section(rows, leading),
        *_choice_section(rows, leading),
        *_other_splits(metrics),
        f"## Protocols\n\n{ABOUT_PROTOCOLS}\n\n{PROTOCOLS.markdown(rows)}",
    ]
    if metrics.get("routing"):
        parts.append(f"## Routing\n\n{routing_line(metrics['routing'])}.")
    if pictures:
        parts.append("## Pictures\n\n" + "\n\n".join(f"![{name[:-4]}]({name})" for name in pictures))
    if note:
        parts.append(note)
    return "\n\n".join([*parts, _made(again, metrics)]) + "\n"


def data_notes(metrics: Mapping[str, Any]) -> list[str]:
    """Lists each set's own caveat and licence, from its passport."""
    return [
        f"Data `{name}`: "
        f"{' '.join(part for part in (entry['note'], _sentence(entry['licence'])) if part)}"
        for name, entry in metrics.get("data", {}).items()
        if entry.get("note") or entry.get("licence")
    ]


def _sentence(licence: str) -> str:
    return (
        f"Licence: {licence}."
        if licence and "not stated" not in licence
        else licence and f"{licence}.".capitalize()
    )


def _leading(config: Config, rows: Rows, split: str) -> list[str]:
    """Writes corrected and published scores, in the order of config.evaluate.scoring."""
    corrected = (
        f"## Corrected scores on {split}\n\n"
        f"{CORRECTED.markdown(rows)}\n\n{about_margin(config.evaluate.bootstrap)}"
    )
    published = (
        f"## Scores as published on {split}\n\n{PUBLISHED.markdown(rows)}\n\n{about_published(config)}"
    )
    return [published, corrected] if config.evaluate.scoring == "published" else [corrected, published]


def _notes(metrics: Mapping[str, Any], rows: Rows) -> list[str]:
    lines = [f"- {text}." for text in metrics["notes"]]
    lines += [f"- {name}, {task}: {text}." for name, task, entry in rows for text in entry["notes"]]
    return ["Notes:\n\n" + "\n".join(lines)] if lines else []


def _peer_section(rows: Rows) -> list[str]:
    if not any(entry["peer_margin"] for *_, entry in rows):
        return []
    return [f"## Next to learned baselines that read the same text\n\n{PEERS.markdown(rows)}"]


def _further_section(rows: Rows, split: str) -> list[str]:
    if not any(len(entry["corrected"]) > 1 for *_, entry in rows):
        return []
    return [f"## Further corrected scores on {split}\n\n{FURTHER.markdown(rows)}"]


def _choice_section(rows: Rows, split: str) -> list[str]:
    if not any("likelihood" in entry for *_, entry in rows):
        return []
    return [
        f"## Classes and choices on {split}\n\n{CHOICES.markdown(rows)}\n\n"
        f"{GAINS.markdown(rows)}\n\n{ABOUT_CHOICES}"
    ]


def _other_splits(metrics: Mapping[str, Any]) -> list[str]:
    others = [split for split in metrics["pooled"] if split != metrics["split"]]
    return [f"## Split {split}\n\n{CORRECTED.markdown(rows_of(metrics, split))}" for split in others]


def _made(again: str, metrics: Mapping[str, Any]) -> str:
    made = [
        f"{key} `{metrics[key]}`"
        for key in ("config_hash", "data_checksum", "code_version", "fidelity", "seed")
    ]
    return (
        f"## How this was made\n\n{', '.join(made)}.\n\n"
        "The full scores are in `metrics.json`, each answer in `predictions.jsonl`. To score again:\n\n"
        f"```\npython -m unimed_jax.main evaluate {again}\n```"
    )
