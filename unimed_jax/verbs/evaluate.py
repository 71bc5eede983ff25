"""Scores a finished run again, or the predictions of any tool.

--config.evaluate.key=value changes how, and config.text.max_prompt may be raised for longer questions.
--predictions=FILE scores lines {"id": "<set>/<split>/<id>", "prediction": "..."} on the data of --run or --config.
"""

from pathlib import Path

import ml_collections

from unimed_jax.config import to_dict
from unimed_jax.errors import UserError
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config, with_overrides

CHANGEABLE = ("--config.evaluate.", "--config.text.max_prompt=")


def run(arguments: list[str]) -> None:
    """Opens the run on the devices found and writes its scores into its folder, or scores a file of predictions."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", help="a run's folder")
    options.add_argument("--predictions", help="a file of predictions as JSON lines, scored without a model")
    options.add_argument("--config", help=f"with --predictions, in place of --run: {CONFIG_HELP}")
    options.add_argument("--out", help="with --predictions: the folder for the scores (default: next to the file)")
    known, overrides = options.parse_known_args(arguments)
    if (known.run is None) == (known.config is None) or (known.config and not known.predictions):
        raise UserError("evaluate takes --run=DIR, or --predictions=FILE with --run=DIR or --config=FILE; give those.")
    for word in overrides:
        if known.run and not word.startswith(CHANGEABLE):
            raise UserError(f"argument {word!r} cannot change a finished run; only --config.evaluate.key=value can.")

    from unimed_jax.evaluate.run import evaluate_predictions, evaluate_run
    from unimed_jax.runs.folder import read_config as config_of_run
    from unimed_jax.runs.open import open_run

    if known.predictions:
        file = Path(known.predictions)
        if known.config:
            config = read_config(known.config, overrides)
        else:
            settings = to_dict(config_of_run(Path(known.run)))
            config = with_overrides(ml_collections.ConfigDict(settings), overrides)
        evaluate_predictions(config, file, Path(known.out or file.with_suffix("")))
        return
    run = open_run(known.run)
    config = with_overrides(ml_collections.ConfigDict(to_dict(run.config)), overrides)
    with run.inside():
        evaluate_run(run, config)
