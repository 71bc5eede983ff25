"""Draws examples of a data set: images, questions, answers and boxes."""

from unimed_jax.errors import UserError, nearest
from unimed_jax.paths import check_output_file
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config

MOST = 400  # examples: their picture has 100 rows and takes 100 MB while it is drawn


def run(arguments: list[str]) -> None:
    """Opens the set and writes the picture."""
    options = parser(__name__, __doc__)
    options.add_argument("name", help="a reader, or with --config the id of a data set")
    options.add_argument("--path", help="folder of the raw files, for a reader")
    options.add_argument("--config", help=CONFIG_HELP)
    options.add_argument("--out", required=True, help="the picture, a PNG")
    options.add_argument("--split", default="train", help="a split (default: train)")
    options.add_argument("--task", default="", help="of this task only (default: all)")
    options.add_argument("--n", type=int, default=12, help="examples (default: 12)")
    known, overrides = options.parse_known_args(arguments)
    if not 1 <= known.n <= MOST:
        raise UserError(f"--n={known.n} is not a number of examples from 1 to {MOST}; give another.")
    if not known.out.lower().endswith(".png"):
        raise UserError(f"--out={known.out} is not the name of a PNG; let it end in .png.")
    check_output_file(known.out, "--out")

    from unimed_jax.config import DataConfig, SourceConfig
    from unimed_jax.data.datasets import distinct, open_sources
    from unimed_jax.data.example_sheet import example_sheet

    if known.config:
        sets = {
            dataset.id: dataset
            for dataset in distinct(open_sources(read_config(known.config, overrides).data))
        }
        if known.name not in sets:
            raise UserError(
                f"data show: {known.config} has no data set {known.name!r}{nearest(known.name, sets)}"
            )
        dataset = sets[known.name]
    elif overrides:
        raise UserError(f"argument {overrides[0]!r} is unknown; see --help.")
    else:
        (dataset,) = open_sources(DataConfig((SourceConfig(known.name, path=known.path or ""),)))
    count = example_sheet(dataset, known.out, known.split, known.task, known.n)
    print(f"drew {count} examples of {dataset.id} to {known.out}")
