"""Counts what the server does, as Prometheus reads it; no word of any request is in it."""

import collections
import time
from collections.abc import Iterator

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Histogram:
    """Counts seconds by the bucket that they fall into."""

    def __init__(self) -> None:
        self._buckets, self._sum = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._buckets[sum(seconds > bound for bound in BUCKETS)] += 1
        self._sum += seconds

    @property
    def mean(self) -> float:
        return self._sum / max(1, sum(self._buckets))

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*BUCKETS, "+Inf"), self._buckets, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Counts:
    """Holds all counters of one server. Only the event loop changes them."""

    def __init__(self) -> None:
        self.started = time.time()
        self.responses: collections.Counter[tuple[str, int]] = collections.Counter()  # path, status
        self.answers: collections.Counter[tuple[str, str]] = collections.Counter()  # task, how it ended
        self.prompt_tokens = self.answer_tokens = 0
        self.first_piece, self.whole = Histogram(), Histogram()

    def text(self, waiting: int, ready: bool) -> str:
        """Writes Prometheus' text format; waiting: requests that wait or are answered now."""
        responses = [
            f'{{path="{path}",status="{status}"}} {n}'
            for (path, status), n in sorted(self.responses.items())
        ]
        answers = [
            f'{{task="{task}",end="{end}"}} {n}' for (task, end), n in sorted(self.answers.items())
        ]
        parts: tuple[tuple[str, str, str, list[str]], ...] = (
            ("responses_total", "counter", "Responses by path and status.", responses),
            ("answers_total", "counter", "Answers by task and by how they ended.", answers),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", [f" {self.prompt_tokens}"]),
            ("answer_tokens_total", "counter", "Tokens of answers.", [f" {self.answer_tokens}"]),
            ("requests_open", "gauge", "Requests that wait or are answered.", [f" {waiting}"]),
            ("ready", "gauge", "Whether the server takes requests.", [f" {int(ready)}"]),
            ("start_time_seconds", "gauge", "When the server started.", [f" {self.started:.0f}"]),
        )
        out = []
        for name, kind, words, values in parts:
            out += [f"# HELP unimed_{name} {words}", f"# TYPE unimed_{name} {kind}"]
            out += [f"unimed_{name}{value}" for value in values]
        for name, words, found in (
            ("first_piece_seconds", "Time to the first piece of an answer.", self.first_piece),
            ("answer_seconds", "Time to the end of an answer.", self.whole),
        ):
            out += [f"# HELP unimed_{name} {words}", f"# TYPE unimed_{name} histogram"]
            out += found.lines(f"unimed_{name}")
        return "\n".join(out) + "\n"
