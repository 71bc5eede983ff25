"""Counts the parameters of the model that a config describes, without making any."""

from unimed_jax.paths import check_output_file
from unimed_jax.processes import start
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config


def run(arguments: list[str]) -> None:
    """Prints the table, and writes the same numbers to the file that --json names."""
    options = parser(__name__, __doc__)
    options.add_argument("--config", required=True, help=CONFIG_HELP)
    options.add_argument("--json", help="a file for the same numbers")
    known, overrides = options.parse_known_args(arguments)
    config = read_config(known.config, overrides)
    if known.json is not None:
        check_output_file(known.json, "--json")
    start()

    from unimed_jax.analyze import params
    from unimed_jax.files import write_json

    counted = params.count(config)
    print(params.table(counted, config.model))
    if known.json is not None:
        write_json(known.json, {"config": known.config, **counted})
        print(f"wrote {known.json}")
