"""Shows why a model does what it does; each command has --help.

analyze tug-of-war --run=DIR [--run=DIR ...]
    compares the gradients that tasks send into the same parameters
analyze reliance --run=DIR
    asks test questions again without their image, with others, and in other words
analyze experts --run=DIR
    measures the experts' weights: norms, distances, moves, and the updates of single tasks
analyze ablation --run=DIR
    switches experts off, one at a time, and measures what each task loses
analyze routing --run=DIR
    measures which experts each task, data set, modality and place goes to
analyze tokens --run=DIR
    draws visual tokens before and after the connector in two dimensions, by task
"""

import importlib

from unimed_jax.errors import UserError, nearest
from unimed_jax.verbs.options import parser

# each a file of this folder, with _ for -
COMMANDS = ("tug-of-war", "reliance", "experts", "ablation", "routing", "tokens")


def run(arguments: list[str]) -> int | None:
    """Reads which command is meant and runs it; returns its exit status."""
    if arguments[:1] in (["--help"], ["-h"]):
        parser(__name__, __doc__).parse_args(arguments)
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        raise UserError(
            f"analyze: {command!r} is not one of {', '.join(COMMANDS)}{nearest(command, COMMANDS)}"
        )
    return importlib.import_module(f"{__name__}.{command.replace('-', '_')}").run(arguments[1:])
