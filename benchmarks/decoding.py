"""Compares decoding with stacked layers and with layers whose arrays are separate (model/decoding.py).

    python benchmarks/decoding.py --layers=30 --width=576 --rows 1 32

A decoder of random weights, without adapters, picks 33 tokens after prompts of 32 by `generate`; both
forms in one process in turn, and their tokens must be the same. Figures are medians over rounds (min ..
max) of processor time (all threads) a token; the first call, which compiles, is given by itself.
"""

import argparse
import functools
import time
from typing import Any

import harness

PROMPT, NEW = 32, 33


class Side:
    """Holds a model in one of the two forms."""

    def __init__(self, model: Any, batch: dict[str, Any]):
        self.model, self.batch = model, batch
        self.first = self.round()
        self.times: list[float] = []

    def round(self) -> float:
        from unimed_jax.model.generate import generate

        start = time.process_time()
        found = generate(self.model, self.batch, max_new_tokens=NEW, eos=-1, pad=harness.PAD)
        self.tokens = found.tolist()
        return time.process_time() - start


def measure(layers: int, width: int, rows: int, rounds: int) -> list[list[str]]:
    """Measures both forms with so many rows; returns lines of the table."""
    import accelerator_scales
    import jax
    import numpy as np

    from unimed_jax.config import ConnectorConfig, DecoderConfig, LoraConfig, ModelConfig, VisionConfig
    from unimed_jax.model.decoding import prepared
    from unimed_jax.model.parameters import abstract, parameters, with_parameters

    heads = width // 64
    config = ModelConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_width=64),
        connector=ConnectorConfig(experts=2, hidden=8, router_hidden=8),
        decoder=DecoderConfig(
            vocab=1024,
            width=width,
            depth=layers,
            heads=heads,
            kv_heads=heads,
            head_dim=64,
            mlp_width=3 * width,
        ),
        lora=LoraConfig(rank=0),
    )
    shapes = {
        p: jax.ShapeDtypeStruct(x.shape, np.float32) for p, x in parameters(abstract(config)).items()
    }
    stacked = with_parameters(abstract(config), accelerator_scales.random_leaves(shapes))
    ones = np.ones((rows, PROMPT), np.int32)
    side = config.vision.image_size
    batch = {
        "images": np.zeros((rows, 0, side, side, 3), np.uint8),
        "image_tasks": np.zeros((rows, 0), np.int32),
        "tokens": np.random.default_rng(0).integers(3, 1000, ones.shape, np.int32),
        "visual": -ones,
        "segments": ones,
        "prefixes": ones,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
    }
    sides = {"stacked": Side(stacked, batch), "separate": Side(prepared(stacked), batch)}
    if sides["stacked"].tokens != sides["separate"].tokens:
        raise harness.Failed("the two forms pick other tokens, so there is no ratio to give.")
    harness.warm({name: one.round for name, one in sides.items()})
    for _ in range(rounds):
        for one in sides.values():
            one.times.append(one.round())
    reference = sides["stacked"].times
    return [
        [
            f"{layers} x {width}, batch {rows}",
            name,
            harness.figure(harness.spread([1e3 * seconds / NEW for seconds in one.times])),
            harness.figure(harness.ratio(reference, one.times)),
            f"{one.first:.1f}",
        ]
        for name, one in sides.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=harness.at_least(1), default=30)
    parser.add_argument("--width", type=harness.at_least(64, 64), default=576, help="a multiple of 64")
    parser.add_argument("--rows", type=harness.at_least(1), nargs="+", default=(1, 32))
    parser.add_argument("--rounds", type=harness.at_least(1), default=3)
    parser.add_argument("--threads", type=int, default=2)
    known = parser.parse_args()
    harness.pin(known.threads)
    measured = functools.partial(measure, known.layers, known.width, rounds=known.rounds)
    lines = [line for rows in known.rows for line in measured(rows=rows)]
    print(harness.machine(known.threads))
    header = ("decoder", "layers", "processor ms a token", "x stacked", "first, processor s")
    print(harness.table(header, lines))


if __name__ == "__main__":
    harness.run(main)
