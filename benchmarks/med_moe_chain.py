"""Measures what Med-MoE's third stage and its parts are worth, at a small size.

    python benchmarks/med_moe_chain.py [--out=runs/med_moe_ablation] [--seeds=0,1,2]
    [--start=runs/brain_tiny] [--size=real --root=DIR] [--variants=moe,dense] [--smoke]

For each seed the stages of configs/med_moe/all.py:tiny (or :real, on the data sets in DIR), then
variants of the last one, all from the same stage 2: dense, for as many steps and for as many FLOPs as
the experts take; without the meta expert; with a router that learns next to the experts; top-2.
Finished runs are skipped, so the same command continues. Writes ablation.json, ablation.md and
ablation.png into the folder: paired differences with 95 % intervals, and whether what was published
appears here; and, where the images name their modality, how many tokens of each go to each expert.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from harness import table

from unimed_jax import files
from unimed_jax.analyze import params
from unimed_jax.analyze.chain import Stage, finished, linked, train_and_evaluate
from unimed_jax.analyze.experts import load_table, write_load
from unimed_jax.config import Config
from unimed_jax.config_file import load_config_file
from unimed_jax.errors import UserError
from unimed_jax.evaluate.metrics.text import closed_accuracy, exact_match, is_closed, token_recall
from unimed_jax.evaluate.statistics import Measure, interval, resample
from unimed_jax.settings import from_config_dict

CHAIN = Path(__file__).parents[1] / "configs" / "med_moe" / "all.py"
BEFORE = ("align", "instruct", "router")  # stages from which all variants of the last one start
SCORES = ("open recall", "closed accuracy", "classification accuracy")

# What is compared: left minus right; and the published difference in points, the mean over the
# paper's three data sets (arXiv 2404.10237: recall of open, accuracy of closed questions).
PAIRS = (
    ("experts - dense, as many steps", "moe", "dense", (3.50, 1.82, None)),
    ("experts - dense, as many FLOPs", "moe", "dense_flops", (None, None, None)),
    ("with - without meta expert", "moe", "no_meta", (3.44, 2.07, None)),
    ("frozen - learned router", "moe", "learned_router", (1.96, 0.77, None)),
    ("top-2 - top-1", "top2", "moe", (None, None, None)),
)


# ---- runs ------------------------------------------------------------------------------------------
def activated(config: Config) -> int:
    """Counts the decoder parameters that a token is multiplied with (its FLOPs up to a factor)."""
    modules = params.count(config)["modules"]
    return sum(
        row["activated"]
        for name, row in modules.items()
        if name.startswith("decoder/") and name != "decoder/embedding"  # the embedding is only looked up
    )


def variants(moe: Config) -> dict[str, Config]:
    """Lists stage 3 and what it is compared with, by name."""
    experts, rules = moe.model.moe, moe.train.rules
    without = tuple((kind, path) for kind, path in moe.init if kind != "router")

    def changed(**fields) -> Config:
        return dataclasses.replace(
            moe, model=dataclasses.replace(moe.model, moe=dataclasses.replace(experts, **fields))
        )

    def trained(config: Config, **fields) -> Config:
        return dataclasses.replace(
            config, init=without, train=dataclasses.replace(config.train, **fields)
        )

    dense = trained(changed(experts=0), rules=tuple(rule for rule in rules if "/moe/" not in rule.match))
    longer = round(moe.train.steps * activated(moe) / activated(dense))
    learns = tuple(
        dataclasses.replace(rule, train=True) if "/router/" in rule.match else rule for rule in rules
    )
    found = {
        "moe": moe,
        "dense": dense,
        "dense_flops": trained(dense, steps=longer),
        "no_meta": changed(meta=False),
        "learned_router": trained(moe, rules=learns),
        "top2": changed(top_k=2),
    }
    folder = Path(moe.name).parent
    return {name: dataclasses.replace(config, name=str(folder / name)) for name, config in found.items()}


def stages_of(
    seed: int,
    out: Path,
    start: str,
    smoke: bool,
    size: str = "tiny",
    root: str = "",
    wanted: Sequence[str] = (),
) -> list[Stage]:
    """Lists all runs of one seed, each after those that it starts from; `wanted` (): all variants."""
    configs = {}
    for file in load_config_file(f"{CHAIN}:{size}").stages:
        settings = load_config_file(file)
        settings.data.root = root
        config = from_config_dict(settings)
        init = tuple((kind, start if path == "runs/brain_tiny" else path) for kind, path in config.init)
        config = dataclasses.replace(config, seed=seed, init=init)
        configs[Path(config.name).name] = shortened(config) if smoke else config
    found = variants(configs["moe"])
    if unknown := [name for name in wanted if name not in found]:
        raise UserError(f"--variants names {unknown[0]!r}; choose from {', '.join(found)}.")
    some = [found[name] for name in wanted or found]
    return linked([*(configs[name] for name in BEFORE), *some], out / f"seed{seed}")


def shortened(config: Config) -> Config:
    """Shortens the run to a few steps and answers, to see that all of it works."""
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=3),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
        evaluate=dataclasses.replace(config.evaluate, limit=24, bootstrap=100),
        router_fit=dataclasses.replace(
            config.router_fit, labels=(40,) if config.job == "router" else ()
        ),
    )


# ---- comparison ------------------------------------------------------------------------------------
def measures(seeds: Sequence[Sequence[Mapping]]) -> dict[str, Measure]:
    """Scores one variant: means over seeds, from each seed's records of the same examples."""
    kinds = np.array(
        [record["task"] + ("/closed" if is_closed(record["meta"]) else "") for record in seeds[0]]
    )
    rules = {"vqa": token_recall, "vqa/closed": closed_accuracy, "cls": exact_match}
    found = {}
    for name, kind in zip(SCORES, rules, strict=True):
        values = [[rules[kind](r["prediction"], r["reference"]) for r in records] for records in seeds]
        found[name] = Measure.mean(np.mean(np.array(values, float), axis=0)).where(kinds == kind)
    return found


def compared(records: Mapping[str, Sequence[Sequence[Mapping]]], resamples: int = 2000) -> dict:
    """Compares variants over their seeds, in points (%).

    `records`: variant -> seed -> records; returned: {"variants": {variant: {score: {value,
    seeds}}}, "pairs": [...]}.

    Each pair: {pair, left, right, scores: {score: {value, ci95, seeds, published, verdict}}};
    intervals over clusters of test items, the same for both sides; `seeds` are the differences of
    single seeds.
    """
    ids = {tuple(r["id"] for r in some) for seeds in records.values() for some in seeds}
    if len(ids) != 1:
        raise UserError(
            "the variants answered different questions; remove the folder and run all of it again."
        )
    clusters = [record["cluster"] for record in next(iter(records.values()))[0]]
    every = {variant: measures(seeds) for variant, seeds in records.items()}
    single = {variant: [measures([some]) for some in seeds] for variant, seeds in records.items()}
    flat = [every[variant][score] for variant in every for score in SCORES]
    keys = [(variant, score) for variant in every for score in SCORES]
    draws = dict(zip(keys, resample(flat, clusters, resamples, seed=0), strict=True))
    pairs = []
    for pair, left, right, published in PAIRS:
        if not {left, right} <= set(records):
            continue
        scores = {}
        for score, known in zip(SCORES, published, strict=True):
            ci95 = interval(100 * (draws[left, score] - draws[right, score]))
            scores[score] = {
                "value": 100 * (every[left][score].value - every[right][score].value),
                "ci95": ci95,
                "seeds": [
                    100 * (a[score].value - b[score].value)
                    for a, b in zip(single[left], single[right], strict=True)
                ],
                "published": known,
                "verdict": verdict(ci95, known),
            }
        pairs.append({"pair": pair, "left": left, "right": right, "scores": scores})
    shown = {
        variant: {
            score: {
                "value": 100 * every[variant][score].value,
                "seeds": [100 * one[score].value for one in some],
            }
            for score in SCORES
        }
        for variant, some in single.items()
    }
    return {"variants": shown, "pairs": pairs}


def verdict(ci95: Sequence[float] | None, published: float | None) -> str:
    """Says whether a published gain appears here; without one, which side is ahead."""
    sign = 0 if ci95 is None else 1 if ci95[0] > 0 else -1 if ci95[1] < 0 else 0
    if published is None:
        return ("undecided", "left ahead", "right ahead")[sign]
    return ("does not appear", "appears", "reversed")[sign]


def report(result: Mapping, costs: Mapping[str, tuple[int, int]], seeds: Sequence[int]) -> str:
    """Writes the report; `costs` holds steps and activated decoder parameters of each variant."""
    rows = []
    for variant, scores in result["variants"].items():
        values = [
            f"{s['value']:.1f} ({min(s['seeds']):.1f} .. {max(s['seeds']):.1f})"
            for s in (scores[n] for n in SCORES)
        ]
        rows.append([variant, str(costs[variant][0]), f"{costs[variant][1]:,}", *values])
    pairs = []
    for entry in result["pairs"]:
        cells = []
        for score in SCORES:
            s = entry["scores"][score]
            ends = "no interval" if s["ci95"] is None else ", ".join(f"{end:+.1f}" for end in s["ci95"])
            known = "" if s["published"] is None else f"; published {s['published']:+.2f}"
            spread = f"seeds {min(s['seeds']):+.1f} .. {max(s['seeds']):+.1f}"
            cells.append(f"{s['value']:+.1f} [{ends}] ({spread}){known}: {s['verdict']}")
        pairs.append([entry["pair"], *cells])
    return (
        f"# Med-MoE's third stage: {len(seeds)} seeds\n\n"
        f"{table(('variant', 'steps', 'activated in the decoder', *SCORES), rows)}\n\n"
        "Per cent on the held-out set, mean over seeds (lowest .. highest).\n\n"
        f"{table(('difference in points', *SCORES), pairs)}\n\n"
        "Paired by example, 95 % intervals by a bootstrap over source images and slabs of the "
        "means over seeds; few source images, so they are wide. Published: the mean over the "
        "paper's three data sets. FLOPs: the decoder parameters that a token is multiplied with, "
        "times steps.\n"
    )


def draw(result: Mapping, path: Path) -> None:
    """Draws each difference with its interval, next to single seeds' and the published one."""
    from matplotlib.figure import Figure

    pairs = result["pairs"]
    figure = Figure(figsize=(11, 0.55 * len(pairs) + 1.4), dpi=130, layout="constrained")
    for axes, score in zip(figure.subplots(1, len(SCORES), sharey=True), SCORES, strict=True):
        axes.axvline(0, color="0.7", linewidth=1)
        for at, entry in enumerate(pairs):
            s = entry["scores"][score]
            low, high = s["ci95"] or (s["value"], s["value"])
            axes.plot([low, high], [at, at], color="tab:blue")
            here = axes.plot(s["value"], at, "o", color="tab:blue", label="here")
            seeds = axes.plot(
                s["seeds"], [at + 0.22] * len(s["seeds"]), ".", color="0.5", label="single seeds"
            )
            if s["published"] is not None:
                known = axes.plot(
                    s["published"], at, "D", color="tab:orange", fillstyle="none", label="published"
                )
        axes.set(title=score, xlabel="difference in points")
        axes.set_yticks(range(len(pairs)), [entry["pair"] for entry in pairs])
    axes.invert_yaxis()
    figure.legend(handles=[*here, *seeds, *known], loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def test_records(stage: Stage) -> list[dict]:
    lines = (stage.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    records = [{**record, "cluster": f"{record['set']}/{record['cluster']}"} for record in records]
    return sorted(
        (r for r in records if r["split"] == "test" and r["task"] in ("vqa", "cls")),
        key=lambda r: r["id"],
    )


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("runs/med_moe_ablation"))
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument(
        "--start", default="runs/brain_tiny", help="a finished run of configs/brain_tiny.py"
    )
    options.add_argument("--size", choices=("tiny", "real"), default="tiny")
    options.add_argument("--root", default="", help="folder of the data sets, for --size=real")
    options.add_argument("--variants", default="", help="of stage 3, joined by commas; all by default")
    options.add_argument("--smoke", action="store_true", help="a few steps and answers of each run")
    known = options.parse_args()
    seeds = [int(seed) for seed in known.seeds.split(",")]
    if known.size == "tiny" and not (Path(known.start) / "config.json").is_file():
        raise UserError(f"--start={known.start} is no finished run; train configs/brain_tiny.py first.")
    wanted = known.variants.split(",") if known.variants else ()
    records: dict[str, list[list[dict]]] = {}
    loads: list[dict] = []
    costs = {}
    for seed in seeds:
        stages = stages_of(seed, known.out, known.start, known.smoke, known.size, known.root, wanted)
        for stage in stages:
            done = finished(stage)
            print(f"seed {seed}, {stage.name}: {'finished' if done else stage.folder}", flush=True)
            if not done:
                train_and_evaluate(stage.config, stage.folder)
            if stage.name == "moe":
                loads.append(write_load(stage.folder, stages[BEFORE.index("router")].folder))
            if stage.name not in BEFORE:
                records.setdefault(stage.name, []).append(test_records(stage))
                costs[stage.name] = (stage.config.train.steps, activated(stage.config))
    result = compared(records)
    text = report(result, costs, seeds) + "".join(
        f"\n## Tokens by expert, seed {seed}\n\n{load_table(load)}\n"
        for seed, load in zip(seeds, loads, strict=True)
    )
    kept = {"seeds": seeds, "smoke": known.smoke, "steps and activated": costs, **result}
    kept["experts"] = loads
    with files.written_together(known.out, ("ablation.png", "ablation.md", "ablation.json")) as place:
        draw(result, place / "ablation.png")
        files.write_text(place / "ablation.md", text)
        files.write_json(place / "ablation.json", kept)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
