"""Kills commands at random moments, repeats them, and compares their files with unbroken ones.

The commands are training, saving, building a data set, evaluating, exporting, a chain of two stages
and a run of two processes, on coloured squares. After every kill each file under its final name must
be whole: its state from before the command, or its state from the end. After the last kill the losses
and all files must be those of a command that was never killed, and no other files may be there.
"""

import argparse
import dataclasses
import json
import random
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path

from forked import Commands, commands, wait_until
from PIL import Image

# Without captions, whose METEOR starts a Java program for each evaluation.
TASKS = """
from support.fake_brain import tiny_config
TASKS = ("vqa", "refer", "identify", "cls", "qa")
SQUARES = dict(name="support.squares", id="squares", questions=2, tasks=TASKS)
"""
RUN = """{tasks}
def get_config(argument=""):
    config = tiny_config(steps=60, save_every=3)
    config.name, config.data.cache, config.data.sources = "run", "cache", (SQUARES,)
    config.evaluate.splits, config.evaluate.limit, config.evaluate.max_new_tokens = ("test",), 2, 2
    return config
"""
STAGE = """{tasks}
def get_config(argument=""):
    config = tiny_config(steps=6, save_every=2)
    config.name, config.init = "chain/{name}", {init}
    config.data.cache, config.data.sources = "cache", (SQUARES,)
    config.evaluate.splits, config.evaluate.limit, config.evaluate.max_new_tokens = ("test",), 1, 2
    return config
"""
CHAIN = """
import ml_collections
def get_config(argument=""):
    return ml_collections.ConfigDict(dict(name="chain", stages=("first.py", "second.py")))
"""
FILES = {
    "run.py": RUN.replace("{tasks}", TASKS),
    "first.py": STAGE.format(tasks=TASKS, name="first", init=(("seed", ""),)),
    "second.py": STAGE.format(
        tasks=TASKS, name="second", init=(("seed", ""), ("run", "runs/chain/first"))
    ),
    "chain.py": CHAIN,
}
RESULTS = ("predictions.jsonl", "predictions.png", "routing.png", "report.md", "metrics.json")
LEFT = re.compile(r"\..+\.\d+(-\d+)?|.*orbax-checkpoint-tmp|.*\.deleted|.*\.partial\.jsonl|.*\.tmp")
# files that are compared in another way, or not at all
OTHER = ("lock", "log.jsonl", "cost.json", "environment.json", "report.html", "__pycache__")


@dataclasses.dataclass(frozen=True)
class Subject:
    """Describes a command that is killed.

    writing: a pattern of what exists in the folder while the command writes. Half of the kills wait for
    that. makes: the folder that it makes at its end, over which it refuses to write.
    """

    words: tuple[str, ...]
    writing: str
    needs: str = ""  # the subject whose folder it starts from
    processes: int = 1
    makes: str = ""


TRAIN = ("--config=run.py", "--workdir=run")
SUBJECTS = {
    "train": Subject(TRAIN, "run/log.jsonl"),
    "save": Subject(TRAIN, "run/checkpoints/*-tmp"),
    "build": Subject(
        ("data", "export", "--config=run.py", "--out=asked"), "cache/.*.[0-9]*", makes="asked"
    ),
    "evaluate": Subject(
        ("evaluate", "--run=run", "--config.evaluate.limit=4"), "run/.metrics*", "train"
    ),
    "export": Subject(
        ("export", "--run=run", "--format=model", "--out=out"), ".out*", "train", makes="out"
    ),
    "chain": Subject(("--config=chain.py", "--workdir=chain"), "chain/*/checkpoints/*-tmp"),
    "processes": Subject((*TRAIN, "--config.train.steps=6"), "run/checkpoints/*-tmp", processes=2),
}
SEQUENCES = {  # numbers of kills before the command may end
    "train": (5, 5),
    "save": (5, 5),
    "build": (3, 3),
    "evaluate": (4, 4),
    "export": (4, 4),
    "chain": (2, 2),
    "processes": (2, 2),
}
SHORT = {"train": (2,), "build": (1,), "evaluate": (1,), "export": (1,)}  # five kills for CI


def run(arguments: list[str]) -> None:
    """Kills and continues every command; prints a line for each sequence and the totals."""
    options = argparse.ArgumentParser(prog="campaign.py kills", description=__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", help="these subjects only, with commas")
    options.add_argument("--short", action="store_true", help="five kills")
    known = options.parse_args(arguments)
    began = time.monotonic()
    sequences = SHORT if known.short else SEQUENCES
    if known.only:
        sequences = {name: SEQUENCES[name] for name in known.only.split(",")}
    count = 2 if "processes" in sequences else 1
    with tempfile.TemporaryDirectory() as folder, commands(Path(folder), count) as workers:
        campaign = Campaign(Path(folder), known.seed, workers)
        found = [
            campaign.sequence(name, n, k) for name, ks in sequences.items() for n, k in enumerate(ks)
        ]
    kills, wrong = (
        sum(len(moments) for moments, _ in found),
        [line for _, lines in found for line in lines],
    )
    print(f"seed {known.seed}: {kills} kills, {len(wrong)} findings, {time.monotonic() - began:.0f} s")
    if wrong:
        raise SystemExit(1)


class Campaign:
    """Makes folders of unbroken commands, and folders in which the same commands are killed."""

    def __init__(self, place: Path, seed: int, workers: list[Commands]):
        self.place, self.seed, self.workers = place, seed, workers
        self.seconds: dict[str, float] = {}  # duration of each unbroken command

    # ---- unbroken ----------------------------------------------------------------------------------
    def fresh(self, name: str, folder: Path) -> Path:
        """Makes a folder in which the command has not run yet."""
        subject = SUBJECTS[name]
        if subject.needs:
            shutil.copytree(self.unbroken(subject.needs), folder)
        else:
            folder.mkdir(parents=True)
        for file, text in FILES.items():
            (folder / file).write_text(text)
        Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "image.png")
        return folder

    def unbroken(self, name: str) -> Path:
        """Returns the folder of a command that was never killed."""
        name = "train" if name == "save" else name
        folder = self.place / "unbroken" / name
        if not folder.exists():
            self.fresh(name, folder)
            self.finish(name, folder)
            began = time.monotonic()  # times a run that finds everything compiled
            shutil.rmtree(folder)
            self.fresh(name, folder)
            self.finish(name, folder)
            self.seconds[name] = time.monotonic() - began
        return folder

    def start(self, name: str, folder: Path) -> list[Commands]:
        subject = SUBJECTS[name]
        used = self.workers[: subject.processes]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        for number, worker in enumerate(used):
            environment = {}
            if len(used) > 1:
                environment = {"JAX_NUM_PROCESSES": str(len(used)), "JAX_PROCESS_ID": str(number)}
                environment["JAX_COORDINATOR_ADDRESS"] = address
            worker.start(subject.words, folder, **environment)
        return used

    def finish(self, name: str, folder: Path) -> None:
        used = self.start(name, folder)
        statuses = [worker.end() for worker in used]
        if any(statuses):
            raise RuntimeError(f"{name}: status {statuses}: {used[0].last_words()}")

    # ---- killed ------------------------------------------------------------------------------------
    def sequence(self, name: str, number: int, kills: int) -> tuple[list[str], list[str]]:
        """Kills the command `kills` times, then lets it end.

        Returns the moments of the kills and what was wrong.
        """
        rng = random.Random(f"{self.seed}/{name}/{number}")
        unbroken = self.unbroken(name)
        folder = self.fresh(name, self.place / f"{name}{number}")
        before, after = finals(folder), finals(unbroken)
        moments, wrong = [], []
        for _ in range(kills):
            moments.append(self.kill(name, folder, rng))
            wrong += halves(folder, before, after)
            if moments[-1] == "after":
                wrong += [f"{file} is missing" for file in sorted(after.keys() - finals(folder).keys())]
                self.again(name, folder)
        try:
            self.finish(name, folder)
        except RuntimeError as error:
            wrong.append(str(error))
        wrong += differences(folder, unbroken)
        print(
            f"{name:10s} {number}: killed {', '.join(moments)}: {'; '.join(wrong) or 'as unbroken'}",
            flush=True,
        )
        if not wrong:
            shutil.rmtree(folder)
        return moments, wrong

    def again(self, name: str, folder: Path) -> None:
        """Removes what a command made that has ended, or was killed just before its process ended."""
        shutil.rmtree(folder)
        self.fresh(name, folder)

    def kill(self, name: str, folder: Path, rng: random.Random) -> str:
        """Starts the command and kills it; returns the moment: before, while or after it wrote."""
        subject, span = SUBJECTS[name], self.seconds["train" if name == "save" else name]
        for _ in range(10):
            used = self.start(name, folder)
            if name == "save" or rng.random() < 0.5:
                wait_until(lambda: any(folder.glob(subject.writing)) or not self.workers[0].alive())
                time.sleep(rng.uniform(0, 0.05 if name == "save" else 0.3))
            else:
                wait_until(lambda: not self.workers[0].alive(), rng.uniform(0.1, 0.9) * span)
            writes = any(folder.glob(subject.writing))
            for worker in used:
                worker.kill()
            statuses = [worker.end() for worker in used]
            if all(status == -9 for status in statuses):
                if subject.makes and (folder / subject.makes).exists():
                    return "after"
                return "writing" if writes else "before"
            if subject.makes and not any(statuses):
                self.again(name, folder)
        raise RuntimeError(f"{name} always ends before it can be killed")


def finals(folder: Path) -> dict[str, bytes]:
    """Reads every file that has its final name.

    Left out are the files of checkpoints, whose bytes hold times, and the log.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        inside = {"checkpoints", "tensorboard", *OTHER} & set(parts)
        if path.is_file() and not hidden and not inside and not LEFT.fullmatch(path.name):
            found["/".join(parts)] = path.read_bytes()
    return found


def halves(folder: Path, before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """Lists files that are half written, and folders that mix the results of two evaluations.

    A file is whole if it equals its state before the command or its state after the command.
    """
    found = finals(folder)
    wrong = [
        f"{name} is half written"
        for name, data in found.items()
        if data not in (before.get(name), after.get(name))
    ]
    for run in {str(Path(name).parent) for name in found if Path(name).name in RESULTS}:
        names = [f"{run}/{name}" for name in RESULTS if f"{run}/{name}" in found]
        one = [all(found[name] == kept.get(name) for name in names) for kept in (before, after)]
        if not any(one):
            wrong.append(f"{run} holds results of two evaluations")
        last = f"{run}/{RESULTS[-1]}"
        if last in names and not any(
            all((f"{run}/{name}" in kept) == (f"{run}/{name}" in found) for name in RESULTS)
            for kept in (before, after)
        ):
            wrong.append(f"{run} lacks results beside metrics.json")
    return wrong


def losses(folder: Path) -> dict[str, list[dict]]:
    """Reads every logged value that measures no time or memory, by log."""
    found = {}
    for log in sorted(folder.rglob("log.jsonl")):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        timed = ("speed/", "memory/")
        kept = [
            {key: value for key, value in line.items() if not key.startswith(timed)} for line in lines
        ]
        found[str(log.relative_to(folder))] = kept
    return found


def differences(folder: Path, unbroken: Path) -> list[str]:
    """Lists what differs from the unbroken folder."""
    ours, theirs = finals(folder), finals(unbroken)
    wrong = [
        f"{name} differs"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if losses(folder) != losses(unbroken):
        wrong.append("losses differ")
    saved, wanted = (
        {str(path.relative_to(f)) for path in f.glob("**/checkpoints/*")} for f in (folder, unbroken)
    )
    wrong += [f"{name} is not as unbroken" for name in sorted(saved ^ wanted)]
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if LEFT.fullmatch(path.name)]
    return wrong + [f"{name} is left over" for name in left]
