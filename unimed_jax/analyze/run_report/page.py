"""Puts the sections together and writes the page."""

from collections.abc import Callable, Sequence
from pathlib import Path

from unimed_jax import files, processes
from unimed_jax.analyze.run_report import examples, provenance, scores, training
from unimed_jax.analyze.run_report.facts import Data, Facts, gather, names_of
from unimed_jax.analyze.run_report.markup import Markup, joined, tag
from unimed_jax.config import Config
from unimed_jax.errors import UserError
from unimed_jax.evaluate.report.markdown import MEDICAL, rows_of

NAME = "report.html"
MOST_RUNS = 8  # colours that an eye can distinguish
# Nothing is fetched, nothing runs: the page needs only its own styles and the pictures inside it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
# what reading one kind of value as another raises
_OTHER_FORM = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, StopIteration)
STYLE = Path(__file__).with_name("report.css")


def write(
    folders: Sequence[Path],
    out: Path | None = None,
    audit: Path | None = None,
    config: Config | None = None,
) -> Path:
    """Writes the page of one run, or of several side by side, and returns its path.

    out: the file (default: report.html in the folder of a single run, reports.html in the first of
    several); audit: a check.json to take in place of those of the runs; config: the settings of a
    folder that holds none. Raises UserError for a run that was not scored, and for damaged files.
    """
    signs = [chr(ord("A") + i) for i in range(len(folders))] if len(folders) > 1 else [""]
    named = zip(folders, names_of(folders), signs, strict=True)
    try:
        runs = [gather(folder, name, sign, audit, config) for folder, name, sign in named]
        splits = sorted({run.split for run in runs})
        if len(splits) > 1:
            raise UserError(
                f"the runs are scored on different splits ({', '.join(splits)}); score them on one."
            )
        text = page(runs, Data([run.config for run in runs if run.config is not None]))
    except _OTHER_FORM as error:
        raise UserError(
            f"{', '.join(map(str, folders))}: a file of the results has another form than "
            f"this version writes ({error!r}); score and analyse the run again."
        ) from error
    place = out or folders[0] / (NAME if len(folders) == 1 else "reports.html")
    files.write_text(place, text)
    return place


def page(runs: Sequence[Facts], data: Data) -> Markup:
    """Makes the whole page."""
    sections: list[tuple[str, str, Callable[[], Markup]]] = [
        ("summary", "Summary", lambda: _summary(runs)),
        ("scores", "Scores", lambda: scores.scores(runs)),
        ("reliance", "Does it need the image?", lambda: scores.reliance(runs)),
        ("pictures", "Examples", lambda: examples.pictures(runs, data)),
        ("curves", "Training", lambda: training.curves(runs)),
        ("routing", "Routing", lambda: training.routing(runs)),
        ("tug", "Tug-of-war", lambda: training.tug_of_war(runs)),
        ("data", "Data sheet", lambda: provenance.sheet(runs, data)),
        ("made", "How it was made", lambda: provenance.made(runs)),
    ]
    title = _title(runs)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        Markup(f"<style>{STYLE.read_text(encoding='utf-8')}</style>"),
    )
    links = [tag("a", words, href=f"#{name}") for name, words, _ in sections]
    body = tag(
        "body",
        tag("a", "Skip to the scores", href="#scores", class_="skip"),
        tag("p", MEDICAL, class_="banner", role="note"),
        tag("header", tag("h1", title), _runs(runs)),
        tag("nav", *links, aria_label="Sections"),
        tag(
            "main",
            *(
                tag("section", tag("h2", words), make(), id=name, aria_label=words)
                for name, words, make in sections
            ),
        ),
        tag("footer", MEDICAL),
    )
    return Markup(f"<!doctype html>\n{tag('html', head, body, lang='en')}\n")


def _title(runs: Sequence[Facts]) -> str:
    names = list(dict.fromkeys(run.metrics.get("name") or "Run" for run in runs))
    return f"{', '.join(names)}: evaluation" if len(runs) == 1 else f"{len(runs)} runs side by side"


def _runs(runs: Sequence[Facts]) -> Markup:
    """Names each run with what tells it apart."""
    lines = []
    for run in runs:
        metrics = run.metrics
        parts = [f"seed {metrics.get('seed')}", f"fidelity {metrics.get('fidelity')}"]
        if metrics.get("step") is not None:
            parts.insert(0, f"step {metrics['step']}")
        if run.config is not None:
            connector = run.config.model.connector
            parts.insert(
                0, connector.kind + (f", {connector.experts} experts" if connector.is_moe else "")
            )
        name = run.name if run.sign else str(metrics.get("name") or run.name)
        parts.append(f"split {run.split}")
        lines.append(tag("li", scores.signed(run), " ", tag("b", name), " ", " · ".join(parts)))
    return tag("ul", *lines, class_="runs")


def _summary(runs: Sequence[Facts]) -> Markup:
    notes = {
        name: entry["note"]
        for run in runs
        for name, entry in run.metrics["data"].items()
        if entry.get("note")
    }
    warned: dict[str, list[str]] = {}
    for run in runs:
        said = [*run.metrics.get("notes", ())]
        said += [
            f"{name}, {task}: {text}"
            for name, task, entry in rows_of(run.metrics, run.split)
            for text in entry.get("notes", ())
        ]
        for note in dict.fromkeys(said):
            warned.setdefault(note, []).append(run.sign)
    if len(runs) == 1:
        shown = joined((scores.tiles(runs[0]), scores.summary(runs[0])))
    else:
        shown = joined(
            tag("div", tag("h3", scores.signed(run), " ", run.name), scores.summary(run)) for run in runs
        )
    lines = [tag("li", f"{' '.join(signs)} {note}.".strip()) for note, signs in warned.items()]
    return joined(
        (
            shown,
            *(tag("p", tag("b", name), f": {note}", class_="note") for name, note in notes.items()),
            tag("details", tag("summary", f"{len(lines)} notes"), tag("ul", *lines)) if lines else "",
        )
    )


def check_runs(folders: Sequence[Path]) -> None:
    """Raises UserError for more runs than the page can tell apart, or one named twice."""
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs are too many for one page; give at most {MOST_RUNS}.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name each once.")


def write_page(folder: Path, config: Config | None = None) -> None:
    """Writes report.html beside the scores of an evaluation or after an analysis; says where it is.

    config: the settings of a folder that holds none. It is called on all processes; the leader writes,
    if there are scores. Whatever hinders it is said and raises nothing: the scores are there.
    """
    if not (processes.leads() and (folder / "metrics.json").is_file()):
        return
    try:
        processes.say(f"wrote {write([folder], config=config)}")
    except UserError as error:
        processes.say(f"{folder / NAME} was not written: {error}")
