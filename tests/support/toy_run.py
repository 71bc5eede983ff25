"""Makes runs of random weights on the toy data set, for analyses that need no training."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from support import tiny
from support.toy import Toy, sets_of, toy_config

from unimed_jax.evaluate.tasks import units_of
from unimed_jax.runs.open import Run


def toy_run(**connector) -> Run:
    """Returns a model whose every leaf is random, with the settings of the toy data set."""
    settings = tiny.config(connector=connector)
    config = dataclasses.replace(toy_config(), model=settings)
    return Run(Path("runs/toy"), config, SimpleNamespace(), tiny.model(settings), step=7)


def toy_units(run: Run, *toys):
    return units_of(run.config, sets_of(*(toys or (Toy(),))))[0]
