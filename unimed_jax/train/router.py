"""Trains Med-MoE's router by itself, as a linear classifier of modalities.

It classifies the hidden states of a dense model.

The published recipe: an image with its prompt is the mean over all hidden states and positions; one
linear layer, cross-entropy, Adam. What it finds goes into every layer with experts (`config.init`
kind "router").
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from unimed_jax import files, parsing, processes
from unimed_jax.config import Config, config_hash
from unimed_jax.data.datasets import distinct, open_sources
from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.layout import Encoder
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.evaluate.statistics import Measure, with_interval
from unimed_jax.evaluate.tasks import open_held_out
from unimed_jax.finite import refuse_not_finite
from unimed_jax.interop.families.med_moe import export_router
from unimed_jax.interruption import claim
from unimed_jax.model import sharding
from unimed_jax.model.parameters import stored_leaves, tree_bytes
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import Batch, UniMed, span_of
from unimed_jax.predict.plain import prompt_batch
from unimed_jax.provenance import code_version, joint_checksum, plain
from unimed_jax.runs import inputs
from unimed_jax.runs.folder import load_text, tokenizer_folder, write_config
from unimed_jax.runs.open import initial_model

REPORT, ROUTER, PICTURE = "router.json", "router", "router.png"  # names in the run's folder


class Labelled(NamedTuple):
    """Holds one example of each image that has a label, in the drawn order."""

    examples: list[Example]
    datasets: list[Dataset]  # the data set of each example
    classes: Int[np.ndarray, "N"]
    left_out: int  # images without a label


def train_router(config: Config, folder: Path) -> dict[str, Any]:
    """Trains the router that `config.router_fit` describes and reports how well it classifies.

    Writes router/, router.png and router.json.

    router/ is in Med-MoE's format. router.json is returned: accuracy by number of labels and a
    confusion matrix for every split of `config.evaluate.splits`. A router that is finished already is
    read, not trained again.

    Raises UserError where no image has a label, or one that is not among `router.classes`.
    """
    claim(folder)
    with processes.leader_first("inputs"):
        write_config(folder, config)
        if (folder / REPORT).is_file():
            return parsing.read_json(folder / REPORT, "remove it and train again")
        datasets = open_sources(config.data)
        tokenizer = load_text(folder, config, datasets)
        now = inputs.state_of_tokenizer(tokenizer_folder(folder, config), tokenizer)
        now |= inputs.state_of_data(config, datasets, open_held_out(config))
        trained_on = inputs.keep(folder, config, now)
    datasets = distinct(datasets)
    held_out = distinct(open_sources(config.held_out)) if config.evaluate.sources else datasets
    key = config.router_fit.key
    images = [example for _, example in _with_images(datasets, "train")]
    classes = config.router_fit.classes or tuple(sorted({e.meta[key] for e in images if key in e.meta}))
    train = labelled(datasets, "train", config, classes)
    held = {split: labelled(held_out, split, config, classes) for split in config.evaluate.splits}
    counts = _counts(config, len(train.examples))

    weights = tree_bytes(stored_leaves(config))
    mesh = sharding.make_mesh(config.mesh, config.evaluate.batch, weights)
    with sharding.inside(mesh):
        model, _ = initial_model(config, tokenizer, mesh)
        embed = embedder(model, config, tokenizer)
        rows = embed(train.examples[: counts[-1]], train.datasets[: counts[-1]])
        held_inputs = {split: embed(some.examples, some.datasets) for split, some in held.items()}

    results: dict[str, Any] = {
        split: {"images": len(some.examples), "accuracy": []} for split, some in held.items()
    }
    for count in counts:
        kernel, bias = fit(rows[:count], train.classes[:count], len(classes), config)
        for split, some in held.items():
            guessed = (held_inputs[split] @ kernel + bias[None]).argmax(axis=1)
            results[split]["accuracy"].append({"labels": count, **_accuracy(guessed, some, config)})
            # Rows: what it is; columns: what it is taken for.
            confusion = np.zeros((len(classes), len(classes)), int)
            np.add.at(confusion, (some.classes, guessed), 1)
            results[split]["confusion"] = confusion
            results[split]["sets"] = _by_set(guessed, some, len(classes))
    report = {
        "name": config.name,
        "config_hash": config_hash(config),
        "data_checksum": joint_checksum([dataset.checksum for dataset in held_out]),
        "code_version": code_version(),
        "key": key,
        "classes": classes,
        "images": {"train": len(train.examples), "without label": train.left_out},
        "splits": results,
    }
    if trained_on.changes:
        report["notes"] = trained_on.notes()
    refuse_not_finite(
        {"kernel": kernel, "bias": bias}, f"the router of {folder}", "lower config.router_fit.lr"
    )
    if processes.leads():
        ours = "decoder/layers/moe/router"
        with files.written_together(folder, (ROUTER, PICTURE, REPORT)) as place:
            export_router(
                place / ROUTER,
                config.model,
                {f"{ours}/kernel": kernel[None], f"{ours}/bias": bias[None]},
            )
            _draw(place / PICTURE, report)
            files.write_json(place / REPORT, plain(report))
    return plain(report)


def summary(report: dict[str, Any]) -> str:
    """Describes the accuracy in a line for each split and number of labels."""
    lines = []
    for split, result in report["splits"].items():
        for entry in result["accuracy"]:
            ends = entry["ci95"]
            shown = "no interval" if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"
            lines.append(f"{split}: {entry['value']:.1%} ({shown}) with {entry['labels']} labels")
    return "\n".join(lines)


# ---- labels ----------------------------------------------------------------------------------------
def _with_images(datasets: Sequence[Dataset], split: str) -> Iterator[tuple[Dataset, Example]]:
    """Yields the examples of a split that have an image, each after its data set."""
    for dataset in datasets:
        if split in dataset.splits:
            yield from ((dataset, example) for example in dataset.examples(split) if example.images)


def labelled(
    datasets: Sequence[Dataset], split: str, config: Config, classes: Sequence[str]
) -> Labelled:
    """Draws one prompt of each image whose examples have the label, and the order of the prompts.

    Both depend on `config.seed`.

    Raises UserError if there is none, or if a label is not one of `classes`.
    """
    key, rng = config.router_fit.key, np.random.default_rng([config.seed % 2**32, 3])
    prompts: dict[tuple[str, ...], list[tuple[Dataset, Example]]] = {}
    for dataset, example in _with_images(datasets, split):
        prompts.setdefault((dataset.id, *example.images), []).append((dataset, example))
    chosen, classes_of = [], []
    for some in prompts.values():
        with_label = [pair for pair in some if pair[1].meta.get(key) is not None]
        if not with_label:
            continue
        dataset, example = with_label[rng.integers(len(with_label))]
        label = example.meta[key]
        if label not in classes:
            raise UserError(
                f"record {dataset.id}/{example.id}: {key}={label!r} is none of "
                f"config.router_fit.classes ({', '.join(classes)}); name it there, or mend the "
                "record."
            )
        chosen.append((dataset, example))
        classes_of.append(classes.index(label))
    if not chosen:
        raise UserError(
            f"config.router_fit.key={key!r}: no {split} image of "
            f"{', '.join(d.id for d in datasets)} has this label; name a key of their meta."
        )
    order = rng.permutation(len(chosen))
    sets, examples = zip(*(chosen[i] for i in order), strict=True)
    return Labelled(list(examples), list(sets), np.array(classes_of)[order], len(prompts) - len(chosen))


def _counts(config: Config, available: int) -> tuple[int, ...]:
    counts = config.router_fit.labels or (available,)
    if counts[-1] > available:
        raise UserError(
            f"config.router_fit.labels={counts}: the training split has {available} labelled "
            "images; ask less."
        )
    return counts


# ---- embeddings and classifier ---------------------------------------------------------------------
def embedder(
    model: UniMed, config: Config, tokenizer: Tokenizer
) -> Callable[[Sequence[Example], Sequence[Dataset]], Float[np.ndarray, "N D"]]:
    """Makes a function that embeds examples by a dense model's hidden states.

    The function takes examples and the data set of each, and returns the mean of each prompt's hidden
    states [N, D].

    The mean is over all layers, the embeddings included, and all tokens of the prompt.
    """
    encoder = Encoder(tokenizer, config.text, config.model.tokens_per_image)

    @jax.jit
    def means(model: UniMed, batch: Batch) -> Float[Array, "B D"]:
        x, _ = model.embed(batch)
        states = model.decoder(x, span_of(batch), states=True).states
        assert states is not None
        real = (batch["segments"] != 0).astype(jnp.float32)
        total = jnp.einsum("lbsd,bs->bd", states, real, preferred_element_type=jnp.float32)
        mean = total / (len(states) * real.sum(axis=1, keepdims=True))
        return constrain(mean, None, None)  # every process reads all of it

    def embed(examples: Sequence[Example], datasets: Sequence[Dataset]) -> Float[np.ndarray, "N D"]:
        out = []
        for start in range(0, len(examples), config.evaluate.batch):
            rows = slice(start, start + config.evaluate.batch)
            part = examples[rows]
            pixels = [
                [d.image(key) for key in e.images] for d, e in zip(datasets[rows], part, strict=True)
            ]
            batch = prompt_batch(encoder, config, tokenizer.pad, part, pixels)
            out.append(np.asarray(means(model, batch))[: len(part)])
        return np.concatenate(out)

    return embed


def fit(
    inputs: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], classes: int, config: Config
) -> tuple[Float[np.ndarray, "D E"], Float[np.ndarray, "E"]]:
    """Trains the linear classifier; returns its kernel and bias after all epochs.

    Each epoch goes through the inputs in a new order.
    """
    settings, (count, width) = config.router_fit, inputs.shape
    batch = min(settings.batch, count)
    steps = -(-count // batch)
    keys = jax.random.split(jax.random.key(config.seed), settings.epochs + 2)
    bound = width**-0.5  # both start as torch's linear layers do
    linear = (
        jax.random.uniform(keys[0], (width, classes), minval=-bound, maxval=bound),
        jax.random.uniform(keys[1], (classes,), minval=-bound, maxval=bound),
    )
    optimizer = optax.adam(settings.lr)

    def loss(linear, x, y, weight):
        logits = x @ linear[0] + jnp.broadcast_to(linear[1], (batch, classes))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return (losses * weight).sum() / weight.sum()

    @jax.jit
    def train(linear, inputs, labels):
        order = jax.vmap(lambda key: jax.random.permutation(key, count))(keys[2:])
        # the last batch may be short
        order = jnp.pad(order, ((0, 0), (0, steps * batch - count)), constant_values=-1)
        order = order.reshape(-1, batch)  # [epochs * steps, batch]

        def step(state, rows):
            linear, moments = state
            gradient = jax.grad(loss)(
                linear, inputs[rows], labels[rows], (rows >= 0).astype(jnp.float32)
            )
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(linear, updates), moments), None

        return jax.lax.scan(step, (linear, optimizer.init(linear)), order)[0][0]

    kernel, bias = train(linear, inputs, labels)
    return np.asarray(kernel), np.asarray(bias)


# ---- report ----------------------------------------------------------------------------------------
def _by_set(guessed: np.ndarray, some: Labelled, classes: int) -> dict[str, np.ndarray]:
    """Counts each set's confusions: a class of one set alone may be known by how its questions read."""
    found: dict[str, np.ndarray] = {}
    for dataset, is_, taken_for in zip(some.datasets, some.classes, guessed, strict=True):
        found.setdefault(dataset.id, np.zeros((classes, classes), int))[is_, taken_for] += 1
    return found


def _accuracy(guessed: np.ndarray, some: Labelled, config: Config) -> dict[str, Any]:
    """Measures accuracy and its bootstrap 95 % interval over clusters, None below two."""
    measure = Measure.mean((guessed == some.classes).astype(float))
    clusters = [f"{d.id}/{e.cluster or e.id}" for d, e in zip(some.datasets, some.examples, strict=True)]
    return with_interval(measure, clusters, config.evaluate.bootstrap, config.seed)


def _draw(path: Path, report: dict[str, Any]) -> None:
    """Draws accuracy against the number of labels, and each split's confusion matrix.

    The matrices are those with all labels.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        processes.say(f"unimed_jax: {path} was not drawn: {error}; install matplotlib.")
        return
    splits, classes = report["splits"], report["classes"]
    figure = Figure(figsize=(4.2 * (1 + len(splits)), 4.0), dpi=130, layout="constrained")
    curve, *matrices = figure.subplots(1, 1 + len(splits))
    for split, result in splits.items():
        labels, values = zip(*((e["labels"], e["value"]) for e in result["accuracy"]), strict=True)
        curve.plot(labels, values, marker="o", label=split)
        if result["accuracy"][0]["ci95"] is not None:  # the same clusters for every number of labels
            low, high = zip(*(e["ci95"] for e in result["accuracy"]), strict=True)
            curve.fill_between(labels, low, high, alpha=0.2)
    curve.set(xscale="log", ylim=(0, 1.02), xlabel="labelled images", ylabel="accuracy", title="router")
    curve.legend()
    for axes, (split, result) in zip(matrices, splits.items(), strict=True):
        confusion = np.asarray(result["confusion"])
        axes.imshow(confusion, cmap="Blues")
        for (row, column), number in np.ndenumerate(confusion):
            dark = number > confusion.max() / 2
            axes.text(
                column, row, str(number), ha="center", va="center", color="white" if dark else "black"
            )
        axes.set_xticks(range(len(classes)), classes, rotation=30)
        axes.set_yticks(range(len(classes)), classes)
        axes.set(
            xlabel="taken for", ylabel="is", title=f"{split}, {result['accuracy'][-1]['labels']} labels"
        )
    figure.savefig(path, format="png")
