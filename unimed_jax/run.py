"""A run's folder: what stands where in it, and `open_run`, from which every verb that reads one starts.

config.json       the settings, fidelity expanded       tokenizer/    a Hugging Face tokenizer folder
checkpoints/      see checkpoint.py                     log.jsonl     one line per logged step
contact_sheet.png images with their boxes               tensorboard/, lock: who trains here
metrics.json, predictions.jsonl, report.md, other *.png what the evaluation left
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from unimed_jax.checkpoint import Checkpoints
from unimed_jax.config import Config, UserError, to_dict
from unimed_jax.data.datasets import SELF_CONTAINED, joined
from unimed_jax.data.example import Dataset
from unimed_jax.data.tokenizer import Tokenizer, corpus, train_tokenizer
from unimed_jax.model.sharding import parameter_shardings
from unimed_jax.model.unimed import UniMed, abstract, order_coordinates, parameters, with_parameters
from unimed_jax.settings import from_config_dict

# Where each kind of `config.init` takes its leaves from; the others come with later kinds.
INIT_KINDS = {"seed": "random numbers from config.seed", "run": "a finished run's folder"}
# What the full-size configs start from and interop will read.
WEIGHT_FILES = {"hf": "the folder of a Hugging Face decoder", "eva": "the EVA-CLIP-g file"}


@dataclasses.dataclass
class Run:
    folder: Path
    config: Config
    tokenizer: Tokenizer
    model: UniMed
    step: int
    mesh: Mesh | None = None  # over which the model's leaves lie


def write_config(folder: Path, config: Config) -> None:
    """Notes the settings in a new folder; in an old one they must be the same."""
    file = folder / "config.json"
    if file.exists():
        old = read_config(folder)
        if dataclasses.replace(old, mesh=config.mesh) != config:  # a run may go on upon other devices
            raise UserError(
                f"{folder} holds a run with other settings ({_difference(to_dict(old), to_dict(config))}); choose "
                "another --workdir, or remove the folder."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "config.tmp"  # a kill must not leave half of it under its name
    unfinished.write_text(json.dumps(to_dict(config), indent=1) + "\n")
    unfinished.rename(file)


def read_config(folder: Path) -> Config:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist; --run names the folder that training wrote (see --workdir).")
    try:
        return from_config_dict(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON ({error}); restore it or train again.") from error


def _difference(old: dict, new: dict, where: str = "config") -> str:
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            return _difference(a, b, f"{where}.{key}")
        if a != b:
            return f"{where}.{key} is {a!r} there and {b!r} now"
    return "the same"


def missing_inputs(config: Config) -> str | None:
    """One sentence that names every weight file and data folder that the settings still lack, or None."""
    lacks = [
        f"{WEIGHT_FILES[kind]} (config.init {kind!r})"
        for kind, path in config.init
        if kind in WEIGHT_FILES and not path
    ]
    if not config.text.tokenizer and any(kind == "hf" for kind, _ in config.init):
        lacks.append("the tokenizer folder (config.text.tokenizer)")
    names = [source.name for source in config.data.sources if source.name not in SELF_CONTAINED and not source.path]
    if names and not config.data.root:
        lacks.append(f"the data sets {', '.join(dict.fromkeys(names))} (config.data.root, one folder each)")
    return f"config {config.name!r} still needs {'; '.join(lacks)}." if lacks else None


def load_text(folder: Path, config: Config, datasets: Sequence[Dataset]) -> Tokenizer:
    """The run's tokenizer: the folder named in the settings, or a BPE trained once on the training texts."""
    if config.text.tokenizer:
        return Tokenizer.load(config.text.tokenizer)
    path = folder / "tokenizer"
    if not path.exists():
        unfinished = folder / "tokenizer.tmp"
        train_tokenizer(corpus(joined(datasets).examples("train"), config.text), config.text, unfinished)
        unfinished.rename(path)
    return Tokenizer.load(path)


def initial_model(config: Config, tokenizer: Tokenizer, mesh: Mesh | None = None) -> tuple[UniMed, dict[str, str]]:
    """The model before the first step, laid over the mesh, and the source of every leaf.

    A function of the settings alone: the random numbers do not depend on the devices.
    """
    if tokenizer.size > config.model.decoder.vocab:
        raise UserError(
            f"config.model.decoder.vocab={config.model.decoder.vocab} is less than the tokenizer's {tokenizer.size} "
            "tokens; raise it."
        )

    def random_leaves() -> dict[str, jax.Array]:
        model = UniMed(config.model, nnx.Rngs(config.seed))
        if tokenizer.coordinate_start is not None:
            order_coordinates(model, tokenizer.coordinate_start)
        return parameters(model)

    model = abstract(config.model)
    places = None if mesh is None else parameter_shardings(parameters(model), mesh)
    model = with_parameters(model, jax.jit(random_leaves, out_shardings=places)())
    sources = dict.fromkeys(parameters(model), "seed")
    for kind, path in config.init:
        if kind not in INIT_KINDS:
            raise UserError(f"config.init: {kind!r} is no source of weights here; choose from {', '.join(INIT_KINDS)}.")
        if kind == "run":
            other = open_run(path)
            leaves = parameters(other.model)
            fits = {k: v for k, v in parameters(model).items() if k in leaves and leaves[k].shape == v.shape}
            if not fits:
                raise UserError(f"config.init: no parameter of run {path} fits this model; check config.model.")
            taken = {k: leaves[k] if places is None else jax.device_put(leaves[k], places[k]) for k in fits}
            model = with_parameters(model, taken)
            sources |= dict.fromkeys(fits, f"run {path}")
    return model, sources


def open_run(path: str | Path) -> Run:
    """Reads a run's folder: settings, tokenizer, and the model of its newest checkpoint."""
    folder = Path(path)
    config = read_config(folder)
    tokenizer = Tokenizer.load(config.text.tokenizer or folder / "tokenizer")
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    if checkpoints.latest() is None:
        raise UserError(f"{folder} holds no checkpoint yet; continue its training first.")
    saved = checkpoints.saved_weights()
    model = abstract(config.model)
    if saved < set(parameters(model)):  # the others are frozen, and named by config.init
        model, _ = initial_model(config, tokenizer)
    weights, _, _ = checkpoints.restore({k: v for k, v in parameters(model).items() if k in saved})
    step = checkpoints.latest()
    assert step is not None  # restore says so otherwise
    checkpoints.close()
    return Run(folder, config, tokenizer, with_parameters(model, weights), step)
