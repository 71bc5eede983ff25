"""Works with data sets: `data export` writes the questions and images that another tool needs to answer them.

data export --config=FILE --out=DIR [--split=test]   questions.jsonl and images/*.png, without the answers
"""

import dataclasses

from unimed_jax.errors import UserError, nearest
from unimed_jax.paths import check_output
from unimed_jax.processes import start
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config

COMMANDS = ("export",)


def run(arguments: list[str]) -> None:
    """Reads which command is meant and runs it."""
    if arguments[:1] in (["--help"], ["-h"]):
        parser(__name__, __doc__).parse_args(arguments)
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        raise UserError(f"data: {command!r} is not one of {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
    export(arguments[1:])


def export(arguments: list[str]) -> None:
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
        config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, splits=(known.split,)))

    from unimed_jax.evaluate.questions import export_questions

    asked, images = export_questions(config, known.out, known.split)
    print(f"wrote {asked} questions and {images} images to {known.out}; score the answers with:")
    print(f"python -m unimed_jax.main evaluate --config={known.config} --predictions=FILE")
