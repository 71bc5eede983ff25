"""Scores a finished run again, or predictions that another tool made (--predictions).

A run is changed by --config.evaluate.key=value and --config.text.max_prompt=N only. Predictions are JSON lines
{"id": "<set>/<split>/<id within the set>", "prediction": "..."}; `data export` writes the questions.
"""

from pathlib import Path
from typing import Literal

import ml_collections

from unimed_jax.config import Config, to_dict
from unimed_jax.errors import UserError
from unimed_jax.files import no_file
from unimed_jax.paths import check_run_folder
from unimed_jax.processes import start
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config, with_overrides

CHANGEABLE = ("--config.evaluate.", "--config.text.max_prompt=")


def run(arguments: list[str]) -> None:
    """Opens the run on the devices found, or reads the predictions, and writes scores and a report."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", help="a run's folder")
    options.add_argument("--which", choices=("newest", "best"), help="with --run: which checkpoint (default: newest)")
    options.add_argument("--predictions", help="a file of JSON lines; needs --config=FILE or --run=DIR")
    options.add_argument("--config", help=f"with --predictions: {CONFIG_HELP}")
    options.add_argument("--out", help="folder of the report (default: the run's, or next to the predictions)")
    known, overrides = options.parse_known_args(arguments)
    if known.predictions is None and (known.run is None or known.config):
        raise UserError("evaluate takes --run=DIR, or --predictions=FILE with --config=FILE; give one of them.")
    if known.predictions is None:
        _of_run(known.run, known.out, known.which or "newest", overrides)
        return
    if known.which:
        raise UserError("--which chooses a checkpoint of --run=DIR, but --predictions reads none; leave it out.")
    if (known.run is None) == (known.config is None):
        raise UserError("--predictions needs --config=FILE or --run=DIR, which say what was asked; give one of them.")

    file = Path(known.predictions)
    if reason := no_file(file):
        raise UserError(f"{file} {reason}; give a file of JSON lines as --predictions.")
    out = check_run_folder(file.with_suffix(".scores") if known.out is None else known.out, "--out")
    start()

    from unimed_jax.evaluate.run import evaluate_predictions
    from unimed_jax.runs.folder import read_config as config_of_run

    if known.config:
        config = read_config(known.config, overrides)
    else:
        config = _changed(config_of_run(Path(known.run)), overrides)
    evaluate_predictions(config, file, out)


def _of_run(folder: str, out: str | None, which: Literal["newest", "best"], overrides: list[str]) -> None:
    place = check_run_folder(folder, "--run") if out is None else check_run_folder(out, "--out")
    start()

    from unimed_jax.evaluate.run import claim_results, evaluate_run
    from unimed_jax.runs.open import open_run

    _refuse_others(overrides)
    if (place / "config.json").is_file():  # before the model is opened, which takes minutes if it is large
        claim_results(place)
    run = open_run(folder, which=which)
    with run.inside():
        evaluate_run(run, _changed(run.config, overrides), place)


def _changed(config: Config, overrides: list[str]) -> Config:
    _refuse_others(overrides)
    return with_overrides(ml_collections.ConfigDict(to_dict(config)), overrides)


def _refuse_others(overrides: list[str]) -> None:
    for word in overrides:
        if not word.startswith(CHANGEABLE):
            raise UserError(
                f"argument {word!r} cannot change a finished run; only --config.evaluate.key=value and "
                "--config.text.max_prompt=N can."
            )
