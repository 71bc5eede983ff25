"""Measures the way of data: decoding, preparing, reading prepared records, and the training pipeline.

    python benchmarks/data_throughput.py [--only=decode,prepare,memory,pipeline] [--real=DIR]

Each figure stands a second of wall time and a second of CPU time, all threads and processes taken
together: on a busy machine the second is the one to trust, and it is the figure of one core.

- decode: reads a picture's file and fits it to 224 x 224, on one core; --real=DIR has the real sets
  (docs/real_data.md), without it only synthetic pictures are read;
- prepare: prepares synthetic pictures, and VQA-RAD, by 0, 1 and 2 processes, as found and encoded again;
- memory: builds and reads a set of 200,000 records, and says what the process holds on the way;
- pipeline: makes training batches of configs/brain_tiny.py without any cached image, with the cache,
  and takes training steps on one of them.
"""

import argparse
import itertools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import numpy as np
from PIL import Image

from unimed_jax.config import DataConfig, ReencodeConfig, SourceConfig, VisionConfig
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.example import Example
from unimed_jax.data.fitting import fit
from unimed_jax.data.image_shards import processes
from unimed_jax.data.images import read_image
from unimed_jax.data.info import Info

HEADER = ("what", "count", "a wall second", "a CPU second", "wall s", "CPU s", "MiB held")
FOLDERS = {
    "VQA-RAD": "vqa_rad/VQA_RAD Image Folder",
    "MedPix 2.0": "medpix2/images",
    "BCCD": "bccd/JPEGImages",
}
INFO = Info("pictures", ("vqa",), splits=("train",))


def read(folder, split, options, skipped):
    """Yields two questions about each picture of a folder, or questions of text if there is none."""
    if not options.get("folder"):
        for i in range(options["records"]):
            meta = {"template": f"t{i % 20}"}
            yield Example(f"r{i}", "qa", f"What is {i}?", str(i), cluster=f"p{i // 8}", meta=meta), ()
        return
    for path in sorted(Path(options["folder"]).iterdir()):
        for word in ("where", "what"):
            yield Example(f"{path.name}/{word}", "vqa", f"{word}?", "here", (path.name,)), (path,)


def cpu() -> float:
    """Returns the CPU seconds of this process and of those of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def resident() -> float:
    """Returns the MiB of memory that this process holds now, without mapped files."""
    _, pages, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(pages) - int(shared)) * resource.getpagesize() / 2**20


def measured(what: str, run: Callable[[], int]) -> list[str]:
    """Runs something that returns a count, and makes a row of the table."""
    wall, used = time.perf_counter(), cpu()
    count = run()
    wall, used = time.perf_counter() - wall, cpu() - used
    held = f"{resident():.0f}"
    row = [
        what,
        str(count),
        f"{count / wall:.1f}",
        f"{count / used:.1f}",
        f"{wall:.2f}",
        f"{used:.2f}",
        held,
    ]
    print("  ".join(row), file=sys.stderr, flush=True)
    return row


def write_pictures(folder: Path, count: int, kind: str, side: int) -> None:
    """Writes synthetic pictures that compress as radiographs do: smooth shapes and a little noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-4, 5, (side, side)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).convert("RGB").save(folder / f"{i:05d}.{kind}")


def decode(real: str, folder: Path, count: int) -> Iterator[list[str]]:
    places = {name: Path(real, place) for name, place in FOLDERS.items() if real}
    for kind, side in (("jpg", 512), ("png", 512), ("jpg", 2048)):
        places[f"synthetic {kind}, {side} x {side}"] = made = folder / f"{kind}{side}"
        write_pictures(made, 40 if side > 1000 else 100, kind, side)
    for name, place in places.items():
        paths = sorted(path for path in place.iterdir() if path.suffix in (".jpg", ".jpeg", ".png"))
        some = paths[:: max(1, len(paths) // count)][:count]

        def run(some=some) -> int:
            for path in some:
                fit(read_image(path), "stretch", VisionConfig(image_size=224))
            return len(some)

        yield measured(f"decode and resize to 224, {name}", run)


def prepare(real: str, folder: Path, count: int) -> Iterator[list[str]]:
    write_pictures(folder / "raw", count, "jpg", 512)
    made = SourceConfig("benchmarks.data_throughput", options={"folder": str(folder / "raw")})
    sets = {"synthetic jpg, 512 x 512": (made, count)}
    if real:
        sets["VQA-RAD"] = SourceConfig("vqa_rad", path=str(Path(real, "vqa_rad"))), 314
    for (name, (source, images)), size, workers in itertools.product(sets.items(), (0, 224), (0, 1, 2)):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            data = DataConfig((source,), cache=cache, reencode=ReencodeConfig(size=size))

            def run(data=data, workers=workers, images=images) -> int:
                with processes(workers) as pool:
                    open_sources(data, workers, pool)
                return images

            how = "encoded again at 224" if size else "as found"
            yield measured(f"images prepared, {how}, {name}, {workers} processes", run)


def memory(folder: Path, records: int) -> Iterator[list[str]]:
    """Builds a set in quarters of its final size and reads it in random order."""
    for share in (4, 2, 1):
        data = DataConfig(
            (SourceConfig("benchmarks.data_throughput", options={"records": records // share}),),
            cache=str(folder / "cache"),
        )
        yield measured(f"records prepared, {records // share}", lambda: len(opened(data)))  # noqa: B023
    (dataset,) = open_sources(data)
    examples, order = dataset.examples("train"), np.random.default_rng(0).permutation(records)
    for part in np.array_split(order, 4):

        def run(part=part) -> int:
            for number in part:
                examples[int(number)]
            return len(part)

        yield measured(f"records read at random, of {records}", run)
    yield measured(f"records read in order, of {records}", lambda: sum(1 for _ in examples))


def opened(data: DataConfig):
    (dataset,) = open_sources(data)
    return dataset.examples("train")


def pipeline(folder: Path, steps: int) -> Iterator[list[str]]:
    """Takes batches of brain_tiny alone, then training steps of one batch alone."""
    from unimed_jax.data.pipeline import Pipeline
    from unimed_jax.model import sharding
    from unimed_jax.train.start import prepare as started
    from unimed_jax.verbs.options import read_config

    for cached in (0, 256):
        config = read_config("configs/brain_tiny.py", [f"--config.data.image_cache_mib={cached}"])
        start = started(config, folder / f"run{cached}")
        pipe = Pipeline(start.datasets, config, start.tokenizer)
        batches = pipe.batches()
        # the first steps start threads, and all images of the cache are asked for once
        first = list(itertools.islice(batches, 100 if cached else 5))

        def run(batches=batches, pipe=pipe) -> int:
            return sum(int(pipe.stats(b)["examples"]) for b in itertools.islice(batches, steps))

        yield measured(f"examples of the pipeline, image cache {cached} MiB", run)
    with sharding.inside(start.program.mesh):
        batch, rate = sharding.on_devices(first[0], start.program.mesh), np.float32(1e-4)

        def step(count: int) -> int:
            for _ in range(count):
                start.state, metrics = start.program.step(start.state, start.frozen, batch, rate)
            float(metrics["loss"])  # waits
            return count * int(pipe.stats(first[0])["examples"])

        step(2)  # compiles
        yield measured("examples of the training step", lambda: step(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="decode,prepare,memory,pipeline")
    parser.add_argument("--real", default=os.environ.get("UNIMED_JAX_REAL_DATA", ""))
    parser.add_argument("--images", type=int, default=1000, help="synthetic pictures that are prepared")
    parser.add_argument("--files", type=int, default=150, help="files of a set that are decoded")
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=40)
    known = parser.parse_args()
    sys.modules["benchmarks.data_throughput"] = sys.modules[__name__]
    print(harness.machine(len(os.sched_getaffinity(0))))
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as place:
        parts = {
            "decode": lambda folder: decode(known.real, folder, known.files),
            "prepare": lambda folder: prepare(known.real, folder, known.images),
            "memory": lambda folder: memory(folder, known.records),
            "pipeline": lambda folder: pipeline(folder, known.steps),
        }
        for name in known.only.split(","):
            folder = Path(place, name)
            folder.mkdir()
            rows += parts[name](folder)
    print(harness.table(HEADER, rows))


if __name__ == "__main__":
    harness.run(main)
