"""Training: from settings and a folder to a trained run, however often it is stopped in between."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unimed_jax import processes
from unimed_jax.config import Config, config_hash
from unimed_jax.data.contact_sheet import contact_sheet
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.errors import UserError
from unimed_jax.interruption import Interruption, claim
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.rules import leaf_rules
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.folder import load_text, write_config
from unimed_jax.runs.open import Run, base_note, check_base, initial_leaves
from unimed_jax.train.log import Log, Silence, peak_memory, step_values
from unimed_jax.train.optimizer import AdamState, Optimizer, learning_rate, per_leaf
from unimed_jax.train.program import Program, build, make_mesh
from unimed_jax.train.step import TrainState, first_state


def train(config: Config, folder: Path) -> Run:
    """Trains to `config.train.steps`, from the newest checkpoint in `folder` if there is one.

    Raises UserError where the loss or a gradient is not finite, naming the records of that batch; nothing
    of such a step is saved. Raises `Stopped`, when all is saved, after a signal (see interruption.py).
    """
    # ---- data, text side, model --------------------------------------------------------------------
    claim(folder)
    with processes.leader_first("inputs"):
        write_config(folder, config)
        datasets = open_sources(config.data)
        tokenizer = load_text(folder, config, datasets)
    pipeline = Pipeline(datasets, config, tokenizer)
    program = build(config, make_mesh(config), tokenizer.coordinate_start)
    with sharding.inside(program.mesh):
        return _train(config, folder, datasets, tokenizer, pipeline, program)


def _train(config: Config, folder: Path, datasets, tokenizer, pipeline: Pipeline, program: Program) -> Run:
    rules, mesh, step = program.rules, program.mesh, program.step
    leaves, sources = initial_leaves(config, tokenizer, mesh)
    trainable = {path: leaf for path, leaf in leaves.items() if rules[path].train}
    frozen = {path: leaf for path, leaf in leaves.items() if not rules[path].train}
    random_frozen = {path: leaf for path, leaf in frozen.items() if sources[path] == "seed"}
    base = base_note({path: leaf for path, leaf in frozen.items() if path not in random_frozen}, sources)
    state = first_state(trainable, program.optimizer, mesh)
    share, shares = sharding.rows_of_process(mesh, config.data.rows)
    if processes.leads():
        describe(leaves, sources, rules, mesh)

    # ---- where it stopped --------------------------------------------------------------------------
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep)
    if checkpoints.latest() is not None:
        weights, rest, note = checkpoints.restore({**random_frozen, **state.leaves}, (state.step, state.moments))
        frozen |= {path: weights[path] for path in random_frozen}
        state = TrainState(rest[0], {path: weights[path] for path in state.leaves}, rest[1])
        check_base(folder, note["base"], base)
    if mesh is None:  # arrays that were read belong to a device, made ones to none: two programs, if left so
        state, frozen = jax.device_put((state, frozen), jax.local_devices()[0])
    first = int(state.step)
    if first == 0 and processes.leads():
        contact_sheet(datasets, folder / "contact_sheet.png")

    def save(done: int) -> None:
        note = {"config_hash": config_hash(config), "rows_read": done * config.data.rows, "base": base}
        checkpoints.save(done, {**random_frozen, **state.leaves}, (state.step, state.moments), note)

    # ---- steps -------------------------------------------------------------------------------------
    log = Log(folder, config, first) if processes.leads() else Silence()
    meter = Meter(shares)
    pending = None  # the step before, still running while the next batch is made
    # Innermost: closing would wait for a save that a lost process never finishes.
    lost = processes.explain_lost_process()
    with Interruption() as interruption, closing(checkpoints), closing(log), lost:
        for i, batch in zip(range(first, config.train.steps), pipeline.batches(first, share, shares), strict=False):
            lr = learning_rate(i, config.train.steps, config.optimizer)
            state, metrics = step(state, frozen, sharding.on_devices(batch, mesh, shares), np.float32(lr))
            if pending is not None:
                report(log, meter, config, pipeline, *pending)
            pending = (i, lr, metrics, pipeline.stats(batch))
            stop = interruption.reached()
            if stop or (i + 1) % config.train.save_every == 0 or i + 1 == config.train.steps:
                report(log, meter, config, pipeline, *pending)
                pending = None
                log.flush()
                save(i + 1)
            if stop:
                raise interruption.stopped(i + 1)  # behind the closing, which waits until all is on disk
            checkpoints.check()
    if step._cache_size() > 1:
        raise RuntimeError(f"the train step was compiled {step._cache_size()} times; its inputs changed shape")
    model = with_parameters(program.model, {**frozen, **state.leaves})
    return Run(folder, config, tokenizer, model, config.train.steps, mesh)


def saved_state(run: Run) -> tuple[dict[str, Any], AdamState]:
    """(trained leaves, Adam's state of each) of a run's newest checkpoint, by path."""
    config, leaves = run.config, parameters(run.model)
    rules = leaf_rules(leaves, config.train, config.optimizer)
    trained = {path: leaf for path, leaf in leaves.items() if rules[path].train}
    checkpoints = Checkpoints(run.folder / "checkpoints", read_only=True)
    saved = {path: leaf for path, leaf in leaves.items() if path in checkpoints.saved_weights()}
    state = jax.eval_shape(lambda: first_state(trained, Optimizer(config.optimizer, rules)))
    _, rest, _ = checkpoints.restore(saved, (state.step, state.moments))
    checkpoints.close()
    return trained, per_leaf(rest[1])


class Meter:
    """Examples, tokens and time since the last logged step; each of `shares` processes sees its part of a batch."""

    def __init__(self, shares: int = 1) -> None:
        self.shares = shares
        self.reset()

    def reset(self) -> None:
        self.start, self.steps, self.examples, self.tokens = time.perf_counter(), 0, 0, 0
        self.padding = self.vision = 0.0

    def add(self, stats: dict[str, float]) -> None:
        self.steps += 1
        self.examples += int(stats["examples"]) * self.shares
        self.tokens += int(stats["tokens"]) * self.shares
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


def report(
    log: Log | Silence, meter: Meter, config: Config, pipeline: Pipeline, i: int, lr: float, metrics, stats
) -> None:
    """Waits for step `i`, checks that it is finite, and logs it where its turn has come."""
    metrics = jax.device_get(metrics)
    if not metrics["finite"]:
        records = pipeline.record_ids(i)
        shown = ", ".join(records[:20]) + (f" and {len(records) - 20} more" if len(records) > 20 else "")
        raise UserError(
            f"step {i}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}: not finite, so the "
            f"run stops and nothing of this step is saved; look at its records ({shown}) or lower config.optimizer.lr."
        )
    meter.add(stats)
    done = i + 1
    if done % config.train.log_every == 0 or done == config.train.steps:
        rates = meter.rates()
        log.write(i, {**step_values(metrics), "train/lr": lr, **rates, "memory/peak_gib": peak_memory()})
        log.progress(done, float(metrics["loss"]), rates["speed/examples_per_second"])
        meter.reset()


def describe(leaves, sources, rules, mesh: Mesh | None) -> None:
    """Prints the devices, what trains and where every leaf came from, a line per room, source and rule."""
    if mesh is not None:
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        print(f"{mesh.size} devices ({sizes}) of {jax.process_count()} processes")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for path in leaves:
        action = "trains" if rules[path].train else "frozen"
        groups.setdefault((path.split("/")[0], sources[path], action), []).append(path)
    for (room, source, action), paths in groups.items():
        count = sum(leaves[p].size for p in paths)
        print(f"{room}: {count:,} parameters in {len(paths)} leaves, {action}, from {source}")
