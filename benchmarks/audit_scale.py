"""Measures `data check` on many small pictures, of which some are planted copies of others.

    python benchmarks/audit_scale.py --images=100000 --folder=DIR [--processes=2]

It writes the pictures once (JPEG, smooth, with a dark frame, all with something in common as scans
have), then prepares and audits them and prints one line of JSON: seconds and CPU seconds of writing,
preparing and auditing, the largest memory of all processes together, and of the planted copies
(same pixels, re-encoded, smaller, brighter, mirrored) how many were found, and how many pictures
were found beyond them. A second run reads what the first one kept.
"""

import argparse
import io
import json
import multiprocessing
import resource
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from unimed_jax.audit.check import audit
from unimed_jax.config import Config, DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources

SIDE = 128  # pixels
Y, X = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
BODY = (1 / (1 + np.exp(20 * (np.hypot(X, Y) / 0.8 - 1)))).astype(np.float32)  # dark around it
PLANTED = 500  # of each kind
KINDS = ("image", "near", "near", "near", "mirror")


def scene(number: int) -> np.ndarray:
    """Draws a scan of its own: a bright oval, the same for all, with soft structures in it."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (10, 10), dtype=np.uint8))
    inside = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    return (BODY * (90 + 0.5 * inside)).astype(np.uint8)


def changed(image: np.ndarray, change: int) -> np.ndarray:
    if change == 1:
        return image  # re-encoded with another quality below
    if change == 2:
        return np.asarray(Image.fromarray(image).resize((90, 100), Image.Resampling.BILINEAR))
    if change == 3:
        return np.clip(image * 0.7 + 25, 0, 255).astype(np.uint8)
    return image[:, ::-1] if change == 4 else image


def write(task: tuple[Path, int, int, int]) -> list[str]:
    """Writes the pictures of one folder and returns their lines of data.jsonl.

    The pictures from half of all on are test ones; the first of them are changed train ones.
    """
    folder, start, stop, images = task
    place = folder / f"{start:07d}"
    place.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(start, stop):
        planted = number - images // 2
        change, quality = 0, 90
        if 0 <= planted < PLANTED * len(KINDS):
            change = planted // PLANTED
            quality = 60 if change == 1 else 90
            apart = images // 2 // (PLANTED * len(KINDS))  # over all of train
            pixels = changed(scene(planted * apart), change)
        else:
            pixels = scene(number)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        (place / f"{number}.jpg").write_bytes(buffer.getvalue())
        record = {
            "id": str(number),
            "images": [f"{place.name}/{number}.jpg"],
            "task": "vqa",
            "question": f"Is finding {number % 5000} there?",
            "answer": "yes" if number % 3 else "no",
            "split": "train" if planted < 0 else "test",
        }
        lines.append(json.dumps(record))
    return lines


class Memory(threading.Thread):
    """Notes the largest memory that this process and those it starts hold together, in MiB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            total = 0
            for status in Path("/proc").glob("[0-9]*/smaps_rollup"):
                try:
                    parent = (status.parent / "stat").read_text().rpartition(")")[2].split()[1]
                    own = multiprocessing.current_process().pid
                    if str(own) in (status.parent.name, parent):
                        text = status.read_text()  # Pss: shared pages count once
                        total += int(text.partition("\nPss:")[2].split()[0])
                except (OSError, ValueError, IndexError):
                    continue
            self.most = max(self.most, total / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--processes", type=int, default=2)
    known = parser.parse_args()
    if known.images < 2 * PLANTED * len(KINDS):
        parser.error(f"--images={known.images} has no place for the planted ones; give 5000 or more")
    folder = Path(known.folder)
    seconds: dict[str, list[float]] = {}

    def clocked(name: str, work):
        before = time.monotonic(), cpu()
        out = work()
        seconds[name] = [round(time.monotonic() - before[0]), round(cpu() - before[1])]
        return out

    if not (folder / "data.jsonl").exists():
        tasks = [
            (folder, start, min(start + 1000, known.images), known.images)
            for start in range(0, known.images, 1000)
        ]

        def written() -> None:
            with multiprocessing.get_context("spawn").Pool(known.processes) as pool:
                lines = [line for some in pool.imap(write, tasks) for line in some]
            (folder / "data.jsonl").write_text("\n".join(lines) + "\n")

        clocked("write", written)
    memory = Memory()
    memory.start()
    data = DataConfig((SourceConfig("jsonl", path=str(folder)),), cache=str(folder / "cache"))
    clocked("prepare", lambda: open_sources(data))
    content, pairs, _ = clocked("audit", lambda: audit(Config(data=data), known.processes))
    memory.done.set()
    leaks = {kind: counts["train_test"] for kind, counts in content["sets"]["jsonl"]["leaks"].items()}
    planted = {kind: PLANTED * KINDS.count(kind) for kind in ("image", "near", "mirror")}
    print(
        json.dumps(
            {
                "images": known.images,
                "wall_and_cpu_seconds": seconds,
                "memory_mib": round(memory.most),
                "planted": planted,
                "found": {kind: leaks[kind] for kind in planted},
            }
        )
    )


def cpu() -> float:
    """Returns the CPU seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
