"""Switches experts off, one at a time, and measures what each task loses.

It writes ablation.json, ablation.md and ablation.png. An expert of the connector that is off has weight
0 at every visual token, and the weights of the others are scaled to sum to 1 again. An expert of the
decoder is off in all layers, and its tokens go to their next choice; the meta expert has its turn, too.
Every question is answered once with all experts and once without each of them; losses are paired, with
intervals over clusters. A killed analysis goes on with the same command.
"""

from pathlib import Path

from unimed_jax.verbs.analyze.options import folder_of, of_one_run, opened, settings


def run(arguments: list[str]) -> None:
    """Opens the run, answers its questions without each expert, and writes the files."""
    options = of_one_run(__name__, __doc__, limit=0)
    known = options.parse_args(arguments)
    out = folder_of(known)
    config = settings(known)

    from unimed_jax import files, processes
    from unimed_jax.analyze import ablation, ablation_report, drawing
    from unimed_jax.analyze.routing import refuse_without_mixture
    from unimed_jax.evaluate.run import claim_results

    if not ablation.has_decoder_experts(config):
        refuse_without_mixture(Path(known.run), config)
    claim_results(out)  # claimed before the model is opened, which can take minutes
    found, units = opened(known, config)
    with found.inside():
        content = {**drawing.about(found, known.split), **ablation.analyse(found, units, out)}
    drawing.write(
        out,
        "ablation",
        content,
        ablation_report.page(content),
        lambda path: ablation_report.draw(path, content),
    )
    if processes.leads():
        files.remove_folder(out / ablation.PARTIAL)
