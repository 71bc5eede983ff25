"""Parses what the analyses of one run have in common, and opens the run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from unimed_jax.errors import UserError
from unimed_jax.paths import ANALYSES, check_run_folder
from unimed_jax.processes import start
from unimed_jax.verbs.options import Parser, parser

if TYPE_CHECKING:
    from unimed_jax.config import Config
    from unimed_jax.evaluate.tasks import Unit
    from unimed_jax.runs.open import Run

FOLDER, *_ = ANALYSES  # in the run's folder


def of_one_run(module: str, description: str | None, limit: int) -> Parser:
    """Makes the parser of an analysis of one run; `limit` is its usual number of examples."""
    options = parser(module, description)
    options.add_argument("--run", required=True, help="a run's folder")
    options.add_argument(
        "--which", choices=("newest", "best"), default="newest", help="checkpoint (default: newest)"
    )
    options.add_argument("--split", default="val", help="whose examples are used (default: val)")
    options.add_argument(
        "--task", action="append", default=[], help="only this task; may be repeated (default: all)"
    )
    options.add_argument(
        "--limit",
        type=int,
        default=limit,
        help=f"examples of each task and set at most, 0: all (default: {limit})",
    )
    options.add_argument("--out", help=f"folder of the files (default: {FOLDER}/ in the run's folder)")
    return options


def within(value: int, option: str, least: int, most: int) -> int:
    """Returns the number that an option gives; raises UserError outside its bounds."""
    if not least <= value <= most:
        raise UserError(f"{option}={value} cannot be used; give a number from {least} to {most}.")
    return value


def folder_of(known: argparse.Namespace) -> Path:
    """Returns the folder to write into, checked before any work."""
    within(known.limit, "--limit", 0, 10**9)
    folder = check_run_folder(known.run, "--run")
    if known.out is None:
        return check_run_folder(folder / FOLDER, "--out")
    return check_run_folder(known.out, "--out")


def settings(known: argparse.Namespace) -> "Config":
    """Reads the settings of the run, before its weights are."""
    start()
    from unimed_jax.runs.open import settings_of

    return settings_of(Path(known.run))


def opened(known: argparse.Namespace, config: "Config") -> "tuple[Run, list[Unit]]":
    """Opens the chosen examples of the run's held-out sets, then the run."""
    from unimed_jax.analyze.examples import held_out_units
    from unimed_jax.runs.open import open_run

    units = held_out_units(config, known.split, known.task, known.limit)
    return open_run(known.run, which=known.which), units
