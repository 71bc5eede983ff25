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

from unimed_jax.verbs.options import run_command

# each a file of this folder, with _ for -
COMMANDS = ("tug-of-war", "reliance", "experts", "ablation", "routing", "tokens")


def run(arguments: list[str]) -> int | None:
    """Reads which command is meant and runs it; returns its exit status."""
    return run_command(__name__, __doc__, COMMANDS, arguments)
