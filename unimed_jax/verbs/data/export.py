"""Writes the questions and images of config.evaluate for another tool to answer.

The files are questions.jsonl and images/*.png.
"""

import dataclasses

from unimed_jax.paths import check_output
from unimed_jax.processes import start
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config


def run(arguments: list[str]) -> None:
    """Writes what config.evaluate asks, of one split or all of its splits."""
    options = parser(__name__, __doc__)
    options.add_argument("--config", required=True, help=CONFIG_HELP)
    options.add_argument("--out", required=True, help="the new folder")
    options.add_argument("--split", help="this split only (default: those of config.evaluate)")
    known, overrides = options.parse_known_args(arguments)
    config = read_config(known.config, overrides)
    check_output(known.out, "--out")
    start()
    if known.split and not config.evaluate.entries:
        config = dataclasses.replace(
            config, evaluate=dataclasses.replace(config.evaluate, splits=(known.split,))
        )

    from unimed_jax.evaluate.questions import export_questions

    asked, images = export_questions(config, known.out, known.split)
    print(f"wrote {asked} questions and {images} images to {known.out}; score the answers with:")
    print(f"python -m unimed_jax.main evaluate --config={known.config} --predictions=FILE")
