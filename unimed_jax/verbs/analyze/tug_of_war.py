"""Compares the gradients that tasks and data sets send into the same parameters, on held-out data.

It writes tug_of_war.json, tug_of_war.md and tug_of_war.png: direction similarity (cosine) and
magnitude similarity of each two tasks, with intervals over batches; the share of pairs in conflict in
each expert, the router and each layer; spectral entropy and the ratio of the dominant eigenvalue.
Several runs, for example with other connectors, and several checkpoints of a run stand side by side.
A killed analysis goes on with the same command.
"""

import re
from collections.abc import Sequence

from unimed_jax.errors import UserError
from unimed_jax.paths import check_run_folder
from unimed_jax.processes import start
from unimed_jax.verbs.analyze.options import FOLDER, within
from unimed_jax.verbs.options import parser


def run(arguments: list[str]) -> None:
    """Opens the runs one after the other, measures them, and writes the files."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", action="append", required=True, help="a run's folder; may be repeated")
    options.add_argument(
        "--which",
        action="append",
        help="newest (default), best, all, or a number of steps, 0 before training; may be repeated",
    )
    options.add_argument("--split", default="val", help="whose examples are used (default: val)")
    options.add_argument(
        "--task", action="append", default=[], help="only this task; may be repeated (default: all)"
    )
    options.add_argument(
        "--match",
        action="append",
        default=[],
        help="a pattern of parameter paths (default: the connector, and LoRA if any); may be repeated",
    )
    options.add_argument("--batches", type=int, default=16, help="of each task at most (default: 16)")
    options.add_argument(
        "--planted",
        action="store_true",
        help="show a task beside itself, beside itself negated, and times ten, as a check",
    )
    options.add_argument(
        "--out", help=f"folder of the files (default: {FOLDER}/ in the first run's folder)"
    )
    known = options.parse_args(arguments)
    within(known.batches, "--batches", 1, 10_000)
    folders = [check_run_folder(folder, "--run") for folder in known.run]
    out = check_run_folder(known.out or folders[0] / FOLDER, "--out")
    wanted = [checkpoint for word in known.which or ["newest"] for checkpoint in _checkpoint(word)]
    start()

    from unimed_jax import files, processes
    from unimed_jax.analyze import drawing
    from unimed_jax.analyze.run_report.page import write_page
    from unimed_jax.analyze.tug_of_war import PARTIAL, analyse
    from unimed_jax.analyze.tug_of_war_report import content, draw, page
    from unimed_jax.evaluate.run import claim_results
    from unimed_jax.runs.checkpoint import Checkpoints
    from unimed_jax.runs.open import open_run, settings_of

    for folder in folders:
        settings_of(folder)  # refuses what is no run, before the first is measured
    claim_results(out)
    found, partial = [], out / PARTIAL
    for folder in folders:
        for which in wanted:
            every: Sequence = [which]
            if which == "all":
                every = Checkpoints(folder / "checkpoints", read_only=True).steps()
                if not every:
                    raise UserError(
                        f"{folder} holds no checkpoint; train it first, or measure it before its "
                        "training (--which=0)."
                    )
            for one in every:
                opened = open_run(folder, which=one)
                with opened.inside():
                    one_run = analyse(
                        opened,
                        known.split,
                        known.match,
                        known.batches,
                        known.planted,
                        partial,
                        known.task,
                    )
                found.append(one_run)
    drawing.write(out, "tug_of_war", content(found), page(found), lambda path: draw(path, found))
    if processes.leads():
        files.remove_folder(partial)
    if out.parent == folders[0]:
        write_page(folders[0])


def _checkpoint(word: str) -> list[str | int]:
    """Reads a word of --which."""
    if word in ("newest", "best", "all"):
        return [word]
    if re.fullmatch("[0-9]{1,18}", word):
        return [int(word)]
    raise UserError(f"--which={word} names no checkpoint; give newest, best, all or a number of steps.")
