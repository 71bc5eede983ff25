"""The original's numbers, case by case; `--goldens=DIR` takes any folder of the format.

Tolerances are the manifest's: connector and routing 2e-5, ViT 5e-5, logits 2e-4, loss 2e-5,
gradients 1e-3 of their tensor's maximum, one AdamW step 5e-6 where |gradient| >= 1e-6.
"""

import contextlib
import dataclasses
import hashlib
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from support import golden_uni_med as golden_files
from support.golden_folders import golden_folder
from support.published_rows import training_rows
from support.uni_med_checks import AUX, close, published_schedule

from unimed_jax.config import (
    VISUAL_TASKS,
    Config,
    LossConfig,
    OptimizerConfig,
    RuleConfig,
    SourceConfig,
    TrainConfig,
    to_dict,
)
from unimed_jax.data import forms, layout
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError
from unimed_jax.evaluate.metrics import captions
from unimed_jax.interop.families import unimed_names
from unimed_jax.interop.tensors.table import to_published
from unimed_jax.model.cache import Cache, Span
from unimed_jax.model.generate import extended_span, generate
from unimed_jax.model.parameters import parameters
from unimed_jax.model.unimed import span_of
from unimed_jax.rules import leaf_rules
from unimed_jax.settings import from_config_dict
from unimed_jax.train.loss import answer_logits, cross_entropy
from unimed_jax.train.optimizer import Optimizer, learning_rate
from unimed_jax.train.step import TrainState, make_step

GRAD_RULES = (
    RuleConfig("vision/*", False),
    RuleConfig("*lora_?", True),
    RuleConfig("connector/*", True),
    RuleConfig("*", False),
)


def pytest_generate_tests(metafunc):
    folder = golden_folder(metafunc.config, metafunc.module)
    data = golden_files.manifest(folder)
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", [c["name"] for c in data["cases"]])
    if "entry" in metafunc.fixturenames:
        splits = [json.loads((folder / files["json"]).read_text()) for files in data["aux"].values()]
        metafunc.parametrize("entry", list(dict.fromkeys(entry for split in splits for entry in split)))
    if "broken" in metafunc.fixturenames:
        broken = data.get("broken", [])  # a folder may list none
        metafunc.parametrize("broken", broken, ids=[entry["label"] for entry in broken])


def test_files(goldens):
    """Checks that every listed file is there, with its checksum."""
    for name, entry in golden_files.manifest(goldens)["files"].items():
        assert hashlib.sha256((goldens / name).read_bytes()).hexdigest() == entry["sha256"], name


@pytest.mark.usefixtures("quick_compiles")
def test_case(goldens, case_name):
    golden = golden_files.load(goldens, case_name)
    kind = golden.case.get("kind", "forward")
    {"forward": check_forward, "generate": check_generate, "train_sequence": check_train_sequence}[kind](
        golden
    )


# Compiled once per shapes and settings: what the cases of one base share is not compiled again.
see = jax.jit(lambda vision, images: (vision.encode(images), vision(images)))
connect = jax.jit(lambda connector, patches, tasks: connector(patches, tasks))
embed = jax.jit(lambda model, batch: model.embed(batch)[0])
decode = jax.jit(lambda decoder, x, span, cache, place: decoder(x, span, cache, place)[:2])


@jax.jit
def forward(model, batch):
    """Returns logits [B, S, vocab], routing and mean loss []."""
    out = model(batch)
    nll, _ = cross_entropy(answer_logits(model, out.hidden, batch), batch["targets"], LossConfig(), None)
    loss = (nll * batch["weights"]).sum() / batch["weights"].sum()
    return model.decoder.logits(out.hidden), out.routing, loss


def check_forward(golden):
    case, arrays, model = golden.case, golden.arrays, golden.model()
    batch = golden_files.training_batch(
        golden, arrays["layout_ids"], arrays["attention_mask"], arrays["targets"], case["image_index"]
    )
    check_layout(golden)
    if case["image_index"] is not None:
        check_images(golden, model, batch)
    logits, routing, loss = forward(model, batch)
    close(np.asarray(logits)[batch["segments"] == 1], arrays["logits"], 2e-4, "logits")
    assert ("routing_weights" in arrays) == (routing is not None)
    if routing is not None:
        routing = np.asarray(routing)[used(batch)]  # [images, T, E]
        close(
            reshape_like(routing, arrays["routing_weights"]), arrays["routing_weights"], 2e-5, "routing"
        )
        close(routing.mean((0, 1)), arrays["routing_weights_logged"], 2e-5, "logged routing")
    close(loss, case["loss"], 2e-5, "loss")
    if case.get("grads"):
        check_gradients(golden, model, batch)


def used(batch):
    """Returns which of the batch's B * M image slots hold an image."""
    return batch["image_tasks"].reshape(-1) >= 0


def reshape_like(x, like):
    return np.asarray(x).reshape(np.shape(like))  # [images, T, ...] or [B, M * T, ...]


def check_images(golden, model, batch):
    images_ = batch["images"].reshape(-1, *batch["images"].shape[2:])[used(batch)]  # [images, H, W, 3]
    index = golden_files.flat(golden.case["image_index"])
    features, patches = see(model.vision, images_)
    close(features, golden.pool["pool.vit_out"][index], 5e-5, "ViT")
    close(patches, golden.pool["pool.ln_vision_out"][index][:, 1:], 5e-5, "ln_vision")
    tasks = batch["image_tasks"].reshape(-1)[used(batch)]
    for form in ("fast", "literal"):
        connector = nnx.clone(model.connector)
        connector.config = dataclasses.replace(golden.config.connector, form=form)
        expected = golden.arrays["connector_out"]
        close(
            reshape_like(connect(connector, patches, tasks).tokens, expected),
            expected,
            2e-5,
            f"{form} connector",
        )


def specials(golden) -> SimpleNamespace:
    base = golden.base
    return SimpleNamespace(bos=base["bos_id"], eos=base["eos_id"], pad=base["pad_id"])


def check_layout(golden):
    """Checks that data/layout.py lays the golden's segments and answers out as the original did."""
    case, arrays, pad = golden.case, golden.arrays, golden.base["pad_id"]
    segments = [s if s and isinstance(s[0], list) else [s] for s in case["prompt_segments"]]
    answers = [np.trim_zeros(np.array(row) - pad, "b") + pad for row in case["answer_ids"]]
    batch = training_rows(
        segments,
        answers,
        golden.config.tokens_per_image,
        specials(golden),
        tasks=[case["task"]] * len(answers),
    )
    ids = np.where(batch["visual"] >= 0, -1, batch["tokens"])
    # The original's rows end with the padding of the longest answer; ours end with the longest row.
    length = ids.shape[1]
    assert (arrays["layout_ids"][:, length:] == pad).all() and not arrays["attention_mask"][
        :, length:
    ].any()
    np.testing.assert_array_equal(ids, arrays["layout_ids"][:, :length])
    np.testing.assert_array_equal(batch["segments"] > 0, arrays["attention_mask"][:, :length] == 1)
    targets = np.full(ids.shape, -100)
    rows, columns = np.nonzero(batch["weights"])
    targets[rows, batch["target_index"][rows, columns] + 1] = batch["targets"][rows, columns]
    np.testing.assert_array_equal(targets, arrays["targets"][:, :length])


def train_setup(golden, model, optimizer: OptimizerConfig):
    config = Config(
        model=golden.config,
        loss=LossConfig(reduction="token"),
        optimizer=optimizer,
        train=TrainConfig(rules=GRAD_RULES),
    )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, lora=dataclasses.replace(config.model.lora, dropout=0.0)
        ),
    )
    leaves = parameters(model)
    rules = leaf_rules(leaves, config.train, config.optimizer)
    trainable = {path: jnp.array(leaf) for path, leaf in leaves.items() if rules[path].train}
    frozen = {path: leaf for path, leaf in leaves.items() if not rules[path].train}
    opt = Optimizer(config.optimizer, rules)
    return (
        make_step(model, config, opt, None),
        TrainState(jnp.int32(0), trainable, opt.init(trainable)),
        frozen,
    )


def check_gradients(golden, model, batch):
    case, arrays = golden.case, golden.arrays
    table = unimed_names.trainable_table(golden.config)
    settings = case["optimizer"]
    optimizer = OptimizerConfig(
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        skip_unused=True,
    )
    step, state, frozen = train_setup(golden, model, optimizer)
    state, metrics_ = step(state, frozen, batch, settings["lr"])
    # Adam's first mean is (1 - beta1) times the gradient.
    leaf_grads = {
        path: np.asarray(mean) / (1 - optimizer.betas[0]) for path, mean in state.moments.mean.items()
    }
    grads = to_published(table, leaf_grads)
    after = to_published(table, state.leaves)
    close(metrics_["loss"], case["loss"], 2e-5, "loss of the step")
    close(
        metrics_["grad_norm"], case["grad_global_norm"], 1e-4 * case["grad_global_norm"], "gradient norm"
    )

    # The original names parameters that take no part and that ours does not hold (the router under
    # hard routing), but only among those without a gradient.
    idle = set(case["grad_none"])
    assert {key.removeprefix("grad/") for key in arrays if key.startswith("grad/")} == set(after) - idle
    for name in set(after) - idle:
        expected = arrays[f"grad/{name}"]
        close(grads[name], expected, 1e-3 * np.abs(expected).max() + 1e-9, f"gradient of {name}")
        kept = (np.abs(expected) >= 1e-6) | (expected == 0)
        expected = arrays[f"after/{name}"]
        close(np.where(kept, after[name], expected), expected, 5e-6, f"{name} after the step")
    for name in set(after) & idle:
        np.testing.assert_array_equal(after[name], golden.weights[name], err_msg=f"{name} must stay")
    for name in case["zero_grad"]:
        assert not np.any(grads[name]), name


def check_train_sequence(golden):
    case, arrays, model = golden.case, golden.arrays, golden.model()
    schedule = case["lr_schedule"]
    optimizer, total = published_schedule(schedule)
    step, state, frozen = train_setup(golden, model, dataclasses.replace(optimizer, skip_unused=True))
    tiny = dict.fromkeys(state.leaves, False)  # entries whose first gradient is below 1e-6, but not 0
    for i, expected in enumerate(case["steps"]):
        golden.case["task"] = expected["task"]
        batch = golden_files.training_batch(
            golden,
            arrays[f"step{i}/layout_ids"],
            arrays[f"step{i}/attention_mask"],
            arrays[f"step{i}/targets"],
            expected["image_index"],
        )
        lr = learning_rate(i, total, optimizer)
        assert lr == pytest.approx(expected["lr"], rel=1e-12)
        state, metrics_ = step(state, frozen, batch, lr)
        close(metrics_["loss"], expected["loss"], 2e-5, f"loss of step {i}")
        for path, mean in state.moments.mean.items():
            first = np.asarray(state.moments.count[path]) == 1
            tiny[path] |= first & (mean != 0) & (np.abs(mean) < 1e-6 * (1 - optimizer.betas[0]))
    table = unimed_names.trainable_table(golden.config)
    final = to_published(table, state.leaves)
    counts = {
        path: np.broadcast_to(state.moments.count[path], leaf.shape)
        for path, leaf in state.leaves.items()
    }
    counted = {name: set(np.unique(n)) for name, n in to_published(table, counts).items()}
    idle = {name for name, count in case["adam_step_counts"].items() if count == 0}
    # As for single steps: what ours does not hold never took part.
    assert {key.removeprefix("final/") for key in arrays if key.startswith("final/")} - idle == set(
        final
    ) - idle
    tiny = to_published(table, tiny)
    assert sum(map(np.sum, tiny.values())) < 0.01 * sum(map(np.size, tiny.values()))
    for name, value in final.items():
        # Adam's first step is the gradient's sign, even if only rounding made it (the manifest's
        # exception).
        expected = arrays.get(f"final/{name}", golden.weights[name])
        close(value, np.where(tiny[name], value, expected), 2e-5, f"{name} after the last step")
        close(value, expected, 2 * optimizer.lr, f"{name} after the last step")
        assert counted[name] == {case["adam_step_counts"].get(name, 0)}, name


def check_generate(golden):
    """Checks greedy tokens of the jitted loop, every step's teacher-forced logits, and positions."""
    case, arrays, base, model = golden.case, golden.arrays, golden.base, golden.model()
    tokens_per_image = golden.config.tokens_per_image
    segments, calls = [], list(case["token_calls"])
    for text in case["texts"]:
        count = text.count("<ImageHere>") + 1
        segments.append([ids for _, ids, _ in calls[:count]])
        del calls[:count]
    mask = arrays["left_padded_mask"]
    rows, length = mask.shape
    prompts_ = []
    for parts in segments:
        assert parts[0][0] == base["bos_id"]  # the recorded ids carry both BOS; one of them is layout's
        parts = [parts[0][1:], *parts[1:]]
        encoded = layout.encode_ids(parts, [], tokens_per_image, base["bos_id"], task=case["task"])
        prompts_.append(layout.Group((encoded,)))
    slots = max(len(parts) - 1 for parts in segments)
    shape = layout.RowShape(length, slots, 0, tokens_per_image, golden.config.vision.image_size)
    batch = layout.prompt_batch(prompts_, shape, base["pad_id"])
    np.testing.assert_array_equal(batch["segments"] > 0, mask == 1)
    real = mask == 1
    np.testing.assert_array_equal(batch["positions"][real], arrays["first_position_ids"][real])
    batch["images"], batch["image_tasks"] = golden.slots(
        case["image_index"], [len(parts) - 1 for parts in segments]
    )
    embedded = embed(model, batch)
    close(np.asarray(embedded)[real], arrays["left_padded_embs"][real], 2e-5, "prompt embeddings")

    output = arrays["output_ids"][:, 1:]
    new = case["generate_kwargs"]["max_new_tokens"]
    tokens = generate(model, batch, max_new_tokens=new, eos=base["eos_id"], pad=0)
    np.testing.assert_array_equal(np.asarray(tokens)[:, : output.shape[1]], output)
    assert not np.any(tokens[:, output.shape[1] :])  # every row had ended

    span = extended_span(batch, output.shape[1])
    cache: Cache | None = model.decoder.empty_cache(span, jnp.float32)
    hidden, cache = decode(model.decoder, embedded, span_of(batch), cache, 0)
    alive = np.ones(rows, bool)
    for n in range(arrays["step_logits"].shape[1]):
        logits = np.asarray(model.decoder.logits(hidden[:, -1]))
        close(logits[alive], arrays["step_logits"][alive, n], 2e-4, f"logits of step {n}")
        alive &= output[:, n] != base["eos_id"]
        if n + 1 == output.shape[1]:
            break
        place = length + n
        here = Span(*(s[:, place : place + 1] for s in span))
        np.testing.assert_array_equal(here.positions[alive], arrays[f"position_ids_step{n + 1}"][alive])
        token = model.decoder.embed(output[:, n : n + 1], jnp.float32)  # [B, 1, D]
        hidden, cache = decode(model.decoder, token, here, cache, place)


def test_aux(goldens, entry):
    assert entry in AUX, f"no check for the entry {entry!r}: write aux_{entry}"
    for files in golden_files.manifest(goldens)["aux"].values():
        entries = json.loads((goldens / files["json"]).read_text())
        if entry in entries:
            AUX[entry](entries[entry], load_file(goldens / files["tensors"]), entries)


def test_report_metrics(goldens):
    data = golden_files.manifest(goldens)
    value = json.loads((goldens / data["report_metrics"]["file"]).read_text())
    missing = captions.why_no_java_metrics()
    scores = captions.report_scores(value["pairs"])
    for name, expected in value.items():
        if isinstance(expected, float):
            if missing and name.startswith(("bleu", "meteor")):
                assert scores[name] == missing
                continue
            assert scores[name] == pytest.approx(expected, abs=1e-6), name


def test_broken(goldens, broken):
    """What the original cannot run is refused with a sentence; what it can run is accepted."""
    data = golden_files.manifest(goldens)
    base = next(iter(data["bases"].values()))
    settings = {
        **{"projector_type": "moe_mlp", "router_type": "soft", "router_method": "router_task_token"},
        **{"resample_method": "projection", "resample_rate": 4, "num_experts": 5, "num_task_tokens": 1},
        **{"sparse_topk": 2, "task_token_c": base["task_token_c"]},
        **{k: v for k, v in broken["config"].items() if k != "has_moe"},
    }
    label = broken["label"]
    if label == "task qa with image":
        with pytest.raises(UserError, match="text only"):
            forms.form_of(Config().text).training(Example("r1", "qa", "why?", "so", images=("i",)), 0)
    elif label.startswith("hard with 3 experts"):
        task = next(t for t in VISUAL_TASKS if t in label)
        config = Config(
            model=dataclasses.replace(Config().model, connector=golden_files.connector_config(settings)),
            data=dataclasses.replace(Config().data, sources=(SourceConfig(tasks=(task,)),)),
        )
        refuses = (
            contextlib.nullcontext() if broken["stage"] == "ok" else pytest.raises(UserError, match=task)
        )
        with refuses:
            from_config_dict(to_dict(config))
    elif broken["stage"] == "ok" and "silently" not in label:
        golden_files.model_config(base, settings)
    elif broken["config"].get("has_moe", True) != settings["projector_type"].startswith("moe_"):
        # only the contradiction was broken, and it cannot be said here
        golden_files.model_config(base, settings)
    else:
        with pytest.raises(UserError):
            golden_files.model_config(base, settings)
