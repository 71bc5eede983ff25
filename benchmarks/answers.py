"""Compares the engine with the plain loop: answers a second of an evaluation, as a run is scored.

    python benchmarks/answers.py --run=runs/brain_tiny --examples=400 --rounds=3 --out=answers.json

All sides answer the same examples of all tasks, about their own images and about another's, as
`evaluate` asks them; the plain loop answers batch by batch (`--batch`, several are several sides;
default: the run's). They run in one process in turn. What all need, images and tokens, is read once
before anything is timed. Then comes the first pass of each side, which compiles and is timed by itself;
every side has run every shape twice before a round counts. Seconds are of the clock and of the processor
(all threads), which other work on the machine disturbs less. How many answers differ from the engine's
is said: the last bits of floating point are not the same, which turns a token where two are nearly
equally likely.
"""

import argparse
import dataclasses
import json
import time
from typing import Any

import harness


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--run", required=True)
    options.add_argument("--examples", type=int, default=400)
    options.add_argument("--split", default="test")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--batch", type=int, nargs="*", help="of the plain loop; several: each is a side"
    )
    options.add_argument("--slots", type=int, nargs="*", help="of the engine; several: each is a side")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--out", type=harness.output())
    given = options.parse_args()
    harness.pin(given.threads)
    found = measured(given)
    print(table(found))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Opens the run, warms all sides and asks them in turn."""
    from unimed_jax.evaluate.answers import calls_of
    from unimed_jax.evaluate.model_answers import together
    from unimed_jax.evaluate.tasks import open_sets, units_of
    from unimed_jax.runs.open import open_run

    run = open_run(given.run, changed="accept")
    config = run.config
    tasks = sum(len(source.tasks) for source in open_sets(config.held_out).values())
    evaluate = dataclasses.replace(
        config.evaluate,
        splits=(given.split,),
        limit=-(-given.examples // tasks),
    )
    config = dataclasses.replace(config, evaluate=evaluate)
    units, _ = units_of(config, open_sets(config.held_out))
    sides: dict[str, Side] = {}
    count = together(config.model, units)
    for slots in given.slots or [0]:
        name = f"engine, {slots} slots" if slots else "engine"
        sides[name] = Side(run, config, calls_of(units, config.seed, True, count), slots=slots)
    for batch in given.batch or [config.evaluate.batch]:
        own = [dataclasses.replace(unit, batch=batch) for unit in units]
        calls = calls_of(own, config.seed, True, 0)
        sides[f"plain loop, batches of {batch}"] = Side(run, config, calls, plain=True)
    read(run, config, next(iter(sides.values())).calls)
    for side in sides.values():
        side.warm()
    for _ in range(given.rounds):
        for side in sides.values():
            side.round()
    first, *others = sides.values()
    return {
        "machine": harness.machine(given.threads),
        "examples": sum(len(unit.examples) for unit in units),
        "answers": len(first.texts),
        "rounds": given.rounds,
        "sides": {
            name: {
                "first": side.first,
                "rounds": side.times,
                "clock": harness.spread([clock for clock, _ in side.times]),
                "processor": harness.spread([cpu for _, cpu in side.times]),
                "different": sum(a != b for a, b in zip(side.texts, first.texts, strict=True)),
            }
            for name, side in sides.items()
        },
    }


def read(run, config, calls) -> None:
    """Reads every image and encodes every prompt once, and starts the compiler."""
    import jax
    import numpy as np

    from unimed_jax.data import fitting, layout

    encoder = layout.Encoder(run.tokenizer, config.text, config.model.tokens_per_image)
    for call in calls:
        for question in call.own:
            encoder.prompt(question.example)
            for picture in question.images:
                fitting.fit(picture.read(), config.data.fit, config.model.vision)
    jax.jit(lambda x: jax.numpy.exp(x @ x))(np.ones((64, 64), np.float32)).block_until_ready()


class Side:
    """Answers all calls of an evaluation in one of the two ways."""

    def __init__(self, run, config, calls, plain: bool = False, slots: int = 0):
        self.run, self.config, self.calls, self.plain, self.slots = run, config, calls, plain, slots
        self.times: list[tuple[float, float]] = []
        self.texts: list[str] = []

    def warm(self) -> None:
        """Answers everything once, which compiles, and a second time."""
        self.first = self._timed()
        self._timed()

    def round(self) -> None:
        self.times.append(self._timed())

    def _timed(self) -> tuple[float, float]:
        clock, cpu = time.perf_counter(), time.process_time()
        self.texts = self._answers()
        return time.perf_counter() - clock, time.process_time() - cpu

    def _answers(self) -> list[str]:
        from unimed_jax.evaluate import model_answers
        from unimed_jax.predict import sizes

        config, most = self.config, sizes.MOST_SLOTS
        if self.plain:
            answerer = model_answers.by_batches(self.run.model, config, self.run.tokenizer)
        else:
            if self.slots:
                sizes.MOST_SLOTS = {}
            answerer = model_answers.by_engine(
                self.run.model, config, self.run.tokenizer, slots=self.slots or None
            )
        with self.run.inside():
            answer = answerer(self.calls)
            found = {}
            for call in self.calls:
                for number, (some, texts) in enumerate(
                    zip(call.passes, answer(call.passes, lambda: None), strict=True)
                ):
                    for question, text in zip(some, texts, strict=True):
                        found[question.unit.name, question.example.id, number] = text
        sizes.MOST_SLOTS = most
        return [found[key] for key in sorted(found)]


def quotient(plain: dict[str, Any], side: dict[str, Any], which: int) -> str:
    """Divides the plain loop's times by a side's, of the clock (0) or of the processor (1)."""
    times = ([pair[which] for pair in one["rounds"]] for one in (plain, side))
    return harness.figure(harness.ratio(*times))


def table(found: dict[str, Any]) -> str:
    """Lays the figures out; ratios are to the first side of the plain loop."""
    plain = next(side for name, side in found["sides"].items() if name.startswith("plain"))
    rows = []
    for name, side in found["sides"].items():
        clock, cpu = side["clock"], side["processor"]
        rows.append(
            [
                name,
                harness.figure(clock),
                harness.figure(cpu),
                f"{found['answers'] / clock['median']:.0f}",
                f"{found['answers'] / cpu['median']:.0f}",
                quotient(plain, side, 1),
                quotient(plain, side, 0),
                f"{side['first'][0]:.1f}, {side['first'][1]:.1f}",
                f"{plain['first'][1] / side['first'][1]:.2f}",
                str(side["different"]),
            ]
        )
    head = [
        "side", "seconds", "processor s", "answers/s", "answers/processor s", "x plain (processor)",
        "x plain (clock)", "first with compiling: s, processor s", "x plain", "different answers",
    ]  # fmt: skip
    return harness.table(head, rows)


if __name__ == "__main__":
    harness.run(main)
