"""Trains a chain of runs, each from the weights of those before it, and tabulates their scores.

Stage `runs/<name>` of a chain in `<workdir>` lives in `<workdir>/<last part of name>`, wherever its
config is named in another one's `init`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_collections

from unimed_jax import files, processes
from unimed_jax.analyze.chain_experts import LOAD, load_table, write_load
from unimed_jax.analyze.cost import measured
from unimed_jax.analyze.run_report.page import write_page
from unimed_jax.config import Config
from unimed_jax.config_file import load_config_file
from unimed_jax.errors import UserError
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.evaluate.run import evaluate_run
from unimed_jax.interruption import claim
from unimed_jax.parsing import read_json
from unimed_jax.paths import check_run_folder
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.folder import missing_inputs, write_config
from unimed_jax.settings import from_config_dict
from unimed_jax.train import router
from unimed_jax.train.loop import train
from unimed_jax.verdicts import with_interval

FAILED = "failed.json"  # in a run's folder: why the last try of a sweep to train it ended
Read = Callable[[ml_collections.ConfigDict], Config]
# Heading of the table, task, where metrics.json has the score.
SCORES = (
    ("open: recall, %, published", "vqa", ("published", "open_recall")),
    ("open: recall", "vqa", ("corrected", "open_recall")),
    ("closed: accuracy, %, published", "vqa", ("published", "closed_accuracy")),
    ("closed: accuracy", "vqa", ("corrected", "closed_accuracy")),
    ("classification: accuracy", "cls", ("corrected", "exact_match")),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    config: Config  # `init` leads into the chain's folder
    folder: Path


def read_stages(
    settings: ml_collections.ConfigDict, folder: Path, read: Read = from_config_dict
) -> list[Stage]:
    """Reads the stages in their order, in the folder of the chain.

    `read` makes a stage's config of what its file holds. Raises UserError for what a stage lacks, and
    if a stage's folder holds other settings, so that no chain begins that could not end.
    """
    unknown = sorted(set(settings.keys()) - {"name", "stages"})
    if unknown or not settings.stages:
        raise UserError(
            f"a config with stages has a name and at least one stage, and no {unknown or 'empty list'}."
        )
    stages = linked([_stage_config(file, read) for file in settings.stages], folder)
    for i, stage in enumerate(stages):
        made = [earlier.folder for earlier in stages[:i]]
        refuse_missing(stage.config, made)
        check_run_folder(stage.folder, "--workdir")
        if (stage.folder / "config.json").exists():
            write_config(stage.folder, stage.config)  # refuses other settings
        later = next((s for s in stages[i + 1 :] if (s.folder / "config.json").exists()), None)
        if later and not trained(stage):
            raise UserError(
                f"{later.folder} started from another {stage.folder} than will be trained now; "
                "remove it."
            )
    return stages


def refuse_missing(config: Config, made: Sequence[Path]) -> None:
    """Raises UserError for what a run lacks to start, besides the runs that are `made` before it."""
    given = tuple(
        (kind, path) for kind, path in config.init if not any(map(Path(path).is_relative_to, made))
    )
    if lacks := missing_inputs(dataclasses.replace(config, init=given)):
        raise UserError(lacks)


def _stage_config(file: str, read: Read) -> Config:
    """Reads one stage's config file; raises UserError for a chain."""
    settings = load_config_file(file)
    if "stages" in settings:
        raise UserError(
            f"stage {file} is a chain itself; name its stages ({', '.join(settings.stages)}) instead."
        )
    return read(settings)


def linked(configs: Sequence[Config], folder: Path) -> list[Stage]:
    """Makes configs the stages of one chain in `folder`, so that `init` leads to earlier stages.

    Raises UserError if two of them have the same name.
    """
    stages: list[Stage] = []
    moved: dict[Path, Path] = {}  # folder of a stage that is run by itself -> its folder in the chain
    for config in configs:
        name = Path(config.name).name
        if any(stage.name == name for stage in stages):
            raise UserError(f"two stages are called {name!r}; give each config another name.")
        init = moved_init(config, moved)
        stages.append(Stage(name, dataclasses.replace(config, init=init), folder / name))
        moved[Path("runs") / config.name] = folder / name
    return stages


def moved_init(config: Config, folders: Mapping[Path, Path]) -> tuple[tuple[str, str], ...]:
    """Returns `init` with other folders in place of those that are named: old -> new."""
    return tuple((kind, _moved(path, folders)) for kind, path in config.init)


def _moved(path: str, folders: Mapping[Path, Path]) -> str:
    for old, new in folders.items():
        if path and Path(path).is_relative_to(old):
            return str(new / Path(path).relative_to(old))
    return path


def _result(stage: Stage) -> dict | None:
    """Reads the scores that the stage ended with, and returns None if it has not ended."""
    try:
        name = "router.json" if stage.config.job == "router" else "metrics.json"
        return read_json(stage.folder / name)
    except UserError:  # absent, or cut off by a kill
        return None


def trained(stage: Stage) -> bool:
    if stage.config.job == "router":
        return _result(stage) is not None
    if not (stage.folder / "checkpoints").is_dir():
        return False
    checkpoints = Checkpoints(stage.folder / "checkpoints", read_only=True)
    latest, note = checkpoints.latest(), checkpoints.newest_note()
    checkpoints.close()
    return latest == stage.config.train.steps or bool(note) and note["progress"]["finished"]


def finished(stage: Stage) -> bool:
    """Says whether the stage is trained, and scored if it is to be."""
    return trained(stage) and (not stage.config.evaluates or _result(stage) is not None)


def run_chain(settings: ml_collections.ConfigDict, folder: Path, read: Read = from_config_dict) -> None:
    """Trains and scores all unfinished stages; the same command continues a chain."""
    stages, table = read_stages(settings, folder, read), ""
    for i, stage in enumerate(stages):
        done = finished(stage)
        processes.say(
            f"stage {i + 1} of {len(stages)}, {stage.name}: {'finished' if done else stage.folder}"
        )
        if not done:
            train_and_evaluate(stage.config, stage.folder)
        write_expert_load(stage, stages[:i])
        if processes.leads():
            table = write_table(folder, stages[: i + 1])
    if table:
        processes.say(f"{table}\nwrote {folder / 'stages.md'}")


def write_expert_load(stage: Stage, earlier: Sequence[Stage]) -> None:
    """Writes which experts a stage's tokens go to, if a stage before it fitted its router."""
    router = next((s for s in reversed(earlier) if s.config.job == "router"), None)
    if router is None or not stage.config.model.moe.experts or (stage.folder / LOAD).is_file():
        return
    load = write_load(stage.folder, router.folder)
    processes.say(f"{load_table(load)}\nwrote {stage.folder / LOAD}")


def train_and_evaluate(config: Config, folder: Path) -> None:
    """Trains one run in `folder`, from where it was left, and writes its scores there."""
    if processes.leads():
        (folder / FAILED).unlink(missing_ok=True)
    if config.job == "router":
        with measured(folder):
            report = router.train_router(config, folder)
        processes.say(f"{router.summary(report)}\nwrote {folder / router.REPORT}")
        return
    claim(folder)  # from here to the end of the evaluation, which writes there, too
    with measured(folder):
        run = train(config, folder)
        with run.inside():
            evaluate_run(run, config)
    write_page(folder, config)


def write_table(folder: Path, stages: Sequence[Stage]) -> str:
    """Writes the stages' scores so far to stages.json and stages.md, and returns the table.

    Raises UserError if they were scored on different data.
    """
    rows, kept, checksums = [], {}, {}
    for stage in stages:
        result = _result(stage)
        if result is None or stage.config.job == "router":
            continue
        checksums[stage.name] = result["data_checksum"]
        found = {heading: _score(result, task, where) for heading, task, where in SCORES}
        blind = {
            heading: _blind(result, task, where[1])
            for heading, task, where in SCORES
            if where[0] == "corrected"
        }
        kept[stage.name] = {
            "folder": str(stage.folder),
            "steps": stage.config.train.steps,
            "config_hash": result["config_hash"],
            "n": {task: _entry(result, task).get("n", 0) for task in ("vqa", "cls")},
            "scores": found,
            "blind": blind,
        }
        rows.append([stage.name, str(stage.config.train.steps), *map(_shown, found.values())])
    if len(set(checksums.values())) > 1:
        raise UserError(
            f"the stages were scored on different data ({checksums}); evaluate them on the same."
        )
    if not rows:
        return ""
    best = kept[next(reversed(kept))]["blind"]
    rows.append(
        ["best blind, with the last", "", *(_shown(best.get(heading)) for heading, *_ in SCORES)]
    )
    table = markdown_table(["stage", "steps", *(heading for heading, *_ in SCORES)], rows)
    n = kept[next(reversed(kept))]["n"]
    text = (
        f"# Stages on one held-out set\n\n{table}\n\nTest split: {n['vqa']} questions, {n['cls']} "
        "classifications; 95 % intervals over source images and slabs. Research software, not a "
        "medical device.\n"
    )
    with files.written_together(folder, ("stages.md", "stages.json")) as unfinished:
        files.write_text(unfinished / "stages.md", text)
        files.write_json(unfinished / "stages.json", {"stages": kept})
    return table


def _entry(result: Mapping, task: str) -> Mapping:
    """Returns a task's scores over all sets on the leading split, or {} if it was not scored."""
    return result["pooled"].get(result["split"], {}).get(task, {})


def _score(result: Mapping, task: str, where: tuple[str, str]) -> Mapping | float | None:
    return _entry(result, task).get(where[0], {}).get(where[1])


def _blind(result: Mapping, task: str, metric: str) -> float | None:
    """Returns the best of the baselines that do not see the example's image."""
    baselines = _entry(result, task).get("blind", {}).values()
    return max((scores[metric] for scores in baselines if metric in scores), default=None)


def _shown(score: Mapping | float | None) -> str:
    return (
        with_interval(score) if isinstance(score, Mapping) else "-" if score is None else f"{score:.4g}"
    )
