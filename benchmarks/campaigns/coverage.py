"""Lets atheris search for pickles and GGUF headers that reach new code in the readers.

    python benchmarks/campaign.py coverage --runs=100000

atheris (pip install atheris; Python 3.11 to 3.13 on Linux) changes bytes and keeps what runs new
lines of the readers. Without it the campaign says so and ends.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

READERS = ("pickle", "gguf")


def run(arguments: list[str]) -> None:
    """Runs the search on each reader and prints a line for each.

    The line says how many inputs were run, and whether one of them led to anything but a refusal.
    """
    parser = argparse.ArgumentParser(prog="campaign.py coverage")
    parser.add_argument("--runs", type=int, default=100_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    try:
        import atheris  # noqa: F401
    except ImportError:
        print(
            "skipped: the package atheris is not installed (pip install atheris; Python 3.11 to "
            "3.13 on Linux)"
        )
        return
    for reader in READERS:
        with tempfile.TemporaryDirectory() as corpus:
            limits = [f"-runs={given.runs}", f"-seed={given.seed}", "-timeout=10", "-rss_limit_mb=2048"]
            command = [sys.executable, __file__, reader, corpus, *limits]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        last = [
            line
            for line in done.stderr.splitlines()
            if line.startswith(("#", "Done", "Uncaught", "ERROR"))
        ]
        result = "no finding" if done.returncode == 0 else f"a finding (status {done.returncode})"
        print(
            f"{reader}: {given.runs} runs, seed {given.seed}, {result}; "
            f"{last[-1] if last else done.stderr[-300:]}"
        )


def search(reader: str, arguments: list[str]) -> None:
    """Runs atheris on one reader; never returns."""
    import atheris

    with atheris.instrument_imports(include=["unimed_jax.interop.tensors", "gguf"]):
        from unimed_jax import pickles
        from unimed_jax.interop.tensors.gguf import GgufFile
    import pickle

    from campaigns import fuzz_pickles, fuzz_weights

    from unimed_jax.errors import UserError

    folder = Path(arguments[0])
    path = Path(tempfile.mkdtemp()) / "it.gguf"

    # What TorchFile makes one sentence of; a crash, a hang or endless memory is a finding.
    refused = (
        pickles.Refused,
        pickle.UnpicklingError,
        ValueError,
        LookupError,
        TypeError,
        OverflowError,
    )

    def read_pickle(data: bytes) -> None:
        with contextlib.suppress(*refused):
            pickles.read_pickle(data, "archive/", 1 << 20)

    def read_gguf(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            file = GgufFile(path)
            for key in file.fields:
                file.value(key, object)

    good = {"pickle": fuzz_pickles.good_pickle, "gguf": fuzz_weights.gguf_bytes}[reader]()
    (folder / "good").write_bytes(good)
    atheris.Setup([sys.argv[0], *arguments], {"pickle": read_pickle, "gguf": read_gguf}[reader])
    atheris.Fuzz()


if __name__ == "__main__":
    search(sys.argv[1], sys.argv[2:])
