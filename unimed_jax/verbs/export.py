"""Writes a run's weights in a format that other programs read.

--config.text.changed=accept writes them with a tokenizer that changed since the run was trained.
"""

from pathlib import Path

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
    scores, reliance = run.folder / "metrics.json", run.folder / "reliance" / "reliance.json"
    trained, moments = saved_state(run) if target.moments else ({}, None)
    content = Content(
        config=run.config,
        leaves=parameters(run.model),
        tokenizer=tokenizer_folder(run.folder, run.config),
        trained=frozenset(trained),
        moments=moments,
        notes=run.notes,
        inputs=kept(run.folder).inputs,
        metrics=read_json(scores, "evaluate the run again") if scores.is_file() else None,
        reliance=read_json(reliance, "analyze it again") if reliance.is_file() else None,
    )
    target.write(known.out, content)
    quantised = any(isinstance(leaf, Quantised) for leaf in content.leaves.values())
    if quantised and target.kernels:
        model = run.config.model
        print(
            f"{known.run}: its frozen kernels are stored as {model.frozen_kernels}; what is written is "
            f"the numbers that these codes stand for, in {model.frozen_dtype}"
        )
    for note in run.notes:
        print(f"{known.run}: {note}")
    print(f"wrote {known.out}")
