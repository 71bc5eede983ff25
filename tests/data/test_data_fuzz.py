"""A seeded cut of benchmarks/campaigns/fuzz_data.py: damaged data files give their records or one
sentence.
"""

import itertools
import sys
from pathlib import Path

import pytest

from unimed_jax.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from campaigns import fuzz_data  # noqa: E402


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_data_files_are_one_sentence(seed):
    refused = read = 0
    for name, call in itertools.islice(fuzz_data.cases(seed), 100):
        try:
            call()
            read += 1
        except UserError as error:
            assert "\n" not in str(error), name
            str(error).encode()
            refused += 1
        except Exception as error:
            raise AssertionError(name) from error
    assert refused > 50 and read > 3  # damage is seen, and does not spoil what it does not touch


def test_the_same_seed_makes_the_same_cases():
    first, second = ([name for name, _ in itertools.islice(fuzz_data.cases(5), 8)] for _ in range(2))
    assert first == second and len(set(first)) == 8
