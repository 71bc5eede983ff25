"""Scores a finished run again; --config.evaluate.key=value changes how."""

import ml_collections

from unimed_jax.config import to_dict
from unimed_jax.errors import UserError
from unimed_jax.verbs.options import parser, with_overrides


def run(arguments: list[str]) -> None:
    """Opens the run on the devices found and writes its scores into its folder."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", required=True, help="a run's folder")
    known, overrides = options.parse_known_args(arguments)
    for word in overrides:
        if not word.startswith("--config.evaluate."):
            raise UserError(f"argument {word!r} cannot change a finished run; only --config.evaluate.key=value can.")

    from unimed_jax.evaluate.run import evaluate_run
    from unimed_jax.runs.open import open_run

    run = open_run(known.run)
    config = with_overrides(ml_collections.ConfigDict(to_dict(run.config)), overrides)
    with run.inside():
        evaluate_run(run, config)
