"""Works with data sets: looks at them, makes synthetic twins of them, writes their questions for other tools.

data show NAME (--path=DIR or --config=FILE) --out=FILE.png   examples with images, questions, answers and boxes
data twin NAME --out=DIR [--layout=...] [--n=24]   synthetic data in the exact layout of a real set
data schema                                        the JSON Schema of our own form of data (the reader jsonl)
data export --config=FILE --out=DIR [--split=test] questions.jsonl and images/*.png, without the answers
"""

import dataclasses
import json

from unimed_jax.errors import UserError, nearest
from unimed_jax.paths import check_output, check_output_file
from unimed_jax.processes import start
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config


def run(arguments: list[str]) -> None:
    """Reads which command is meant and runs it."""
    if arguments[:1] in (["--help"], ["-h"]):
        parser(__name__, __doc__).parse_args(arguments)
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        raise UserError(f"data: {command!r} is not one of {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
    COMMANDS[command](arguments[1:])


def show(arguments: list[str]) -> None:
    """Draws examples of a data set."""
    options = parser(__name__, __doc__)
    options.add_argument("name", help="a reader, or with --config the id of a data set")
    options.add_argument("--path", help="folder of the raw files, for a reader")
    options.add_argument("--config", help=CONFIG_HELP)
    options.add_argument("--out", required=True, help="the picture, a PNG")
    options.add_argument("--split", default="train")
    options.add_argument("--task", default="", help="of this task only")
    options.add_argument("--n", type=int, default=12, help="examples")
    known, overrides = options.parse_known_args(arguments)
    if known.n < 1:
        raise UserError(f"--n={known.n} draws nothing; give 1 or more.")
    check_output_file(known.out, "--out")

    from unimed_jax.config import DataConfig, SourceConfig
    from unimed_jax.data.datasets import distinct, open_sources
    from unimed_jax.data.example_sheet import example_sheet

    if known.config:
        sets = {dataset.id: dataset for dataset in distinct(open_sources(read_config(known.config, overrides).data))}
        if known.name not in sets:
            raise UserError(f"data show: {known.config} has no data set {known.name!r}{nearest(known.name, sets)}")
        dataset = sets[known.name]
    elif overrides:
        raise UserError(f"argument {overrides[0]!r} is unknown; see --help.")
    else:
        (dataset,) = open_sources(DataConfig((SourceConfig(known.name, path=known.path or ""),)))
    count = example_sheet(dataset, known.out, known.split, known.task, known.n)
    print(f"drew {count} examples of {dataset.id} to {known.out}")


def twin(arguments: list[str]) -> None:
    """Writes a synthetic twin of a data set."""
    options = parser(__name__, __doc__)
    options.add_argument("name", help="a reader (unimed_jax/data/twins)")
    options.add_argument("--out", required=True, help="the new folder")
    options.add_argument("--layout", default="", help="one of the set's layouts (default: its first)")
    options.add_argument("--n", type=int, default=24, help="records of the training split, about")
    options.add_argument("--seed", type=int, default=0)
    known = options.parse_args(arguments)
    if known.n < 1 or known.seed < 0:
        raise UserError("data twin: --n is at least 1 and --seed at least 0.")
    check_output(known.out, "--out")

    from unimed_jax.data.twins import write_twin

    write_twin(known.name, known.out, known.n, known.layout, known.seed)
    print(f"wrote a twin of {known.name} to {known.out}")


def schema(arguments: list[str]) -> None:
    """Prints the JSON Schema of a record of the reader jsonl."""
    parser(__name__, __doc__).parse_args(arguments)

    from unimed_jax.data.datasets.jsonl import SCHEMA

    print(json.dumps(SCHEMA, indent=1))


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


COMMANDS = {"show": show, "twin": twin, "schema": schema, "export": export}
