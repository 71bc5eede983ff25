"""Scores a finished run again, or predictions that another tool made (--predictions).

A run is scored as its own settings say, or as config.evaluate of another file says
(--config=FILE). It is changed by --config.evaluate.key=value and --config.text.max_prompt=N only;
--config.data.changed=accept and --config.text.changed=accept score it on data or with a tokenizer
that changed since its training. Predictions are JSON lines
{"id": "<set>/<split>/<id within the set>", "prediction": "..."}; `data export` writes the questions.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from unimed_jax.config import Config
from unimed_jax.errors import UserError
from unimed_jax.parsing import no_file
from unimed_jax.paths import check_run_folder
from unimed_jax.processes import start
from unimed_jax.verbs.options import CONFIG_HELP, changed, parser, read_config

CHANGEABLE = (
    "--config.evaluate.",
    "--config.text.max_prompt=",
    "--config.text.changed=",
    "--config.data.changed=",
)


def run(arguments: list[str]) -> None:
    """Opens the run on the devices found, or reads the predictions, and writes scores and a report."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", help="a run's folder")
    options.add_argument(
        "--which", choices=("newest", "best"), help="with --run: which checkpoint (default: newest)"
    )
    options.add_argument("--predictions", help="a file of JSON lines; needs --config=FILE or --run=DIR")
    options.add_argument(
        "--config",
        help=f"{CONFIG_HELP}: with --predictions what was asked, with --run its config.evaluate alone",
    )
    options.add_argument(
        "--out", help="folder of the report (default: the run's, or next to the predictions)"
    )
    known, overrides = options.parse_known_args(arguments)
    if known.predictions is None and known.run is None:
        raise UserError(
            "evaluate takes --run=DIR, or --predictions=FILE with --config=FILE; give one of them."
        )
    if known.predictions is None:
        _of_run(known.run, known.out, known.which or "newest", known.config, overrides)
        return
    if known.which:
        raise UserError(
            "--which chooses a checkpoint of --run=DIR, but --predictions reads none; leave it out."
        )
    if (known.run is None) == (known.config is None):
        raise UserError(
            "--predictions needs --config=FILE or --run=DIR, which say what was asked; give one of them."
        )

    file = Path(known.predictions)
    if reason := no_file(file):
        raise UserError(f"{file} {reason}; give a file of JSON lines as --predictions.")
    out = check_run_folder(file.with_suffix(".scores") if known.out is None else known.out, "--out")
    start()

    from unimed_jax.analyze.run_report.page import write_page
    from unimed_jax.evaluate.run import evaluate_predictions
    from unimed_jax.runs.folder import read_config as config_of_run

    if known.config is not None:
        config = read_config(known.config, overrides)
    else:
        config = changed(config_of_run(Path(known.run)), overrides, CHANGEABLE)
    _refuse_nothing(config)
    evaluate_predictions(config, file, out, None if known.run is None else Path(known.run))
    write_page(out, config)


def _of_run(
    folder: str,
    out: str | None,
    which: Literal["newest", "best"],
    other: str | None,
    overrides: list[str],
) -> None:
    place = check_run_folder(folder, "--run") if out is None else check_run_folder(out, "--out")
    start()

    from unimed_jax.analyze.run_report.page import write_page
    from unimed_jax.evaluate.run import claim_results, evaluate_run
    from unimed_jax.runs.open import open_run, settings_of

    config = settings_of(Path(folder))
    if other is not None:
        config = dataclasses.replace(config, evaluate=read_config(other).evaluate)
    config = changed(config, overrides, CHANGEABLE)
    _refuse_nothing(config)
    claim_results(place)  # claimed before the model is opened, which can take minutes
    run = open_run(folder, which=which, changed=config.text.changed)
    with run.inside():
        evaluate_run(run, config, place)
    write_page(place, config)


def _refuse_nothing(config: Config) -> None:
    """Raises UserError if nothing would be scored.

    An empty report would replace the run's report.
    """
    if not config.evaluates:
        raise UserError(
            "config.evaluate.splits and config.evaluate.entries are empty, so that nothing would "
            "be scored; name a split."
        )
