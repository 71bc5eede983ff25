"""Prints the JSON Schema of a record of the reader jsonl, our own form of data."""

import json

from unimed_jax.verbs.options import parser


def run(arguments: list[str]) -> None:
    """Prints the JSON Schema on standard output."""
    parser(__name__, __doc__).parse_args(arguments)

    from unimed_jax.data.datasets.jsonl import SCHEMA

    print(json.dumps(SCHEMA, indent=1))
