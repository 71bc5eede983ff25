"""Writes the README.md of an exported model.

It says what the model is, where it comes from, how well it does, and what its limits are.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.config import Config
from unimed_jax.data.datasets import path_of, reader_of
from unimed_jax.data.info import NO_LICENCE, Info, described
from unimed_jax.errors import UserError
from unimed_jax.interop.sources import SOURCES
from unimed_jax.verdicts import reliance_verdict, verdict

# task -> (the text that it takes, what it answers)
ASKED = {
    "vqa": ("a question about the image", "words"),
    "refer": ("what to find", "a box `{<x1><y1><x2><y2>}` in hundredths of the image"),
    "identify": ("a box `{<x1><y1><x2><y2>}`", "what it holds"),
    "caption": ("nothing", "a report"),
    "cls": ("nothing, or the classes", "a class"),
    "qa": ("a question, without an image", "words"),
}
USAGE = """```python
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/of/this/folder"  # or the name of its repository
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(model.answer(tokenizer, Image.open("image.png"), task="vqa", text="Which plane is this?"))
```"""
COMMANDS = """```bash
python -m unimed_jax.main predict --run=FOLDER --task=vqa --image=image.png --text="Which plane is this?"
python -m unimed_jax.main serve --run=FOLDER  # a page and an API on this machine
```"""
# What a verdict over the best blind baseline means for who uses the model.
MEANING = {
    "above blind": "better than the best guess without the image",
    "undecided": "not shown to be better than the best guess without the image",
    "below blind": "worse than the best guess without the image",
    "no verdict": "not compared with a guess without the image, or on too few independent cases",
}


def model_card(
    config: Config,
    size: int,
    metrics: Mapping[str, Any] | None,
    notes: Sequence[str] = (),
    inputs: Mapping[str, str] | None = None,
    passports: Mapping[str, Info] | None = None,
    reliance: Mapping[str, Any] | None = None,
) -> str:
    """Writes the card as Markdown, with the header that the Hugging Face Hub reads.

    size: number of parameters. metrics: the content of metrics.json. notes: what changed of data
    and tokenizer since the training began. inputs: the states of both (runs/inputs.py). passports:
    those of the training sources, by name. reliance: the content of reliance.json (analyze/reliance.py).
    """
    what = {kind: source.what for kind, source in SOURCES.items()} | {
        "run": "the folder of a run of unimed_jax"
    }
    bases = [f"- {what[kind]}: `{name or 'not named'}`" for kind, name in config.init if kind != "seed"]
    reason = (
        "the terms of the base weights named below apply" if bases else "no outside weights are in it"
    )
    header = (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n"
        "tags:\n- medical-imaging\n- vision-language-model\n- mixture-of-experts\n- unimed_jax\n"
        f"license: unknown  # to be filled in: {reason}\n---"
    )
    m = config.model
    connector = f"`{m.connector.kind}`"
    if m.connector.is_moe:
        connector += f" with {m.connector.experts} experts and a {m.connector.router} router"
    trained = trained_tasks(config, passports)
    tasks = [f"| `{task}` | {' | '.join(ASKED[task])} |" for task in ASKED if task in trained]
    others = ", ".join(f"`{task}`" for task in ASKED if task not in trained)
    lacking = f"\n\nNot trained, so that answers mean nothing: {others}." if others else ""
    parts = [
        header,
        f"# {config.name or 'UniMed model'}",
        "**Research software, not a medical device.** Not for diagnosis, treatment or any clinical "
        "decision.",
        f"A medical vision-language model of {size / 1e6:.1f} million parameters that answers "
        f"{len(tasks)} kind{'s' * (len(tasks) > 1)} of questions: a vision transformer "
        f"({m.vision.image_size} pixels, {m.vision.depth} blocks of width {m.vision.width}), a "
        f"connector ({connector}; Uni-Med, arXiv 2409.17508) that makes {m.tokens_per_image} visual "
        f"tokens of an image, and a language decoder ({m.decoder.depth} layers of width "
        f"{m.decoder.width}). Trained and exported with "
        "unimed_jax; adapters, if there were any, are merged.",
        f"## How to ask\n\n{USAGE}\n\n"
        "All code is in `modeling_unimed.py` in this folder, in plain torch. The image is read as "
        "RGB, turned by its EXIF orientation, with white behind what is transparent; for DICOM, pass "
        "the windowed pixels as a uint8 array [H, W, 3]; for a question about several images, pass a "
        "list of them, in their order. Prompts are those of "
        "the evaluation and decoding is greedy; `model.answers` takes several questions at "
        "once. `unimed_jax` opens the folder as it opens a run, for its own commands:\n\n"
        f"{COMMANDS}\n\n"
        "| task | text | answer |\n| --- | --- | --- |\n" + "\n".join(tasks) + lacking,
        "## Base weights\n\n"
        + ("\n".join(bases) if bases else "None: every parameter was trained from random numbers."),
        f"## Data\n\n{_data(config, metrics, passports)}{_states(inputs or {})}",
        *(f"**Note:** {note}." for note in notes),
        f"## Scores\n\n{_scores(metrics)}",
        "## Intended use\n\nResearch on multi-task medical vision-language models: comparison, "
        "ablation, teaching, by people who can judge the answers. **Not for** diagnosis, treatment, "
        "triage or any decision about a patient, nor for images, tasks or languages other than those "
        "above.",
        "## Limits\n\n"
        + _limits(metrics, reliance)
        + "Answers can be wrong and sound sure; nobody has checked them, and no score above says how "
        "the model does on other patients, devices, hospitals or kinds of images than those of its "
        "data. Questions outside the six tasks, more images in a question than the data has and "
        "languages other than that of the data were not trained. What is unfair in the data is "
        "unfair in the answers.",
        "## Licence\n\nTo be filled in by whoever publishes this folder, here and in the header: "
        + (
            f"{reason}, and so may those of the data."
            if bases
            else f"{reason}; terms of the data may apply."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def passports_of(config: Config) -> dict[str, Info]:
    """Finds what is known of the training sources, by name.

    Nothing is known of a source that does not exist any more.
    """
    found: dict[str, Info] = {}
    for source in config.data.sources:
        folder = path_of(source, config.data)
        with contextlib.suppress(UserError):
            info = described(reader_of(source.name).INFO, Path(folder) if folder else None, source.info)
            found.setdefault(source.name, info)
    return found


def trained_tasks(config: Config, passports: Mapping[str, Info] | None) -> set[str]:
    """Names the tasks of the training sources; all of them, if a source names none and is not known."""
    found: set[str] = set()
    for source in config.data.sources:
        known = (passports or {}).get(source.name)
        found |= set(source.tasks or (known.tasks if known else ASKED))
    return found


def _data(
    config: Config, metrics: Mapping[str, Any] | None, passports: Mapping[str, Info] | None
) -> str:
    """Lists the training sources with their licences, and the known facts of all data sets.

    The facts cover the sets that the model was scored on, too.
    """
    tasks: dict[str, list[str]] = {}
    for source in config.data.sources:
        tasks.setdefault(source.name, []).extend(source.tasks or ("all its tasks",))
    known = dict(passports or {})
    lines = []
    for name, listed in tasks.items():
        licence = known[name].licence if name in known else NO_LICENCE
        lines.append(f"- `{name}`: {', '.join(dict.fromkeys(listed))} ({licence})")
    scored = (metrics or {}).get("data", {})
    notes = [info.note for info in known.values()] + [entry.get("note") for entry in scored.values()]
    notes += [
        f"Scored on `{name}`: {entry['licence']}."
        for name, entry in scored.items()
        if entry.get("licence")
    ]
    lines += [f"\n{note}" for note in dict.fromkeys(filter(None, notes))]
    return "\n".join(lines) if lines else "Not named in the settings."


def _states(inputs: Mapping[str, str]) -> str:
    """Lists the checksums of what the model was trained with."""
    listed = ", ".join(f"`{name}@{state[:8]}`" for name, state in inputs.items())
    return f"\n\nTrained with {listed}." if listed else ""


def _units(metrics: Mapping[str, Any] | None) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Lists (set, task, scores) of the split that leads."""
    split = (metrics or {}).get("split", "test")
    return [
        (name, task, entry)
        for name, splits in (metrics or {}).get("sets", {}).items()
        for task, entry in splits.get(split, {}).items()
    ]


def _scores(metrics: Mapping[str, Any] | None) -> str:
    scored = _units(metrics)
    if not metrics or not scored:
        return "Not evaluated."
    lines = [
        "| set | task | n | metric | value [95 % interval] | margin over the best blind baseline "
        "| verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, task, entry in scored:
        margin = entry.get("margin")
        over = f"{_interval(margin, '+')} ({margin['baseline']})" if margin else "-"
        primary = entry["primary"]
        value = _interval(entry["corrected"].get(primary))
        cells = (name, task, entry["n"], primary, value, over, verdict(margin))
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    made = ", ".join(
        f"{key} `{metrics[key]}`"
        for key in ("config_hash", "data_checksum", "code_version")
        if key in metrics
    )
    return (
        f"On the {metrics.get('split', 'test')} split, corrected scores; a blind baseline answers "
        "without seeing the image. *Above blind*: the whole interval of the margin is above 0.\n\n"
        + "\n".join(lines)
        + (f"\n\nMade with {made}." if made else "")
    )


def _limits(metrics: Mapping[str, Any] | None, reliance: Mapping[str, Any] | None) -> str:
    """Says for each set and task what the scores do not allow; empty without scores."""
    lines = []
    for name, task, entry in _units(metrics):
        said = [MEANING[verdict(entry.get("margin"))]]
        weak = [
            template
            for template, part in entry.get("templates", {}).items()
            if len(entry["templates"]) > 1 and verdict(part.get("margin")) != "above blind"
        ]
        if weak:
            said.append(f"of its question templates not shown to be better: {', '.join(weak)}")
        peer = entry.get("peer_margin")
        if peer and verdict(peer) == "below blind":
            said.append(f"{peer['baseline']}, which reads the same text, answers better")
        kept = (reliance or {}).get("sets", {}).get(name, {}).get(task)
        if kept and (score := kept["scores"].get("visual_reliance_score")):
            words = reliance_verdict(score)
            undecided = words == "undecided"
            said.append("not shown to rely on the image" if undecided else words)
        lines.append(f"- {name}, {task}: {'; '.join(said)}.")
    return "\n".join(lines) + "\n\n" if lines else ""


def _interval(score: Mapping[str, Any] | None, sign: str = "") -> str:
    if not score or score.get("value") is None:
        return "-"
    low, high = score.get("ci95") or (None, None)
    ends = "" if low is None or high is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"{score['value']:{sign}.3f}{ends}"
