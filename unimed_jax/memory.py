"""Compares the memory that a run needs with what the machine has, before anything is allocated.

Less is counted than a run takes, so that no run that fits is refused: weights, moments, gradients, a
batch, its logits, a cache. This keeps a setting that is wrong by orders of magnitude from ending in a
dead machine.
"""

import math
import os
import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unimed_jax import processes
from unimed_jax.config import TASKS, Config, ModelConfig
from unimed_jax.errors import UserError
from unimed_jax.model.parameters import tree_bytes

MODEL = "the widths, depths and numbers of experts in config.model"
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def available_bytes() -> float:
    """Returns the bytes of all devices together or, on CPU, those that all processes may have.

    All processes call it and get the same: as many times what the one with the least has, since what
    they choose by it is part of one program.
    """
    return min(processes.gathered(_own_bytes())) * jax.process_count()


def _own_bytes() -> float:
    """Returns the bytes of this process's devices or, on CPU, those that it may have."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        return sum(limit for limit in limits if limit) or math.inf
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    found += [float(word) for file in LIMITS if (word := _read(file)).isdecimal()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(float(limit))
    return min(found)


def _read(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""


def refuse_too_large(needed: float, what: str, settings: str) -> None:
    """Raises UserError if `what` needs more bytes than there are; `settings` are those to lower."""
    have = available_bytes()
    if needed > have:
        raise UserError(
            f"{what} needs at least {needed / 2**30:,.1f} GiB of memory, and there are "
            f"{have / 2**30:,.1f}; lower {settings}."
        )


def check_training(config: Config, state: Any, frozen: Any, batch: Any) -> None:
    """Raises UserError if training cannot fit; the trees are those of `train.program.Program`."""
    data, model = config.data, config.model
    rows = data.rows // config.train.accumulation
    logits = 4 * rows * data.row_answers * model.decoder.vocab
    # the mask, a byte each
    scores = rows * data.row_tokens**2 if jax.devices()[0].platform == "cpu" else 0
    # of each leaf, held at once: one, or those of all tasks and of the balancing loss
    gradients = 1 if config.train.gradients == "sum" else len(TASKS) + 1
    weights = tree_bytes(state) + gradients * tree_bytes(state.leaves) + tree_bytes(frozen)
    refuse_too_large(weights, "training this model", MODEL)
    refuse_too_large(
        weights + tree_bytes(batch) + logits + scores,
        f"training on batches of config.data.rows={data.rows} rows",
        "config.data.rows, row_tokens, row_images or row_answers, or raise config.train.accumulation",
    )


def check_answering(model: ModelConfig, weights: Any, rows: int, tokens: int, entering: int = 0) -> None:
    """Raises UserError if `rows` answers at once cannot fit into memory.

    The arguments are those of answering_bytes.
    """
    refuse_too_large(tree_bytes(weights), "this model", MODEL)
    refuse_too_large(
        answering_bytes(model, weights, rows, tokens, entering),
        f"answering {rows} prompts at once with {tokens} tokens each",
        "config.evaluate.batch or config.evaluate.max_new_tokens",
    )


def answering_bytes(
    model: ModelConfig, weights: Any, rows: int, tokens: int, entering: int = 0
) -> float:
    """Counts the bytes that `rows` answers at once need at least.

    weights: the leaves as they are stored, or shapes in their place. tokens: the length of each answer
    with its prompt; entering: tokens of prompts that are held besides, while they are copied to where
    answers are made.
    """
    decoder, width = model.decoder, jnp.dtype(model.compute_dtype).itemsize
    token = 2 * width * decoder.depth * decoder.kv_heads * decoder.head_dim
    return tree_bytes(weights) + token * (rows * tokens + entering)


def spare_for(more: Any, needed: float) -> bool:
    """Says whether what is needed and a second copy of some arrays leave half of the memory free."""
    return needed + tree_bytes(more) <= available_bytes() / 2
