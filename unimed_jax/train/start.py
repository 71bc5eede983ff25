"""Prepares a training run: everything that the loop needs, as one object."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from unimed_jax import features, files, processes
from unimed_jax.config import Config, config_hash
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.example import Dataset
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import check_evaluation, open_held_out
from unimed_jax.finite import refuse_not_finite
from unimed_jax.interop.families.unimed_pth import load_moments
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.table import folded
from unimed_jax.interruption import claim
from unimed_jax.memory import check_training
from unimed_jax.model import sharding
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.model.unimed import UniMed
from unimed_jax.runs import inputs
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.folder import load_text, tokenizer_folder, write_config
from unimed_jax.runs.inputs import Inputs
from unimed_jax.runs.open import base_note, check_base, initial_leaves
from unimed_jax.train.checks import check_start
from unimed_jax.train.gradients import STRATEGIES
from unimed_jax.train.optimizer import AdamState, learning_rate
from unimed_jax.train.program import Program, build, make_mesh
from unimed_jax.train.step import TrainState, first_state
from unimed_jax.train.validate import Validation


@dataclasses.dataclass(frozen=True)
class Progress:
    """Holds what a run has found out on its way, besides weights and moments.

    It goes into the note of every checkpoint.
    """

    best: float | None = None  # value of config.train.best
    best_step: int | None = None  # steps done when it was measured
    waited: int = 0  # measurements since then
    finished: bool = False  # stopped early, after config.train.patience of them
    steps: int = 0  # config.train.steps, when the note was written
    schedule_start: int = 0  # step at which the learning rate's schedule began

    def measured(self, value: float, done: int, config: Config) -> "Progress":
        """Returns the progress after one more measurement of config.train.best.

        A NaN is never better.
        """
        sign = 1 if config.train.best_mode == "max" else -1
        if value == value and (self.best is None or sign * value > sign * self.best):
            return dataclasses.replace(self, best=value, best_step=done, waited=0)
        waited = self.waited + 1
        return dataclasses.replace(self, waited=waited, finished=0 < config.train.patience <= waited)

    def learning_rate(self, step: int, config: Config) -> float:
        """Returns the learning rate of step `step`; the schedule spans the steps since its start."""
        first = self.schedule_start
        return learning_rate(step - first, config.train.steps - first, config.optimizer)


@dataclasses.dataclass
class Start:
    """Holds a run that is ready for its next step.

    `state` and `progress` change as it trains; the rest stays the same.
    """

    config: Config
    folder: Path
    datasets: Sequence[Dataset]
    tokenizer: Tokenizer
    pipeline: Pipeline
    validation: Validation
    program: Program
    state: TrainState
    frozen: dict[str, Any]  # path -> leaf that does not train
    sources: Mapping[str, str]  # path -> where the leaf came from
    base: Mapping[str, dict]  # source and fingerprint of each leaf that checkpoints do not hold
    checkpoints: Checkpoints
    progress: Progress
    inputs: Inputs  # data and tokenizer

    @property
    def done(self) -> int:
        """Returns the number of steps done."""
        return int(self.state.step)

    @property
    def finished(self) -> bool:
        return self.progress.finished or self.done >= self.config.train.steps

    @property
    def model(self) -> UniMed:
        return with_parameters(self.program.model, {**self.frozen, **self.state.leaves})

    def saved_leaves(self) -> dict[str, Any]:
        """Returns the leaves of the model that a checkpoint holds.

        These are the leaves that train, and those that no file could give back.
        """
        random = {path: leaf for path, leaf in self.frozen.items() if path not in self.base}
        return {**random, **self.state.leaves}

    def save(self, done: int) -> None:
        """Writes a checkpoint in the background."""
        note = {
            "config_hash": config_hash(self.config),
            "rows_read": done * self.config.data.rows,
            "packing": self.pipeline.mark(done),
            "base": self.base,
            "progress": dataclasses.asdict(self.progress),
            "inputs": self.inputs.plain(),
        }
        best = self.progress.best_step
        self.checkpoints.save(done, self.saved_leaves(), self.state.besides, note, best=best)


def prepare(config: Config, folder: Path) -> Start:
    """Opens data, weights and the newest checkpoint in `folder`, and builds the training program.

    If there are several processes, each calls it. Raises UserError for what is missing or does not fit.
    """
    # ---- files, data, text -------------------------------------------------------------------------
    claim(folder)
    with processes.leader_first("inputs"):
        if processes.leads():  # whose unfinished files others would take for a killed run's
            files.remove_leftovers(folder)
        write_config(folder, config)
        datasets = open_sources(config.data)
        tokenizer = load_text(folder, config, datasets)
        now = inputs.state_of_tokenizer(tokenizer_folder(folder, config), tokenizer)
        now |= inputs.state_of_data(config, datasets, open_held_out(config))
        trained_on = inputs.keep(folder, config, now)
    check_start(config, tokenizer, parameters(abstract(config.model)))
    check_evaluation(config, tokenizer)
    pipeline = Pipeline(datasets, config, tokenizer)

    # ---- program -----------------------------------------------------------------------------------
    program = build(config, make_mesh(config), tokenizer.coordinate_start)
    check_training(config, program.state, program.frozen, program.batch)
    validation = Validation(config, tokenizer, program)

    # ---- weights -----------------------------------------------------------------------------------
    with sharding.inside(program.mesh):
        leaves, sources = initial_leaves(config, tokenizer, program.mesh)
        refuse_not_finite(leaves, "the weights of config.init", "give others")
        frozen = {path: leaves[path] for path in program.frozen}
        base = base_note(
            {path: leaf for path, leaf in frozen.items() if sources[path] != "seed"}, sources
        )
        state = first_state(
            {path: leaves[path] for path in program.state.leaves},
            program.optimizer,
            program.mesh,
            STRATEGIES[config.train.gradients](),
        )
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep)
    start = Start(
        config, folder, datasets, tokenizer, pipeline, validation, program, state, frozen, sources,
        base, checkpoints,
        Progress(steps=config.train.steps), trained_on,
    )  # fmt: skip

    # ---- where it stopped --------------------------------------------------------------------------
    if checkpoints.latest() is not None:
        _continue(start)
    elif config.train.moments == "init":
        start.state = start.state._replace(moments=_moments_of_init(config, start.state, program.mesh))
    if config.train.cache_features:
        with sharding.inside(program.mesh):
            pipeline.use(features.cached(config, pipeline, program.model, start.frozen, program.mesh))
    if program.mesh is None:
        # Restored arrays belong to a device, fresh ones do not: without this the step would compile
        # twice.
        start.state, start.frozen = jax.device_put((start.state, start.frozen), jax.local_devices()[0])
    return start


def _moments_of_init(config: Config, state: TrainState, mesh: Mesh | None) -> AdamState:
    """Reads AdamW's state from the last original checkpoint that `config.init` names.

    It is placed as `state.moments` is. Raises UserError if there is no such file, if it lacks the state
    of a parameter that trains here, or if our optimizer does not count the steps of each parameter.
    """
    path = next((path for kind, path in reversed(config.init) if kind == "unimed"), None)
    if path is None:
        raise UserError(
            'config.train.moments="init" needs an original checkpoint: ("unimed", FILE) in config.init.'
        )
    if not config.optimizer.skip_unused:
        raise UserError(
            f'config.train.moments="init": {path} counts the steps of each parameter; set '
            "config.optimizer.skip_unused=True."
        )
    shapes = parameters(abstract(config.model))
    places = None if mesh is None else sharding.parameter_shardings(shapes, mesh)
    found = load_moments(path, config.model, Destination(shapes, places))
    lacking = [leaf for leaf in state.leaves if leaf not in found.mean]
    if lacking:
        raise UserError(
            f'config.train.moments="init": {path} holds no state of {", ".join(folded(lacking)[:3])}; '
            "freeze it by config.train.rules, or start with zeros."
        )
    moments = AdamState(*({leaf: part[leaf] for leaf in state.leaves} for part in found))
    moments = jax.tree.map(lambda x, like: x.astype(like.dtype), moments, state.moments)
    return moments if mesh is None else jax.device_put(moments, sharding.state_shardings(moments, mesh))


def _continue(start: Start) -> None:
    """Replaces weights, moments and progress by those of the newest checkpoint."""
    state, config = start.state, start.config
    weights, rest, note = start.checkpoints.restore(start.saved_leaves(), state.besides)
    check_base(start.folder, note["base"], start.base)
    start.frozen |= {path: leaf for path, leaf in weights.items() if path not in state.leaves}
    step, *others = rest
    start.pipeline.go_on(note.get("packing"))
    start.state = TrainState(step, {path: weights[path] for path in state.leaves}, *others)
    progress = Progress(**note["progress"])
    if progress.steps != config.train.steps:  # raised: `write_config` allowed it
        begin = start.done if config.train.longer == "restart" else progress.schedule_start
        # A run that `train.patience` ended goes on, since more steps are asked for now.
        progress = dataclasses.replace(
            progress, steps=config.train.steps, schedule_start=begin, finished=False, waited=0
        )
    start.progress = progress
    if progress.steps < start.done:
        raise UserError(
            f"{start.folder} has done {start.done} steps, more than config.train.steps={progress.steps}."
        )
