"""Measures which experts the images of each task, data set, modality and place go to, with intervals.

It writes routing.json, routing.md and routing.png: mean weights of the connector's experts, each
example under its own task; what the weights vary with (task, place, image); how far apart two tasks
route the same images; the mean weight at every place of the image. A run with experts in the decoder
gets the share of tokens that go to each of them, by layer, too.
"""

from pathlib import Path

from unimed_jax.verbs.analyze.options import folder_of, of_one_run, opened, settings


def run(arguments: list[str]) -> None:
    """Opens the run, routes its held-out examples, and writes the files."""
    options = of_one_run(__name__, __doc__, limit=500)
    options.add_argument(
        "--by",
        action="append",
        default=[],
        help="a key of the examples' meta to group by; may be repeated (default: modality)",
    )
    known = options.parse_args(arguments)
    out = folder_of(known)
    config = settings(known)

    from unimed_jax.analyze import decoder_routing, drawing, examples, routing, routing_report
    from unimed_jax.evaluate.report.pictures import token_grid

    keys = known.by or ["modality"]
    decoder = bool(config.model.moe.numbers(config.model.decoder.depth))
    if not decoder:  # else the decoder's experts are looked at, whatever the connector
        routing.refuse_without_mixture(Path(known.run), config)
    found, units = opened(known, config)
    examples.check_keys(units, known.by)
    with found.inside():
        content = {
            **drawing.about(found, known.split),
            "connector_routing": (
                routing.analyse(found, units, keys) if routing.has_mixture(config) else None
            ),
            "decoder_routing": decoder_routing.analyse(found, units, keys) if decoder else None,
        }
    drawing.write(
        out,
        "routing",
        content,
        routing_report.page(content),
        lambda path: routing_report.draw(path, content, token_grid(config)),
    )
