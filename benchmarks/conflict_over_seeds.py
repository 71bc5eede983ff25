"""Tabulates how much tasks conflict at several connectors, over seeds.

    python benchmarks/conflict_over_seeds.py SWEEP/tug_of_war/seed*/tug_of_war.json

Each file is what `analyze tug-of-war` wrote of one seed's runs, in folders VARIANT/seedN, the same
variants in each; two files or more. An index is that of the whole connector, averaged over seeds. Its
difference from the first variant is paired by seed; the interval is Student's t over seeds (95 %), not
corrected for the number of lines. "-" is an index that some seed does not define. Without noise the mean
cosine is that over the pairs of tasks that all variants of the seed know.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import table
from scipy import stats

from unimed_jax.analyze.conflict import WITHOUT_NOISE
from unimed_jax.analyze.tug_of_war_report import TITLES
from unimed_jax.errors import UserError
from unimed_jax.parsing import read_json

PART = "connector"
Pair = tuple[str, str]  # of tasks


def indices(file: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """Reads the seed's name of a file, and the indices of each variant.

    NaN stands for what is not defined. Raises UserError for a file of another kind, for one of several
    seeds, and for one that holds a variant twice.
    """
    content = read_json(file, "give what analyze tug-of-war wrote")
    found: dict[str, dict[str, float]] = {}
    cosines: dict[str, dict[Pair, float | None]] = {}
    seeds: set[str] = set()
    batches: set[str] = set()
    try:
        for run in content["runs"]:
            part, folder = run["units"][PART], Path(run["run"])
            values = {key: part["indices"][key]["value"] for key in TITLES}
            if folder.parent.name in found:
                raise UserError(
                    f"{file} holds two runs of {folder.parent.name!r}, {folder} among them; analyse one "
                    "checkpoint of each variant, and each seed by itself."
                )
            found[folder.parent.name] = {k: np.nan if v is None else v for k, v in values.items()}
            cosines[folder.parent.name] = {
                (min(one, other), max(one, other)): part["cos_without_noise"][i][j]
                for i, one in enumerate(part["names"])
                for j, other in enumerate(part["names"][:i])
            }
            seeds.add(folder.name)
            batches.add(run["batches"])
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{file} holds no indices of a connector (lacks {error}); give what analyze tug-of-war "
            "wrote."
        ) from error
    if len(seeds) != 1:
        raise UserError(
            f"{file} holds runs of {', '.join(sorted(seeds)) or 'no seed'}; analyse each seed by itself."
        )
    if len(batches) > 1:
        raise UserError(f"{file} holds runs that were measured on other examples; analyse them alike.")
    known = set.intersection(*({p for p, c in of.items() if c is not None} for of in cosines.values()))
    for variant, of in cosines.items():
        found[variant][WITHOUT_NOISE] = np.mean([of[pair] for pair in known]) if known else np.nan
    return seeds.pop(), found


def cell(values: Sequence[float], against: Sequence[float] | None) -> str:
    """Writes a mean over seeds and, beside another variant, the paired difference with its interval."""
    if not np.isfinite([*values, *(against or ())]).all():
        return "-"
    mean = f"{np.mean(values):.3f}"
    if against is None:
        return f"{mean} ({min(values):.3f} .. {max(values):.3f})"
    difference = np.subtract(values, against)
    spread = difference.std(ddof=1) / len(difference) ** 0.5
    if spread < 1e-12:  # which says nothing of other seeds
        return f"{mean}: {difference.mean():+.3f} in every seed"
    reach = stats.t.ppf(0.975, len(difference) - 1) * spread
    low, high = difference.mean() - reach, difference.mean() + reach
    return f"{mean}: {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def lines(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> list[list[Any]]:
    """Makes a line for each variant, in the order of the first file."""
    first = next(iter(seeds[0]))
    return [
        [
            variant,
            *(
                cell(
                    [seed[variant][key] for seed in seeds],
                    None if variant == first else [seed[first][key] for seed in seeds],
                )
                for key in TITLES
            ),
        ]
        for variant in seeds[0]
    ]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files = options.parse_args().files
    if len(files) < 2:
        options.error("one file holds one seed; give those of two or more.")
    try:
        names, seeds = zip(*(indices(file) for file in files), strict=True)
    except UserError as error:
        options.error(str(error))
    for file, name, seed in zip(files, names, seeds, strict=True):
        if names.count(name) > 1:
            options.error(f"{file} holds {name}, as another file does; give each seed once.")
        if seed.keys() != seeds[0].keys():
            options.error(f"{file} holds {', '.join(seed)}, and {files[0]} {', '.join(seeds[0])}.")
    print(table(["variant", *TITLES.values()], lines(seeds)))
    first = next(iter(seeds[0]))
    print(f"\n{len(seeds)} seeds; {first}: (least .. largest), others: difference from {first} [95 %].")


if __name__ == "__main__":
    main()
