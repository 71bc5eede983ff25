"""Trains, scores and reports what a config describes.

The same command continues after an interruption.

A config with `stages` is a chain: its stages run in turn, and finished ones are skipped.
"""

import functools
from collections.abc import Sequence

from unimed_jax.config_file import load_config_file
from unimed_jax.errors import UserError
from unimed_jax.paths import check_run_folder
from unimed_jax.processes import start
from unimed_jax.verbs.options import CONFIG_HELP, parser, with_overrides

# Settings that an argument may give all stages of a chain.
FOR_ALL = ("--config.data.root=", "--config.data.cache=", "--config.seed=")


def run(arguments: list[str]) -> None:
    """Reads the arguments, checks that nothing is missing, and trains one run or a chain of them."""
    options = parser(__name__, __doc__)
    options.add_argument("--config", required=True, help=CONFIG_HELP)
    options.add_argument("--workdir", help="the run's folder (default: runs/<config name>)")
    options.epilog = "--config.key=value changes a setting."
    known, overrides = options.parse_known_args(arguments)
    settings = load_config_file(known.config)
    if "stages" in settings:
        _check_for_all(overrides, settings.stages)
        folder = check_run_folder(
            f"runs/{settings.name}" if known.workdir is None else known.workdir, "--workdir"
        )
        start()
        from unimed_jax.analyze.chain import run_chain

        run_chain(settings, folder, functools.partial(with_overrides, overrides=overrides))
        return
    config = with_overrides(settings, overrides)
    folder = check_run_folder(
        f"runs/{config.name}" if known.workdir is None else known.workdir, "--workdir"
    )
    start()

    from unimed_jax.analyze.chain import train_and_evaluate
    from unimed_jax.runs.folder import missing_inputs

    lacks = missing_inputs(config)
    if lacks:
        raise UserError(lacks)
    train_and_evaluate(config, folder)


def _check_for_all(overrides: Sequence[str], stages: Sequence[str]) -> None:
    """Raises UserError for an override that is not meant for all stages of a chain."""
    for word in overrides:
        if not word.startswith(FOR_ALL):
            raise UserError(
                f"argument {word!r} cannot change a chain, whose stages have their own settings, but "
                f"for {', '.join(FOR_ALL)}; write it into the stages' files ({', '.join(stages)})."
            )
