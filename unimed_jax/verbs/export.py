"""Writes a run's weights in a format that other programs read."""

import json

from unimed_jax.errors import UserError
from unimed_jax.verbs.options import parser


def run(arguments: list[str]) -> None:
    """Opens the run and writes it to --out."""
    options = parser(__name__, __doc__)
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

    from unimed_jax.data.forms import form_of
    from unimed_jax.interop.families import med_moe
    from unimed_jax.interop.families.hf import export_decoder
    from unimed_jax.interop.families.peft import export_peft
    from unimed_jax.interop.families.unimed_hf import export_unimed_hf, merged_leaves
    from unimed_jax.interop.families.unimed_names import trainable_table
    from unimed_jax.interop.families.unimed_pth import export_unimed
    from unimed_jax.model.parameters import parameters
    from unimed_jax.runs.folder import tokenizer_folder
    from unimed_jax.runs.open import open_run
    from unimed_jax.train.loop import saved_state

    run = open_run(known.run)
    config, tokenizer = run.config, tokenizer_folder(run.folder, run.config)
    ids = {"bos": run.tokenizer.bos, "eos": run.tokenizer.eos, "pad": run.tokenizer.pad}
    if config.model.moe.experts and known.format in ("model", "decoder", "unimed"):
        raise UserError(f"--format={known.format} has no place for the decoder's experts; choose med_moe.")
    if known.format == "model" and not (form_of(config.text).exported and config.data.fit == "stretch"):
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
