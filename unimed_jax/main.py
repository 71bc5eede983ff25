"""Runs a verb: `python -m unimed_jax.main [verb] --config=FILE | --run=DIR`.

Every file of verbs/ is a verb; its first line says what it does, and `<verb> --help` lists its arguments.
"""

import importlib
import os
import pkgutil
import sys

from unimed_jax import processes, verbs
from unimed_jax.errors import UserError, nearest
from unimed_jax.interruption import Stopped, explain_full_disk, stoppable

VERBS = sorted(name for _, name, _ in pkgutil.iter_modules(verbs.__path__) if name != "options")


def main(argv: list[str] | None = None) -> int:
    """Runs a verb (`train` if none is named) and returns the exit status.

    A mistake that the user can mend is one sentence on stderr and status 2; a stop by SIGTERM or Ctrl-C is one
    sentence and status 143 or 130.
    """
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss PyTorch, which nothing here needs
    if argv[:1] in (["--help"], ["-h"]):
        print(_help())
        return 0
    try:
        verb = argv[0] if argv and not argv[0].startswith("-") else "train"
        if verb not in VERBS:
            raise UserError(f"{verb!r} is not a verb{nearest(verb, VERBS)} Choose from {', '.join(VERBS)}.")
        with processes.quiet(), stoppable(), explain_full_disk(), processes.explain_lost_process():
            processes.join()
            _module(verb).run(argv[1:] if argv[:1] == [verb] else argv)
    except UserError as error:
        print(f"unimed_jax: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"unimed_jax: {stop}", file=sys.stderr)
        return stop.status
    return 0


def _module(verb: str):
    return importlib.import_module(f"unimed_jax.verbs.{verb}")


def _help() -> str:
    lines = [f"  {verb:10} {(_module(verb).__doc__ or '').splitlines()[0]}" for verb in VERBS]
    return f"{__doc__}\nverbs (without one: train):\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
