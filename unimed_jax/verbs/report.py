"""Writes report.html: scores, pictures, curves and data of a scored run, or of several side by side.

A RUN is a folder that `train` or `evaluate` has scored. The page is one file without outside
resources: of one run report.html in its folder, of several reports.html in the first one's.
"""

from pathlib import Path

from unimed_jax.errors import UserError
from unimed_jax.parsing import no_file
from unimed_jax.paths import check_output_file
from unimed_jax.processes import start
from unimed_jax.verbs.options import parser


def run(arguments: list[str]) -> None:
    """Reads the folders of the runs and writes the page."""
    options = parser(__name__, __doc__)
    options.add_argument("runs", nargs="+", metavar="RUN", help="a scored folder")
    options.add_argument("--check", help="a check.json of `data check` (default: RUN/check/check.json)")
    options.add_argument("--out", help="the file (default: in the first run's folder)")
    known = options.parse_args(arguments)
    folders = [Path(folder) for folder in known.runs]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; name the folder of a scored run.")
    out = None if known.out is None else check_output_file(known.out, "--out")
    if out is not None and out.suffix != ".html":  # which no other file of a run has
        raise UserError(f"--out={out} is not the name of a page; give one that ends with .html.")
    audit = None if known.check is None else Path(known.check)
    if audit is not None and (reason := no_file(audit)):
        raise UserError(f"--check={audit} {reason}; give a check.json that `data check` wrote.")
    start()

    from unimed_jax.analyze.run_report.page import check_runs, write

    check_runs(folders)
    place = write(folders, out, audit)
    print(f"wrote {place} ({place.stat().st_size / 2**20:.1f} MiB)")
