"""Shows whether answers depend on the image, and whether on the wording of the instruction.

Every test question is asked again without its image, with a blank one, with another case's, and in each
other wording of its instruction. It writes reliance.json, reliance.md, reliance.png and, with every
answer, reliance.jsonl. A run is changed by --config.evaluate.key=value and so on, as by `evaluate`
(--config.evaluate.limit=100 asks 100 questions of each task). A killed command goes on where it stopped.
"""

from pathlib import Path
from typing import Literal, cast

from unimed_jax.paths import check_run_folder
from unimed_jax.processes import start
from unimed_jax.verbs.evaluate import CHANGEABLE
from unimed_jax.verbs.options import changed, parser


def run(arguments: list[str]) -> None:
    """Opens the run, asks all passes and writes the files."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", required=True, help="a run's folder")
    options.add_argument(
        "--which", choices=("newest", "best"), default="newest", help="checkpoint (default: newest)"
    )
    options.add_argument("--split", default="", help="a split (default: test, or else the first scored)")
    options.add_argument("--out", help="folder of the files (default: reliance/ in the run's folder)")
    known, overrides = options.parse_known_args(arguments)
    folder = check_run_folder(known.run, "--run")
    out = check_run_folder(folder / "reliance" if known.out is None else known.out, "--out")
    start()

    from unimed_jax.analyze.reliance import measure_reliance
    from unimed_jax.analyze.run_report.page import write_page
    from unimed_jax.runs.open import open_run, settings_of

    config = changed(settings_of(Path(folder)), overrides, CHANGEABLE)
    opened = open_run(
        folder, which=cast(Literal["newest", "best"], known.which), changed=config.text.changed
    )
    with opened.inside():
        measure_reliance(opened, config, out, known.split)
    if out.parent == folder:
        write_page(folder)
