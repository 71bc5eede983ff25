"""The only door: `python -m unimed_jax.main [verb] --config=FILE | --run=DIR`.

(train)   --config=FILE[:argument] [--workdir=DIR] [--config.key=value ...]   trains, evaluates, reports; a config
          with `stages`: each of them in turn, finished ones skipped
evaluate  --run=DIR [--config.evaluate.key=value ...]                         scores a run again
predict   --run=DIR --task=TASK [--image=FILE] [--text=WORDS] [--out=FILE]    answers one question
export    --run=DIR --out=PATH --format=model|decoder|peft|unimed|med_moe     writes weights for other programs
params    --config=FILE[:argument] [--json=FILE] [--config.key=value ...]     counts parameters; makes none

--run=DIR may also be a folder that `export --format=model` wrote; predict takes --config=FILE in its place, where
config.init names all weights (those of an original checkpoint and its base model, say).
"""

import argparse
import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import ml_collections

from unimed_jax import processes
from unimed_jax.config import TASKS, Config, to_dict
from unimed_jax.errors import UserError, nearest
from unimed_jax.interruption import Stopped, full_disk_told, stoppable
from unimed_jax.settings import from_config_dict, load_config_file

VERBS = ("train", "evaluate", "predict", "export", "params")


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit status.

    A mistake that the user can mend is one sentence on stderr and status 2; a stop by SIGTERM or Ctrl-C is one
    sentence and status 143 or 130.
    """
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss PyTorch, which nothing here needs
    try:
        verb = argv[0] if argv and not argv[0].startswith("-") else "train"
        if verb not in VERBS:
            raise UserError(f"{verb!r} is no verb{nearest(verb, VERBS)} Choose from {', '.join(VERBS)}.")
        arguments = argv[1:] if argv[:1] == [verb] else argv
        with stoppable(), full_disk_told(), processes.lost_processes_told():
            processes.join()
            run = {"train": run_train, "evaluate": run_evaluate, "predict": run_predict, "export": run_export}
            run |= {"params": run_params}
            run[verb](arguments)
    except UserError as error:
        print(f"unimed_jax: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"unimed_jax: {stop}", file=sys.stderr)
        return stop.status
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help.")


def parser(verb: str) -> Parser:
    out = Parser(prog=f"python -m unimed_jax.main {verb}", description=__doc__, allow_abbrev=False)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    return out


def settings_of(settings: ml_collections.ConfigDict, overrides: list[str]) -> Config:
    """Applies `--config.a.b=value` in turn. Raises UserError for an unknown key or word."""
    for word in overrides:
        key, equals, value = word.partition("=")
        if not key.startswith("--config.") or not equals:
            raise UserError(f"argument {word!r} is unknown; settings are given as --config.key=value.")
        *groups, name = key.removeprefix("--config.").split(".")
        place: Any = settings
        for part in [*groups, name]:
            if not isinstance(place, ml_collections.ConfigDict) or part not in place:
                choices = list(place.keys()) if isinstance(place, ml_collections.ConfigDict) else []
                raise UserError(f"{key} is not a setting{nearest(part, choices)}")
            parent, place = place, place[part]
        with parent.ignore_type():
            parent[name] = _literal(value, place)
    return from_config_dict(settings)


def _literal(value: str, old: Any) -> Any:
    if isinstance(old, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(value.lower(), value)


def run_train(arguments: list[str]) -> None:
    options = parser("train")
    options.add_argument("--config", required=True, help="a file of configs/, with :argument where it takes one")
    options.add_argument("--workdir", help="the run's folder (default: runs/<config name>)")
    known, overrides = options.parse_known_args(arguments)
    if "://" in (known.workdir or ""):
        raise UserError(f"--workdir={known.workdir} is no folder; mount the bucket, and give its path there.")
    settings = load_config_file(known.config)
    if "stages" in settings:
        run_stages(settings, overrides, Path(known.workdir or f"runs/{settings.name}"))
        return
    config = settings_of(settings, overrides)

    from unimed_jax.runs.folder import missing_inputs

    lacks = missing_inputs(config)
    if lacks:
        raise UserError(lacks)
    train_and_evaluate(config, Path(known.workdir or f"runs/{config.name}"))


def run_stages(settings: ml_collections.ConfigDict, overrides: list[str], folder: Path) -> None:
    """What is left of a chain: the same command continues one that was interrupted."""
    from unimed_jax.analyze.chain import finished, read_stages, write_table

    stages, table = read_stages(settings, overrides, folder), ""
    for i, stage in enumerate(stages):
        done = finished(stage)
        if processes.leads():
            print(f"stage {i + 1} of {len(stages)}, {stage.name}: {'finished' if done else stage.folder}", flush=True)
        if not done:
            train_and_evaluate(stage.config, stage.folder)
        if processes.leads():
            table = write_table(folder, stages[: i + 1])
    if table:
        print(f"{table}\nwrote {folder / 'stages.md'}")


def train_and_evaluate(config: Config, folder: Path) -> None:
    """From settings to a run's folder with its scores, from where it was left."""
    from unimed_jax.model.sharding import inside
    from unimed_jax.train.loop import train

    if config.job == "router":
        from unimed_jax.train.router import REPORT, summary, train_router

        report = train_router(config, folder)
        if processes.leads():
            print(f"{summary(report)}\nwrote {folder / REPORT}")
        return
    run = train(config, folder)
    with inside(run.mesh):
        _evaluate(run, config)


def run_evaluate(arguments: list[str]) -> None:
    options = parser("evaluate")
    options.add_argument("--run", required=True, help="a run's folder")
    known, overrides = options.parse_known_args(arguments)
    for word in overrides:
        if not word.startswith("--config.evaluate."):
            raise UserError(f"argument {word!r} cannot change a finished run; only --config.evaluate.key=value can.")

    from unimed_jax.runs.open import open_run

    run = open_run(known.run)
    _evaluate(run, settings_of(ml_collections.ConfigDict(to_dict(run.config)), overrides))


def _evaluate(run, config: Config) -> None:
    """Scores validation and test, measures the routing, writes the report into the run's folder.

    All processes generate together; the first one writes.
    """
    from unimed_jax.data.datasets import joined, load_datasets
    from unimed_jax.evaluate.report import write_report
    from unimed_jax.evaluate.routing import routing_report
    from unimed_jax.evaluate.tasks import evaluate
    from unimed_jax.model.parameters import with_parameters
    from unimed_jax.predict.predictor import answerer
    from unimed_jax.runs.open import initial_leaves

    leads = processes.leads()
    dataset = joined(load_datasets(config.held_out))
    answer = answerer(run.model, config, run.tokenizer)
    results, records = {}, []
    for split in config.evaluate.splits:
        if leads:
            print(f"evaluating {split} ...", flush=True)
        results[split], lines = evaluate(answer, dataset, dataset.examples("train"), config, split)
        records += lines
    shown = {line["image"]: line["cluster"] for line in records if line["image"] and line["split"] == "test"}
    routing = None
    if shown:
        pixels = [dataset.image(key) for key in shown]
        first, _ = initial_leaves(config, run.tokenizer, run.mesh, ("vision/*", "connector/*"))
        initial = with_parameters(run.model, first)
        routing = routing_report(run.model, initial, config, pixels, list(shown.values()))
    if not leads:
        return
    metrics = write_report(run.folder, config, dataset.checksum, results, records, dataset.image, routing)
    for task, entry in metrics["tasks"].items():
        if entry["n"]:
            margin = entry["margin"]
            score = entry["corrected"][entry["primary"]]
            print(
                f"{task:9s} {entry['primary']:12s} {score['value']:.3f}  {margin['value']:+.3f} on {margin['baseline']}"
            )
    print(f"wrote {run.folder / 'report.md'}")


def run_predict(arguments: list[str]) -> None:
    options = parser("predict")
    options.add_argument("--run", help="a run's folder, or that of an exported model")
    options.add_argument("--config", help="in place of --run: settings whose init names all weights")
    options.add_argument("--task", required=True, help=", ".join(TASKS))
    options.add_argument("--image", help="PNG, JPEG or DICOM (every task but qa)")
    options.add_argument("--text", default="", help="the question; refer: what to find; identify: {<x1><y1><x2><y2>}")
    options.add_argument("--out", help="refer, identify: where to draw the box (default: beside the run)")
    known, overrides = options.parse_known_args(arguments)
    if (known.run is None) == (known.config is None) or (overrides and known.run):
        raise UserError(
            "predict takes either --run=DIR or --config=FILE with its --config.key=value; give one of them."
        )
    if known.task not in TASKS:
        raise UserError(f"--task={known.task} is no task{nearest(known.task, TASKS)} Choose from {', '.join(TASKS)}.")
    if known.task in ("vqa", "qa", "refer", "identify") and not known.text:
        raise UserError(f"task {known.task!r} needs --text.")

    from unimed_jax.data.example import Example
    from unimed_jax.data.images import read_image
    from unimed_jax.data.prompts import text_to_box
    from unimed_jax.evaluate.report.pictures import draw_box
    from unimed_jax.predict.predictor import answerer
    from unimed_jax.runs.open import open_config, open_run

    if known.task == "identify" and text_to_box(known.text) is None:
        raise UserError(f"--text={known.text!r} is no box; write {{<x1><y1><x2><y2>}} in hundredths of the image.")
    image = read_image(known.image) if known.image else None
    run = open_run(known.run) if known.run else open_config(settings_of(load_config_file(known.config), overrides))
    example = Example("--text", known.task, known.text, "", image=known.image)
    (text,) = answerer(run.model, run.config, run.tokenizer)([example], [image])
    print(text)
    box = text_to_box({"refer": text, "identify": known.text}.get(known.task, ""))
    if box and image is not None:
        out = Path(known.out or run.folder / f"{Path(known.image).stem}_{known.task}.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_box(out, image, box, known.text if known.task == "refer" else text)
        print(f"drew {out}")


def run_export(arguments: list[str]) -> None:
    options = parser("export")
    options.add_argument("--run", required=True, help="a run's folder")
    options.add_argument("--out", required=True, help="the new folder (unimed: file)")
    options.add_argument(
        "--format",
        required=True,
        choices=("model", "decoder", "peft", "unimed", "med_moe"),
        help="model: all of it, for transformers; decoder: the language model, adapters merged; peft: the adapters "
        "alone; unimed, med_moe: a checkpoint of the original Uni-Med or Med-MoE",
    )
    known = options.parse_args(arguments)

    from unimed_jax.interop.families import med_moe
    from unimed_jax.interop.families.hf import export_decoder
    from unimed_jax.interop.families.peft import export_peft
    from unimed_jax.interop.families.unimed_hf import export_unimed_hf, merged_leaves
    from unimed_jax.interop.families.unimed_pth import export_unimed, trainable_table
    from unimed_jax.model.parameters import parameters
    from unimed_jax.runs.folder import tokenizer_folder
    from unimed_jax.runs.open import open_run
    from unimed_jax.train.loop import saved_state

    run = open_run(known.run)
    config, tokenizer = run.config, tokenizer_folder(run.folder, run.config)
    ids = {"bos": run.tokenizer.bos, "eos": run.tokenizer.eos, "pad": run.tokenizer.pad}
    if config.model.moe.experts and known.format in ("model", "decoder", "unimed"):
        raise UserError(f"--format={known.format} has no place for the decoder's experts; choose med_moe.")
    if known.format == "model" and (config.text.form, config.data.fit) != ("unimed", "stretch"):
        raise UserError(
            f"--format=model asks in Uni-Med's form alone, and this run has config.text.form={config.text.form!r} and "
            f"config.data.fit={config.data.fit!r}; choose another format."
        )
    if known.format == "med_moe":
        med_moe.export_med_moe(known.out, config.model, parameters(run.model), tokenizer, ids)
    elif known.format == "model":
        scores = run.folder / "metrics.json"
        metrics = json.loads(scores.read_text()) if scores.is_file() else None
        export_unimed_hf(known.out, config, run.model, tokenizer, metrics)
    elif known.format == "decoder":
        export_decoder(known.out, config.model.decoder, merged_leaves(run.model), tokenizer, ids)
    elif known.format == "peft":
        base = next((path for kind, path in reversed(config.init) if kind in ("hf", "gguf")), "")
        export_peft(known.out, config.model, parameters(run.model), base)
    else:
        original = next((path for kind, path in reversed(config.init) if kind == "unimed"), None)
        trained, moments = saved_state(run)
        paths = trainable_table(config.model).paths()
        held = {path: leaf for path, leaf in parameters(run.model).items() if path in paths}
        export_unimed(known.out, config, {**held, **trained}, moments, like=original)
    print(f"wrote {known.out}")


def run_params(arguments: list[str]) -> None:
    options = parser("params")
    options.add_argument("--config", required=True, help="a file of configs/, with :argument where it takes one")
    options.add_argument("--json", help="a file for the same numbers")
    known, overrides = options.parse_known_args(arguments)
    settings = load_config_file(known.config)
    if "stages" in settings:
        raise UserError(f"--config={known.config} is a chain; name one of its stages ({', '.join(settings.stages)}).")
    config = settings_of(settings, overrides)

    from unimed_jax.analyze import params
    from unimed_jax.files import new_file

    counted = params.count(config)
    print(params.table(counted, config.model))
    if known.json:
        with new_file(known.json) as file:
            file.write_text(json.dumps({"config": known.config, **counted}, indent=1) + "\n")
        print(f"wrote {known.json}")


if __name__ == "__main__":
    sys.exit(main())
