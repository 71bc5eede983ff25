"""Trains variants of one config over several seeds, and compares them in one table.

Finished runs are skipped, so the same command continues. A run that fails is named and kept, and the
others go on; the exit status is then 1. There is no table before a run of the baseline and one of
another variant are finished, which may be those of other shards.
"""

import dataclasses
import re
from collections.abc import Sequence

from unimed_jax.config_file import load_sweep_file
from unimed_jax.errors import UserError
from unimed_jax.paths import check_output
from unimed_jax.processes import start
from unimed_jax.verbs.options import parser, with_overrides

# Settings that an argument may give all runs of a sweep.
FOR_ALL = ("--config.data.root=", "--config.data.cache=")


def run(arguments: list[str]) -> int:
    """Reads the arguments, checks every run before the first begins, trains, and writes the table.

    Returns 1 if a run of this command failed.
    """
    options = parser(__name__, __doc__)
    options.add_argument(
        "--config", required=True, help="a file of configs/sweeps/, with :argument if it takes one"
    )
    options.add_argument("--workdir", help="the sweep's folder (default: runs/<name of the sweep>)")
    options.add_argument("--variants", help="only these, joined by commas (default: all)")
    options.add_argument("--seeds", help="only these, or others than the config's, joined by commas")
    options.add_argument("--baseline", help="the variant that the others are compared with")
    options.add_argument("--shard", help="train one part of several: 1/3, 2/3 or 3/3")
    options.add_argument(
        "--only-table", action="store_true", help="train nothing, compare what is there"
    )
    options.epilog = f"{', '.join(f'{word}VALUE' for word in FOR_ALL)} set that for every run."
    known, words = options.parse_known_args(arguments)
    for word in words:
        if not word.startswith(FOR_ALL):
            raise UserError(
                f"argument {word!r} cannot change a sweep, whose variants have their own settings, but "
                f"for {', '.join(FOR_ALL)}; write it into {known.config}."
            )
    if known.only_table and known.shard is not None:
        raise UserError("--shard divides what --only-table leaves out, the training; give one of them.")
    sweep = load_sweep_file(known.config)
    if known.baseline is not None:
        sweep = dataclasses.replace(sweep, baseline=known.baseline)
    folder = check_output(f"runs/{sweep.name}" if known.workdir is None else known.workdir, "--workdir")
    variants, seeds = _names(known.variants, "--variants"), _numbers(known.seeds)
    start()

    from unimed_jax import processes
    from unimed_jax.analyze.sweep.plan import check_folders, of_shard, planned
    from unimed_jax.analyze.sweep.run import failure, run_all
    from unimed_jax.analyze.sweep.table import nothing_to_compare, write_table

    plan = planned(sweep, folder, with_overrides, words, variants, seeds)
    mine = of_shard(plan, known.shard) if known.shard is not None else plan.runs
    check_folders(plan, trains=not known.only_table)
    if not known.only_table:
        run_all(plan, mine)
    failed = any(failure(run) for run in mine)
    lacks = nothing_to_compare(plan)
    if lacks and (failed or known.shard is not None):
        processes.say(f"no table: {lacks}")
    else:
        write_table(plan)
    return int(failed)


def _names(given: str | None, option: str) -> list[str]:
    """Reads names joined by commas; raises UserError if one is empty or doubled."""
    names = [] if given is None else given.split(",")
    for i, name in enumerate(names):
        if not name or name in names[:i]:
            what = f"{name!r} twice" if name else "an empty name"
            raise UserError(f"{option}={given} has {what}; write each name once, joined by commas.")
    return names


def _numbers(given: str | None) -> Sequence[int]:
    seeds: list[int] = []
    for name in _names(given, "--seeds"):
        if not re.fullmatch("[0-9]{1,10}", name) or int(name) >= 2**32:
            raise UserError(f"--seeds={given}: {name!r} is not a seed; write whole numbers (0,1,2).")
        if int(name) in seeds:  # as 01 and 1
            raise UserError(f"--seeds={given} has {int(name)} twice; write each seed once.")
        seeds.append(int(name))
    return seeds
