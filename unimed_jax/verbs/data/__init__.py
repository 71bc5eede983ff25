"""Works with data sets; each command has --help.

data show NAME (--path=DIR or --config=FILE) --out=FILE.png
    draws examples with images, questions, answers and boxes
data prepare --config=FILE [--workers=N] [--strict] [--image-size=N ...]
    reads the raw files once and keeps them in a form that opens at once
data check --config=FILE --out=DIR
    counts examples, finds faults, and finds leaks between splits and between sets
data twin NAME --out=DIR [--layout=...] [--n=24]
    writes synthetic data in the exact layout of a real set
data subset --path=DIR --out=DIR [--per_class=...] [--seed=0] ...
    writes a seeded part of SA-Med2D-20M in boxes, and says what each class gets
data schema
    prints the JSON Schema of our own form of data (the reader jsonl)
data export --config=FILE --out=DIR [--split=test]
    writes questions.jsonl and images/*.png, without the answers
"""

from unimed_jax.verbs.options import run_command

# each a file of this folder
COMMANDS = ("show", "prepare", "check", "twin", "subset", "schema", "export")


def run(arguments: list[str]) -> int | None:
    """Reads which command is meant and runs it; returns its exit status."""
    return run_command(__name__, __doc__, COMMANDS, arguments)
