"""Audits the data of a config: counts, faults, and leaks between splits and between sets.

It writes check.json, check.md and pairs.png (the worst pairs of images). The exit status is 1 if
something must be looked at.
"""

import os
from pathlib import Path

from unimed_jax.errors import UserError
from unimed_jax.paths import check_output
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config

MOST = 256  # processes


def run(arguments: list[str]) -> int:
    """Audits every set of config.data and config.evaluate."""
    options = parser(__name__, __doc__)
    options.add_argument("--config", required=True, help=CONFIG_HELP)
    options.add_argument("--out", required=True, help="the folder of the report")
    options.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help="that look at images (default: one a core)",
    )
    known, overrides = options.parse_known_args(arguments)
    if not 1 <= known.processes <= MOST:
        raise UserError(f"--processes={known.processes} is not from 1 to {MOST}; give another number.")
    config = read_config(known.config, overrides)
    check_output(known.out, "--out")
    if os.path.lexists(known.out) and not os.path.isdir(known.out):
        raise UserError(f"--out={known.out} is a file, where a folder belongs; choose another.")

    from unimed_jax.audit.check import audit
    from unimed_jax.audit.report import write_audit

    content, pairs, sets = audit(config, known.processes)
    write_audit(Path(known.out), content, pairs, sets)
    for line in content["look"]:
        print(line)
    print(
        f"wrote {known.out}/check.md and check.json: {len(content['look'])} findings must be looked at"
    )
    return 1 if content["look"] else 0
