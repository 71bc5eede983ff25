"""The toy config that plans are made of, compiled once for all tests of plans."""

from pathlib import Path

import pytest

from unimed_jax import main as cli

CONFIG = """
from support.fake_brain import tiny_config
def get_config():
    config = tiny_config()
    config.data.rows = 8
    return config
"""


@pytest.fixture(scope="session")
def cache(built_once) -> Path:
    """A folder with the toy config as plan.py, and what was compiled of it."""

    def plan(folder):
        (folder / "toy.py").write_text(CONFIG)
        assert run(folder, "--topology=cpu:8") == 0

    return built_once("plan", plan)


def run(folder: Path, *arguments: str) -> int:
    given = [f"--config={folder / 'toy.py'}", f"--cache={folder / 'cache'}", f"--out={folder / 'out'}"]
    return cli.main(["plan", *given, *arguments])
