"""Fills the disk under every command, in bytes and in files, at several points of what it writes.

It needs root on Linux.

Each command runs on a small disk in memory that takes only a part of what it writes. It must end
with one sentence and leave whole files, as they were before the command or as they are after it. On
a larger disk the same command must then end with the files of a command that never ran out of space.
"""

import argparse
import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from campaigns import kills
from forked import commands

PARTS = (0.0, 0.3, 0.6, 0.9)  # share of what the command writes
LARGE = 256 << 20  # bytes
MANY = 1 << 16  # files
BOX = (
    "predict",
    "--run=run",
    "--image=image.png",
    "--task=identify",
    "--text={<10><10><60><60>}",
    "--out=box.png",
)
STAGES = {name: kills.SUBJECTS[name] for name in ("build", "train", "evaluate", "export", "chain")} | {
    "picture": kills.Subject(BOX, ".box*", "train"),
    "params": kills.Subject(("params", "--config=run.py", "--json=params.json"), ".params*"),
}


class Room(NamedTuple):
    """Holds the bytes and files that a folder's disk holds."""

    bytes: int
    files: int


def run(arguments: list[str]) -> None:
    """Runs every trial; prints a line for each and the totals.

    A trial fills the disk, checks what is left, frees space and repeats the command.
    """
    options = argparse.ArgumentParser(prog="campaign.py disks", description=__doc__)
    options.add_argument("--only", help="these commands only, with commas")
    known = options.parse_args(arguments)
    began, trials, refused, wrong = time.monotonic(), 0, 0, 0
    kills.SUBJECTS.update(STAGES)
    with tempfile.TemporaryDirectory() as folder, commands(Path(folder)) as workers:
        campaign = kills.Campaign(Path(folder), 0, workers)
        for name in known.only.split(",") if known.only else STAGES:
            needed = _needed(campaign, name)
            for what in ("bytes", "files"):
                for part in PARTS:
                    status, lines = _trial(campaign, name, what, part, needed)
                    trials, refused, wrong = trials + 1, refused + (status == 2), wrong + len(lines)
                    print(
                        f"{name:10s} {part:.0%} of its {what}: {'; '.join(lines) or f'status {status}'}",
                        flush=True,
                    )
    print(
        f"{trials} full disks, {refused} sentences, {wrong} findings, {time.monotonic() - began:.0f} s"
    )
    if wrong:
        raise SystemExit(1)


def _trial(
    campaign: kills.Campaign, name: str, what: str, part: float, needed: Room
) -> tuple[int, list[str]]:
    """Runs the command on a disk that is too small, then on one that is large enough."""
    unbroken, worker = campaign.unbroken(name), campaign.workers[0]
    with _disk(campaign.place / "disk") as disk:
        folder = campaign.fresh(name, disk / name)
        before, after = kills.finals(folder), kills.finals(unbroken)
        used = _used(disk)
        size = used.bytes + int(part * needed.bytes) if what == "bytes" else LARGE
        files = used.files + int(part * needed.files) if what == "files" else MANY
        _remount(disk, size, files)
        status = worker.run(STAGES[name].words, folder)
        said = worker.last_words()
        wrong = kills.halves(folder, before, after)
        if status not in (0, 2) or "Traceback" in said:
            wrong.append(f"status {status}: {said[-400:]}")
        elif status == 2 and not ("unimed_jax: " in said and "No space left" in said.splitlines()[-1]):
            wrong.append(f"another sentence: {said.splitlines()[-1]}")
        _remount(disk, LARGE, MANY)
        try:
            if status:
                campaign.finish(name, folder)
        except RuntimeError as error:
            wrong.append(f"does not go on: {error}")
        else:
            wrong += kills.differences(folder, unbroken)
    return status, wrong


def _needed(campaign: kills.Campaign, name: str) -> Room:
    """Measures what the command writes on a disk that is large enough."""
    with _disk(campaign.place / "disk") as disk:
        folder = campaign.fresh(name, disk / name)
        before = _used(disk)
        campaign.finish(name, folder)
        after = _used(disk)
    return Room(after.bytes - before.bytes, after.files - before.files)


def _used(disk: Path) -> Room:
    facts = os.statvfs(disk)
    return Room((facts.f_blocks - facts.f_bfree) * facts.f_frsize, facts.f_files - facts.f_ffree)


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[Path]:
    """Mounts a disk in memory."""
    place.mkdir(exist_ok=True)
    options = f"size={LARGE},nr_inodes={MANY}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"a small disk cannot be mounted here ({done.stderr.strip()}); run this as root on Linux."
        )
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def _remount(disk: Path, size: int, files: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size},nr_inodes={files}", disk], check=True)
