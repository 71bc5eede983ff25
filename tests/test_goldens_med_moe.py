"""Med-MoE's numbers, entry by entry; `--goldens=DIR` takes any folder of the format.

Tolerances are the manifest's: 2e-5 + 1e-4 relative for everything in float32, whole numbers exact;
2e-3 for what StableLM makes of left padding.
"""

import dataclasses
import functools
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import golden_med_moe as golden_files
from support.golden_folders import golden_folder
from support.med_moe_checks import (
    check_eval_metrics,
    check_image_preprocess,
    check_prompts,
    check_router_import,
    close,
)

from unimed_jax.config import LossConfig
from unimed_jax.interop.families import med_moe
from unimed_jax.interop.tensors.table import to_published
from unimed_jax.model.generate import extended_span, generate
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.routing import Noise, balance, expert_capacity, positions_in_expert, route
from unimed_jax.model.unimed import Span, span_of
from unimed_jax.train.loss import loss_sums

pytestmark = pytest.mark.usefixtures("quick_compiles")
GOLDENS = "med_moe"
NOISELESS = Noise()


def pytest_generate_tests(metafunc):
    if "entry" in metafunc.fixturenames:
        entries = golden_files.manifest(golden_folder(metafunc.config, metafunc.module))["entries"]
        metafunc.parametrize("entry", entries, ids=map(golden_files.name_of, entries))


def test_files(goldens):
    """Checks that every listed file is there, with its checksum."""
    for name, file in golden_files.manifest(goldens)["files"].items():
        assert hashlib.sha256((goldens / name).read_bytes()).hexdigest() == file["sha256"], name


def test_entry(goldens, entry):
    assert entry["family"] in FAMILIES, (
        f"no check for the family {entry['family']!r}: write check_{entry['family']}"
    )
    FAMILIES[entry["family"]](goldens, entry)


# --------------------------------------------------------------------------------------------------
# Gating and layers
# --------------------------------------------------------------------------------------------------


def published_aux(routing, used):
    """Averages the loss over unused tokens too, as the original does if it is given them."""
    first = jax.nn.one_hot(routing.experts[:, 0], routing.logits.shape[1], dtype=bool)
    first = first if used is None else first & used.reshape(-1, 1)
    return balance(jax.nn.softmax(routing.logits), first, jnp.ones(len(first), bool))


def spread_out(routing, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Spreads routing out as weights and masks [tokens, experts, capacity]."""
    at = np.asarray(positions_in_expert(routing.experts, routing.kept, len(routing.counts)))
    weights = np.asarray(routing.weights)
    shape = (len(at), routing.counts.shape[0], capacity)
    combine, dispatch = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    for token, choice in np.argwhere(at >= 0):
        place = (token, int(routing.experts[token, choice]), at[token, choice])
        combine[place], dispatch[place] = weights[token, choice], 1
    return combine, dispatch


def check_gating(folder, entry):
    arrays = golden_files.arrays_of(folder, entry)
    top_k = {"top1gating": 1, "top2gating": 2}[entry["function"]]
    said = golden_files.limits(
        top_k,
        entry["drop_tokens"],
        entry["capacity_factor"],
        entry["capacity_factor"],
        entry["min_capacity"],
    )
    capacity = expert_capacity(
        entry["S"], golden_files.MoeConfig(experts=entry["E"], top_k=top_k, **said), training=True
    )
    used = golden_files.used(arrays)
    assert (used is not None) == entry["used_token"]
    noise = golden_files.noise(arrays, "")
    routing = jax.jit(route, static_argnums=(1, 2))(
        jnp.asarray(arrays["logits"]), top_k, capacity, used, noise
    )
    np.testing.assert_array_equal(routing.counts, arrays["exp_counts"])
    assert (int(routing.counts.max()) if capacity is None else capacity) == entry["capacity"]
    combine, dispatch = spread_out(routing, entry["capacity"])
    np.testing.assert_array_equal(dispatch, arrays["dispatch_mask"])
    close(combine, arrays["combine_weights"], "weights")
    close(published_aux(routing, used), arrays["l_aux"], "balancing loss")
    if used is None:
        close(routing.aux, arrays["l_aux"], "balancing loss")


def check_moe_layer(folder, entry):
    arrays = golden_files.arrays_of(folder, entry)
    for path in ("dense", "grouped", "capacity"):
        check_layer_path(arrays, entry, path)


def check_layer_path(arrays, entry, path):
    config = golden_files.layer_config(entry, path)
    table = med_moe.expert_layer_table(config, "param", 0)
    weights, grads = (
        complete(arrays, "param."),
        {k: v for k, v in arrays.items() if k.startswith("grad.")},
    )
    model = golden_files.loaded(config, table, weights)
    leaves = {
        path: leaf for path, leaf in parameters(model).items() if path.startswith("decoder/layers/moe/")
    }
    used, training = golden_files.used(arrays), entry["module_training"]
    used = None if used is None else used.reshape(entry["B"], entry["T"])
    noise = golden_files.noise(arrays, "in.")
    scale = (
        float(re.search(r"([\d.]+) *\* *l_aux", entry["gradients"])[1]) if entry["gradients"] else 0.0
    )

    def loss(leaves, x, cotangent):
        moe = jax.tree.map(lambda leaf: leaf[0], with_parameters(model, leaves).decoder.layers.moe)
        y, routing = moe(x, used, noise, training)
        aux = published_aux(routing, used)
        return (y * cotangent).sum() + scale * aux, (y, routing, aux)

    x = arrays["in.hidden_states"]
    cotangent = arrays.get("in.cotangent", np.zeros_like(x))
    (total, (y, routing, aux)), (d_leaves, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        leaves, x, cotangent
    )
    close(y, arrays["out.output"], f"{path}: output")
    close(aux, arrays["out.l_aux"], f"{path}: balancing loss")
    close(routing.logits, arrays["out.gate_logits"], f"{path}: logits")
    np.testing.assert_array_equal(routing.counts, arrays["out.exp_counts"])
    combine, dispatch = spread_out(routing, entry["capacity"])
    np.testing.assert_array_equal(dispatch, arrays["out.dispatch_mask"])
    close(combine, arrays["out.combine_weights"], f"{path}: weights")
    if entry["gradients"]:
        close(total, arrays["out.grad_loss"], f"{path}: loss")
        close(dx, grads.pop("grad.in.hidden_states"), f"{path}: gradient of the input")
        check_gradients(to_published(table, d_leaves), weights, grads, path)


def complete(arrays, prefix):
    """Returns the weights under a prefix.

    The residual MLP is the meta expert, and may be listed once.
    """
    weights = {k: v for k, v in arrays.items() if k.startswith(prefix)}
    if any("coefficient" in name for name in weights):
        for name, value in list(weights.items()):
            weights.setdefault(twin_of(name), value)
    return weights


def twin_of(name):
    """Returns the other name of the MLP that is both meta expert and residual MLP."""
    if "meta_moe." in name:
        return name.replace("meta_moe.", "mlp.")
    return re.sub(r"(\.mlp|^param)\.mlp\.", r"\1.meta_moe.", name)


def check_gradients(ours, weights, grads, what):
    """Compares gradients; `grads`: "grad." + published name.

    Of two names of one parameter only one is listed, with the sum of both.
    """
    assert grads
    for key, expected in grads.items():
        name = key.removeprefix("grad.")
        twin, actual = twin_of(name), ours[name]
        if twin != name and twin in ours and f"grad.{twin}" not in grads:
            np.testing.assert_array_equal(weights[name], weights[twin])
            actual = actual + ours[twin]
        close(actual, expected, f"{what}: gradient of {name}")


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


@functools.cache
def model_of(folder, name):
    """Returns (entry of the weights, config, weights, model)."""
    entries = golden_files.manifest(folder)["entries"]
    (entry,) = (e for e in entries if e["family"] == "model_weights" and e["model"] == name)
    config = golden_files.model_config(entry)
    weights = complete(load_file(folder / entry["file"]), "")
    return entry, config, weights, golden_files.loaded(config, med_moe.med_moe_table(config), weights)


def check_model_weights(folder, entry):
    """Checks that every tensor is known and comes back as it was, and so do the settings."""
    entry, config, weights, model = model_of(folder, entry["model"])
    table = med_moe.med_moe_table(config)
    back = to_published(table, parameters(model))
    for name, value in back.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
    unread = set(weights) - set(back)
    assert not {name for name in unread if not name.startswith(med_moe.TOWER)}
    stored = load_file(folder / entry["file"])
    twins = [name for name in stored if twin_of(name) in stored and "meta_moe." in name]
    sizes = [sum(stored[n].size for n in names) for names in (stored, set(stored) - set(twins))]
    assert entry["params"] in sizes
    assert golden_files.trainable(entry, back) <= set(back)
    again = med_moe.model_from_med_moe(med_moe.model_to_med_moe(config), config.vision)
    assert again == golden_plain(config)


def golden_plain(config):
    return dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, eval_noise=None, route_padding=None)
    )


def check_model(folder, entry):
    assert entry["prefix"].startswith("gen") == ("out.sequences" in entry["tensors"])
    (check_generation if "out.sequences" in entry["tensors"] else check_forward)(folder, entry)


see = jax.jit(
    lambda model, images, tasks: (model.vision(images), model.encode_images(images, tasks).tokens)
)


@functools.partial(jax.jit, static_argnames="training")
def forward(model, batch, noise, training):
    x, _ = model.embed(batch)
    key = jax.random.key(0) if training else None  # nothing draws from it: the noise is given
    out = model.decoder(x, span_of(batch), dropout_key=key, noise=noise, states=True)
    return x, out.states, model.decoder.logits(out.hidden), out.routing


def stacked_noise(arrays, rows, layers, first=0):
    """Stacks the recorded noise of all routers, from call number `first` on, in our places."""
    each = [golden_files.noise(arrays, "in.", first + i) for i in range(layers)]
    if not each or not jax.tree.leaves(each):
        return NOISELESS
    return jax.tree.map(lambda *a: jnp.stack([rows.ours(np.asarray(x)) for x in a]), *each)


def check_forward(folder, entry):
    arrays = golden_files.arrays_of(folder, entry)
    weights_entry, config, weights, model = model_of(folder, entry["model"])
    left = entry["options"].get("side") == "left"
    # StableLM's left padding sees the tokens after it, as its mask takes the minimum of fp16.
    after = left and not config.decoder.parallel_block
    rows = golden_files.rows_of(arrays, config, left, arrays["out.attention_mask"].shape[1], after)
    np.testing.assert_array_equal(rows.real, arrays["out.attention_mask"])
    np.testing.assert_array_equal(rows.labels, arrays["out.labels"])
    if "in.images" in arrays:
        pixels = arrays["in.images"].transpose(0, 2, 3, 1)
        features, projected = see(model, pixels, np.zeros(len(pixels), np.int32))
        close(features, arrays["out.image_features"], "CLIP features")
        close(projected, arrays["out.projected_features"], "projector")

    numbers = config.moe.numbers(config.decoder.depth)
    noise = stacked_noise(arrays, rows, len(numbers))
    x, states, logits, routing = forward(model, rows.batch, noise, entry["module_training"])
    # What stands in left padding of StableLM is rounded like numbers of the size of 65504.
    exact = rows.real if left else np.ones_like(rows.real)
    embedded = rows.back(np.where(rows.batch["segments"][..., None] != 0, x, 0))
    close(embedded, arrays["out.inputs_embeds"], "embeddings")
    for i, state in enumerate(states):
        expected = arrays[f"out.hidden_states.{i}"]
        close(rows.back(state)[exact], expected[exact], f"hidden states {i}")
        close(rows.back(state), expected, f"hidden states {i}, padding too", atol=2e-3)
    close(rows.back(logits)[exact], arrays["out.logits"][exact], "logits")
    loose = 2e-3 if left else 2e-5
    for nth, i in enumerate(numbers):
        capacity = expert_capacity(rows.order.size, config.moe, entry["module_training"])
        here = jax.tree.map(lambda a, nth=nth: a[nth], routing)
        check_routing(here, rows, arrays, f"out.layer{i}.", capacity, exact, loose)
        close(
            routing.aux[nth],
            arrays["out.moe_loss_list"][nth],
            f"balancing loss of layer {i}",
            atol=loose,
        )
    check_loss(entry, config, weights, model, rows, noise, arrays, loose)


def check_routing(routing, rows, arrays, prefix, capacity, exact, loose):
    shape = rows.order.shape
    count = routing.counts.shape[0]
    per_token = {name: getattr(routing, name) for name in ("logits", "experts", "weights", "kept")}
    in_order = {k: rows.back(v.reshape(*shape, -1)).reshape(v.shape) for k, v in per_token.items()}
    routing = routing._replace(**{k: jnp.asarray(v) for k, v in in_order.items()})
    exact = exact.reshape(-1)
    close(routing.logits[exact], arrays[f"{prefix}gate_logits"][exact], f"{prefix}gate_logits")
    close(
        routing.logits, arrays[f"{prefix}gate_logits"], f"{prefix}gate_logits, padding too", atol=loose
    )
    np.testing.assert_array_equal(routing.counts, arrays[f"{prefix}exp_counts"])
    combine, slot = np.zeros((len(exact), count), np.float32), np.full((len(exact), count), -1)
    at = np.asarray(positions_in_expert(routing.experts, routing.kept, len(routing.counts)))
    for token, choice in np.argwhere(at >= 0):
        place = (token, int(routing.experts[token, choice]))
        combine[place], slot[place] = routing.weights[token, choice], at[token, choice]
    np.testing.assert_array_equal(slot, arrays[f"{prefix}slot_se"])
    close(combine, arrays[f"{prefix}combine_se"], f"{prefix}combine_se", atol=loose)
    assert (int(routing.counts.max()) if capacity is None else capacity) == arrays[f"{prefix}capacity"]


def check_loss(entry, config, weights, model, rows, noise, arrays, loose):
    coef = config.moe.aux_coef
    leaves = parameters(model)
    # Under gradient checkpointing the original's balancing loss has no gradient.
    cut = any("checkpoint" in key and value for key, value in entry["options"].items())

    def loss(leaves):
        copy = with_parameters(model, leaves)
        total, aux = loss_sums(copy, rows.batch, LossConfig(reduction="token"), None, None, noise=noise)
        balancing = coef * aux["balance"].sum() / aux["weight"] if "balance" in aux else 0.0
        value = total / aux["weight"]
        return value + (jax.lax.stop_gradient(balancing) - balancing if cut else 0.0), balancing

    grads = {k: v for k, v in arrays.items() if k.startswith("grad.")}
    if grads:
        (value, balancing), d_leaves = jax.jit(jax.value_and_grad(loss, has_aux=True))(leaves)
        check_gradients(
            to_published(med_moe.med_moe_table(config), d_leaves), weights, grads, entry["case"]
        )
    else:
        value, balancing = jax.jit(loss)(leaves)
    close(value, arrays["out.loss"], "loss", atol=max(2e-5, loose * coef))
    close(value, entry["loss"], "loss", atol=max(2e-5, loose * coef))
    close(balancing, arrays["out.moe_loss"], "balancing loss", atol=max(2e-5, loose * coef))
    close(value - balancing, entry["ce"], "cross entropy")


@jax.jit
def decode(model, x, span, cache, place, noise):
    hidden, cache, *_ = model.decoder(x, span, cache, place, noise=noise)
    return model.decoder.logits(hidden[:, -1]), cache


def check_generation(folder, entry):
    """Checks greedy tokens of the cached loop with the recorded noise, and of `generate` without
    noise.
    """
    arrays = golden_files.arrays_of(folder, entry)
    _, config, weights, model = model_of(folder, entry["model"])
    rows = golden_files.rows_of(arrays, config, left=True)
    prompt, sequences = arrays["in.input_ids"].shape[1], arrays["out.sequences"]
    np.testing.assert_array_equal(sequences[:, :prompt], arrays["in.input_ids"])
    new, scores = sequences[:, prompt:], arrays["out.scores"]
    assert new.shape == scores.shape[:2] and (len(new) > 1 or new[0].tolist() == entry["new_tokens"])
    layers = len(config.moe.numbers(config.decoder.depth))
    span = extended_span(rows.batch, new.shape[1])
    x, _ = model.embed(rows.batch)
    width = x.shape[1]
    cache = model.decoder.empty_cache(span, jnp.float32)
    here = span_of(rows.batch)
    for n in range(new.shape[1]):
        noise = stacked_noise(arrays, rows, layers) if n == 0 else step_noise(arrays, layers, n)
        logits, cache = decode(model, x, here, cache, 0 if n == 0 else width + n - 1, noise)
        allowed = scores[:, n] > -1e29  # the end of text is not, at first
        close(np.asarray(logits)[allowed], scores[:, n][allowed], f"scores of step {n}")
        np.testing.assert_array_equal(np.where(allowed, logits, -np.inf).argmax(axis=1), new[:, n])
        x = model.decoder.embed(jnp.asarray(new[:, n : n + 1]), jnp.float32)
        here = Span(*(s[:, width + n : width + n + 1] for s in span))
    if not any("gumbel" in key for key in arrays):  # top-1 without a limit draws nothing that counts
        check_generate(config, weights, rows, scores, new)


def step_noise(arrays, layers, n):
    each = [golden_files.noise(arrays, "in.", n * layers + i) for i in range(layers)]
    return jax.tree.map(lambda *a: jnp.stack(a), *each) if each else NOISELESS


def check_generate(config, weights, rows, scores, new):
    """Checks `generate` with a bias of the head that holds the end of text back, as the original did."""
    never = (scores < -1e29).all(axis=(0, 1))
    if (scores < -1e29).any(axis=(0, 1)).tolist() != never.tolist():
        return
    biased = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, head_bias=True))
    table = med_moe.med_moe_table(biased)
    weights = {
        **weights,
        "lm_head.bias": np.where(never, -1e30, weights.get("lm_head.bias", 0)).astype(np.float32),
    }
    model = golden_files.loaded(biased, table, weights)
    tokens = generate(model, rows.batch, max_new_tokens=new.shape[1], eos=-1, pad=0)
    np.testing.assert_array_equal(tokens, new)


FAMILIES = {
    "gating": check_gating,
    "moe_layer": check_moe_layer,
    "model_weights": check_model_weights,
    "model": check_model,
    "eval_metrics": check_eval_metrics,
    "prompts": check_prompts,
    "image_preprocess": check_image_preprocess,
    "router_import": check_router_import,
}
