"""Finds the folders of golden cases.

This is not in conftest.py: there is one in several folders of tests, and which of them
`import conftest` means depends on what was collected last.
"""

from pathlib import Path

GOLDENS = Path(__file__).parents[1] / "goldens"


def golden_folder(config, module) -> Path:
    """Returns `--goldens`, or the folder in tests/goldens that a test file names as its GOLDENS."""
    return Path(config.getoption("--goldens") or GOLDENS / getattr(module, "GOLDENS", "uni_med"))
