"""The tables and the text of report.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from unimed_jax.config import Config
from unimed_jax.data.forms import form_of


def verdict(margin: Mapping | None) -> str:
    """What a margin over the best blind baseline allows to say."""
    if margin is None or margin["ci95"] is None:
        return "no verdict"
    low, high = margin["ci95"]
    return "above blind" if low > 0 else "below blind" if high < 0 else "undecided"


def _number(value, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if isinstance(value, float) else "-" if value is None else str(value)


def with_interval(entry: Mapping | None, sign: str = "") -> str:
    if entry is None:
        return "-"
    ends = "no interval" if entry["ci95"] is None else ", ".join(_number(end, sign) for end in entry["ci95"])
    return f"{_number(entry['value'], sign)} [{ends}]"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines)


def routing_line(routing: Mapping) -> str:
    parts = [
        f"{name} {with_interval(routing[key])}"
        for key, name in (("tv_trained", "trained"), ("tv_step0", "at step 0"))
        if routing.get(key)
    ]
    if routing.get("tv_token_router") is not None:
        parts.append(f"router on tokens alone {routing['tv_token_router']:.3f}")
    return "Mean total variation between tasks: " + "; ".join(parts)


def _corrected_table(tasks: Mapping[str, Mapping]) -> str:
    rows = []
    for task, scores in tasks.items():
        margin, primary = scores["margin"], scores["primary"]
        best = f"{_number(scores['blind'][margin['baseline']][primary])} ({margin['baseline']})" if margin else "-"
        rows.append(
            [
                task,
                scores["n"],
                primary,
                with_interval(scores["corrected"].get(primary)),
                best,
                with_interval(margin, "+"),
                verdict(margin) if scores["n"] else "no example",
            ]
        )
    head = ("task", "n", "primary metric", "value [95 % interval]", "best blind", "margin [95 %]", "verdict")
    return markdown_table(head, rows)


def _published_table(tasks: Mapping[str, Mapping]) -> str:
    rows = []
    for task, scores in tasks.items():
        listed = ", ".join(f"{name} {_number(value)}" for name, value in scores["published"].items())
        rows.append([task, scores["n"], listed or ("no published rule" if task == "qa" else "-")])
    return markdown_table(("task", "n", "scores by the published rules"), rows)


def _templates_table(tasks: Mapping[str, Mapping]) -> str:
    rows = []
    for task, scores in tasks.items():
        for template, part in scores.get("per_template", {}).items():
            best = _number(max(part["blind"].values(), default=None))
            rows.append([task, template or "(none)", part["n"], with_interval(part), best])
    return markdown_table(("task", "template", "n", "value [95 %]", "best blind"), rows)


def markdown(folder: Path, config: Config, metrics: Mapping, pictures: Sequence[str], note: str) -> str:
    tasks, validation = metrics["tasks"], metrics["validation"]["tasks"]
    corrected = (
        "## Corrected scores on test\n\n"
        f"{_corrected_table(tasks)}\n\n"
        "The margin is the model minus the best blind baseline, a paired bootstrap over clusters of test items "
        f"({config.evaluate.bootstrap} resamples); *above blind* means that its lower end is above 0."
    )
    of_vqa = form_of(config.text).published
    system = "Uni-Med's" + (f" (vqa: {of_vqa}'s)" if of_vqa != "Uni-Med" else "")
    published = (
        "## Scores as published on test\n\n"
        f"{_published_table(tasks)}\n\n"
        f"By the rules of {system} evaluation, flaws included, to compare with the papers."
    )
    leading = [published, corrected] if config.evaluate.scoring == "published" else [corrected, published]
    blind = markdown_table(
        ("task", "baseline", "metric", "value"),
        [
            [task, name, scores["primary"], _number(values[scores["primary"]])]
            for task, scores in tasks.items()
            for name, values in scores["blind"].items()
        ],
    )
    notes = [f"- {task}: {text}." for task, scores in tasks.items() for text in scores["notes"]]
    data = (
        "The brain images are slices of ONE average brain (ICBM152), so these numbers hold across slices and jitter "
        "of that brain and say nothing about patients. "
        if any(source.name in ("brain", "domains") for source in config.data.sources)
        else ""
    )
    parts = [
        f"# {metrics['name'] or 'Run'}: evaluation",
        f"{data}Research software, not a medical device: not for diagnosis or treatment.",
        *leading,
        *(["Notes:\n\n" + "\n".join(notes)] if notes else []),
        f"## Blind baselines on test\n\n{blind}",
        f"## By question template on test\n\n{_templates_table(tasks)}",
        *([f"## Validation\n\n{_corrected_table(validation)}"] if validation else []),
    ]
    if metrics.get("routing"):
        parts.append(f"## Routing\n\n{routing_line(metrics['routing'])}.")
    if pictures:
        parts.append("## Pictures\n\n" + "\n\n".join(f"![{name[:-4]}]({name})" for name in pictures))
    if note:
        parts.append(note)
    made = [f"{key} `{metrics[key]}`" for key in ("config_hash", "data_checksum", "code_version", "fidelity", "seed")]
    parts.append(
        f"## How this was made\n\n{', '.join(made)}.\n\n"
        "The full scores are in `metrics.json`, each answer in `predictions.jsonl`. To score this run again:\n\n"
        f"```\npython -m unimed_jax.main evaluate --run={folder}\n```"
    )
    return "\n\n".join(parts) + "\n"
