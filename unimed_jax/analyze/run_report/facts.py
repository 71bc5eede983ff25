"""Gathers what a run's folder and its data say, for the page."""

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.analyze.reliance_report import of_the_same
from unimed_jax.config import Config
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import Source, open_sets
from unimed_jax.parsing import json_lines, read_json, read_text
from unimed_jax.runs import environment
from unimed_jax.runs.folder import read_config

LARGEST = 1 << 30  # bytes of a file of answers or a log
COUNTED = 50_000  # examples of a split whose tasks are counted
# of a line of predictions.jsonl
KEPT = (
    *("id", "set", "task", "template", "question", "images", "reference", "prediction"),
    *("box", "image_size", "blind", "peers"),
)
AUDIT = "check/check.json"  # in a run's folder: where `data check --out=RUN/check` puts it


@dataclasses.dataclass(frozen=True)
class Facts:
    """Holds what is known of one scored run; what a folder lacks is None or empty."""

    folder: Path
    name: str  # tells it from the others on the page
    sign: str  # A, B, C ... where there are several, else empty
    metrics: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]  # id -> a line of predictions.jsonl, of the leading split
    log: Sequence[Mapping[str, Any]]
    config: Config | None
    settings: Mapping[str, Any]  # config.json as it is
    inputs: Mapping[str, Any] | None
    cost: Mapping[str, Any] | None
    environment: Sequence[Mapping[str, Any]]
    reliance: Mapping[str, Any] | None
    tug_of_war: Mapping[str, Any] | None
    audit: Mapping[str, Any] | None

    @property
    def split(self) -> str:
        return self.metrics["split"]

    @property
    def reliance_is_its_own(self) -> bool:
        """Says whether reliance was measured after the step and on the data that were scored."""
        return self.reliance is not None and of_the_same(self.reliance, self.metrics)


def gather(
    folder: Path, name: str, sign: str, audit: Path | None = None, config: Config | None = None
) -> Facts:
    """Reads a run's folder; audit: a check.json to take in place of the run's own.

    config: the settings, where the folder holds none.

    Raises UserError if the run was not scored, or if a file is damaged.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist; score the run first (evaluate --run={folder}).")
    metrics = _object(file, f"score it again (evaluate --run={folder})")
    if not {"sets", "split", "pooled", "data"} <= metrics.keys():
        raise UserError(
            f"{file} is not of this version of the program; score it again (evaluate --run={folder})."
        )
    records = {
        line["id"]: {key: line[key] for key in KEPT}
        for line in _lines(folder / "predictions.jsonl")
        if line.get("split") == metrics["split"]
    }
    has_settings = (folder / "config.json").is_file()
    found = audit or folder / AUDIT
    return Facts(
        folder=folder,
        name=name,
        sign=sign,
        metrics=metrics,
        records=records,
        # of a run that was killed the last line may be cut short
        log=[
            line
            for line in _lines(folder / "log.jsonl", whole=False)
            if isinstance(line.get("step"), int)
        ],
        config=read_config(folder) if has_settings else config,
        settings=_object(folder / "config.json", "restore it") if has_settings else {},
        inputs=_maybe(folder / "inputs.json"),
        cost=_maybe(folder / "cost.json"),
        environment=environment.kept(folder),
        reliance=_maybe(folder / "reliance" / "reliance.json"),
        tug_of_war=_maybe(folder / "analysis" / "tug_of_war.json"),
        audit=_object(found, "give a check.json that `data check` wrote")
        if audit or found.is_file()
        else None,
    )


def _object(file: Path, advice: str) -> dict[str, Any]:
    content = read_json(file, advice)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; {advice}.")
    return content


def _maybe(file: Path) -> dict[str, Any] | None:
    return _object(file, "restore it, or remove it") if file.is_file() else None


def _lines(file: Path, whole: bool = True) -> Iterator[dict[str, Any]]:
    """Reads the objects of a file of JSON lines; nothing if there is none.

    whole: whether a last line without its end is read, too.
    """
    if file.is_file():
        text = read_text(file, "restore it, or remove it", LARGEST)
        text = text if whole else text[: text.rfind("\n") + 1]
        yield from (line for _, line in json_lines(text, str(file)) if isinstance(line, dict))


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names each folder with as much of its path as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


class Data:
    """Gives images and counts of the sets that were scored, as far as they are on this machine."""

    def __init__(self, configs: Sequence[Config]):
        self.missing = ""  # why some are not there
        self.sets: dict[str, Source] = {}
        if not configs:
            self.missing = "the folder has no config.json, which names the data"
        for settings in dict.fromkeys(config.held_out for config in configs):
            try:
                self.sets = open_sets(settings) | self.sets
            except UserError as error:
                self.missing = str(error).rstrip(".")

    def image(self, name: str, key: str) -> np.ndarray | None:
        """Returns an image, uint8 [H, W, 3], or None where it cannot be read."""
        try:
            return self.sets[name].data.image(key) if name in self.sets else None
        except (UserError, KeyError, OSError):
            return None

    def changed(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Says whether a set is in another state here than in an entry of a run's metrics."""
        return name in self.sets and self.sets[name].data.checksum != entry.get("checksum")

    def counts(self, name: str) -> list[list[Any]]:
        """Lists [split, examples, tasks] of a set; of a very large split only how many there are."""
        if name not in self.sets:
            return []
        data, rows = self.sets[name].data, []
        for split in data.splits:
            examples = data.examples(split)
            few = len(examples) <= COUNTED
            tasks = Counter(example.task for example in examples) if few else {}
            rows.append([split, len(examples), ", ".join(f"{task} {n}" for task, n in tasks.items())])
        return rows


def command(*words: str) -> str:
    """Writes a command of this program as a shell takes it."""
    return shlex.join(["python", "-m", "unimed_jax.main", *words])


def flat(settings: Mapping[str, Any], place: str = "") -> dict[str, str]:
    """Flattens settings to "model.vision.depth" -> value as JSON; lists stay whole."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{place}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = json.dumps(value, ensure_ascii=False)
    return found
