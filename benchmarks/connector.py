"""Times only the connector at Uni-Med's full size, ours against plain torch.

    python benchmarks/connector.py --threads=2 --out=connector.json

It needs torch: pip install -e '.[parity]'.

Four images of one task as EVA-CLIP-g leaves them (256 patches of 1408) -> 4 x 64 tokens of 5632 ->
five experts 5632 -> 4096 -> 4096 and a soft router 11264 -> 45056 -> 5 over task token and visual
token, in float32: 707 M weights.

- `ours`: unimed_jax/model/connector.py, jitted: all experts as two products, the router's task half
  once per task.
- `ours_literal`: the same module run as the original's loop (`form="literal"`), jitted.
- `torch`: the original's loop in torch, eager (benchmarks/torch_unimed.py).

All hold the same weights; outputs, and a grid of entries of every weight's gradient, must agree
before a figure is given. The gradient is by all weights and not by the patches, whose encoder is
frozen. A side needs 6 GiB and more, so one runs at a time: each round starts every side again,
warms it and times it. A figure is the median over rounds (min .. max); the ratio is taken round by
round, of three rounds at least.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np

from unimed_jax.config import VISUAL_TASKS, ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig

SIDES = ("ours", "ours_literal", "torch")
PASSES = ("forward", "backward")  # backward: forward and backward together
# Of the largest output and, weight by weight, of the largest entry of the gradient: what rounding
# explains, TF32's on a card.
TOLERANCE = {
    **{("cpu", "float32"): 1e-4, ("cuda", "float32"): 1e-2},
    **{("cpu", "bfloat16"): 5e-2, ("cuda", "bfloat16"): 5e-2},
}
TASK = 1  # number of all images' task in VISUAL_TASKS


def model(image: int, patch: int, width: int, out: int) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(image_size=image, patch_size=patch, width=width),
        connector=ConnectorConfig(experts=5),
        decoder=DecoderConfig(width=out),
    )


SIZES = {"tiny": model(32, 8, 16, 32), "full": model(224, 14, 1408, 4096)}


def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws a leaf: uniform, of variance 1 / inputs, or 0.1 for a vector or a table."""
    values = np.random.default_rng(zlib.crc32(path.encode())).random(shape, np.float32)
    values -= 0.5
    kernel = path.split("/")[-1] in ("up", "down") or path.endswith("_kernel")
    values *= (12 / shape[0]) ** 0.5 if kernel else 0.1
    return values


def inputs(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draws patch features [4, patches, width] and the outputs' cotangents [4, T, out]."""
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((4, config.vision.patches, config.vision.width), np.float32)
    return patches, rng.standard_normal((4, config.tokens_per_image, config.decoder.width), np.float32)


def some(part) -> Any:
    """Takes a grid of at most 128 x 128 entries of a gradient, which may have 508 M."""
    return part[tuple(slice(None, None, max(1, n // 64)) for n in part.shape)]


# `tokens`, and a published tensor's (or half's) name -> `some` of its gradient
Values = dict[str, np.ndarray]

# ---- sides -------------------------------------------------------------------------------------------


class Ours:
    def __init__(self, config: ModelConfig, form: str):
        import jax

        from unimed_jax.interop.families.unimed_names import connector_table
        from unimed_jax.model.parameters import abstract, parameters, with_parameters

        connector = dataclasses.replace(config.connector, form=form)
        module = abstract(dataclasses.replace(config, connector=connector)).connector
        shapes = {path: x.shape for path, x in parameters(module).items()}
        self.table = connector_table(config)
        self.leaves = {path: jax.device_put(leaf(path, shape)) for path, shape in shapes.items()}
        self.patches, self.cotangent, self.tasks = jax.device_put(
            (*inputs(config), np.full(4, TASK, np.int32))
        )
        dtype = config.compute_dtype

        def tokens(leaves, patches, tasks):
            return with_parameters(module, leaves)(patches.astype(dtype), tasks).tokens

        def loss(leaves, patches, tasks, cotangent):
            out = tokens(leaves, patches, tasks)
            return (out.astype(cotangent.dtype) * cotangent).sum(), out

        self._forward = jax.jit(tokens)
        self._backward = jax.jit(jax.grad(loss, has_aux=True))

    def values(self) -> Values:
        grads, out = self._backward(self.leaves, self.patches, self.tasks, self.cotangent)
        found = {"tokens": np.asarray(out, np.float32)}
        for entry in self.table:
            leaf = np.asarray(grads[entry.path.removeprefix("connector/")])
            found[f"{entry.name} {entry.columns}"] = some(entry.to_published(leaf))
        return found

    def forward(self) -> None:
        self._forward(self.leaves, self.patches, self.tasks).block_until_ready()

    def backward(self) -> None:
        grads, _ = self._backward(self.leaves, self.patches, self.tasks, self.cotangent)
        for g in grads.values():
            g.block_until_ready()


class Torch:
    def __init__(self, config: ModelConfig, threads: int, device: str = "cpu"):
        import torch
        import torch_unimed

        from unimed_jax.interop.families.unimed_names import connector_table
        from unimed_jax.model.parameters import abstract, parameters

        self.torch, self.device, self.half = torch, device, config.compute_dtype == "bfloat16"
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = True  # as XLA multiplies by default
        with torch.device("meta"):
            module = torch_unimed.Connector(config)
        self.module = module.to_empty(device=device)
        self.weights = dict(self.module.named_parameters())
        # One leaf in memory at a time.
        self.table = sorted(connector_table(config), key=lambda entry: entry.path)
        shapes = {
            f"connector/{path}": x.shape for path, x in parameters(abstract(config).connector).items()
        }
        held, values = "", np.empty(0)
        with torch.no_grad():
            for entry in self.table:
                if entry.path != held:
                    held, values = (
                        entry.path,
                        leaf(entry.path.removeprefix("connector/"), shapes[entry.path]),
                    )
                self._part(self.weights[entry.name], entry).copy_(
                    torch.from_numpy(entry.to_published(values))
                )
        patches, cotangent = inputs(config)
        self.patches, self.cotangent = (torch.from_numpy(x).to(device) for x in (patches, cotangent))

    @staticmethod
    def _part(tensor, entry):
        return tensor if entry.columns is None else tensor[:, slice(*entry.columns)]

    def _tokens(self):
        with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.half):
            return self.module.connect(self.patches, self.module.task_tokens[VISUAL_TASKS[TASK]])

    def values(self) -> Values:
        out = self._tokens()
        (out * self.cotangent).sum().backward()
        found = {"tokens": out.detach().float().cpu().numpy()}
        for entry in self.table:
            weight = self.weights[entry.name]
            # another task's token
            gradient = self.torch.zeros_like(weight) if weight.grad is None else weight.grad
            found[f"{entry.name} {entry.columns}"] = (
                some(self._part(gradient, entry)).cpu().numpy().copy()
            )
        self.module.zero_grad()
        return found

    def forward(self) -> None:
        with self.torch.no_grad():
            self._tokens()
        self._finish()

    def backward(self) -> None:
        (self._tokens() * self.cotangent).sum().backward()
        self.module.zero_grad()
        self._finish()

    def _finish(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def serve(arguments: argparse.Namespace) -> None:
    side, folder = arguments.side, arguments.folder
    config = dataclasses.replace(SIZES[arguments.size], compute_dtype=arguments.dtype)
    if side == "torch":
        runner: Ours | Torch = Torch(config, arguments.threads, arguments.device)
    else:
        runner = Ours(config, "literal" if side == "ours_literal" else "fast")

    def values() -> None:
        np.savez(folder / f"{side}.npz", **runner.values())

    def time(name: str, repeats: int) -> list[float]:
        run = getattr(runner, name)
        harness.warm({name: lambda: harness.seconds(run)})
        return [harness.seconds(run) for _ in range(repeats)]

    harness.serve(
        {
            "values": values,
            "time": time,
            "memory": functools.partial(harness.peak_memory, arguments.device),
        }
    )


# ---- the comparison ----------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures each side; raises harness.Failed if outputs or gradients differ."""
    own = [f"--{name}={getattr(arguments, name)}" for name in ("size", "threads", "device", "dtype")]
    own.append(f"--folder={folder}")
    times: dict[str, dict[str, list[float]]] = {side: {name: [] for name in PASSES} for side in SIDES}
    memory = dict.fromkeys(SIDES, 0.0)
    for i in range(arguments.rounds):
        for name in SIDES:
            side = harness.Side(name, __file__, own)
            try:
                if i == 0:
                    side.ask("values")
                    check(name, folder, TOLERANCE[arguments.device, arguments.dtype])
                for what in PASSES:
                    times[name][what].append(
                        statistics.median(side.ask("time", name=what, repeats=arguments.repeats))
                    )
                memory[name] = max(memory[name], side.ask("memory"))
            finally:
                side.close()
            print(
                f"round {i + 1}, {name}: "
                + ", ".join(f"{w} {times[name][w][-1]:.4g} s" for w in PASSES),
                flush=True,
            )
    return {
        name: {
            **{
                what: {"seconds": harness.spread(times[name][what]), "rounds": times[name][what]}
                for what in PASSES
            },
            **{
                f"{what}_ratio": harness.ratio(times["torch"][what], times[name][what])
                for what in PASSES
            },
            "peak_gib": memory[name],
        }
        for name in SIDES
    }


def check(name: str, folder: Path, tolerance: float) -> None:
    """Compares outputs and gradients of side `name` with those of the first one."""
    mine, reference = (np.load(folder / f"{side}.npz") for side in (name, SIDES[0]))
    # The tokens of other tasks have a gradient of zero.
    apart = {
        key: float(np.abs(mine[key] - x).max() / (np.abs(x).max() or 1)) for key, x in reference.items()
    }
    tokens = apart.pop("tokens")
    print(
        f"{name}: outputs within {tokens:.1e} of {SIDES[0]}'s largest, gradients within "
        f"{max(apart.values()):.1e}"
    )
    wrong = [key for key, value in {"outputs": tokens, **apart}.items() if not value < tolerance]
    if wrong:
        raise harness.Failed(
            f"{name} and {SIDES[0]} differ ({', '.join(wrong)}), so there is no ratio to give."
        )


HEADER = (
    "side",
    "forward s",
    "forward + backward s",
    "peak GiB",
    "x torch, forward",
    "x torch, forward + backward",
)


def rows(sides: dict[str, Any]) -> Iterator[list[str]]:
    for name, f in sides.items():
        digits = 2 if f["forward"]["seconds"]["median"] > 0.1 else 5
        yield [
            name,
            *(harness.figure(f[what]["seconds"], digits) for what in PASSES),
            f"{f['peak_gib']:.2f}",
            *(harness.figure(f[f"{what}_ratio"]) for what in PASSES),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--threads", type=int, default=2, help="of a side")
    parser.add_argument("--device", choices=harness.DEVICES, default="cpu")
    parser.add_argument("--dtype", choices=harness.DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="starts of every side")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs of a pass in a round; their median counts"
    )
    parser.add_argument("--out", type=harness.output(), help="where the figures go as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        harness.pin(arguments.threads, arguments.device)
        return serve(arguments)
    harness.need("torch")
    machine = harness.machine(arguments.threads, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        sides = measure(arguments, Path(folder))
    print(json.dumps(machine))
    print(harness.table(HEADER, list(rows(sides))))
    if arguments.out:
        result = {"size": arguments.size, "dtype": arguments.dtype, "machine": machine, "sides": sides}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    harness.run(main)
