"""Scores a finished run again, or predictions that another tool made (--predictions).

A run is changed by --config.evaluate.key=value and --config.text.max_prompt=N only. Predictions are JSON lines
{"id": "<set>/<split>/<id within the set>", "prediction": "..."}; `data export` writes the questions.
"""

from pathlib import Path
from typing import Literal

import ml_collections

from unimed_jax.config import Config, to_dict
from unimed_jax.errors import UserError
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config, with_overrides

CHANGEABLE = ("--config.evaluate.", "--config.text.max_prompt=")


def run(arguments: list[str]) -> None:
    """Opens the run on the devices found, or reads the predictions, and writes scores and a report."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", help="a run's folder")
    options.add_argument("--which", choices=("newest", "best"), help="with --run: which checkpoint (default: newest)")
    options.add_argument("--predictions", help="a file of JSON lines; needs --config=FILE or --run=DIR")
    options.add_argument("--config", help=f"with --predictions: {CONFIG_HELP}")
    options.add_argument("--out", help="with --predictions: folder of the report (default: next to the file)")
    known, overrides = options.parse_known_args(arguments)
    if known.predictions is None and (known.run is None or known.config or known.out):
        raise UserError("evaluate takes --run=DIR, or --predictions=FILE with --config=FILE; give one of them.")
    if known.predictions is None:
        _of_run(known.run, known.which or "newest", overrides)
        return
    if known.which:
        raise UserError("--which chooses a checkpoint of --run=DIR, but --predictions reads none; leave it out.")
    if (known.run is None) == (known.config is None):
        raise UserError("--predictions needs --config=FILE or --run=DIR, which say what was asked; give one of them.")

    from unimed_jax.evaluate.run import evaluate_predictions
    from unimed_jax.runs.folder import read_config as config_of_run

    file = Path(known.predictions)
    if known.config:
        config = read_config(known.config, overrides)
    else:
        config = _changed(config_of_run(Path(known.run)), overrides)
    _refuse_nothing(config)
    evaluate_predictions(config, file, Path(known.out or file.with_suffix(".scores")))


def _of_run(folder: str, which: Literal["newest", "best"], overrides: list[str]) -> None:
    from unimed_jax.evaluate.run import evaluate_run
    from unimed_jax.runs.open import open_run

    _refuse_others(overrides)
    run = open_run(folder, which=which)
    config = _changed(run.config, overrides)
    _refuse_nothing(config)
    with run.inside():
        evaluate_run(run, config)


def _changed(config: Config, overrides: list[str]) -> Config:
    _refuse_others(overrides)
    return with_overrides(ml_collections.ConfigDict(to_dict(config)), overrides, of_run=True)


def _refuse_others(overrides: list[str]) -> None:
    for word in overrides:
        if not word.startswith(CHANGEABLE):
            raise UserError(
                f"argument {word!r} cannot change a finished run; only --config.evaluate.key=value and "
                "--config.text.max_prompt=N can."
            )


def _refuse_nothing(config: Config) -> None:
    """Raises UserError if nothing would be scored, because an empty report would replace that of the run."""
    if not config.evaluates:
        raise UserError(
            "config.evaluate.splits and config.evaluate.entries are empty, so that nothing would be scored; name a "
            "split."
        )
