"""Damaged pictures: a seeded cut of benchmarks/campaigns/fuzz_images.py."""

import itertools
import resource
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from campaigns import fuzz_images

from unimed_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of decoders
CASES = 200
SECONDS, BYTES = 5.0, 600 << 20  # of a case; of all of them


def test_whole_files_are_read():
    for kind, data in fuzz_images.whole_files().items():
        try:
            fuzz_images.read(data)
        except UserError as error:
            raise AssertionError(kind) from error


def test_cases_are_those_of_their_seed():
    first, again, other = (list(itertools.islice(fuzz_images.cases(seed), 50)) for seed in (1, 1, 2))
    bytes_of = lambda case: case[1].__defaults__  # noqa: E731
    assert [name for name, _ in first] == [name for name, _ in again] != [name for name, _ in other]
    assert list(map(bytes_of, first)) == list(map(bytes_of, again)) != list(map(bytes_of, other))


def test_damaged_pictures_are_read_or_refused_in_one_sentence():
    before, read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for name, call in itertools.islice(fuzz_images.cases(0), CASES):
        start = time.process_time()
        try:
            call()
            read += 1
        except UserError as error:
            assert str(error).startswith("image of ") and str(error).isprintable(), name
        except Exception as error:
            raise AssertionError(name) from error
        assert time.process_time() - start < SECONDS, name
    assert CASES // 10 < read < CASES * 9 // 10  # the cases try both
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
