"""Trains a model from settings and a folder, however often the run is stopped in between."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unimed_jax import processes
from unimed_jax.config import Config
from unimed_jax.data.contact_sheet import contact_sheet
from unimed_jax.errors import UserError
from unimed_jax.finite import named
from unimed_jax.interruption import Interruption, claims_end
from unimed_jax.model import sharding
from unimed_jax.model.dispatch import way_of
from unimed_jax.model.grouped import SHOWN
from unimed_jax.model.parameters import parameters
from unimed_jax.rules import leaf_rules
from unimed_jax.runs import environment
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.folder import remove_results
from unimed_jax.runs.open import Run
from unimed_jax.train.log import Log, Silence, peak_memory, step_values
from unimed_jax.train.optimizer import AdamState, per_leaf
from unimed_jax.train.program import build
from unimed_jax.train.start import Start, prepare


@claims_end()
def train(config: Config, folder: Path) -> Run:
    """Trains to `config.train.steps`, from the newest checkpoint in `folder` if there is one.

    Raises UserError if the loss, a gradient or an updated parameter is not finite, naming the
    records of that batch or the parameters; nothing of such a step is saved. Raises `Stopped`, when
    all is saved, after a signal (see interruption.py).
    """
    start = prepare(config, folder)
    describe(start)
    if not start.finished:
        environment.keep(folder)
        if processes.leads():
            remove_results(folder)  # of fewer steps
    if start.done == 0 and processes.leads():
        contact_sheet(start.datasets, folder / "contact_sheet.png")
    with sharding.inside(start.program.mesh):
        run_steps(start)
    notes = tuple(start.inputs.notes())
    return Run(folder, config, start.tokenizer, start.model, start.done, start.program.mesh, notes)


def run_steps(start: Start) -> None:
    """Takes the steps that are left; logs, measures and saves on the way.

    One step is always under way while the next batch is made, so a step is reported one turn late.
    """
    config, program, pipeline, mesh = start.config, start.program, start.pipeline, start.program.mesh
    first = start.done
    share = sharding.share_of_process(mesh, config.data.rows)
    log = Log(start.folder, config, first) if processes.leads() else Silence()
    report = Reporter(log, start, Meter(share.of / len(share.rows)))
    # The innermost context: closing the checkpoints would wait for a save that a lost process never
    # finishes.
    lost = processes.explain_lost_process()
    with Interruption() as interruption, closing(start.checkpoints), closing(log), lost:
        left = range(first, first if start.finished else config.train.steps)
        for i, batch in zip(left, pipeline.batches(first, share.rows), strict=False):
            # ---- step ------------------------------------------------------------------------------
            lr = start.progress.learning_rate(i, config)
            arrays = sharding.on_devices(batch, mesh, share)
            start.state, metrics = program.step(start.state, start.frozen, arrays, np.float32(lr))
            report.later(i, lr, metrics, pipeline.stats(batch))

            # ---- held-out data ---------------------------------------------------------------------
            done = i + 1
            better = False
            if start.validation.due(done):
                report.now()  # first, because a loss that is not finite ends the run
                better = measure(start, log, report.meter, done)

            # ---- checkpoint ------------------------------------------------------------------------
            stop = interruption.reached()
            last = start.progress.finished or done == config.train.steps
            if stop or better or last or done % config.train.save_every == 0:
                report.now()
                log.flush()  # a run that continues from the checkpoint must find the steps before it
                start.save(done)
            if stop:
                raise interruption.stopped(done)  # leaving the contexts waits until all is on disk
            if last:
                break
            start.checkpoints.check()
    for what, programs in (
        ("train step", program.step._cache_size()),
        ("losses", start.validation.compiled()),
    ):
        if programs > 1:
            raise RuntimeError(f"the {what} was compiled {programs} times; its inputs changed shape")


def measure(start: Start, log: "Log | Silence", meter: "Meter", done: int) -> bool:
    """Logs the entries of the evaluation that are due after `done` steps.

    Returns whether `best` has a new best value.
    """
    begun = time.perf_counter()
    found = start.validation.measure(done, start.state, start.frozen)
    # A NaN is not JSON; None stands for what a step did not have.
    log.write(done - 1, {each.logged: each.value if np.isfinite(each.value) else None for each in found})
    for each in found:
        if each.name == start.config.train.best:
            start.progress = start.progress.measured(each.value, done, start.config)
    meter.leave_out(time.perf_counter() - begun)
    return start.progress.best_step == done


def saved_state(run: Run) -> tuple[dict[str, Any], AdamState]:
    """Reads the trained leaves and Adam's state, both by path, from the checkpoint of an open run."""
    config, leaves = run.config, parameters(run.model)
    rules = leaf_rules(leaves, config.train, config.optimizer)
    trained = {path: leaf for path, leaf in leaves.items() if rules[path].train}
    checkpoints = Checkpoints(run.folder / "checkpoints", read_only=True)
    saved = {path: leaf for path, leaf in leaves.items() if path in checkpoints.saved_weights()}
    # it has shardings, so moments are restored straight into their shards
    state = build(config, run.mesh).state
    _, rest, _ = checkpoints.restore(saved, state.besides, only=run.step)
    checkpoints.close()
    count, *moments = per_leaf(rest[1])
    return trained, AdamState(count, *jax.tree.map(lambda x: x.astype(jnp.float32), moments))


class Meter:
    """Counts examples, tokens and time since the last logged step.

    A process sees its rows of a batch, which has `times` as many.
    """

    def __init__(self, times: float = 1) -> None:
        self.times = times
        self.reset()

    def reset(self) -> None:
        self.start, self.steps = time.perf_counter(), 0
        self.examples = self.tokens = self.padding = self.vision = 0.0

    def leave_out(self, seconds: float) -> None:
        """Leaves out time in which no step was taken."""
        self.start += seconds

    def add(self, stats: dict[str, float]) -> None:
        self.steps += 1
        self.examples += int(stats["examples"]) * self.times
        self.tokens += int(stats["tokens"]) * self.times
        self.padding += stats["padding_waste"]
        self.vision += stats["vision_waste"]

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        return {
            "speed/examples_per_second": self.examples / seconds,
            "speed/tokens_per_second": self.tokens / seconds,
            "speed/seconds_per_step": seconds / self.steps,
            "waste/padding": self.padding / self.steps,
            "waste/vision": self.vision / self.steps,
        }


class Reporter:
    """Waits for a step's metrics, checks that they are finite, and logs them when they are due."""

    def __init__(self, log: Log | Silence, start: Start, meter: Meter):
        self.log, self.start, self.meter = log, start, meter
        self._pending: tuple[int, float, Any, dict[str, float]] | None = None

    def later(self, i: int, lr: float, metrics: Any, stats: dict[str, float]) -> None:
        """Reports the step before, and keeps this one, which is still under way."""
        self.now()
        self._pending = (i, lr, metrics, stats)

    def now(self) -> None:
        """Reports the step that is kept, if there is one."""
        if self._pending is None:
            return
        (i, lr, metrics, stats), self._pending = self._pending, None
        metrics, train = jax.device_get(metrics), self.start.config.train
        if not metrics["finite"]:
            records = self.start.pipeline.record_ids(i)
            shown = ", ".join(records[:20]) + (
                f" and {len(records) - 20} more" if len(records) > 20 else ""
            )
            raise UserError(
                f"step {i}: loss {float(metrics['loss'])}, gradient norm "
                f"{float(metrics['grad_norm'])}: not finite, so the run stops and nothing of this "
                f"step is saved; look at its records ({shown}) or lower config.optimizer.lr."
            )
        if not metrics["updated"].all():
            leaves = zip(self.start.state.leaves, metrics["updated"], strict=True)
            raise UserError(
                f"step {i}: {named([path for path, finite in leaves if not finite])} not finite "
                "after the update, although the loss and its gradient were, so the run stops and "
                "nothing of this step is saved; lower config.optimizer.lr or weight_decay, or the "
                "lr_scale of their rule."
            )
        self.meter.add(stats)
        if (i + 1) % train.log_every == 0 or i + 1 == train.steps:
            rates = self.meter.rates()
            self.log.write(
                i, {**step_values(metrics), "train/lr": lr, **rates, "memory/peak_gib": peak_memory()}
            )
            self.log.progress(i + 1, float(metrics["loss"]), rates["speed/examples_per_second"])
            self.meter.reset()


def describe(start: Start) -> None:
    """Prints the devices, how experts run there, what trains, and where every leaf came from."""
    mesh, rules = start.program.mesh, start.program.rules
    if mesh is not None:
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        processes.say(f"{mesh.size} devices ({axes}) of {jax.process_count()} processes")
    with sharding.inside(mesh):
        chosen = way_of(start.config.model)
    if chosen:
        processes.say(SHOWN[chosen])
    groups: dict[tuple[str, str, str], list[int]] = {}
    for path, leaf in start.program.leaves.items():
        action = "trains" if rules[path].train else "frozen"
        groups.setdefault((path.split("/")[0], start.sources[path], action), []).append(leaf.size)
    for (module, source, action), sizes in groups.items():
        processes.say(
            f"{module}: {sum(sizes):,} parameters in {len(sizes)} leaves, {action}, from {source}"
        )
