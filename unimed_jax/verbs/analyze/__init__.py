"""Shows why a model does what it does; each command has --help.

analyze tug-of-war --run=DIR [--run=DIR ...]
    compares the gradients that tasks send into the same parameters
"""

import importlib

from unimed_jax.errors import UserError, nearest
from unimed_jax.verbs.options import parser

COMMANDS = ("tug-of-war",)  # each a file of this folder, with _ for -


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
