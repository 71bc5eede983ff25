"""Says, before anything is paid for, whether a config fits a TPU slice or GPUs.

Its programs are compiled for chips that this machine need not have; neither weights nor a tokenizer
nor data are needed.
"""

import contextlib
import os
import re
from pathlib import Path

from unimed_jax.errors import UserError
from unimed_jax.paths import check_output
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config

PROGRAMS = ("train", "prefill", "decode")


def run(arguments: list[str]) -> int:
    """Compiles, prints the table and writes plan.json and plan.md; 1 if something did not compile."""
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
        "--out", help="folder of plan.json and plan.md (default: plans/<config's name>)"
    )
    options.add_argument(
        "--cache", help="folder of what was compiled (default: plans in config.data.cache)"
    )
    options.add_argument(
        "--minutes", type=float, default=60.0, help="for each compilation (default: 60)"
    )
    options.add_argument(
        "--memory", type=float, help="GiB that a compilation may take (default: 90 %% of what is free)"
    )
    known, overrides = options.parse_known_args(arguments)

    from unimed_jax.plan import topology as topologies

    wanted = [topologies.parse(text) for text in dict.fromkeys(known.topology)]
    programs = _programs(known.programs)
    if not (0 < known.minutes <= 10_000 and (known.memory is None or 0 < known.memory <= 1e6)):
        raise UserError("--minutes and --memory are above 0; give the time and GiB of a compilation.")
    config = read_config(known.config, overrides)
    if config.job != "model":
        raise UserError(
            f"--config={known.config}: config.job={config.job!r} has no training step to plan; plan a "
            "config that trains the model."
        )
    folder = check_output(known.out or f"plans/{config.name}", "--out")
    cache = check_output(known.cache or config.data.cache_folder / "plans", "--cache")
    topologies.check_compiler(wanted)

    from unimed_jax.plan import table
    from unimed_jax.plan.compile import Job, Limits, compile_all

    jobs = [Job(config, topology, program) for topology in wanted for program in programs]
    memory = known.memory * 2**30 if known.memory else 0.9 * _free_memory()
    rows = []
    for outcome in compile_all(jobs, cache, Limits(60 * known.minutes, memory)):
        rows.append(table.row_of(outcome))
        table.write(folder, config, rows, known.config)
    print(table.text(rows))
    print(f"wrote {folder}/plan.json and plan.md")
    return int(any(row["fits"] is None for row in rows))


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
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return 1024.0 * int(found[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
