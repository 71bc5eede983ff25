"""Runs a campaign of faults against the library: `python benchmarks/campaign.py kills --help`, for example.

Each file of campaigns/ is one; what they found stands in docs/reliability.md.
"""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
CAMPAIGNS = sorted(path.stem for path in (HERE / "campaigns").glob("*.py"))

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in CAMPAIGNS:
        sys.exit(f"{__doc__}\nCampaigns: {', '.join(CAMPAIGNS)}")
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]
    importlib.import_module(f"campaigns.{sys.argv[1]}").run(sys.argv[2:])
