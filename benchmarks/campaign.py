"""Runs one of the campaigns in the folder `campaigns`.

For example: `python benchmarks/campaign.py fuzz --reader=pth --cases=1000`.
"""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    names = sorted(
        file.stem for file in (HERE / "campaigns").glob("*.py") if not file.stem.startswith("fuzz_")
    )
    if not arguments or arguments[0] not in names:
        sys.exit(f"name a campaign: {', '.join(names)}.")
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]
    importlib.import_module(f"campaigns.{arguments[0]}").run(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
