"""Measures the weights of the connector's experts: norms, distances, and moves since the start.

It writes experts.json, experts.md and experts.png: how far apart the experts are, by their weights and
by what they make of the same visual tokens; how far each moved since the run started; and how alike
the updates are that each task alone would cause (--steps=0 leaves these out).
"""

from pathlib import Path

from unimed_jax.verbs.analyze.options import folder_of, of_one_run, opened, settings, within


def run(arguments: list[str]) -> None:
    """Opens the run, measures its experts, and writes the files."""
    options = of_one_run(__name__, __doc__, limit=200)
    options.add_argument("--steps", type=int, default=5, help="of each task's update (default: 5)")
    options.add_argument(
        "--repeats", type=int, default=4, help="of each update, on other batches (default: 4)"
    )
    known = options.parse_args(arguments)
    within(known.steps, "--steps", 0, 1000)
    within(known.repeats, "--repeats", 1, 100)
    out = folder_of(known)
    config = settings(known)

    from unimed_jax.analyze import drawing, expert_weights, experts_report, updates
    from unimed_jax.analyze.examples import shown_images
    from unimed_jax.analyze.routing import refuse_without_mixture

    refuse_without_mixture(Path(known.run), config)
    found, units = opened(known, config)

    with found.inside():
        measured = expert_weights.analyse(found, shown_images(units))
        changes = updates.analyse(found, units, known.steps, known.repeats) if known.steps else None
    content = {**drawing.about(found, known.split), **measured, "updates": changes}
    content["notes"] = [*found.notes, *measured["notes"], *(changes["notes"] if changes else ())]
    drawing.write(
        out,
        "experts",
        content,
        experts_report.page(content),
        lambda path: experts_report.draw(path, content),
    )
