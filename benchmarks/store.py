"""Measures a large store: time to open, memory of index and grouping, random reads a second.

    python benchmarks/store.py --cache=DIR

The first run builds the store and says how long that took. The same command again opens the store, in
a process that did not build it.

It prints one line of JSON. The images are one pixel each.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data import datasets
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.order import group_examples

INFO = Info("synthetic", ("vqa", "qa"), splits=("train",))
PIXEL = np.zeros((1, 1, 3), np.uint8)


def read(folder, split, options, skipped):
    """Yields four questions an image, four images a patient; every fifth example is text only."""
    for i in range(options["examples"]):
        image, patient, meta = f"image-{i // 4}", f"patient-{i // 16}", {"template": f"t{i % 20}"}
        if i % 5 == 0:
            yield Example(f"r{i}", "qa", f"What is {i}?", str(i), cluster=patient, meta=meta), ()
        else:
            yield Example(f"r{i}", "vqa", f"Is it {i}?", "yes", (image,), None, patient, meta), (PIXEL,)


def resident() -> float:
    """Returns the MiB of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--cache", default="")
    known = parser.parse_args()
    sys.modules["benchmarks.store"] = sys.modules[__name__]
    source = SourceConfig("benchmarks.store", options={"examples": known.examples})
    data = DataConfig((source,), cache=known.cache or tempfile.mkdtemp())
    before, started = resident(), time.monotonic()
    (again,) = datasets.open_sources(data)
    built = time.monotonic() - started
    if built > 5:  # measured in a process that did not build it
        print(json.dumps({"examples": known.examples, "build_s": round(built, 1), "cache": data.cache}))
        return
    columns = again.columns("train")
    groups, _ = group_examples(columns, np.ones(len(columns)))
    row = {
        "examples": len(columns),
        "groups": len(groups),
        "open_s": round(built, 2),
        "open_and_group_s": round(time.monotonic() - started, 2),
        "resident_mib": round(resident() - before, 1),
    }
    examples, random = again.examples("train"), np.random.default_rng(0)
    started = time.monotonic()
    for place in random.integers(0, len(examples), 5000):
        examples[int(place)]
    row["random_reads_per_s"] = round(5000 / (time.monotonic() - started))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
