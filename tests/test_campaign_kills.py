"""Five kills of the campaign (benchmarks/campaigns/kills.py): in training, building, evaluating and
exporting.
"""

import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "campaign.py"


@pytest.mark.slow
def test_five_kills_leave_what_an_unbroken_command_leaves():
    command = [sys.executable, str(CAMPAIGN), "kills", "--short", "--seed=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills, 0 findings" in done.stdout
