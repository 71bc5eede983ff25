"""Writes a run's weights in a format that other programs read.

--config.text.changed=accept writes them with a tokenizer that changed since the run was trained.
"""

from pathlib import Path
from typing import Any

from unimed_jax.errors import UserError, nearest
from unimed_jax.parsing import read_json
from unimed_jax.paths import check_output
from unimed_jax.processes import start
from unimed_jax.verbs.options import ACCEPTING, changed, parser


def run(arguments: list[str]) -> None:
    """Opens the run on the devices found and writes it to --out, one tensor at a time."""
    options = parser(__name__, f"{__doc__}The formats are those of unimed_jax/interop/targets.py.")
    options.add_argument("--run", required=True, help="a run's folder")
    options.add_argument("--out", required=True, help="the new folder (unimed: file)")
    options.add_argument("--format", required=True, help="model, decoder, peft, unimed or med_moe")
    known, overrides = options.parse_known_args(arguments)
    check_output(known.out, "--out")
    start()

    from unimed_jax.interop.targets import TARGETS, Content
    from unimed_jax.model.parameters import parameters
    from unimed_jax.model.quantised import Quantised
    from unimed_jax.runs.folder import tokenizer_folder
    from unimed_jax.runs.inputs import kept
    from unimed_jax.runs.open import open_run, settings_of
    from unimed_jax.runs.origin import base_of_adapters
    from unimed_jax.train.loop import saved_state

    if known.format not in TARGETS:
        choices = "; ".join(f"{name}: {target.what}" for name, target in TARGETS.items())
        raise UserError(
            f"--format={known.format} is not a format{nearest(known.format, TARGETS)} Choose {choices}."
        )
    target = TARGETS[known.format]
    config = changed(settings_of(Path(known.run)), overrides, ACCEPTING)
    run = open_run(known.run, changed=config.text.changed)
    reason = target.refuse(run.config)
    if reason:
        raise UserError(f"--format={known.format}: {reason}")
    metrics, reliance = _scores(run.folder)
    trained, moments = saved_state(run) if target.moments else ({}, None)
    leaves, base, remark = parameters(run.model), "", ""
    if target.base:
        base, remark = base_of_adapters(run.folder, run.config.model, leaves)
    content = Content(
        config=run.config,
        leaves=leaves,
        tokenizer=tokenizer_folder(run.folder, run.config),
        trained=frozenset(trained),
        moments=moments,
        base=base,
        notes=(*run.notes, *_stale(metrics, run.step)),
        inputs=kept(run.folder).inputs,
        metrics=metrics,
        reliance=reliance,
    )
    target.write(known.out, content)
    quantised = any(isinstance(leaf, Quantised) for leaf in content.leaves.values())
    if quantised and target.kernels:
        model = run.config.model
        print(
            f"{known.run}: its frozen kernels are stored as {model.frozen_kernels}; what is written is "
            f"the numbers that these codes stand for, in {model.frozen_dtype}"
        )
    if remark:
        print(f"{known.run}: the adapters name no decoder: {remark}")
    for note in run.notes:
        print(f"{known.run}: {note}")
    print(f"wrote {known.out}")


def _scores(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Reads the content of metrics.json and of the reliance.json that belongs to it, where they are."""
    from unimed_jax.analyze.reliance_report import of_the_same

    scores, measured = folder / "metrics.json", folder / "reliance" / "reliance.json"
    if not scores.is_file():
        return None, None
    metrics = read_json(scores, "evaluate the run again")
    reliance = read_json(measured, "analyze it again") if measured.is_file() else None
    return metrics, reliance if reliance and of_the_same(reliance, metrics) else None


def _stale(metrics: dict[str, Any] | None, step: int) -> list[str]:
    """Says for the model card that scores are of another state than the one that is written."""
    scored = (metrics or {}).get("step", step)
    if scored in (step, None):
        return []
    return [f"the scores below were measured after step {scored}, the weights are those of step {step}"]
