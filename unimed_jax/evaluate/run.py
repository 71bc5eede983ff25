"""The evaluation of one run: answers, scores, routing and the report in the run's folder."""

from typing import Any

from unimed_jax import processes
from unimed_jax.config import Config
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.joined import joined
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.routing import routing_report
from unimed_jax.evaluate.tasks import evaluate
from unimed_jax.model.parameters import with_parameters
from unimed_jax.predict.predictor import answerer
from unimed_jax.runs.open import Run, initial_leaves


def evaluate_run(run: Run, config: Config) -> dict[str, Any]:
    """Scores the run on the splits of `config.evaluate.splits` and writes the report into its folder.

    `config` is the run's own, except for `config.evaluate`. To be called inside `run.inside()`. All processes
    generate together; the first one scores, writes and gets the content of metrics.json, the others get {}.
    """
    leads = processes.leads()
    dataset = joined(open_sources(config.held_out))
    answer = answerer(run.model, config, run.tokenizer)
    results, records = {}, []
    for split in config.evaluate.splits:
        if leads:
            print(f"evaluating {split} ...", flush=True)
        results[split], lines = evaluate(answer, dataset, dataset.examples("train"), config, split)
        records += lines
    shown = {key: line["cluster"] for line in records if line["split"] == "test" for key in line["images"]}
    routing = None
    if shown:
        pixels = [dataset.image(key) for key in shown]
        first, _ = initial_leaves(config, run.tokenizer, run.mesh, ("vision/*", "connector/*"))
        initial = with_parameters(run.model, first)
        routing = routing_report(run.model, initial, config, pixels, list(shown.values()))
    if not leads:
        return {}
    metrics = write_report(run.folder, config, dataset.checksum, results, records, dataset.image, routing)
    for task, entry in metrics["tasks"].items():
        if entry["n"]:
            margin = entry["margin"]
            score = entry["corrected"][entry["primary"]]
            print(
                f"{task:9s} {entry['primary']:12s} {score['value']:.3f}  {margin['value']:+.3f} on {margin['baseline']}"
            )
    print(f"wrote {run.folder / 'report.md'}")
    return metrics
