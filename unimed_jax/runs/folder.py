"""Reads and writes the text files of a run's folder, and says what a run lacks to start.

The text is that of the settings and of the tokenizer.

The folder holds:

- config.json: the settings, with what `fidelity` sets.
- tokenizer/: a Hugging Face tokenizer folder.
- checkpoints/: see checkpoint.py.
- log.jsonl: one line per logged step; tensorboard/ holds the same.
- inputs.json: the states of data and tokenizer (inputs.py).
- contact_sheet.png: images with their boxes.
- lock: says who trains here.
- cost.json: seconds of work and bytes on the disk (analyze/cost.py).
- failed.json: why the last try of a sweep ended, if it failed (analyze/sweep/run.py).
- environment.json: what it was trained on, and by which command (environment.py).
- metrics.json, predictions.jsonl, report.md and other *.png: the results of the evaluation.
- report.html: all of this on one page (analyze/run_report).
- analysis/, reliance/: pages of analyses with numbers and pictures; report.md names them.
"""

import dataclasses
import filecmp
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from unimed_jax import files
from unimed_jax.config import Changed, Config, to_dict
from unimed_jax.data.datasets import distinct, missing
from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.tokenizer import Tokenizer, corpus, train_tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families.gguf import write_tokenizer
from unimed_jax.interop.families.unimed_hf import is_exported
from unimed_jax.interop.sources import SOURCES
from unimed_jax.interop.tensors.gguf import find_gguf, is_gguf
from unimed_jax.parsing import read_json
from unimed_jax.settings import from_config_dict

# What an evaluation writes, the last one last: it stands for the others. The page is written
# afterwards, so the old one goes when the others change.
RESULTS = (
    *("predictions.jsonl", "predictions.png", "routing.png", "reliability.png"),
    *("report.html", "report.md", "metrics.json"),
)


def write_config(folder: Path, config: Config) -> None:
    """Writes the settings into a new folder, or compares them with those of an old one.

    In an old folder they must be the same, except for the mesh.

    `train.steps` may also be raised if `train.longer` says how the schedule goes on; then the
    folder gets the new settings, and loses the scores of the shorter run.
    """
    file = folder / "config.json"
    if file.exists():
        old = read_config(folder)
        old = dataclasses.replace(old, mesh=config.mesh)  # a run may continue on other devices
        old = with_changed(old, config.data.changed, config.text.changed)
        if old == config:
            return
        now = config.train
        longer = dataclasses.replace(
            old, train=dataclasses.replace(old.train, steps=now.steps, longer=now.longer)
        )
        raised = longer == config and now.steps > old.train.steps
        if not raised or now.longer == "refuse":
            way_out = "choose another --workdir, or remove the folder"
            if raised:
                way_out += ", or set config.train.longer to 'restart' or 'stretch'"
            difference = _difference(to_dict(old), to_dict(config))
            raise UserError(f"{folder} holds a run with other settings ({difference}); {way_out}.")
        remove_results(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(file, to_dict(config))


def remove_results(folder: Path) -> None:
    """Removes the scores of a run that trains on, or they would be taken for those of its last step."""
    for name in reversed(RESULTS):
        (folder / name).unlink(missing_ok=True)


def with_changed(config: Config, data: Changed, text: Changed) -> Config:
    """Returns the settings with other values of data.changed and text.changed."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, changed=data),
        text=dataclasses.replace(config.text, changed=text),
    )


def read_config(folder: Path) -> Config:
    """Reads the settings of a run's folder.

    Raises UserError if they are missing, damaged or of another kind.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{file} does not exist; --run names the folder that training wrote (see --workdir)."
        )
    settings = read_json(file, "restore it or train again")
    if not isinstance(settings, dict):
        raise UserError(f"{file} holds no settings of a run; restore it or train again.")
    try:
        return from_config_dict(settings, effects=False)
    except UserError as error:
        raise UserError(
            f"{file} is of another version of this program, or was changed: {error}"
        ) from error


def _difference(old: dict, new: dict, where: str = "config") -> str:
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            return _difference(a, b, f"{where}.{key}")
        if a != b:
            return f"{where}.{key} is {a!r} there and {b!r} now"
    return "the same"


def missing_inputs(config: Config, trains: bool = True) -> str | None:
    """Names in one sentence the weight files and, to train, data folders that the settings lack.

    The answer is None if nothing is missing.
    """
    lacks = [
        f"{SOURCES[kind].what} (config.init {kind!r})"
        for kind, path in config.init
        if kind in SOURCES and not path
    ]
    for kind, path in config.init:
        if kind == "run" and not (Path(path) / "config.json").is_file():
            lacks.append(f"the finished run {path} (config.init 'run'; train it first)")
        if kind == "router" and path and not Path(path).exists():
            lacks.append(f"the router {path} (config.init 'router'; train it first)")
        if kind == "gguf" and path:
            find_gguf(path)  # that run says itself what it lacks
    if not config.text.tokenizer and (
        not trains or any(kind in ("hf", "gguf") for kind, _ in config.init)
    ):
        lacks.append("the tokenizer folder (config.text.tokenizer)")
    if not trains:
        return f"config {config.name!r} still needs {'; '.join(lacks)}." if lacks else None
    names = [
        source.path or source.name
        for source in (*config.data.sources, *config.evaluate.sources)
        if missing(source, config.data)
    ]
    if names:
        there = config.data.root or "config.data.root"
        lacks.append(f"the data sets {', '.join(dict.fromkeys(names))} ({there}, one folder each)")
    return f"config {config.name!r} still needs {'; '.join(lacks)}." if lacks else None


def load_text(folder: Path, config: Config, datasets: Sequence[Dataset]) -> Tokenizer:
    """Opens the run's tokenizer (see `tokenizer_folder`).

    A BPE is trained once, on the training texts. Raises UserError if the folder holds the tokenizer of
    another GGUF file than the one that is named now.
    """
    path, named = tokenizer_folder(folder, config), config.text.tokenizer
    if path.exists():
        if is_gguf(named):
            _refuse_other_tokenizer(path, named)
        return Tokenizer.load(path)
    if is_gguf(named):
        write_tokenizer(named, path)
    elif path == folder / "tokenizer":
        with files.new_folder(path) as unfinished:
            train_tokenizer(corpus(_training_examples(datasets), config.text), config.text, unfinished)
    return Tokenizer.load(path)


def _refuse_other_tokenizer(path: Path, named: str) -> None:
    """Raises UserError if a tokenizer's folder was not made of this GGUF file, where that is there."""
    try:
        find_gguf(named)
    except UserError:  # what a run needs of it lies in its folder
        return
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(named, Path(place, "tokenizer"))
        made, kept = (folder / "tokenizer.json" for folder in (Path(place, "tokenizer"), path))
        if not kept.is_file() or not filecmp.cmp(made, kept, shallow=False):
            raise UserError(
                f"{path} is not the tokenizer of {named}; name the file that it was made of, or give "
                "another --workdir."
            )


def _training_examples(datasets: Sequence[Dataset]) -> Iterator[Example]:
    """Yields the training examples of all data sets, in their order."""
    for dataset in distinct(datasets):
        if "train" in dataset.splits:
            yield from dataset.examples("train")


def tokenizer_folder(folder: Path, config: Config) -> Path:
    """Returns the folder of a run's tokenizer.

    It is the one that the settings name, else that of the run whose embeddings this run starts from.

    A tokenizer that the run has trained or read from a GGUF file is in its own folder.
    """
    named = config.text.tokenizer
    if named:
        return folder / "tokenizer" if is_gguf(named) else Path(named)
    before = next((Path(path) for kind, path in reversed(config.init) if kind == "run"), None)
    if before is None:
        return folder / "tokenizer"
    return before if is_exported(before) else tokenizer_folder(before, read_config(before))
