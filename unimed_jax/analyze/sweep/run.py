"""Trains and scores the runs of a sweep in turn, and keeps going where one of them fails."""

import gc
import shutil
import traceback
from collections.abc import Sequence

from unimed_jax import files, processes
from unimed_jax.analyze import cost
from unimed_jax.analyze.chain import (
    FAILED,
    finished,
    train_and_evaluate,
    trained,
    write_expert_load,
)
from unimed_jax.analyze.sweep.plan import Plan, SweepRun
from unimed_jax.errors import UserError
from unimed_jax.interruption import claims_end, owner
from unimed_jax.parsing import read_json
from unimed_jax.runs.folder import missing_inputs, read_config, tokenizer_folder


def run_all(plan: Plan, runs: Sequence[SweepRun]) -> None:
    """Trains and scores those runs that are not finished, and tries again what failed after that.

    What fails is kept with its sentence (failed.json), and the others go on. A run that another
    process trains is left to that, and one whose stage is not trained yet to the next call.
    """
    left = [run for run in runs if not finished(run) or failure(run)]
    for i, run in enumerate(left):
        busy = owner(run.folder)
        lacks = next((stage.title for stage in plan.stages_of(run) if not trained(stage)), "")
        waits = f"{busy} trains it" if busy else f"left out, as {lacks} is not trained" if lacks else ""
        head = f"{run.title}, {i + 1} of {len(left)} that are left{_time_left(plan, left[i:])}"
        processes.say(f"{head}: {waits or run.command}")
        if not waits:
            _run_one(plan, run)


def _run_one(plan: Plan, run: SweepRun) -> None:
    import jax

    sentence = ""
    if processes.leads():
        (run.folder / FAILED).unlink(missing_ok=True)
    try:
        with claims_end():
            if not finished(run):
                if lacks := missing_inputs(run.config):
                    raise UserError(lacks)
                _share_tokenizer(plan, run)
                train_and_evaluate(run.config, run.folder)
            write_expert_load(run, [r for r in plan.runs if r.is_stage and r.seed == run.seed])
    except UserError as error:
        sentence = str(error)
    except Exception as error:  # such as memory that a variant lacks
        traceback.print_exc()
        words = " ".join(str(error).split())
        sentence = f"{type(error).__name__}: {words}"[:500]
    if sentence and (busy := owner(run.folder)):  # which began it at the same moment
        processes.say(f"{run.title}: {busy} trains it")
    elif sentence:
        processes.say(f"{run.title} failed: {sentence}")
        if processes.leads():
            files.write_json(run.folder / FAILED, {"sentence": sentence})
    # or the programs and weights of all runs would stay in memory
    jax.clear_caches()
    gc.collect()


def failure(run: SweepRun) -> str:
    """Returns the sentence with which a run failed; empty if it did not."""
    try:
        return str(read_json(run.folder / FAILED)["sentence"])
    except (UserError, KeyError, TypeError):
        return ""


def _share_tokenizer(plan: Plan, run: SweepRun) -> None:
    """Copies the tokenizer that another run of the sweep has trained on the same text."""
    own = run.folder / "tokenizer"
    if not processes.leads() or own.exists() or tokenizer_folder(run.folder, run.config) != own:
        return
    for other in plan.runs:
        there = other.folder / "tokenizer"
        if not finished(other) or not there.is_dir():
            continue
        theirs = read_config(other.folder)
        if (theirs.text, theirs.data.sources, theirs.data.root) == (
            run.config.text,
            run.config.data.sources,
            run.config.data.root,
        ):
            with files.new_folder(own) as unfinished:
                shutil.copytree(there, unfinished, dirs_exist_ok=True)
            return


def _time_left(plan: Plan, left: Sequence[SweepRun]) -> str:
    """Says how long the runs that are left take, as those of the same name or all others did."""
    known = [(run.name, found["seconds"]) for run in plan.runs if (found := _cost(run))]
    if not known:
        return ""
    every = sum(seconds for _, seconds in known) / len(known)
    total = 0.0
    for run in left:
        own = [seconds for name, seconds in known if name == run.name]
        total += sum(own) / len(own) if own else every
    return f", about {duration(total)}"


def _cost(run: SweepRun) -> dict[str, float] | None:
    return cost.kept(run.folder) if finished(run) else None


def duration(seconds: float) -> str:
    """Writes a time as a person would: 45 s, 4 min 5 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
