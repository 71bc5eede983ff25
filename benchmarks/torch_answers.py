"""Compares a run with its export in torch: greedy tokens and logits of test examples.

    HF_HUB_OFFLINE=1 python benchmarks/torch_answers.py --run=runs/brain_tiny --examples=50
    --out=answers.json

It needs torch: pip install -e '.[parity]'.

The folder is written by `export_model` if it does not exist yet, and loaded as a user loads it:
`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`. Both sides make prompt and
pixels themselves and answer in left-padded batches. `tokens` counts examples whose greedy tokens
are all the same; `logits` is the largest difference of any logit that predicts a token of the
answer, over whole passes without a cache, next to the largest logit; `gap` is the least distance of
the best two, which a difference would have to reach to turn a token.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np

from unimed_jax.config import TASKS, Config
from unimed_jax.data import fitting, layout
from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.model.generate import generate
from unimed_jax.model.parameters import parameters
from unimed_jax.model.unimed import UniMed, answer_logits
from unimed_jax.predict.plain import prompt_batch

TOLERANCE = 1e-3  # difference of any logit
Pixels = Sequence[Sequence[np.ndarray]]  # the images of each example, uint8 [H, W, 3]


def ended(row: Sequence[int], eos: int) -> list[int]:
    """Cuts the ids after the end of text."""
    row = [int(i) for i in row]
    return row[: row.index(eos) + 1] if eos in row else row


class Ours:
    def __init__(self, model: UniMed, config: Config, tokenizer: Tokenizer):
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)
        self.whole_pass = jax.jit(lambda model, batch: answer_logits(model, model(batch).hidden, batch))

    def tokens(self, examples: Sequence[Example], pixels: Pixels) -> list[list[int]]:
        batch = prompt_batch(self.encoder, self.config, self.tokenizer.pad, examples, pixels)
        new, eos, pad = self.config.evaluate.max_new_tokens, self.tokenizer.eos, self.tokenizer.pad
        rows = generate(self.model, batch, max_new_tokens=new, eos=eos, pad=pad)
        return [ended(row, eos) for row in np.asarray(rows)[: len(examples)]]

    def logits(
        self, examples: Sequence[Example], pixels: Pixels, answers: Sequence[list[int]]
    ) -> list[np.ndarray]:
        """Computes the logits [answer tokens, vocab] that predict each example's given answer."""
        size, groups = self.config.model.vision.image_size, []
        for example, shown, answer in zip(examples, pixels, answers, strict=True):
            prompt = self.encoder.prompt(example)
            suffix = np.concatenate([prompt.suffix, np.array(answer, np.int32)])
            given = dataclasses.replace(
                prompt, suffix=suffix, targets=np.arange(len(suffix) - len(answer), len(suffix))
            )
            groups.append(layout.Group((given,), tuple(fitting.resize(image, size) for image in shown)))
        shape = layout.RowShape(
            # one shape for all batches
            tokens=self.config.text.max_prompt + self.config.evaluate.max_new_tokens,
            images=max(map(len, pixels), default=0) or 1,
            answers=self.config.evaluate.max_new_tokens,
            tokens_per_image=self.config.model.tokens_per_image,
            image_size=size,
        )
        batch = layout.training_batch([[group] for group in groups], shape, self.tokenizer.pad, "token")
        logits = np.asarray(self.whole_pass(self.model, batch))
        return [rows[: len(answer)] for rows, answer in zip(logits, answers, strict=True)]


class Torch:
    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)

    def _questions(self, examples: Sequence[Example], pixels: Pixels):
        return [(list(own), e.task, e.question) for e, own in zip(examples, pixels, strict=True)]

    def tokens(self, examples: Sequence[Example], pixels: Pixels) -> list[list[int]]:
        rows = self.model.generate(
            **self.model.prepare(self.tokenizer, self._questions(examples, pixels))
        )
        return [ended(row, self.model.config.eos_token_id) for row in rows.tolist()]

    def logits(
        self, examples: Sequence[Example], pixels: Pixels, answers: Sequence[list[int]]
    ) -> list[np.ndarray]:
        out = []
        for question, answer in zip(self._questions(examples, pixels), answers, strict=True):
            batch = self.model.prepare(self.tokenizer, [question])
            given = self.torch.tensor([answer[:-1]], dtype=self.torch.long)
            batch["input_ids"] = self.torch.cat([batch["input_ids"], given], dim=1)
            del batch["attention_mask"]  # nothing is padded
            with self.torch.no_grad():
                out.append(self.model(**batch, logits_to_keep=len(answer)).logits[0].float().numpy())
        return out


def compare(
    ours: Ours, theirs: Torch, examples: Sequence[Example], pixels: Pixels
) -> list[dict[str, Any]]:
    """Compares example by example; the logits are those along our own answer."""
    here, there = ours.tokens(examples, pixels), theirs.tokens(examples, pixels)
    logits = ours.logits(examples, pixels, here), theirs.logits(examples, pixels, here)
    records = []
    for example, a, b, x, y in zip(examples, here, there, *logits, strict=True):
        best = np.sort(x, axis=-1)[:, -2:]
        records.append(
            {
                "id": example.id,
                "task": example.task,
                "same": a == b,
                "length": len(a),
                "logits": float(np.abs(x - y).max()),
                "largest": float(np.abs(x).max()),
                "gap": float((best[:, 1] - best[:, 0]).min()),
            }
        )
    return records


def chosen(there: Sequence[tuple[Dataset, Example]], count: int) -> list[tuple[Dataset, Example]]:
    """Picks `count` examples, as evenly over the tasks as it divides and evenly spaced within each."""
    tasks = [task for task in TASKS if any(example.task == task for _, example in there)]
    out = []
    for i, task in enumerate(tasks):
        of_task = [pair for pair in there if pair[1].task == task]
        share = min(len(of_task), count // len(tasks) + (i < count % len(tasks)))
        out += [of_task[int((k + 0.5) * len(of_task) / share)] for k in range(share)]
    return out


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for task in (*TASKS, "all"):
        of_task = [r for r in records if task in (r["task"], "all")]
        if of_task:
            worst, largest = max(r["logits"] for r in of_task), max(r["largest"] for r in of_task)
            same, words = sum(r["same"] for r in of_task), sum(r["length"] for r in of_task)
            gap = min(r["gap"] for r in of_task)
            rows.append(
                [
                    task,
                    f"{same} of {len(of_task)}",
                    str(words),
                    f"{worst:.1e}",
                    f"{largest:.1f}",
                    f"{gap:.1e}",
                ]
            )
    return harness.table(("task", "tokens", "tokens of answers", "logits", "largest logit", "gap"), rows)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--run", required=True, help="a run's folder")
    options.add_argument(
        "--export", help="its exported folder, written if it is not there (default: a temporary one)"
    )
    options.add_argument("--examples", type=int, default=50, help="test examples, spread over the tasks")
    options.add_argument("--batch", type=int, default=8, help="examples that are answered together")
    options.add_argument("--out", help="a JSON file for the records")
    known = options.parse_args()
    harness.need("torch")

    from unimed_jax.data.datasets import distinct, open_sources
    from unimed_jax.interop.families.unimed_hf import export_unimed_hf
    from unimed_jax.runs.folder import tokenizer_folder
    from unimed_jax.runs.open import open_run

    run = open_run(known.run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(known.export or f"{scratch}/exported")
        if not folder.exists():
            scores = run.folder / "metrics.json"
            metrics = json.loads(scores.read_text()) if scores.is_file() else None
            export_unimed_hf(
                folder,
                run.config,
                parameters(run.model),
                tokenizer_folder(run.folder, run.config),
                metrics,
            )
        there = [(d, e) for d in distinct(open_sources(run.config.data)) for e in d.examples("test")]
        picked = chosen(there, known.examples)
        examples = [example for _, example in picked]
        pixels = [[dataset.image(key) for key in example.images] for dataset, example in picked]
        sides, records = (Ours(run.model, run.config, run.tokenizer), Torch(folder)), []
        for start in range(0, len(examples), known.batch):
            part = slice(start, start + known.batch)
            records += compare(*sides, examples[part], pixels[part])
    print(table(records))
    if known.out:
        Path(known.out).write_text(
            json.dumps({"machine": harness.machine(1), "records": records}, indent=1) + "\n"
        )
    failed = [r for r in records if not r["same"] or r["logits"] > TOLERANCE]
    if failed:
        sys.exit(
            f"{len(failed)} of {len(records)} examples differ: "
            f"{', '.join(r['id'] for r in failed[:5])} ..."
        )


if __name__ == "__main__":
    harness.run(main)
