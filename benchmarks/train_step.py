"""Times a training step, ours against plain torch: same model, weights, examples, machine.

    python benchmarks/train_step.py --size=small --threads=2 --out=train_step.json

It needs torch and PEFT: pip install -e '.[parity]'.

The sides are processes of their own, asked in turn so that other load on the machine slows all alike:

- `ours`: `unimed_jax/train/step.py`, jitted: forward, backward, AdamW on adapters and connector.
- `ours_shared` (in `mixture`): the same, questions of one image sharing its tokens, as
  `config.data` allows.
- `torch_eager`: Hugging Face's LLaMA with PEFT's LoRA on all seven linears, the connector as the
  original runs it, a plain frozen ViT (benchmarks/torch_unimed.py), torch.optim.AdamW.
- `torch_compiled`: the same under torch.compile.

Cases:

- `padded`: the same padded rows for all, so that only the program differs: a batch of four for each
  visual task.
- `mixture`: 100 examples, tasks in the shares of Uni-Med's published mixture. Torch trains on them
  as the original does: four of one task a batch, one a row, padded to the longest of the batch.
  Ours packs them into rows of mixed tasks, of which one holds as many examples as a batch of torch
  has (four, nearly).

All run without dropout (two generators' masks would differ), images decoded beforehand.
`--dtype=bfloat16` stores what is frozen and computes in bfloat16 (torch: under autocast) and keeps
what trains in float32; on a card float32 means TF32 products for all sides. Text lengths are those
of the brain set's training records in LLaMA's kind of vocabulary (`train_step_rows.LENGTHS`); which
ids they have changes no cost, so they are random.

Losses must agree before anything is timed: `padded` trains on its batches and compares every loss,
which the updates of the steps before have moved; `mixture` compares the mean loss over all answer
tokens. Rounds of every side that do not count come first, until none gets much faster. A figure is the
median over rounds (min .. max); a ratio is taken round by round, of three rounds at least, of seconds of
the clock and of the processor (all threads), which other work on the machine disturbs less. Memory is
the peak of each process, or what it has held of the card.
"""

import argparse
import dataclasses
import functools
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
from train_step_rows import BATCH, MIXTURE, SIZES, TRAINING, Size, batches, write_weights

from unimed_jax.config import (
    VISUAL_TASKS,
    Config,
    OptimizerConfig,
)

SIDES = ("ours", "ours_shared", "torch_eager", "torch_compiled")
CASES = {"padded": ("ours", "torch_eager", "torch_compiled"), "mixture": SIDES}
# Relative, of losses: (device, dtype) -> what rounding explains, TF32's on a card.
TOLERANCE = {
    **{("cpu", "float32"): 1e-4, ("cuda", "float32"): 1e-3},
    **{("cpu", "bfloat16"): 1e-2, ("cuda", "bfloat16"): 1e-2},
}
CHECK_RATE = 1e-3  # learning rate of the steps whose losses are compared
RATE = 1e-5  # and of the timed ones


# ---- sides -------------------------------------------------------------------------------------------

# Losses of a pass over a case's batches at one learning rate, and answer tokens of each.
Pass = tuple[list[float], list[float]]


class Ours:
    def __init__(self, chosen: Size, case: str, side: str, folder: Path):
        import jax.numpy as jnp
        from safetensors.numpy import load_file

        from unimed_jax.train.program import build
        from unimed_jax.train.step import first_state

        config = Config(model=chosen.model, **TRAINING)
        # Its step also takes batches of other shapes than those that it describes.
        program = build(config, None)
        leaves = {
            path: jnp.asarray(leaf) for path, leaf in load_file(folder / "ours.safetensors").items()
        }
        self.frozen = {path: leaves[path].astype(leaf.dtype) for path, leaf in program.frozen.items()}
        self.state = first_state(
            {path: leaves[path] for path in program.state.leaves}, program.optimizer
        )
        self.step = program.step
        self.batches = batches(chosen, case, side)

    def losses(self, lr: float) -> Pass:
        losses = [float(loss) for loss in self._run(lr)]
        return losses, [float(batch["weights"].sum()) for batch in self.batches]

    def round(self) -> tuple[float, float]:
        return harness.times(lambda: [loss.block_until_ready() for loss in list(self._run(RATE))])

    def _run(self, lr: float) -> Iterator[Any]:
        for batch in self.batches:
            self.state, metrics = self.step(self.state, self.frozen, batch, np.float32(lr))
            yield metrics["loss"]


class Torch:
    def __init__(self, chosen: Size, case: str, side: str, folder: Path, device: str = "cpu"):
        import torch
        import torch_unimed
        from safetensors.torch import load_file

        vision, adam = chosen.model.vision, OptimizerConfig()
        model = torch_unimed.UniMed(chosen.model)
        model.load_state_dict(load_file(folder / "published.safetensors"))
        for weight in model.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(getattr(torch, chosen.model.frozen_dtype))
        self.torch, self.device = torch, device
        self.half = chosen.model.compute_dtype == "bfloat16"
        model = model.to(device).train()
        self.model, self.task_tokens = model, model.task_tokens
        self.optimizer = torch_unimed.optimizer(model, adam.weight_decay, adam.betas, adam.eps)
        if side == "torch_compiled":
            self.model = torch.compile(model)
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (vision.mean, vision.std))
        self.batches = []
        for batch in batches(chosen, case, side):
            labels = np.full(batch["tokens"].shape, -100)
            answered = batch["weights"] > 0
            row = np.nonzero(answered)[0]
            labels[row, batch["target_index"][answered] + 1] = batch["targets"][answered]
            pixels, task, start = None, None, 0
            if batch["image_tasks"].size:
                images = torch.tensor(batch["images"][:, 0]).permute(0, 3, 1, 2)  # [B, 3, H, W]
                pixels = ((images / 255 - mean) / std).contiguous()
                task = VISUAL_TASKS[batch["image_tasks"][0, 0]]
                start = int(np.argmax(batch["visual"][0] >= 0))
            arrays = (batch["tokens"], batch["segments"] > 0, labels)
            tokens, mask, labels = (torch.tensor(x, dtype=torch.int64) for x in arrays)
            self.batches.append((task, pixels, tokens, mask, labels, start))

    def losses(self, lr: float) -> Pass:
        return [float(loss) for loss in self._run(lr)], [
            float((batch[4] != -100).sum()) for batch in self.batches
        ]

    def round(self) -> tuple[float, float]:
        return harness.times(lambda: [float(loss) for loss in list(self._run(RATE))])

    def _run(self, lr: float) -> Iterator[Any]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for task, *arrays, start in self.batches:
            arrays = [None if x is None else x.to(self.device, non_blocking=True) for x in arrays]
            token = None if task is None else self.task_tokens[task]
            with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.half):
                loss = self.model(arrays[0], token, *arrays[1:], start)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.detach()


def serve(arguments: argparse.Namespace) -> None:
    chosen, side = chosen_size(arguments), arguments.side
    if side.startswith("torch"):
        import torch

        torch.set_num_threads(arguments.threads)
        # as XLA multiplies by default
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        warnings.simplefilter("ignore", FutureWarning)  # transformers warns PEFT
        runner: Ours | Torch = Torch(chosen, arguments.case, side, arguments.folder, arguments.device)
    else:
        runner = Ours(chosen, arguments.case, side, arguments.folder)
    memory = functools.partial(harness.peak_memory, arguments.device)
    harness.serve({"losses": runner.losses, "round": runner.round, "memory": memory})


def chosen_size(arguments: argparse.Namespace) -> Size:
    """Returns the size with `--dtype` for computing and for frozen weights."""
    size, dtype = SIZES[arguments.size], arguments.dtype
    return dataclasses.replace(
        size, model=dataclasses.replace(size.model, compute_dtype=dtype, frozen_dtype=dtype)
    )


# ---- the comparison ----------------------------------------------------------------------------------


def compare(case: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures all sides on one case; raises harness.Failed if losses differ."""
    own = [f"--{name}={getattr(arguments, name)}" for name in ("size", "threads", "device", "dtype")]
    own += [f"--case={case}", f"--folder={folder}"]
    started = {
        name: harness.Side(name, __file__, own) for name in CASES[case] if name in arguments.sides
    }
    sides, absent = dict(started), {}
    try:
        losses = {}
        for name, side in started.items():
            try:
                losses[name] = mean_losses(
                    case, *side.ask("losses", lr=CHECK_RATE if case == "padded" else 0.0)
                )
            except harness.Failed as error:
                if name != "torch_compiled":
                    raise
                absent[name] = f"does not run here: {error}"
                del sides[name]
        check(case, losses, TOLERANCE[arguments.device, arguments.dtype])
        harness.warm({name: functools.partial(_clock, side) for name, side in sides.items()})
        rounds: dict[str, list[list[float]]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                rounds[name].append(side.ask("round"))
        memory = {name: side.ask("memory") for name, side in sides.items()}
    finally:
        for side in started.values():
            side.close()
    return {
        "losses": losses,
        "absent": absent,
        "sides": {
            name: figures(SIZES[arguments.size], case, name, rounds, memory[name]) for name in sides
        },
    }


def _clock(side: harness.Side) -> float:
    return side.ask("round")[0]


def mean_losses(case: str, losses: list[float], weights: list[float]) -> list[float]:
    """Returns each step's loss, or the mean over all tokens if the sides batch differently."""
    return losses if case == "padded" else [float(np.average(losses, weights=weights))]


def check(case: str, losses: dict[str, list[float]], tolerance: float) -> None:
    for name, own in losses.items():
        print(f"{case}, {name}: loss " + " ".join(f"{loss:.6f}" for loss in own), flush=True)
    reference = losses["torch_eager"]
    for name, own in losses.items():
        if not np.allclose(own, reference, rtol=tolerance, atol=0):
            raise harness.Failed(
                f"{case}: the losses of {name} differ from torch_eager's, so there is no ratio to give."
            )


def figures(
    chosen: Size, case: str, name: str, rounds: dict[str, list[list[float]]], memory: float
) -> dict[str, Any]:
    made = batches(chosen, case, name)
    (own, processor), (reference, theirs) = (np.array(rounds[n]).T for n in (name, "torch_eager"))
    count = BATCH * (len(VISUAL_TASKS) if case == "padded" else sum(MIXTURE.values()))
    tokens = [int((batch["segments"] > 0).sum()) for batch in made]
    return {
        "round_seconds": own.tolist(),
        "processor_seconds_per_step": harness.spread(processor / len(made)),
        "processor_ratio": harness.ratio(theirs, processor),
        "steps_per_round": len(made),
        "padding_waste": 1 - sum(tokens) / sum(batch["segments"].size for batch in made),
        "seconds_per_step": harness.spread(own / len(made)),
        "examples_per_second": harness.spread(count / own),
        "tokens_per_second": harness.spread(sum(tokens) / own),
        "peak_gib": memory,
        "ratio": harness.ratio(reference, own),
    }


def rows(case: str, result: dict[str, Any]) -> Iterator[list[str]]:
    for name, f in result["sides"].items():
        digits = 4 if f["seconds_per_step"]["median"] < 0.1 else 2
        step = harness.figure(f["seconds_per_step"], digits)
        yield [
            *(
                case,
                name,
                harness.figure(f["examples_per_second"]),
                f"{f['tokens_per_second']['median']:.0f}",
                step,
            ),
            *(f"{100 * f['padding_waste']:.0f} %", f"{f['peak_gib']:.2f}", harness.figure(f["ratio"])),
            harness.figure(f["processor_seconds_per_step"], digits),
            harness.figure(f["processor_ratio"]),
        ]
    for name, reason in result["absent"].items():
        yield [case, name, reason, *[""] * (len(HEADER) - 3)]


HEADER = (
    "case",
    "side",
    "useful examples/s",
    "useful tokens/s",
    "s/step",
    "padding",
    "peak GiB",
    "x torch_eager",
    "processor s/step",
    "x torch_eager (processor)",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--device", choices=harness.DEVICES, default="cpu")
    parser.add_argument("--dtype", choices=harness.DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes over a case's batches")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=SIDES, help="torch_eager always runs"
    )
    parser.add_argument("--out", type=harness.output(), help="where the figures go as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        harness.pin(arguments.threads, arguments.device)
        return serve(arguments)
    harness.need("torch", "peft", "transformers")
    arguments.sides = {*arguments.sides, "torch_eager"}
    machine = harness.machine(arguments.threads, arguments.device)
    result: dict[str, Any] = {
        "size": arguments.size,
        "dtype": arguments.dtype,
        "machine": machine,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        write_weights(SIZES[arguments.size].model, Path(folder))
        for case in CASES:
            result["cases"][case] = compare(case, arguments, Path(folder))
    print(json.dumps(result["machine"]))
    print(
        harness.table(
            HEADER, [row for case, found in result["cases"].items() for row in rows(case, found)]
        )
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    harness.run(main)
