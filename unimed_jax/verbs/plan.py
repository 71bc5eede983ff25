"""Says, before anything is paid for, whether a config fits a TPU slice or GPUs, and how fast it can be.

Its programs are compiled for chips that this machine need not have; neither weights nor a tokenizer
nor data are needed.
"""

import argparse
import contextlib
import os
import re
from pathlib import Path

from unimed_jax.errors import UserError
from unimed_jax.paths import check_output_folder
from unimed_jax.processes import start
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config

PROGRAMS = ("train", "prefill", "decode")


def run(arguments: list[str]) -> int:
    """Compiles, prints the tables and writes plan.json and plan.md.

    Returns 1 if something did not compile, or if nothing can be suggested for one of several topologies.
    """
    known, overrides = _options().parse_known_args(arguments)

    from unimed_jax.plan import topology as topologies

    wanted = [topologies.parse(text) for text in dict.fromkeys(known.topology)]
    programs = _programs(known.programs)
    if not (0 < known.minutes <= 10_000 and (known.memory is None or 0 < known.memory <= 1e6)):
        raise UserError("--minutes and --memory are above 0; give the time and GiB of a compilation.")
    if known.suggest and programs != ["train"]:
        raise UserError("--suggest ranks settings of training; leave --programs out.")
    config = read_config(known.config, overrides)
    if config.job != "model":
        raise UserError(
            f"--config={known.config}: config.job={config.job!r} has no training step to plan; plan a "
            "config that trains the model."
        )
    folder = check_output_folder(f"plans/{config.name}" if known.out is None else known.out, "--out")
    cache = check_output_folder(
        config.data.cache_folder / "plans" if known.cache is None else known.cache, "--cache"
    )
    topologies.check_compiler(wanted)
    # Only children compile, and this process must not hold a chip that somebody uses.
    os.environ["JAX_PLATFORMS"] = "cpu"
    start()

    from unimed_jax.plan import suggest, table
    from unimed_jax.plan.compile import Job, Limits, compile_all
    from unimed_jax.plan.roofline import read_prices

    prices = read_prices(known.prices)
    jobs = [Job(config, topology, program) for topology in wanted for program in programs]
    refused: list[UserError] = []  # topologies for which nothing can be suggested
    if known.suggest:
        jobs = []
        for topology in wanted:
            try:
                found = suggest.ranked(config, topology)
            except UserError as error:
                refused.append(error)
                continue
            print(f"{topology.text}: {len(found)} settings are expected to fit; the best of them")
            print(table.aligned(*suggest.table(found)))
            best = enumerate(found[: suggest.COMPILED], start=1)
            jobs += [Job(s.config, topology, "train", f"suggestion {n}") for n, s in best]
        if not jobs:
            raise refused[0]
    memory = known.memory * 2**30 if known.memory else 0.9 * _free_memory()
    rows = []
    for outcome in compile_all(jobs, cache, Limits(60 * known.minutes, memory)):
        row = table.row_of(outcome, prices)
        if known.suggest:
            row["settings"] = suggest.settings(outcome.job.config)
        rows.append(row)
        table.write(folder, config, rows, known.config)
    print(table.text(rows))
    planned_for = {row["topology"] for row in rows}
    for topology in wanted if known.suggest else ():
        if topology.text in planned_for:
            print(suggest.fastest(rows, topology))
    for refusal in refused:
        print(refusal)
    print(f"wrote {folder}/plan.json and plan.md")
    return int(bool(refused) or any(row["fits"] is None for row in rows))


def _options() -> argparse.ArgumentParser:
    options = parser(__name__, __doc__)
    options.add_argument("--config", required=True, help=CONFIG_HELP)
    options.add_argument(
        "--topology",
        required=True,
        action="append",
        help="chips and how many: v5e:16x16, v5p:2x2x2, h100:8, l4:1, cpu:8; may be given several times",
    )
    options.add_argument(
        "--programs",
        default="train",
        help=f"any of {','.join(PROGRAMS)}, joined by commas (default: train)",
    )
    options.add_argument(
        "--suggest",
        action="store_true",
        help="rank meshes, remat policies and micro-batches, and compile the three that look fastest",
    )
    options.add_argument(
        "--prices",
        help='JSON file of what a chip costs an hour, {"v5e": 1.2}: adds the price of training',
    )
    options.add_argument(
        "--out", help="folder of plan.json and plan.md (default: plans/<config's name>)"
    )
    options.add_argument("--cache", help="folder of what was compiled (default: plans in data.cache)")
    options.add_argument("--minutes", type=float, default=60.0, help="of a compilation (default: 60)")
    options.add_argument(
        "--memory", type=float, help="GiB that a compilation may take (default: 90 %% of what is free)"
    )
    return options


def _programs(given: str) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in PROGRAMS or names.count(name) > 1:
            raise UserError(
                f"--programs={given}: {name!r} is unknown or doubled; join any of "
                f"{', '.join(PROGRAMS)} by commas."
            )
    return names


def _free_memory() -> float:
    """Returns the bytes of this machine's memory that programs can still take."""
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return 1024.0 * int(found[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
