"""Fits laws to how the cost of a training step grows, on programs compiled ahead of time.

    python benchmarks/laws.py --out=laws.json --picture=docs/pictures/laws.png

It needs jax's CUDA plugin, but no GPU. One thing grows at a time; everything else stays as in
configs/cmoe.py (full-size Uni-Med) or, for the decoder's experts, configs/med_moe/moe.py:stablelm,
with full rematerialisation. Every point is one training step, compiled as `plan` compiles it and
counted from its text (unimed_jax/plan). A law is fitted by least squares of relative errors, to the
compiled program and to the ideal (unimed_jax/plan/ideal.py) alike: `worst` is the largest relative
error of a point, `x ideal` the ratio of compiled to ideal at the last. Of chips, each of which has a
row of its own, numbers are those of one chip, and the optimizer's traffic, which is split over all,
is left out.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np

CONFIGS = Path(__file__).parents[1] / "configs"
UNI_MED, MED_MOE = CONFIGS / "cmoe.py", f"{CONFIGS}/med_moe/moe.py:stablelm"
COMMON = ("mesh.auto=False", "model.remat=full", "data.mixing=per_example")
# Sizes of everything that does not grow.
SIZES = ("data.rows=4", "data.row_tokens=1024", "data.row_images=1", "data.row_answers=256")
MEMORY = 6e9  # bytes of this machine that a compilation may take
QUANTITIES = {"flops": ("TFLOP", 1e12), "bytes": ("GB moved", 1e9), "collective_bytes": ("GB sent", 1e9)}
# What a law is a sum of: name -> function of what grows.
TERMS = {
    "1": lambda x: np.ones_like(x),
    "x": lambda x: x,
    "x^2": lambda x: x**2,
    "(1 - 1/x)": lambda x: 1 - 1 / x,
}
LINE, PARABOLA = ("1", "x"), ("1", "x", "x^2")


@dataclasses.dataclass(frozen=True)
class Growth:
    """Says what grows, over which values, and by which laws the cost should follow."""

    title: str
    config: str
    values: tuple[int, ...]
    laws: dict[str, tuple[str, ...]]  # quantity -> terms
    settings: tuple[str, ...]  # of each value, with {x} for it
    topology: str = "h100:1"
    of_optimizer: bool = True  # whether its traffic counts

    def overrides(self, x: int) -> list[str]:
        """Lists the settings of a point, as the arguments of a command."""
        heads = max(1, x // 128)
        given = [text.format(x=x, heads=heads, hidden=x * 43 // 16) for text in self.settings]
        return [f"--config.{each}" for each in (*COMMON, *SIZES, *given)]


LINES = {"flops": LINE, "bytes": LINE}
GROWTHS = {
    "length": Growth(
        "tokens of a row",
        str(UNI_MED),
        (512, 1024, 2048, 4096),
        {"flops": PARABOLA, "bytes": PARABOLA},
        ("data.row_tokens={x}",),
    ),
    "images": Growth("images of a row", str(UNI_MED), (1, 2, 4), LINES, ("data.row_images={x}",)),
    "width": Growth(
        "width of the decoder",
        str(UNI_MED),
        (1024, 2048, 3072, 4096),
        {"flops": PARABOLA, "bytes": PARABOLA},
        (
            *(
                "model.decoder.width={x}",
                "model.decoder.heads={heads}",
                "model.decoder.kv_heads={heads}",
            ),
            "model.decoder.mlp_width={hidden}",
        ),
    ),
    "connector": Growth(
        "experts of the connector", str(UNI_MED), (1, 2, 4, 8), LINES, ("model.connector.experts={x}",)
    ),
    "decoder": Growth(
        "experts of the decoder",
        MED_MOE,
        (1, 2, 4, 8),
        LINES,
        ("model.moe.experts={x}", "train.accumulation=1"),
    ),
    "chips": Growth(
        "chips, a row of 2,048 tokens each",
        str(UNI_MED),
        (16, 32, 64, 128, 256),
        {"flops": ("1",), "bytes": ("1",), "collective_bytes": ("(1 - 1/x)",)},
        ("data.rows={x}", "data.row_tokens=2048", "data.row_answers=1024", "mesh.fsdp={x}"),
        "h100:{x}",
        of_optimizer=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """Holds a fitted law."""

    terms: tuple[str, ...]
    coefficients: tuple[float, ...]
    worst: float  # the largest relative error of a point

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return sum(c * TERMS[t](x) for c, t in zip(self.coefficients, self.terms, strict=True))


def fit(x: Sequence[float], y: Sequence[float], terms: tuple[str, ...]) -> Fit:
    """Fits y = sum of coefficient * term(x), by least squares of relative errors."""
    at, values = np.asarray(x, float), np.asarray(y, float)
    matrix = np.stack([TERMS[term](at) for term in terms], axis=1) / values[:, None]
    found = np.linalg.lstsq(matrix, np.ones(len(at)), rcond=None)[0]
    return Fit(terms, tuple(map(float, found)), float(np.abs(matrix @ found - 1).max()))


def measured(growth: Growth, cache: Path, minutes: float) -> Iterator[dict[str, Any]]:
    """Yields the points of a growth: what grows, and each quantity as compiled and of the ideal."""
    from unimed_jax.plan import topology
    from unimed_jax.plan.compile import Job, Limits, compile_all
    from unimed_jax.plan.ideal import ideal
    from unimed_jax.plan.roofline import costs
    from unimed_jax.verbs.options import read_config

    jobs = []
    for x in growth.values:
        where = topology.parse(growth.topology.format(x=x))
        jobs.append(
            Job(read_config(growth.config, growth.overrides(x)), where, "train", f"{growth.title} {x}")
        )
    topology.check_compiler([job.topology for job in jobs])
    for x, outcome in zip(
        growth.values, compile_all(jobs, cache, Limits(60 * minutes, MEMORY)), strict=True
    ):
        if not outcome.text:
            raise harness.Failed(outcome.failed or f"{outcome.job.shown}: its compiler keeps no text.")
        config, mesh = outcome.job.config, outcome.result["mesh"]
        found = costs(config, mesh, "train", outcome.text)
        if found["unknown"]:
            raise harness.Failed(f"{outcome.job.shown}: {found['unknown'][0]} cannot be counted.")
        optimizer = ideal(config, mesh, "train").byte_terms["optimizer"]
        point: dict[str, Any] = {"x": x}
        for quantity in growth.laws:
            aside = optimizer if quantity == "bytes" and not growth.of_optimizer else 0.0
            pair = found[quantity]
            point[quantity] = {"compiled": pair["compiled"] - aside, "ideal": pair["useful"] - aside}
        yield point


def laws(growth: Growth, points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fits the laws of a growth to its points."""
    x = [point["x"] for point in points]
    found = []
    for quantity, terms in growth.laws.items():
        unit = QUANTITIES[quantity][1]
        ours, least = (
            fit(x, [point[quantity][side] / unit for point in points], terms)
            for side in ("compiled", "ideal")
        )
        found.append(
            {"grows": growth.title, "quantity": quantity, "compiled": ours, "ideal": least}
            | {"ratio": points[-1][quantity]["compiled"] / points[-1][quantity]["ideal"]}
        )
    return found


def rows(found: Sequence[dict[str, Any]], points: dict[str, Any]) -> list[list[str]]:
    """Writes the laws as rows of a table."""
    lines = []
    for law in found:
        ours: Fit = law["compiled"]
        text = " + ".join(
            f"{c:.3g}" + ("" if t == "1" else f" {t}")
            for c, t in zip(ours.coefficients, ours.terms, strict=True)
        )
        values = points[law["grows"]]
        lines.append(
            [law["grows"], f"{values[0]['x']} .. {values[-1]['x']}", QUANTITIES[law["quantity"]][0]]
            + [text.replace("+ -", "- "), f"{ours.worst:.1%}", f"{law['ratio']:.2f}"]
        )
    return lines


def draw(file: Path, found: Sequence[dict[str, Any]], points: dict[str, Any]) -> None:
    """Draws, for each thing that grows, the points over the first, and the fitted laws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from unimed_jax.analyze.drawing import COLOURS

    colours = dict(zip(QUANTITIES, (COLOURS[4], COLOURS[5], COLOURS[2]), strict=True))
    columns = min(3, len(points))
    height = -(-len(points) // columns)
    figure, grid = pyplot.subplots(
        height, columns, figsize=(3.6 * columns, 2.9 * height), squeeze=False, layout="constrained"
    )
    for axes, title in zip(grid.flat, points, strict=False):
        values = points[title]
        x = np.array([point["x"] for point in values], float)
        fine = np.linspace(x[0], x[-1], 200)
        for law in (law for law in found if law["grows"] == title):
            name, unit = QUANTITIES[law["quantity"]]
            y = np.array([point[law["quantity"]]["compiled"] / unit for point in values])
            axes.plot(fine, law["compiled"](fine) / y[0], color=colours[law["quantity"]], linewidth=1)
            axes.plot(x, y / y[0], "o", color=colours[law["quantity"]], label=name, markersize=5)
        axes.set(xscale="log" if title == GROWTHS["chips"].title else "linear", title=title)
        axes.set_xticks(x, [f"{value:.0f}" for value in x])
        axes.minorticks_off()
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(points) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("times the first point")
    handles = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grows", nargs="+", choices=GROWTHS, default=list(GROWTHS))
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/unimed_jax/plans").expanduser())
    parser.add_argument("--minutes", type=float, default=20, help="that one compilation may take")
    parser.add_argument("--out", type=harness.output(), help="where points and laws go as JSON")
    parser.add_argument("--picture", type=harness.output("--picture"))
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # only the compiling processes need more
    points: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    for name in arguments.grows:
        growth = GROWTHS[name]
        points[growth.title] = list(measured(growth, arguments.cache, arguments.minutes))
        found += laws(growth, points[growth.title])
    head = ("what grows", "from .. to", "quantity", "law (x: what grows)", "worst", "x ideal")
    print(harness.table(head, rows(found, points)))
    if arguments.out:
        plain = [
            {k: dataclasses.asdict(v) if isinstance(v, Fit) else v for k, v in law.items()}
            for law in found
        ]
        arguments.out.write_text(json.dumps({"points": points, "laws": plain}, indent=1) + "\n")
    if arguments.picture:
        draw(arguments.picture, found, points)


if __name__ == "__main__":
    harness.run(main)
