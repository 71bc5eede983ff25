"""Compares scored runs, or another tool's predictions, with the first of them, answer by answer.

A RUN is a folder that `train` or `evaluate` has scored, or a file of JSON lines {"id": "<set>/<split>/
<id within the set>", "prediction": "..."} about the questions of such a folder (`data export` writes
them). Differences are paired and clustered; verdicts are better, worse or undecided, corrected for
the number of comparisons. It writes compare.json, compare.md and compare.png.
"""

from pathlib import Path

from unimed_jax.errors import UserError
from unimed_jax.paths import check_run_folder
from unimed_jax.processes import start
from unimed_jax.verbs.options import parser


def run(arguments: list[str]) -> None:
    """Reads the kept answers of the runs, and writes table and picture."""
    options = parser(__name__, __doc__)
    options.add_argument("runs", nargs="+", metavar="RUN", help="a scored folder or a file of answers")
    options.add_argument("--split", default="", help="a split (default: the first report's own)")
    options.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (default: 2000)")
    options.add_argument("--out", help="folder of the files (default: compare/ of the first run)")
    known = options.parse_args(arguments)
    if not 2 <= known.resamples <= 100_000:
        raise UserError(f"--resamples={known.resamples} is out of bounds; give 2 to 100000.")
    first = Path(known.runs[0])
    usual = first / "compare" if first.is_dir() else first.with_suffix(".compare")
    out = check_run_folder(usual if known.out is None else known.out, "--out")
    start()

    from unimed_jax.analyze.compare import compare
    from unimed_jax.analyze.compare_report import write

    write(out, compare(known.runs, known.split, known.resamples))
