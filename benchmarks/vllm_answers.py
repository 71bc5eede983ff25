"""Compares a run's own answers with those of its decoder in vLLM: greedy tokens of test examples.

    python -m unimed_jax.main export --run=runs/brain_tiny --format=decoder --out=decoder
    vllm serve decoder --enable-prompt-embeds --dtype float32 --port 8100
    python benchmarks/vllm_answers.py --run=runs/brain_tiny --url=http://127.0.0.1:8100/v1 --examples=50

vLLM is installed in an environment of its own. Encoder, connector and embeddings run here for both
sides (predict/remote.py). `tokens` counts examples whose greedy tokens are all the same.
"""

import argparse
import json
import sys
import time

import harness
from torch_answers import Ours, chosen, ended

from unimed_jax.config import TASKS


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--run", required=True, help="a run's folder")
    options.add_argument("--url", required=True, help="of vLLM, up to and with /v1")
    options.add_argument("--examples", type=int, default=50, help="test examples, spread over the tasks")
    options.add_argument("--batch", type=int, default=8, help="examples that are answered together")
    options.add_argument("--out", type=harness.output(), help="a JSON file for the records")
    known = options.parse_args()

    from unimed_jax.data.datasets import distinct, open_sources
    from unimed_jax.predict.remote import RemoteDecoder
    from unimed_jax.predict.request import Request
    from unimed_jax.runs.open import open_run

    run = open_run(known.run)
    there = [(d, e) for d in distinct(open_sources(run.config.data)) for e in d.examples("test")]
    picked = chosen(there, known.examples)
    examples = [example for _, example in picked]
    pixels = [tuple(dataset.image(key) for key in example.images) for dataset, example in picked]
    ours = Ours(run.model, run.config, run.tokenizer)
    remote = RemoteDecoder(run.model, run.config, run.tokenizer, known.url, run.mesh)
    here: list[list[int]] = []
    for start in range(0, len(examples), known.batch):
        part = slice(start, start + known.batch)
        here += ours.tokens(examples[part], pixels[part])
    asked = [
        Request(example.task, example.question, own)
        for example, own in zip(examples, pixels, strict=True)
    ]
    begun = time.monotonic()
    found = [ended(row, run.tokenizer.eos) for row in remote.tokens(asked, known.batch)]
    seconds = time.monotonic() - begun
    records = [
        {"id": example.id, "task": example.task, "same": a == b, "length": len(a), "here": a, "there": b}
        for example, a, b in zip(examples, here, found, strict=True)
    ]
    rows = []
    for task in (*TASKS, "all"):
        of_task = [record for record in records if task in (record["task"], "all")]
        if of_task:
            same, words = sum(r["same"] for r in of_task), sum(r["length"] for r in of_task)
            rows.append([task, f"{same} of {len(of_task)}", str(words)])
    print(harness.table(("task", "tokens", "tokens of answers"), rows))
    print(f"{seconds:.1f} s for the answers of the other side")
    if known.out:
        content = {"machine": harness.machine(1), "seconds": seconds, "records": records}
        known.out.write_text(json.dumps(content, indent=1) + "\n")
    if wrong := [record["id"] for record in records if not record["same"]]:
        sys.exit(f"{len(wrong)} of {len(records)} examples differ: {', '.join(wrong[:5])} ...")


if __name__ == "__main__":
    harness.run(main)
