"""Measures torch's rows of accelerator.py, each part in a process of its own.

- `torch train, eager` and `torch train, compiled`: the same model as `train` in plain torch
  (benchmarks/torch_unimed.py: Hugging Face's LLaMA with PEFT), on rows of the same shape, at its own
  best settings: frozen weights in bfloat16, autocast, scaled_dot_product_attention without a mask (so
  that it may take its flash kernel), fused AdamW, no recomputation; then under torch.compile. All
  examples of a batch have one task, as the original needs. Against `train` stands how many times as
  fast ours is.
- `torch decode, batch B`: Hugging Face's `generate` of the same decoder, prompts and lengths as
  `decode`: eager, and with its static cache, which compiles the forward pass.

Losses and tokens are those of random weights and are not compared here: tests/test_benchmarks.py
compares the two models, and tests/interop their tokens.
"""

import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the settings are read with jax, which must not take the card

import accelerator_scales
import harness
import numpy as np
import torch
import torch_unimed
from accelerator_scales import BATCHES, Emit, Scale, Values

from unimed_jax.config import VISUAL_TASKS, OptimizerConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        out.append(time.perf_counter() - start)
    return out


def train(scale: Scale, known: Values, emit: Emit) -> None:
    rows, tokens = scale.batch
    config = accelerator_scales.training(scale, rows, tokens)
    adam = OptimizerConfig()
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model = torch_unimed.UniMed(config.model).train()
        torch.set_default_dtype(torch.float32)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    fused = True if DEVICE == "cuda" else None
    optimizer = torch_unimed.optimizer(model, adam.weight_decay, adam.betas, adam.eps, fused)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    arrays = _batch(config)
    task = model.task_tokens[VISUAL_TASKS[0]]

    def step(run: Callable[..., Any]) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = run(arrays["pixels"], task, arrays["tokens"], None, arrays["labels"], 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for name, run in (("eager", model), ("compiled", torch.compile(model))):
        if name == "compiled" and DEVICE == "cpu":
            emit("torch train, compiled", **{"not run": "on a CPU torch.compile takes minutes"})
            continue
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        (first,) = seconds(functools.partial(step, run), 1)
        seconds(functools.partial(step, run), 2)
        median = statistics.median(seconds(functools.partial(step, run), scale.repeats))
        values = {
            "rows x tokens": f"{rows} x {tokens}",
            "seconds": median,
            "tokens/s": rows * tokens / median,
            "first s": first,
            "loss": float(step(run)),
            "peak GiB": harness.peak_memory(DEVICE),
        }
        if "train" in known and scale.repeats >= harness.LEAST:
            values["ours is faster by"] = median / known["train"]["seconds"]
        emit(f"torch train, {name}", **values)


def _batch(config: Any) -> dict[str, Any]:
    """Makes torch's arrays of full rows, one image each, all of one task."""
    batch, vision = harness.full_rows(config), config.model.vision
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (vision.mean, vision.std))
    images = torch.tensor(batch["images"][:, 0]).permute(0, 3, 1, 2)  # [B, 3, H, W]
    labels = np.full(batch["tokens"].shape, -100)
    np.put_along_axis(labels, batch["target_index"] + 1, batch["targets"], axis=1)
    return {
        "pixels": ((images / 255 - mean) / std).contiguous().to(DEVICE),
        "tokens": torch.tensor(batch["tokens"], dtype=torch.int64, device=DEVICE),
        "labels": torch.tensor(labels, dtype=torch.int64, device=DEVICE),
    }


def decode(scale: Scale, known: Values, emit: Emit) -> None:
    from transformers import LlamaForCausalLM

    settings = torch_unimed.llama_settings(scale.model.decoder)
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(settings).eval()
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None  # no early end
    for rows in BATCHES:
        generator = torch.Generator(DEVICE).manual_seed(0)
        shape = (rows, scale.prompt)
        ids = torch.randint(3, scale.model.decoder.vocab, shape, device=DEVICE, generator=generator)
        how = {"max_new_tokens": scale.new, "do_sample": False, "pad_token_id": 0}
        how |= {"attention_mask": torch.ones_like(ids)}
        values: Values = {}
        for name, more in (("eager", {}), ("static cache", {"cache_implementation": "static"})):
            run = functools.partial(model.generate, ids, **how, **more)
            with torch.no_grad():
                (first,) = seconds(run, 1)
                seconds(run, 1)
                median = statistics.median(seconds(run, max(2, scale.repeats - 2)))
                assert run().shape == (rows, scale.prompt + scale.new)
            values |= {f"{name}, whole answers, s": median, f"{name}, first s": first}
            values |= {f"{name}, tokens/s": rows * scale.new / median}
        row = f"decode, batch {rows}"
        if row in known and scale.repeats >= harness.LEAST:
            best = min(values[f"{name}, whole answers, s"] for name in ("eager", "static cache"))
            values["ours is faster by"] = best / known[row]["whole answers, s"]
        emit(f"torch {row}", **values, **{"peak GiB": harness.peak_memory(DEVICE)})


def about() -> Values:
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return {"device": card, "platform": DEVICE, "torch": torch.__version__}


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # transformers warns PEFT
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    harness.report({"torch_train": train, "torch_decode": decode}, accelerator_scales.SCALES, about)
