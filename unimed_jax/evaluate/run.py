"""Evaluates a run, or predictions that another tool made: answers, scores, routing and the report.

Processes share the work: they generate every batch together over the mesh, then each scores its
part of the units, and process 0 collects the scores and writes.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from unimed_jax import files, processes
from unimed_jax.bounds import FrozenDict
from unimed_jax.config import Config, to_dict
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.evaluate import baselines, likelihood
from unimed_jax.evaluate.answers import Answered, Answerer, Journal, answer_units
from unimed_jax.evaluate.labels import Labels
from unimed_jax.evaluate.metrics import NotComputed, Record
from unimed_jax.evaluate.metrics.registry import LabelLikelihoods
from unimed_jax.evaluate.model_answers import model_answers, together
from unimed_jax.evaluate.protocol import protocols
from unimed_jax.evaluate.records import of_labels, records_of
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.report.markdown import score_line
from unimed_jax.evaluate.routing import routing_report
from unimed_jax.evaluate.scores import Scored, leading_split, score, summarise
from unimed_jax.evaluate.tasks import Source, Training, Unit, data_notes, open_sets, units_of
from unimed_jax.interruption import claim, claims_end
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.unimed import UniMed
from unimed_jax.parsing import json_lines, read_text
from unimed_jax.predict.likelihood import Likelihood
from unimed_jax.provenance import code_version, plain
from unimed_jax.runs import inputs
from unimed_jax.runs.checkpoint import fingerprints
from unimed_jax.runs.folder import read_config
from unimed_jax.runs.open import Run, initial_leaves

LARGEST_PREDICTIONS = 8 << 30  # bytes of a file of answers


@claims_end()
def evaluate_run(run: Run, config: Config, folder: Path | None = None) -> dict[str, Any]:
    """Answers and scores the units of `config.evaluate` and writes the report into `folder`.

    `folder` is the run's by default. `config` is the run's own, except for `config.evaluate` and
    `config.text.max_prompt`. This is to be called inside `run.inside()`, on all processes. Returns
    the content of metrics.json, and {} on processes other than 0 and if nothing is to be scored. A
    killed evaluation continues where it stopped. Raises UserError if another process trains the run
    or writes there.
    """
    folder = claim_results(folder or run.folder)
    if not config.evaluate.entries and not config.evaluate.splits:
        return {}
    sets = open_sets(config.held_out)
    units, notes = units_of(config, sets)
    notes += data_notes(units)
    training = Training(config, sets)
    notes += dict.fromkeys([*run.notes, *changed_inputs(run.folder, run.config, config, sets, training)])
    fingerprint = fingerprint_of(run, config, sets)
    journal = Journal(folder, fingerprint)
    answer_of = model_answers(run.model, config, run.tokenizer)
    measured = None
    if config.evaluate.likelihood:
        likelihoods = Journal(folder, fingerprint, likelihood.JOURNAL, Likelihood)
        measurer = likelihood.model_measurer(run.model, config, run.tokenizer)
        measured = functools.partial(likelihood.measure_units, measurer=measurer, journal=likelihoods)
    scored = answer_and_score(units, training, answer_of, journal, config, measured)
    routing = _routing(run, config, sets, scored)
    if not processes.leads():
        return {}
    notes += training.notes
    metrics = summarise(config, scored, _about(sets, units), notes, run.step, routing)
    write_report(folder, config, metrics, scored, _reader(sets), routing, f"--run={run.folder}")
    journal.remove()
    if measured is not None:
        likelihoods.remove()
    _say(metrics, folder)
    return metrics


def claim_results(folder: Path) -> Path:
    """Locks the folder of results against other processes, and removes what killed ones left.

    It is called on all processes. Raises UserError if a run trains there.
    """

    def lock() -> None:
        if processes.leads():
            claim(folder, "write the results elsewhere with --out=FOLDER")
            files.remove_leftovers(folder)

    _shared(lock)
    return folder


def changed_inputs(
    folder: Path, own: Config, config: Config, sets: Mapping[str, Source], training: Training
) -> list[str]:
    """Lists what the results of a run must say of data that changed since it was trained.

    own: the run's settings. Raises UserError where `config.data.changed` does not accept a change.
    """
    train = [source.data for source in training.sets.values()] if training.opened else []
    # Other held-out sets than the run's have no state to compare with.
    held_out = (
        [source.data for source in sets.values()]
        if config.held_out.sources == own.held_out.sources
        else []
    )
    return inputs.compare(folder, config, inputs.state_of_data(config, train, held_out))


def answer_and_score(
    units: Sequence[Unit],
    training: Training,
    answer_of: Answerer,
    journal: Journal,
    config: Config,
    measured: Callable[[Sequence[Unit], Mapping[str, Labels]], Mapping[str, Likelihood]] | None = None,
) -> list[Scored]:
    """Fits the baselines, answers what the journal lacks, and scores every unit.

    measured: gives the likelihoods of labels; None: they are not measured. It is called on all
    processes together.
    """
    # Baselines come before the long wait for answers, since wrong records show there.
    blind = _shared(lambda: _blind_answers(units, training))
    labels = likelihood.known_labels(units, training) if measured else {}
    count = together(config.model, units)
    found = answer_units(units, answer_of, config.seed, journal, together=count)
    known = (
        {name: of_labels(labels[name], one) for name, one in measured(units, labels).items()}
        if measured
        else {}
    )
    return _scored(units, found, blind, config, known)


def evaluate_predictions(
    config: Config, file: Path, folder: Path, run: Path | None = None
) -> dict[str, Any]:
    """Scores the predictions of any tool, which are read from a file of JSON lines.

    A line is {"id": "<set>/<split>/<id within the set>", "prediction": ...}. Missing answers count
    as empty ones; ids that are unknown or doubled (the first line counts) are counted and the first
    five named, in the report too. run: the folder of a run whose data must be as it was. Returns
    the content of metrics.json. Raises UserError for a file that cannot be read, if no id is known,
    and if a run is at work in `folder`.
    """
    sets = open_sets(config.held_out)
    units, notes = units_of(config, sets)
    given, doubled = read_predictions(file)
    wanted = {unit.id_of(example): example for unit in units for example in unit.examples}
    unknown = [name for name in given if name not in wanted]
    missing = [name for name in wanted if name not in given]
    if len(missing) == len(wanted):
        raise UserError(
            f"{file}: none of its {len(given)} ids is among those asked, such as "
            f"{next(iter(wanted))!r}; ids are <set>/<split>/<id within the set> (see `data "
            "export`)."
        )
    claim_results(folder)  # not before: what cannot be scored leaves no folder behind
    for what, names in (
        ("unknown", unknown),
        ("missing, counted as wrong", missing),
        ("doubled", doubled),
    ):
        if names:
            notes.append(f"{file.name}: {len(names)} ids {what}: {', '.join(names[:5])}")
    notes += data_notes(units)
    training = Training(config, sets)
    notes += training.notes
    if run is not None:
        notes += changed_inputs(run, read_config(run), config, sets, training)
    blind = _shared(lambda: _blind_answers(units, training))
    found = {}
    for unit in units:
        for example in unit.examples:
            name = unit.id_of(example)
            size = None
            if unit.task == "refer":  # the other metrics need no image
                height, width = unit.source.data.image(example.images[0]).shape[:2]
                size = [width, height]
            found[name] = Answered(given.get(name, ""), size)
    scored = _scored(units, found, blind, config, external=True)
    metrics = summarise(config, scored, _about(sets, units), notes)
    metrics["predictions"] = {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "unknown": len(unknown),
        "missing": len(missing),
        "doubled": len(doubled),
    }
    if processes.leads():
        write_report(folder, config, metrics, scored, _reader(sets), None, f"--predictions={file}")
        _say(metrics, folder)
    return metrics


def quick_scores(
    model: UniMed, config: Config, tokenizer: Tokenizer, units: Sequence[Unit]
) -> dict[str, float]:
    """Scores units while training, without baselines, intervals or files.

    Returns "<metric>/<set>/<split>/<task>" -> value, the same on every process; NaN where a metric is
    not computed, which is said.
    """
    found = answered_records(model, config, tokenizer, units)
    values = {}
    for unit in units:
        for metric in unit.metrics:
            try:
                value = metric(found[unit.name]).value
            except NotComputed as missing:
                processes.say(f"{metric.name}/{unit.name} is {missing}")
                value = float("nan")
            values[f"{metric.name}/{unit.name}"] = value
    return values


def answered_records(
    model: UniMed,
    config: Config,
    tokenizer: Tokenizer,
    units: Sequence[Unit],
    journal: Journal | None = None,
) -> dict[str, list[Record]]:
    """Answers each example of the units once, and returns the records of each unit by its name.

    Nothing is asked about other images and no baseline is fitted. With a journal, answers are kept
    as they come, and progress is shown. It is called on all processes together.
    """
    answer_of = model_answers(model, config, tokenizer)
    count = together(config.model, units)
    found = answer_units(units, answer_of, config.seed, journal, permute=False, together=count)
    return {unit.name: records_of(unit, found, {}) for unit in units}


# ---------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------


def fingerprint_of(run: Run, config: Config, sets: Mapping[str, Source]) -> str:
    """Returns a text that names all that answers depend on.

    That is the settings (not devices), weights, data, tokenizer and code.
    """
    settings = {key: value for key, value in to_dict(config).items() if key != "mesh"}
    weights = jax.device_get(jax.tree.leaves(fingerprints(parameters(run.model))))
    checksums = {name: source.data.checksum for name, source in sets.items()}
    facts = [settings, [*map(int, weights)], checksums, run.tokenizer.fingerprint, code_version()]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_predictions(file: Path) -> tuple[dict[str, str], list[str]]:
    """Reads a file of predictions.

    Returns id -> prediction, and the ids that occur more than once.
    """
    found: dict[str, str] = {}
    doubled: dict[str, None] = {}
    text = read_text(file, "give a file of JSON lines as --predictions", LARGEST_PREDICTIONS)
    for number, entry in json_lines(text, str(file)):
        try:
            name, prediction = entry["id"], entry["prediction"]
            assert isinstance(name, str) and isinstance(prediction, str)
        except (KeyError, TypeError, AssertionError):
            raise UserError(
                f'{file}, line {number}: not {{"id": "...", "prediction": "..."}}; mend the line.'
            ) from None
        if name in found:
            doubled[name] = None
        found.setdefault(name, prediction)
    return found, list(doubled)


# ---------------------------------------------------------------------------------------------
# Scores, divided over processes
# ---------------------------------------------------------------------------------------------

Blind = dict[str, dict[str, dict[str, list[str]]]]  # unit -> "blind" | "peers" -> baseline -> answers


def _mine(units: Sequence[Unit]) -> list[Unit]:
    import jax

    return list(units[jax.process_index() :: jax.process_count()])


def _shared(work: Callable[[], Any]) -> Any:
    """Runs `work` on each process.

    A UserError of one process is raised on all, so that none waits for another.
    """
    result, said = None, ""
    try:
        result = work()
    except UserError as error:
        said = str(error)
    for sentence in processes.gathered(said):
        if sentence:
            raise UserError(sentence)
    return result


def _blind_answers(units: Sequence[Unit], training: Training) -> Blind:
    """Returns the baselines' answers to this process's units."""
    out: Blind = {}
    for unit in _mine(units):
        fitted = baselines.fit(unit.task, training.of(unit))
        parts = {"blind": fitted.blind, "peers": fitted.peers}
        out[unit.name] = {
            kind: {name: baseline(unit.examples) for name, baseline in some.items()}
            for kind, some in parts.items()
        }
    return out


def _scored(
    units: Sequence[Unit],
    found: Mapping[str, Answered],
    blind: Blind,
    config: Config,
    known: Mapping[str, LabelLikelihoods] = FrozenDict(),
    external: bool = False,
) -> list[Scored]:
    """Returns every unit's records and scores, in the order of the units, on all processes."""

    def work() -> dict[str, Any]:
        out = {}
        for unit in _mine(units):
            records = records_of(unit, found, blind[unit.name], known)
            given = [record["likelihood"] for record in records if "likelihood" in record]
            labels = [Labels(one["rule"], one["group"], tuple(one["labels"])) for one in given]
            ids = protocols(unit, config, labels, external)
            out[unit.name] = [records, plain(score(unit.task, records, config, unit.metrics, ids))]
        return out

    every: dict[str, Any] = {}
    for part in processes.gathered(_shared(work)):
        every |= part
    return [
        Scored(unit.source.id, unit.split, unit.task, unit.metrics, *every[unit.name]) for unit in units
    ]


# ---------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------


def _about(sets: Mapping[str, Source], units: Sequence[Unit]) -> dict[str, dict[str, str]]:
    """Returns checksum and passport of each set that was scored."""
    scored = {unit.source.id for unit in units}
    fields = ("licence", "citation", "note", "cluster_word")
    return {
        name: {"checksum": source.data.checksum}
        | {field: getattr(source.data.info, field) for field in fields}
        for name, source in sets.items()
        if name in scored
    }


def _reader(sets: Mapping[str, Source]) -> Callable:
    """Returns a function that reads the image (uint8 [H, W, 3]) of a set's id and a key."""
    return lambda name, key: sets[name].data.image(key)


def _routing(
    run: Run, config: Config, sets: Mapping[str, Source], scored: Sequence[Scored]
) -> dict | None:
    """Measures how the connector routes the images of the leading split.

    Returns None if there are no images or no experts.
    """
    leading = leading_split([part.split for part in scored])
    shown = {
        (part.set, key): f"{part.set}/{record['cluster']}"
        for part in scored
        if part.split == leading
        for record in part.records
        for key in record["images"]
    }
    if not shown or not config.model.connector.is_moe:
        return None
    first, _ = initial_leaves(config, run.tokenizer, run.mesh, ("vision/*", "connector/*"))
    initial = with_parameters(run.model, first)
    read = _reader(sets)
    return routing_report(
        run.model, initial, config, list(shown), lambda key: read(*key), list(shown.values())
    )


def _say(metrics: Mapping[str, Any], folder: Path) -> None:
    for name, splits in metrics["sets"].items():
        for task, entry in splits.get(metrics["split"], {}).items():
            processes.say(score_line(name, task, entry))
    for note in metrics["notes"]:
        processes.say(f"note: {note}")
    processes.say(f"wrote {folder / 'report.md'}")
