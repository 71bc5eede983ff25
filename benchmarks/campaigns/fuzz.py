"""Gives every reader thousands of damaged and hostile files.

Each file must be read, or refused in one sentence.

    python benchmarks/campaign.py fuzz --cases=10000 --seed=0 --reader=pth

A case may take 10 seconds of a processor and 1 GiB of memory. The cases of a reader run one after
the other in a process of their own; if that ends or hangs, the case is a finding and the next
process goes on after it. A case can be run again by the seed and number that its finding names: add
--from=NUMBER --cases=1.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # cases use what the tests make files with
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from unimed_jax.errors import UserError

SECONDS = 10  # of processor time
MEMORY = 1 << 30  # bytes
SILENCE = 300  # seconds in which a reader's process prints nothing
LONGEST = 2000  # characters of a sentence
# Modules with `cases(reader, seed)` and READERS, or with `cases(seed)` (then the module is one reader).
MODULES = ("fuzz_weights", "fuzz_images", "fuzz_data")

Case = tuple[str, Callable[[], Any]]


def readers() -> dict[str, Callable[[int], Iterator[Case]]]:
    """Maps each reader to a function from a seed to its cases."""
    found: dict[str, Callable[[int], Iterator[Case]]] = {}
    for name in MODULES:
        if not (Path(__file__).parent / f"{name}.py").is_file():
            continue
        module = importlib.import_module(f"campaigns.{name}")
        for reader in getattr(module, "READERS", ()):
            found[reader] = lambda seed, reader=reader, module=module: module.cases(reader, seed)
        if not hasattr(module, "READERS"):
            found[name.removeprefix("fuzz_")] = module.cases
    return found


def outcome(read: Callable[[], Any]) -> tuple[str, str]:
    """Runs a case: ("read" or "refused", what was said), or ("finding", what went wrong)."""
    try:
        if read() is False:  # it was refused, as some modules say
            return "refused", ""
    except UserError as error:
        said = str(error)
        wrong = (
            "\n" in said
            or len(said) > LONGEST
            or any(ord(c) < 32 for c in said)
            or not said.endswith((".", "?"))
        )
        return ("finding", f"not one sentence: {said[:200]!r}") if wrong else ("refused", said)
    except (KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        return "finding", "MemoryError"
    except BaseException as error:  # also panics of packages in other languages
        last = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "finding",
            f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:150]}",
        )
    return "read", ""


# --------------------------------------------------------------------------------------------------
# The process of a reader
# --------------------------------------------------------------------------------------------------


def _late(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds of a processor")


def _peak() -> int:
    """Returns the most memory since the last call, in bytes, and starts to count again."""
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    return peak << 10


def run_reader(reader: str, seed: int, start: int, count: int) -> None:
    """Runs cases and prints one JSON line for each."""
    cases = itertools.islice(readers()[reader](seed), start, start + count)
    first = next(iter(readers()[reader](seed + 1)))  # what is imported and made once is not a case's own
    outcome(first[1])
    with open("/proc/self/statm") as pages:
        address_space = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + 4 * MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _late)
    _peak()
    before = _peak()
    for number, (name, read) in enumerate(cases, start):
        print(json.dumps({"begins": number, "name": name}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        begun = time.process_time()
        try:
            kind, said = outcome(read)
        except TimeoutError as error:  # the alarm came while the outcome was examined
            kind, said = "finding", str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds, memory = time.process_time() - begun, max(0, _peak() - before)
        if memory > MEMORY and kind != "finding":
            kind, said = "finding", f"{memory >> 20} MiB of memory"
        print(json.dumps({"kind": kind, "said": said, "seconds": seconds, "memory": memory}), flush=True)


# --------------------------------------------------------------------------------------------------
# The campaign
# --------------------------------------------------------------------------------------------------


def _lines(process: subprocess.Popen) -> Iterator[dict[str, Any] | None]:
    """Yields what a reader's process prints; None if it says nothing for too long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=SILENCE)
        except queue.Empty:
            yield None
            return
        if line is None:
            return
        if line.startswith("{"):
            yield json.loads(line)


def campaign(reader: str, seed: int, start: int, count: int) -> dict[str, Any]:
    """Runs the cases of one reader; returns counts, the worst seconds and bytes, and the findings."""
    total: dict[str, Any] = {
        "cases": 0,
        "refused": 0,
        "read": 0,
        "seconds": 0.0,
        "memory": 0,
        "findings": [],
    }
    number, end = start, start + count
    while number < end:
        command = [sys.executable, __file__, f"--child={reader}", f"--seed={seed}", f"--from={number}"]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            [*command, f"--cases={end - number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        began, name = number, ""
        for line in _lines(process):
            if line is None:
                break
            if "begins" in line:
                number, name = line["begins"], line["name"]
                continue
            total["cases"] += 1
            total["seconds"] = max(total["seconds"], line["seconds"])
            total["memory"] = max(total["memory"], line["memory"])
            if line["kind"] == "finding":
                total["findings"].append(f"{name}: {line['said']}")
            else:
                total[line["kind"]] += 1
            number += 1
        if process.poll() is None:
            process.kill()
        process.wait()
        if number < end:
            what = (
                "says nothing any more" if process.returncode == -9 else f"ended ({process.returncode})"
            )
            total["findings"].append(f"{name or reader}: the process {what}")
            if number == began and not name:
                break  # the reader cannot even start
            total["cases"] += 1
            number += 1
    return total


def run(arguments: list[str]) -> None:
    """Prints one row for each reader, its findings, and the totals."""
    parser = argparse.ArgumentParser(prog="campaign.py fuzz")
    parser.add_argument("--cases", type=int, default=10_000, help="of each reader")
    parser.add_argument("--reader", action="append", help="only this one; may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", type=int, default=0, dest="start", help="number of the first case")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        run_reader(given.child, given.seed, given.start, given.cases)
        return
    known = readers()
    for reader in given.reader or ():
        if reader not in known:
            sys.exit(f"--reader={reader} is not known; choose from {', '.join(known)}.")
    print(f"seed {given.seed}; at most {SECONDS} s and {MEMORY >> 20} MiB a case")
    print(
        "| reader | cases | refused | read | worst seconds | worst MiB | findings |\n| --- "
        + "| ---: " * 6
        + "|"
    )
    cases = findings = 0
    for reader in given.reader or known:
        if reader in ("gguf", "sentencepiece") and importlib.util.find_spec(reader) is None:
            print(f"{reader}: skipped, because the package {reader} is not installed", flush=True)
            continue
        total = campaign(reader, given.seed, given.start, given.cases)
        row = (
            reader,
            total["cases"],
            total["refused"],
            total["read"],
            f"{total['seconds']:.2f}",
            total["memory"] >> 20,
        )
        print("| " + " | ".join(map(str, (*row, len(total["findings"])))) + " |", flush=True)
        alike = {finding.partition(": ")[2][:60]: finding for finding in reversed(total["findings"])}
        for finding in alike.values():  # the first of each kind
            print(f"  finding: {finding}", flush=True)
        cases, findings = cases + total["cases"], findings + len(total["findings"])
    print(f"{cases} cases, {findings} findings, seed {given.seed}")


if __name__ == "__main__":
    run(sys.argv[1:])
