"""The log of a run: one JSON line per logged step, TensorBoard, a progress bar, W&B where it is asked for."""

import json
import resource
import sys
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from unimed_jax.config import TASKS, VISUAL_TASKS, Config, UserError, config_hash, to_dict


class Log:
    """Writes scalars by step, from step `first` on; lines that a killed run wrote beyond are dropped."""

    def __init__(self, folder: Path, config: Config, first: int, bar_to: TextIO | None = None):
        from tensorboardX import SummaryWriter

        path = folder / "log.jsonl"
        kept = []
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step(line) < first]
        path.write_text("".join(line + "\n" for line in kept))
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self._wandb: Any = None
        if config.train.wandb:
            self._wandb = _wandb_run(folder, config)
        steps = config.train.steps
        self._bar = tqdm(total=steps, initial=first, unit="step", file=bar_to or sys.stderr, mininterval=1.0, ncols=110)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Values of one step, named `group/name`; None stands for what the step did not have."""
        self._lines.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        present = {name: value for name, value in values.items() if value is not None}
        for name, value in present.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(present, step=step)

    def progress(self, step: int, loss: float, examples_per_second: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3f}, {examples_per_second:.0f} examples/s", refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off by a kill


def _wandb_run(folder: Path, config: Config):
    try:
        import wandb
    except ImportError as error:
        raise UserError("config.train.wandb needs the package wandb; pip install 'unimed-jax[wandb]'.") from error
    identity = f"{folder.name}-{config_hash(config)}"
    return wandb.init(project="unimed_jax", id=identity, resume="allow", dir=str(folder), config=to_dict(config))


def step_values(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The train step's metrics as named scalars; a task or routing weight that the batch lacked is None."""
    values: dict[str, float | None] = {
        "train/loss": float(metrics["loss"]),
        "train/grad_norm": float(metrics["grad_norm"]),
    }
    for task, loss in zip(TASKS, np.asarray(metrics["task_loss"]).tolist(), strict=True):
        values[f"loss/{task}"] = loss if np.isfinite(loss) else None
    if "routing" in metrics:
        slots = np.asarray(metrics["slots"])
        for t, (task, row) in enumerate(zip(VISUAL_TASKS, np.asarray(metrics["routing"]).tolist(), strict=True)):
            for expert, weight in enumerate(row):
                values[f"routing/{task}_{expert}"] = weight if slots[t] else None
    return values


def peak_memory() -> float:
    """GiB: the device's peak where it reports one, else this process's peak resident set."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    kilo = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**30
