"""Asks a server as many clients do, and as hostile ones do: `serve --run=DIR` in a process of its own.

    python benchmarks/serving.py load --run=runs/brain_tiny --out=serving.json
    python benchmarks/serving.py faults --run=runs/brain_tiny

`load` starts the server twice (the second start finds its programs compiled), asks questions of all
tasks about the run's own test images, one after the other and by many clients at once, compares every
answer with `predict`'s, and asks until memory has shown whether it grows. `faults` sends every fault
of serving_faults.py, slow clients, streams that are dropped and a SIGTERM under load, and reads which
files and sockets the server opened meanwhile. Both exit with 1 where something is not as it should be.
"""

import argparse
import base64
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import harness
import serving_faults as hostile

HERE = Path(__file__).parents[1]
# Prints what the server opens while a file of that name exists, at its end.
TRACED = """
import atexit, os, sys
events, mark = [], os.environ["SERVING_MARK"]
def hook(event, arguments):
    if event in WATCHED and mark not in map(str, arguments) and os.path.exists(mark):
        events.append([event, *map(str, (*arguments, None)[:2])])
sys.addaudithook(hook)
from unimed_jax.main import main
status = main(sys.argv[1:])
import json
print(json.dumps(events), file=sys.stderr)
sys.exit(status)
""".replace("WATCHED", repr(hostile.WATCHED))


class Question(NamedTuple):
    """Holds a body for /v1/tasks, and what predict answers."""

    body: bytes
    task: str
    expected: str = ""


class Served:
    """Runs a server in a process, and stops it."""

    def __init__(self, run: str, *arguments: str, compiled: str = ""):
        """Starts it and waits until it is ready; `seconds` is how long that took.

        compiled: a folder for compiled programs.
        """
        started, self._stopping = time.monotonic(), False
        self._mark = Path(tempfile.mkdtemp(prefix="serving_"), "mark")
        environment = os.environ | {"SERVING_MARK": str(self._mark), "PYTHONPATH": str(HERE)}
        if compiled:
            keep = {"JAX_COMPILATION_CACHE_DIR": compiled}
            environment |= keep | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-c", TRACED, "serve", f"--run={run}", "--port=0", *arguments]
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        found = re.search(r":(\d+) ", line := self._process.stdout.readline())
        if not found:
            said = (line + self._process.communicate()[1]).splitlines()
            said = [line for line in said if line and not line.startswith("[")]  # but what it opened
            raise harness.Failed(f"The server did not start: {said[-1] if said else 'it said nothing.'}")
        self.port = int(found[1])
        while self.get("/ready")[0] != 200:
            time.sleep(0.05)
        self.seconds = time.monotonic() - started

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", path)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if path != "/metrics" else content.decode()

    @property
    def mib(self) -> float:
        """Returns the memory that the server holds."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def trace(self, on: bool) -> None:
        self._mark.touch() if on else self._mark.unlink()

    def signal(self) -> None:
        """Asks it to stop, once: a second signal would end it at once."""
        if not self._stopping:
            self._stopping = True
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> tuple[int, str, list[list[str]]]:
        """Stops it; returns its status, what it printed, and what it opened while traced."""
        self.signal()
        out, err = self._process.communicate(timeout=120)
        self._mark.unlink(missing_ok=True)
        self._mark.parent.rmdir()
        said, _, events = err.strip().rpartition("\n")
        return self._process.returncode, out + said, json.loads(events or "[]")


class Asked(NamedTuple):
    """Holds what became of one question."""

    status: int
    text: str
    first: float  # seconds to the first piece
    whole: float


def ask(connection: http.client.HTTPConnection, question: Question) -> Asked:
    """Asks one question, and reads its answer as it comes."""
    started = time.monotonic()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", hostile.TASKS, question.body, headers)
    answer = connection.getresponse()
    if answer.status != 200:
        answer.read()
        return Asked(answer.status, "", 0.0, time.monotonic() - started)
    text, first = "", 0.0
    for line in answer:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            first = first or time.monotonic() - started
            text = event["result"]["answer"] if "result" in event else text
    return Asked(200, text, first, time.monotonic() - started)


def ask_all(port: int, questions: Sequence[Question], clients: int) -> tuple[list[Asked], float]:
    """Asks all questions by so many clients, each as soon as it has its last answer."""
    found: list[Asked | None] = [None] * len(questions)
    numbers = iter(range(len(questions)))
    lock = threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            while (one := ask(connection, questions[number])).status == 429:
                time.sleep(0.05)
            found[number] = one
        connection.close()

    started = time.monotonic()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for one in found if one is not None], time.monotonic() - started


def questions_of(run_folder: str, count: int) -> list[Question]:
    """Takes questions of all tasks from the run's test split, with predict's answers."""
    import numpy as np
    from PIL import Image

    from unimed_jax.evaluate.tasks import open_sets, units_of
    from unimed_jax.predict.predictor import Predictor
    from unimed_jax.predict.request import Request
    from unimed_jax.runs.open import open_run

    run = open_run(run_folder)
    units, _ = units_of(run.config, open_sets(run.config.held_out))
    units = [unit for unit in units if unit.split == "test"]
    requests, bodies = [], []
    for number in range(count):
        unit = units[number % len(units)]
        example = unit.examples[7 * (number // len(units)) % len(unit.examples)]
        pixels = [np.asarray(unit.source.data.image(key)) for key in example.images]
        requests.append(Request(example.task, example.question, tuple(pixels)))
        urls = []
        for one in pixels:
            file = io.BytesIO()
            Image.fromarray(one).save(file, "PNG")
            urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
        body = {"task": example.task, "question": example.question, "images": urls, "stream": True}
        bodies.append(json.dumps(body).encode())
    answers = Predictor(run.model, run.config, run.tokenizer, run.mesh).answers(requests)
    return [
        Question(body, request.task, answer)
        for body, request, answer in zip(bodies, requests, answers, strict=True)
    ]


def load(given: argparse.Namespace) -> dict[str, Any]:
    """Measures one server; what is wrong is listed under "wrong"."""
    questions = questions_of(given.run, given.questions)
    with tempfile.TemporaryDirectory() as compiled:
        cold = []
        for last in (False, True):
            started = time.monotonic()
            served = Served(given.run, compiled=compiled)
            ask_all(served.port, questions[:1], 1)
            cold.append(round(time.monotonic() - started, 1))
            if not last:
                served.stop()
    ask_all(served.port, questions, given.clients)  # what is lazy is done once
    alone, alone_seconds = ask_all(served.port, questions[: given.alone], 1)
    together, seconds = ask_all(served.port, questions, given.clients)
    different = sum(one.text != q.expected for one, q in zip(together, questions, strict=True))
    memory, asked = [served.mib], 0
    while asked < given.memory:
        ask_all(served.port, questions, given.clients)
        asked += len(questions)
        memory.append(served.mib)
    status, said, _ = served.stop()
    wrong = [f"status {one.status}" for one in (*alone, *together) if one.status != 200]
    wrong += [f"{different} of {len(questions)} answers are not predict's"] if different else []
    return {
        "questions": len(questions),
        "clients": given.clients,
        "tasks": sorted({question.task for question in questions}),
        "start to first answer, s": cold[0],
        "the same with programs that are compiled, s": cold[1],
        "answers/s, one at a time": round(len(alone) / alone_seconds, 1),
        "answers/s, together": round(len(together) / seconds, 1),
        "gain": round(len(together) / seconds * alone_seconds / len(alone), 2),
        "ms to first piece, p50 and p95": _ends(one.first for one in together),
        "ms to whole answer, p50 and p95": _ends(one.whole for one in together),
        "ms alone to first piece, p50 and p95": _ends(one.first for one in alone),
        "ms alone to whole answer, p50 and p95": _ends(one.whole for one in alone),
        "answers unlike predict's": different,
        "MiB after each round": [round(one, 1) for one in memory],
        "requests while memory was watched": asked,
        "status": status,
        "printed": said,
        "wrong": wrong,
    }


def _ends(seconds: Any) -> list[float]:
    cut = quantiles(seconds, n=20, method="inclusive")
    return [round(1000 * cut[9], 1), round(1000 * cut[18], 1)]


def faults(given: argparse.Namespace) -> dict[str, Any]:
    """Sends every fault to one server; what is wrong is listed under "wrong"."""
    served = Served(given.run, "--max-mib=4")
    limits = served.get(hostile.TASKS)[1]["limits"]
    table = hostile.faults(limits)
    wrong = []
    before = _listing(given.run)
    served.trace(True)
    for name, fault in table.items():
        status, content = _post(served.port, fault.path, fault.body)
        message = content.get("error", {}).get("message", "")
        if status != fault.status or fault.words not in message:
            wrong.append(f"{name}: {status} {message[:200]}")
    clients = hostile.slow_clients(served.port)
    for _ in range(20):  # streams whose client leaves
        with hostile.connected(served.port) as client:
            body = json.dumps({"task": "qa", "question": "Why?", "stream": True}).encode()
            client.sendall(hostile.head(hostile.TASKS, len(body)) + body)
            client.recv(20)
    if not given.quick:
        wrong += [f"slow client, {one}" for one in hostile.what_slow_clients_got(clients)]
    for client in clients.values():
        client.close()
    opened: Callable[[], bool] = lambda: "unimed_requests_open 0" not in served.get("/metrics")[1]  # noqa: E731
    end = time.monotonic() + 30
    while opened() and time.monotonic() < end:
        time.sleep(0.05)
    if opened():
        wrong.append("requests are still open after their clients have left")
    drained = _stopped_under_load(served, given.clients)
    status, said, events = served.stop()
    if drained["broken"]:
        wrong.append(f"{drained['broken']} answers were broken off by SIGTERM")
    opened_others = [event for event in events if not hostile.harmless(tuple(event))]
    wrong += [f"opened {event}" for event in opened_others]
    if status != 128 + signal.SIGTERM or len(said.strip().splitlines()) != 2:
        wrong.append(f"it ended with status {status} and said {said!r}")
    if _listing(given.run) != before:
        wrong.append("the run's folder has changed")
    return {
        "faults": len(table),
        "traced events": len(events),
        "answered around SIGTERM": drained["answered"],
        "refused around SIGTERM": drained["refused"],
        "wrong": wrong,
    }


def _stopped_under_load(served: Served, clients: int) -> dict[str, int]:
    """Sends SIGTERM while clients ask; each must be answered whole, refused, or find nobody."""
    counts = {"answered": 0, "refused": 0, "broken": 0}
    body = json.dumps({"task": "qa", "question": "Why is it so?", "stream": True}).encode()

    def client() -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
            try:
                connection.connect()
            except OSError:  # nobody listens any more
                return
            try:
                one = ask(connection, Question(body, "qa"))
                kind = "answered" if one.status == 200 and one.text else "refused"
                counts[kind if one.status in (200, 429, 503) else "broken"] += 1
            except (http.client.RemoteDisconnected, ConnectionResetError):
                counts["refused"] += 1  # closed before anything of an answer came
            except (http.client.HTTPException, OSError):
                counts["broken"] += 1
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    served.signal()
    for thread in threads:
        thread.join()
    return counts


def _post(port: int, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)


def _listing(folder: str) -> list[tuple[str, int, int]]:
    found = [(path, path.stat()) for path in sorted(Path(folder).rglob("*"))]
    return [(str(path), state.st_size, state.st_mtime_ns) for path, state in found]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("campaign", choices=("load", "faults"))
    options.add_argument("--run", required=True)
    options.add_argument("--questions", type=int, default=200)
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--alone", type=int, default=100, help="questions asked one after the other")
    options.add_argument("--memory", type=int, default=2000, help="requests while memory is watched")
    options.add_argument("--quick", action="store_true", help="do not wait for slow clients' ends")
    options.add_argument("--out", type=harness.output())
    given = options.parse_args()
    found = (load if given.campaign == "load" else faults)(given)
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    harness.run(main)
