"""Prepares every data set of a config, by several processes, and prints what each holds.

Training does the same by itself with one process, and uses what was prepared here if it has the same
settings of the data. A command that was stopped or killed goes on with the shard that it was at.
"""

import os
import shlex

from unimed_jax.errors import UserError
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config

# argument -> setting that it is short for
SHORT = {
    "--image-size": "config.data.reencode.size",
    "--image-format": "config.data.reencode.format",
    "--image-quality": "config.data.reencode.quality",
}


def run(arguments: list[str]) -> None:
    """Prepares the sets of config.data and config.evaluate."""
    options = parser(__name__, __doc__)
    options.add_argument("--config", required=True, help=CONFIG_HELP)
    options.add_argument(
        "--workers", type=int, default=_cores(), help="processes (default: the cores; 0: this one)"
    )
    options.add_argument(
        "--beam",
        metavar="ARGUMENTS",
        help="store the images by an Apache Beam pipeline with these arguments, such as "
        "'--runner=FlinkRunner --flink_master=HOST:8081' ('' is Beam's local runner)",
    )
    options.add_argument("--strict", action="store_true", help="short for --config.data.strict=True")
    for argument, setting in SHORT.items():
        options.add_argument(argument, dest=setting, metavar="VALUE", help=f"short for --{setting}")
    known, overrides = options.parse_known_args(arguments)
    if not 0 <= known.workers <= 1024:
        raise UserError(f"--workers={known.workers} cannot be; give 0 to 1024.")
    given = {setting: value for setting in SHORT.values() if (value := vars(known)[setting]) is not None}
    short = [f"--{setting}={value}" for setting, value in given.items()]
    if known.strict:
        overrides.append("--config.data.strict=True")
    config = read_config(known.config, [*overrides, *short])
    if not config.data.sources:
        raise UserError(f"--config={known.config} names no data set; fill config.data.sources.")

    from unimed_jax.data.datasets import check_places, distinct, open_sources
    from unimed_jax.data.image_shards import processes
    from unimed_jax.data.selection import Selection

    groups = [config.data, *([config.held_out] if config.evaluate.sources else [])]
    for data in groups:
        check_places(data)  # of all, before the first takes hours
    if known.beam is not None:
        from unimed_jax.data.beam import store_images

        store_images(groups, shlex.split(known.beam))
    with processes(known.workers) as pool:
        found = [each for data in groups for each in open_sources(data, known.workers, pool)]
    for dataset in distinct(found):
        assert isinstance(dataset, Selection)
        counts = ", ".join(f"{split} {len(dataset.examples(split))}" for split in dataset.splits)
        print(
            f"{dataset.id}: {counts} examples; {dataset.skipped} records left out; checksum "
            f"{dataset.checksum[:12]}; {dataset.folder}"
        )
    if short:
        print(f"train with {' '.join(short)}, or with the same in the config file")


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
