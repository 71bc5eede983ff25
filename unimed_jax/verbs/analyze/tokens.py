"""Draws visual tokens before and after the connector in two dimensions, and scores their separation.

It writes tokens.json, tokens.md and tokens.png, coloured by task (or --by=KEY of the examples' meta, or
--by=set). The silhouette beside each picture is computed in the tokens' own space, with an interval
over clusters and the range that shuffled labels give.
"""

from unimed_jax.verbs.analyze.options import folder_of, of_one_run, opened, settings, within


def run(arguments: list[str]) -> None:
    """Opens the run, computes the tokens of its held-out images, and writes the files."""
    options = of_one_run(__name__, __doc__, limit=100)
    options.add_argument("--by", default="task", help="task, set, or a key of meta (default: task)")
    options.add_argument(
        "--projection", choices=("pca", "tsne"), default="pca", help="into the plane (default: pca)"
    )
    options.add_argument(
        "--tokens", type=int, default=1500, help="that are shown at most (default: 1500)"
    )
    known = options.parse_args(arguments)
    within(known.tokens, "--tokens", 4, 20_000)
    out = folder_of(known)
    config = settings(known)

    from unimed_jax.analyze import drawing, tokens, tokens_report
    from unimed_jax.analyze.examples import labelled, shown_images

    found, units = opened(known, config)
    shown, labels = labelled(shown_images(units), known.by)
    with found.inside():
        measured, points = tokens.analyse(found, shown, labels, known.tokens, known.projection)
    content = {**drawing.about(found, known.split), "by": known.by, **measured}
    content["notes"] = [*found.notes, *measured["notes"]]
    drawing.write(
        out,
        "tokens",
        content,
        tokens_report.page(content),
        lambda path: tokens_report.draw(path, content, points),
    )
