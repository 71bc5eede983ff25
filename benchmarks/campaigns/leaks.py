"""Watches memory, threads and open files over a long run and many evaluations in one process.

It prints a row for each tenth of the way, and the slope of each value by least squares over the second
half: what libraries allocate only once is allocated before that.
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Held(NamedTuple):
    """Holds what this process uses at one moment."""

    mib: float  # resident memory
    threads: int
    files: int  # open descriptors


def run(arguments: list[str]) -> None:
    """Trains, then evaluates many times, and prints what the process holds on the way."""
    options = argparse.ArgumentParser(prog="campaign.py leaks", description=__doc__)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--evaluations", type=int, default=200)
    options.add_argument("--compiled", default="", help="a folder for what is compiled")
    known = options.parse_args(arguments)
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": known.compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    from support.fake_brain import tiny_config

    from unimed_jax.evaluate.run import evaluate_run
    from unimed_jax.runs.open import open_run
    from unimed_jax.settings import from_config_dict
    from unimed_jax.train import loop
    from unimed_jax.train.log import Log

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        settings = tiny_config(steps=known.steps, save_every=20, log_every=1)
        settings.data.cache, source = f"{place}/cache", settings.data.sources[0]
        # Without captions, whose METEOR starts a Java program for each evaluation.
        settings.data.sources = ({**source, "tasks": ("vqa", "refer", "identify", "cls", "qa")},)
        settings.evaluate.splits, settings.evaluate.limit, settings.evaluate.max_new_tokens = (
            ("test",),
            2,
            2,
        )
        config = from_config_dict(settings)
        write, watch = Log.write, Watch("steps", known.steps)

        def watching(self: Log, step: int, values: dict) -> None:
            write(self, step, values)
            watch.look()

        Log.write = watching  # type: ignore[method-assign]
        loop.train(config, folder)
        Log.write = write  # type: ignore[method-assign]
        watch.sum_up()

        watch = Watch("evaluations", known.evaluations)
        for _ in range(known.evaluations):
            opened = open_run(folder)
            with opened.inside():
                evaluate_run(opened, config)
            watch.look()
        watch.sum_up()


class Watch:
    """Notes what this process holds each time it looks, and prints it ten times on the way."""

    def __init__(self, what: str, count: int):
        self.what, self.count, self.rows, self.began = what, count, list[Held](), time.monotonic()

    def look(self) -> None:
        self.rows.append(held())
        done, (mib, threads, files) = len(self.rows), self.rows[-1]
        if done == 1 or done % max(1, self.count // 10) == 0:
            print(
                f"{self.what} {done:5d}: {mib:7.1f} MiB, {threads:3d} threads, {files:3d} open files, "
                f"{time.monotonic() - self.began:.0f} s",
                flush=True,
            )

    def sum_up(self) -> None:
        """Prints the slopes of the second half."""
        half = len(self.rows) // 2
        table = np.array(self.rows[half:], float)  # [half of count, 3]
        mib, threads, files = np.polyfit(np.arange(len(table)), table, 1)[0]
        print(
            f"{len(self.rows)} {self.what}; from the middle on {1024 * mib:+.2f} KiB, "
            f"{threads:+.5f} threads and {files:+.5f} open files each",
            flush=True,
        )


def held() -> Held:
    """Reads what this process holds from Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    native = len(os.listdir("/proc/self/task"))
    assert native >= threading.active_count()
    return Held(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, native, len(os.listdir("/proc/self/fd")))
