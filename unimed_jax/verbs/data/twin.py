"""Writes a synthetic twin of a data set, in the exact layout of the real files."""

from unimed_jax.errors import UserError
from unimed_jax.paths import check_output
from unimed_jax.verbs.options import parser

MOST = 1_000_000  # records


def run(arguments: list[str]) -> None:
    """Writes the twin into a new folder."""
    options = parser(__name__, __doc__)
    options.add_argument("name", help="a reader (unimed_jax/data/twins)")
    options.add_argument("--out", required=True, help="the new folder")
    options.add_argument("--layout", default="", help="one of the set's layouts (default: its first)")
    options.add_argument(
        "--n", type=int, default=24, help="records of the training split, about (default: 24)"
    )
    options.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    known = options.parse_args(arguments)
    if not 1 <= known.n <= MOST:
        raise UserError(f"--n={known.n} is not a number of records from 1 to {MOST}; give another.")
    if known.seed < 0:
        raise UserError(f"--seed={known.seed} is below 0; give another.")
    check_output(known.out, "--out")

    from unimed_jax.data.twins import write_twin

    write_twin(known.name, known.out, known.n, known.layout, known.seed)
    print(f"wrote a twin of {known.name} to {known.out}")
