"""Turns the settings of a sweep into its runs: variants by seeds, each an ordinary run.

A run lives in <workdir>/<variant>/seed<N>, a stage that variants share in <workdir>/<stage>/seed<N>.
"""

import copy
import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from unimed_jax.analyze.chain import Stage, finished, moved_init, refuse_missing, trained
from unimed_jax.config import Config
from unimed_jax.config_file import load_config_file
from unimed_jax.config_sweep import SweepConfig
from unimed_jax.effects import REFUSED, SAID, refuse_without_effect
from unimed_jax.errors import UserError, nearest
from unimed_jax.evaluate.metrics import of_task
from unimed_jax.paths import check_run_folder
from unimed_jax.runs.folder import read_config, write_config
from unimed_jax.settings import FIDELITY

# Lays words of the command line, --config.key=value, over settings.
Read = Callable[[ml_collections.ConfigDict, Sequence[str]], Config]


@dataclasses.dataclass(frozen=True)
class SweepRun(Stage):
    """Describes one run of a sweep; its name is that of its variant or stage."""

    seed: int
    is_stage: bool
    command: str  # that trains it by hand

    @property
    def title(self) -> str:
        return f"{self.name}/seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds what is to be trained and compared, as far as it was asked for."""

    sweep: SweepConfig
    folder: Path
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[SweepRun, ...]  # seed by seed, stages before the variants that start from them

    def of(self, variant: str) -> list[SweepRun]:
        """Returns the runs of a variant or stage, one a seed."""
        return [run for run in self.runs if run.name == variant]

    def stages_of(self, run: SweepRun) -> list[SweepRun]:
        """Returns the stages from whose folders a run starts."""
        paths = [Path(path) for _, path in run.config.init if path]
        return [s for s in self.runs if s.is_stage and any(p.is_relative_to(s.folder) for p in paths)]


def planned(
    sweep: SweepConfig,
    folder: Path,
    read: Read,
    words: Sequence[str] = (),
    variants: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Plan:
    """Plans the runs of some variants and seeds; () means all.

    words: laid over the settings of every run. Raises UserError for whatever does not go together.
    """
    _check_names(sweep, variants)
    seeds = tuple(seeds or sweep.seeds)
    chosen = tuple(name for name in sweep.variants if not variants or name in variants)
    if len(chosen) < 2:
        raise UserError(
            f"sweep {sweep.name!r} compares variants with its baseline, and {chosen[0]!r} is alone; add "
            f"another one{' to --variants' if variants else ''}."
        )
    base = load_config_file(sweep.base)
    stages = {name: load_config_file(file) for name, file in sweep.stages.items()}
    for name, settings in {sweep.base: base, **stages}.items():
        if "stages" in settings:
            raise UserError(f"{name} of sweep {sweep.name!r} is a chain; name its stages one by one.")
    runs: list[SweepRun] = []
    for seed in seeds:
        made: dict[Path, Path] = {}  # folder of a stage that is run by itself -> its folder here
        for name, settings in stages.items():
            given = [*words, f"--config.seed={seed}"]
            run = _run(name, seed, sweep.stages[name], settings, given, made, folder, read)
            runs.append(dataclasses.replace(run, is_stage=True))
            made[Path("runs") / run.config.name] = run.folder
        for name in chosen:
            changes = {**sweep.settings, **sweep.variants[name]}
            given = [*(f"--config.{key}={_word(value)}" for key, value in changes.items()), *words]
            given.append(f"--config.seed={seed}")
            try:
                run = _run(name, seed, sweep.base, base, given, made, folder, read)
                _check_variant(run.config, sweep.variants[name])
            except UserError as error:
                raise UserError(f"variant {name!r} of sweep {sweep.name!r}: {error}") from error
            runs.append(run)
    plan = Plan(sweep, folder, chosen, seeds, tuple(runs))
    _check_different(plan)
    return plan


def _check_names(sweep: SweepConfig, variants: Sequence[str]) -> None:
    where = f"sweep {sweep.name!r}"
    known = ", ".join(sweep.variants)
    if sweep.baseline not in sweep.variants:
        raise UserError(
            f"{where}: the baseline {sweep.baseline!r} is not among the variants"
            f"{nearest(sweep.baseline, sweep.variants)} Choose from {known}."
        )
    for name in variants:
        if name not in sweep.variants:
            raise UserError(
                f"{name!r} is not a variant of {where}{nearest(name, sweep.variants)} Choose from "
                f"{known}."
            )
    if variants and sweep.baseline not in variants:
        raise UserError(
            f"the baseline {sweep.baseline!r} of {where} is not among --variants={','.join(variants)}; "
            "add it, or choose another one by --baseline."
        )
    if doubled := sorted({*sweep.stages} & {*sweep.variants}):
        raise UserError(
            f"{where}: a stage and a variant are both called {doubled[0]!r}; give one another name."
        )
    for task, names in sweep.scores.items():
        of_task(task, names, f"scores of {where}")  # refuses what is no metric, or not of this task
    for name, changes in sweep.variants.items():
        for key in {**sweep.settings, **changes}:
            if key in ("seed", "name"):
                raise UserError(
                    f"variant {name!r} of {where} sets config.{key}, which the sweep sets itself; leave "
                    "it out."
                )


def _run(
    name: str,
    seed: int,
    file: str,
    settings: ml_collections.ConfigDict,
    words: Sequence[str],
    made: Mapping[Path, Path],
    folder: Path,
    read: Read,
) -> SweepRun:
    """Describes one run, whose `init` leads to the stages that are `made` before it."""
    config, own = read(copy.deepcopy(settings), words), folder / name / f"seed{seed}"
    init = moved_init(config, made)
    if init != config.init:
        config = dataclasses.replace(config, init=init)
        words = [
            *(word for word in words if not word.startswith("--config.init=")),
            f"--config.init={init!r}",
        ]
    parts = ["python", "-m", "unimed_jax.main", f"--config={file}", *words, f"--workdir={own}"]
    return SweepRun(name, config, own, seed, False, " ".join(map(_quoted, parts)))


def _quoted(word: str) -> str:
    """Quotes an argument for a shell where it must be, in the way that reads best."""
    plain = shlex.quote(word)
    return f'"{word}"' if plain != word and not set(word) & set('"$`\\!') else plain


def _word(value: Any) -> str:
    """Writes a value as an argument of the command line."""
    return value if isinstance(value, str) else repr(_plain(value))


def _plain(value: Any) -> Any:
    """Returns a setting without frozen dicts, as a person would write it."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _check_variant(config: Config, changes: Mapping[str, Any]) -> None:
    """Raises UserError for a change that nothing reads, and for a run without scores."""
    if config.job != "model" or not config.evaluates:
        what = "trains a router alone" if config.job != "model" else "scores nothing (config.evaluate)"
        raise UserError(f"it {what}, so there is nothing to compare.")
    refuse_without_effect(config, FIDELITY[config.fidelity], changes, REFUSED + SAID)


def _check_different(plan: Plan) -> None:
    """Raises UserError for two variants with the same settings."""
    seen: dict[Config, str] = {}
    for run in plan.runs:
        if run.is_stage or run.seed != plan.seeds[0]:
            continue
        if run.config in seen:
            raise UserError(
                f"variants {seen[run.config]!r} and {run.name!r} of sweep {plan.sweep.name!r} have the "
                "same settings; leave one of them out."
            )
        seen[run.config] = run.name


def check_folders(plan: Plan, trains: bool = True) -> None:
    """Raises UserError for what a run lacks to start, and for a folder that holds other settings.

    So no sweep begins that could not end. A finished run lacks nothing, and no run does where none is
    trained: their folders may have come from machines that had their data.
    """
    made = [run.folder for run in plan.runs if run.is_stage]
    for run in plan.runs:
        if trains and not finished(run):
            refuse_missing(run.config, made)
        check_run_folder(run.folder, "--workdir")
        if not (run.folder / "config.json").exists():
            continue
        if not _moved_here(run, plan.folder):
            write_config(run.folder, run.config)  # refuses other settings
        if trains and (lost := [stage for stage in plan.stages_of(run) if not trained(stage)]):
            raise UserError(
                f"{run.folder} started from another {lost[0].folder} than will be trained now; remove "
                "it."
            )


def _moved_here(run: SweepRun, folder: Path) -> bool:
    """Says whether a finished run differs only in where folders were when it was trained.

    That is the sweep's own, and those of the data, whose checksums its scores hold.
    """
    there, data = read_config(run.folder), run.config.data
    init = tuple(
        (kind, ours if _ends_alike(ours, theirs, folder) else theirs)
        for (kind, ours), (_, theirs) in zip(run.config.init, there.init, strict=False)
    )
    places = dataclasses.replace(there.data, root=data.root, cache=data.cache)
    same = dataclasses.replace(there, init=init, mesh=run.config.mesh, data=places) == run.config
    return same and len(there.init) == len(init) and finished(run)


def _ends_alike(ours: str, theirs: str, folder: Path) -> bool:
    """Says whether two paths lead to the same place within two folders, the first of which is given."""
    if not ours or not Path(ours).is_relative_to(folder):
        return False
    inside = Path(ours).relative_to(folder).parts
    return Path(theirs).parts[-len(inside) :] == inside


def of_shard(plan: Plan, shard: str) -> tuple[SweepRun, ...]:
    """Returns the runs of one part of several: "2/3" is the second of three.

    Runs are dealt out in turn; where variants share stages, seeds are. Raises UserError for a part
    that does not exist.
    """
    found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", shard)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UserError(
            f"--shard={shard}: write which part of how many: 1/3, 2/3 and 3/3 for three machines."
        )
    units: Sequence[Any] = plan.seeds if plan.sweep.stages else plan.runs
    if count > len(units):
        what = "seeds, by which a sweep with stages is divided" if plan.sweep.stages else "runs"
        raise UserError(f"--shard={shard}: there are {len(units)} {what}; divide them into fewer parts.")
    mine = units[number - 1 :: count]
    return tuple(run for run in plan.runs if (run.seed if plan.sweep.stages else run) in mine)
