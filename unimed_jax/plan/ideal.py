"""Counts what the mathematics needs of one device: the measure of a compiled program's waste.

Nothing here knows a compiler. Sizes come from the config, and what lies where from the sharding
table, so another mesh needs no new case. Moved in a device's memory:

- FLOPs: `train/flops.py`: 4N a token for a frozen decoder, half of the pairs of a causal row.
- weights: every matrix read once forward, and once backward if a gradient passes through or it
  trains, as it is stored; one that must be gathered is also written.
- products: every product reads its input and writes its output, and backward the gradients of
  both. Products of one input (q, k, v; gate, up) read it once, and all that is between two products
  is fused into them: norms, rotations, activations, dropout and adapters, of which only the low-rank
  side counts. What trains, a kernel or its adapter, reads the input again for its gradient.
- activations: the gradient of a non-linear function reads its input again; that of gate * up writes
  two gradients, where the product below made one.
- residual: each addition to the stream reads it, and backward its gradient and the norm's input.
- attention: q, k, v read and the output written, backward twice that; scores stay inside.
- optimizer: of a trained leaf the gradient, the parameter and two moments are read and written.
- logits: written and read in float32, their gradient written and read in the compute dtype.
- rows: embeddings of the tokens, and the images. cache: decoding reads the keys and values of all
  places, prefill writes them.

Sent to other devices:

- gather: parameters split over axes that split the rows too, forward, and again backward; in the
  compute dtype, or as they are stored if that is smaller.
- gradients: of trained leaves, all-reduced over the axes of the rows that do not split them, and
  scattered over those that do.
- inputs: those of the connector are gathered over the devices that split its width and its sums
  are scattered, backward the reverse; its weights never move.
- sums: over axes that do not split the rows ("tensor") the output of a product whose input is split
  is all-reduced, and backward the gradient of an input whose output is split.
- tokens: each goes to its experts of the decoder and back, forward and backward.

Rematerialisation is waste by this measure; `again` says what it costs at least: every product of a
layer but the last once more, with its weights, input and output, and attention.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from unimed_jax.config import Config, RuleConfig
from unimed_jax.model import sharding
from unimed_jax.model.parameters import stored_leaves, tree_bytes
from unimed_jax.rules import leaf_rules
from unimed_jax.train.flops import Product, gradients_pass, leaf_shapes, products, useful_flops

# Widths split over all devices: what is multiplied by them is gathered, they are not.
_STATIONARY = ("expert_hidden", "router_hidden")
_SAME_INPUT = (("q", "k", "v"), ("gate", "up"))
_ACTIVATED = ("gate", "up", "token_kernel")  # products whose output a non-linear function takes
_FLOATS = 4  # float32 numbers that AdamW moves besides moments, see `optimizer` above


@dataclasses.dataclass(frozen=True)
class Again:
    """Holds what rematerialisation adds to a step at least."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Ideal:
    """Holds what one device must do in one run of a program."""

    flops: float
    bytes: float
    collective_bytes: float  # that leave the device, with ring algorithms (plan/collectives.py)
    byte_terms: dict[str, float]
    collective_terms: dict[str, float]
    again: Again  # on top of the above, at the config's remat policy; 0 except in training


def ideal(
    config: Config,
    mesh_sizes: Mapping[str, int],
    program: str,
    examples: int = 1,
    sizes: Mapping[str, int] | None = None,
) -> Ideal:
    """Counts the least that a device of a mesh must compute, move and send.

    `mesh_sizes` by axis; `program`: "train", "prefill" (`evaluate.batch` prompts of
    `text.max_prompt` tokens) or "decode" (one more token of each, over a full cache). Each row of
    training holds `examples` of equal length. sizes: of the engine's programs (predict/sizes.py), in
    place of those of the settings; a row of theirs holds a prompt for each of its images.
    """
    by_axis = {axis: mesh_sizes.get(axis, 1) for axis in sharding.MESH_AXES}
    leaves = stored_leaves(config)  # while it answers, too, what has trained is float32
    if program != "train":
        examples = 1
        if sizes is not None:
            config = _of_engine(config, program, sizes)
            examples = sizes["images"] if program == "prefill" else 1
        config = _answering(config, program)
    return _Count(config, leaves, by_axis, program, examples).total()


def _of_engine(config: Config, program: str, sizes: Mapping[str, int]) -> Config:
    """Gives settings by which `_answering` describes a program of the engine."""
    rows, tokens = ("rows", "tokens") if program == "prefill" else ("slots", "prompt")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, row_images=sizes["images"]),
        text=dataclasses.replace(config.text, max_prompt=sizes[tokens]),
        evaluate=dataclasses.replace(config.evaluate, batch=sizes[rows], max_new_tokens=sizes["answer"]),
    )


def _answering(config: Config, program: str) -> Config:
    """Describes generation as a step on rows of prompts, or of single tokens, where nothing trains."""
    tokens = config.text.max_prompt if program == "prefill" else 1
    images = config.data.row_images if program == "prefill" else 0
    data = dataclasses.replace(
        config.data,
        rows=config.evaluate.batch,
        row_tokens=tokens,
        row_images=images,
        row_answers=1,
    )
    train = dataclasses.replace(
        config.train, rules=(RuleConfig("*", False),), accumulation=1, cache_features=False
    )
    return dataclasses.replace(config, data=data, train=train)


class _Count:
    """Adds up the terms, one parameter after another."""

    def __init__(
        self,
        config: Config,
        leaves: Mapping[str, Any],
        sizes: dict[str, int],
        program: str,
        examples: int,
    ):
        self.config, self.sizes, self.program, self.examples = config, sizes, program, examples
        model = config.model
        self.shapes = leaf_shapes(model)
        self.rules = leaf_rules(self.shapes, config.train, config.optimizer)
        # bytes of a number, those of codes with their share of a scale
        self.stored = {path: tree_bytes(x) / x.size for path, x in leaves.items()}
        self.divided = {path: sharding.divided_shape(leaf) for path, leaf in leaves.items()}
        self.compute = jnp.dtype(model.compute_dtype).itemsize
        self.row_axes = sharding.axes_by_dimension((config.data.rows,), ("batch",), sizes)[0]
        self.shares = self.ways(self.row_axes)
        self.below = gradients_pass(config)
        self.bytes: dict[str, float] = {}
        self.sent: dict[str, float] = {}

    def total(self) -> Ideal:
        """Adds up all terms."""
        counted = [product for product in products(self.config) if self._runs(product)]
        for product in counted:
            self._product(product)
        self._shared_inputs(counted)
        self._connector_inputs()
        self._residual()
        self._attention()
        self._ends()
        if self.program == "train":
            self._gradients()
        self._tokens_to_experts()
        devices = math.prod(self.sizes.values())
        flops = useful_flops(self.config, self.examples)
        if self.program == "decode":
            flops["attention"] = self._pairs_with_cache()
        return Ideal(
            flops=sum(flops.values()) / devices,
            bytes=sum(self.bytes.values()),
            collective_bytes=sum(self.sent.values()),
            byte_terms=self.bytes,
            collective_terms=self.sent,
            again=self._again(counted, flops),
        )

    # ----------------------------------------------------------------------------------------------
    # Where a parameter lies
    # ----------------------------------------------------------------------------------------------

    def ways(self, axes: tuple[str, ...]) -> int:
        """Counts the devices along some axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    def axes(self, path: str) -> list[tuple[str, ...]]:
        """Gives the axes that split the last dimensions of a parameter, those that have names."""
        names = sharding.parameter_names(path)
        shape = self.divided[path]
        return sharding.axes_by_dimension(shape[len(shape) - len(names) :], names, self.sizes)

    def stays(self, path: str) -> bool:
        """Says whether a parameter never moves, because its inputs do."""
        names = sharding.parameter_names(path)
        return any(name in _STATIONARY for name in names)

    def gathered(self, path: str) -> tuple[str, ...]:
        """Gives the axes over which a parameter is gathered before it is used."""
        if self.stays(path):
            return ()
        names = sharding.parameter_names(path)
        split = zip(names, self.axes(path), strict=True)
        return tuple(a for name, axes in split if name != "expert" for a in axes if a in self.row_axes)

    def held(self, path: str) -> float:
        """Counts the elements of a parameter that a device holds between steps."""
        return math.prod(self.shapes[path]) / math.prod(self.ways(axes) for axes in self.axes(path))

    def used(self, path: str) -> float:
        """Counts the elements that a device multiplies with, after gathering."""
        return self.held(path) * self.ways(self.gathered(path))

    # ----------------------------------------------------------------------------------------------
    # Terms
    # ----------------------------------------------------------------------------------------------

    def add(self, term: str, number: float) -> None:
        """Adds to the bytes of memory."""
        self.bytes[term] = self.bytes.get(term, 0.0) + number

    def send(self, term: str, number: float) -> None:
        """Adds to the bytes that leave the device."""
        if number:
            self.sent[term] = self.sent.get(term, 0.0) + number

    def rows(self, product: Product) -> float:
        """Counts the rows of activations that a device multiplies by a product's parameter."""
        return product.visits / (1 if self.stays(product.path) else self.shares)

    def widths(self, product: Product) -> tuple[float, float]:
        """Gives the input and output channels of a product on a device."""
        moved, shape, ways = self.gathered(product.path), product.shape[-2:], (1, 1)
        if len(axes := self.axes(product.path)) > 1:
            split = [tuple(a for a in some if a not in moved) for some in axes[-2:]]
            ways = self.ways(split[0]), self.ways(split[1])
        width_in, width_out = (width / way for width, way in zip(shape, ways, strict=True))
        return (width_out, width_in) if product.path == "decoder/embedding" else (width_in, width_out)

    def _runs(self, product: Product) -> bool:
        """Says whether there is anything to multiply: without images the connector does not run."""
        return product.visits > 0 and (product.part != "connector" or self.config.data.row_images > 0)

    def _product(self, product: Product) -> None:
        path = product.path
        backward = product.passes or product.trains
        used, size = self.used(path), self.stored[path]
        axes = self.gathered(path)
        self.add("weights", used * size * (1 + backward) * (2 if axes else 1))
        if axes:
            # rounded before it is sent, or sent as the codes that it is stored as
            each = used * min(self.compute, size) * (1 - 1 / self.ways(axes))
            self.send("gather", each * (1 + backward))
        if path.endswith(("/lora_a", "/lora_b")):
            rank = product.shape[-1] if path.endswith("a") else product.shape[-2]
            moved = self.rows(product) * math.prod(product.shape[:-2]) * rank * self.compute
            self.add("products", moved * (1 + product.passes + product.trains))
            return
        width_in, width_out = self.widths(product)
        per_row = self.rows(product) * math.prod(product.shape[:-2]) * self.compute
        if product.part != "head":  # logits are a term of their own
            # written, and backward its gradient read
            self.add("products", per_row * width_out * (1 + backward))
        if backward and _name(path) in _ACTIVATED:
            # read again; a gate has a gradient of its own
            self.add("activations", per_row * width_out * (1 + (_name(path) == "gate")))
        self._sums(product, per_row, width_out)

    def _sums(self, product: Product, per_row: float, width_out: float) -> None:
        """Adds the all-reduce of an output whose input is split over axes that do not split the rows."""
        axes = self.axes(product.path)
        if len(axes) < 2 or self.stays(product.path):
            return
        split = tuple(a for a in axes[-2] if a not in self.row_axes)
        if split:
            self.send("sums", 2 * (1 - 1 / self.ways(split)) * per_row * width_out)

    def _shared_inputs(self, counted: list[Product]) -> None:
        """Adds what is read, and whose gradient is written, once for all products of one input."""
        for group in self._by_input(counted):
            product = group[0]
            width = self.input_width(product)
            trains = any(
                p.trains or self.trains(f"{p.path.removesuffix('kernel')}lora_a") for p in group
            )
            # read forward, read for the gradients of kernels or adapters, its own gradient written
            self.add("products", width * (1 + trains + product.passes))
            axes = self.axes(product.path)
            out = tuple(a for a in axes[-1] if a not in self.row_axes) if axes else ()
            if out and product.passes and not self.stays(product.path):
                self.send("sums", 2 * (1 - 1 / self.ways(out)) * width)

    def _by_input(self, counted: list[Product]) -> list[list[Product]]:
        """Joins the products that read one input; adapters are left out."""
        groups: dict[tuple[str, tuple[str, ...]], list[Product]] = {}
        for product in counted:
            if product.path.endswith(("/lora_a", "/lora_b")):
                continue
            name = _name(product.path)
            above = product.path.removesuffix("/kernel").rpartition("/")[0]
            group = next((g for g in _SAME_INPUT if name in g), (name,))
            groups.setdefault((above, group), []).append(product)
        return list(groups.values())

    def input_width(self, product: Product) -> float:
        """Counts the bytes of a product's input on a device, all layers together."""
        per_row = self.rows(product) * math.prod(product.shape[:-2]) * self.compute
        return per_row * self.widths(product)[0]

    def trains(self, path: str) -> bool:
        """Says whether there is such a parameter and it trains."""
        return path in self.rules and self.rules[path].train

    def _connector_inputs(self) -> None:
        """Adds the gathered input and the scattered output of a connector split over all devices."""
        model, data = self.config.model, self.config.data
        tokens = data.rows * data.row_images * model.tokens_per_image
        up = self.shapes.get("connector/experts/up")
        if up is None or tokens == 0:
            return
        trains = any(r.train for p, r in self.rules.items() if p.startswith("connector/"))
        whole = tokens * self.compute * (1 - 1 / self.shares)
        self.send("inputs", whole * up[0] * (1 + self.below["connector"]))
        self.send("inputs", whole * model.decoder.width * (1 + (trains or self.below["connector"])))
        others = math.prod(self.sizes.values()) / self.shares  # devices that hold the same rows
        part = tokens / self.shares * self.compute * model.decoder.width
        self.send("inputs", 2 * part * (1 - 1 / others))

    def _residual(self) -> None:
        """Adds the residual streams: where they are added to, and what their gradients read."""
        model = self.config.model
        decoder, vision = model.decoder, model.vision
        adds = 1 if decoder.parallel_block else 2
        norms = adds + 2 * decoder.post_norms
        stream = self.stream()
        self.add("residual", stream * (adds + self.below["decoder"] * (adds + norms)))
        stream = self.patches() * vision.width * vision.blocks * self.compute
        self.add("residual", stream * 2 * (3 if self.below["vision"] else 1))

    def patches(self) -> float:
        """Counts the tokens of the images that a device encodes."""
        data, vision = self.config.data, self.config.model.vision
        images = 0 if self.config.train.cache_features else data.rows * data.row_images / self.shares
        return images * (vision.patches + vision.cls_token)

    def stream(self) -> float:
        """Counts the bytes of the decoder's residual stream on a device, all layers together."""
        data, decoder = self.config.data, self.config.model.decoder
        return data.rows * data.row_tokens / self.shares * decoder.width * decoder.depth * self.compute

    def _attention(self) -> None:
        model, data = self.config.model, self.config.data
        decoder, vision = model.decoder, model.vision
        tensor = math.gcd(self.sizes["tensor"], decoder.kv_heads)
        tokens = data.rows * data.row_tokens / self.shares
        query = decoder.heads * decoder.head_dim / tensor
        shared = 2 * decoder.kv_heads * decoder.head_dim / tensor  # keys and values
        times = 3 if self.below["decoder"] else 1
        self.attended = tokens * (2 * query + shared) * decoder.depth * self.compute  # forward
        self.add("attention", self.attended * times)
        patches = self.patches()
        width = 4 * vision.width / math.gcd(self.sizes["tensor"], vision.heads)
        times = 3 if self.below["vision"] else 1
        self.add("attention", patches * width * vision.blocks * self.compute * times)
        if self.program == "train":
            return
        places = self.config.text.max_prompt + self.config.evaluate.max_new_tokens
        kept = places if self.program == "decode" else data.row_tokens
        self.add("cache", data.rows / self.shares * kept * shared * decoder.depth * self.compute)

    def _ends(self) -> None:
        """Adds logits, embeddings and the batch."""
        model, data = self.config.model, self.config.data
        vocab = model.decoder.vocab / math.gcd(self.sizes["tensor"], model.decoder.vocab)
        logits = data.rows * data.row_answers * vocab / self.shares
        trains = self.below["head"]
        self.add("logits", logits * (2 * 4 + trains * 2 * self.compute))
        tokens = data.rows * data.row_tokens / self.shares
        self.add(
            "rows", tokens * model.decoder.width * (self.compute + self.stored["decoder/embedding"])
        )
        images, side = data.rows * data.row_images / self.shares, model.vision.image_size
        if self.config.train.cache_features:  # written; the connector's products count reading them
            self.add("rows", images * model.vision.patches * model.vision.width * 2)
        else:
            self.add("rows", images * 3 * side * side * (1 + self.compute))
        axes = self.gathered("decoder/embedding")
        if axes:  # each device looks up its channels of all tokens, then tokens are exchanged
            width = tokens * model.decoder.width * self.compute
            self.send("gather", width * (1 - 1 / self.ways(axes)))

    def _gradients(self) -> None:
        for path, rule in self.rules.items():
            if not rule.train:
                continue
            held = self.held(path)
            moment = jnp.dtype(self.config.optimizer.moments_dtype).itemsize
            self.add("optimizer", held * (4 * _FLOATS + 4 * moment))
            axes = self.gathered(path)
            if axes:
                self.send("gradients", self.used(path) * self.compute * (1 - 1 / self.ways(axes)))
            split = {a for some in self.axes(path) for a in some}
            rest = tuple(a for a in self.row_axes if a not in split)
            if rest:
                self.send("gradients", 2 * held * self.compute * (1 - 1 / self.ways(rest)))

    def _tokens_to_experts(self) -> None:
        moe, data, decoder = self.config.model.moe, self.config.data, self.config.model.decoder
        ways = self.sizes["expert"]
        if ways == 1 or not moe.experts or moe.experts % ways:
            return
        tokens = data.rows * data.row_tokens * moe.top_k / self.shares
        layers = len(moe.numbers(decoder.depth))
        times = 4 if self.below["decoder"] else 2
        self.send("tokens", times * layers * tokens * decoder.width * self.compute * (1 - 1 / ways))

    def _pairs_with_cache(self) -> float:
        decoder, data = self.config.model.decoder, self.config.data
        places = self.config.text.max_prompt + self.config.evaluate.max_new_tokens
        return 4.0 * decoder.heads * decoder.head_dim * places * data.rows * decoder.depth

    def _again(self, counted: list[Product], flops: dict[str, float]) -> Again:
        """Counts the forward pass of layers that is computed again under the remat policy."""
        policy = self.config.model.remat
        if self.program != "train" or policy == "none" or not self.below["decoder"]:
            return Again(0.0, 0.0)
        devices = math.prod(self.sizes.values())
        attention = flops["attention"] / 3 / devices
        read = self.attended
        if policy == "dots":  # outputs of products are kept
            return Again(attention, read)
        layers = [p for p in counted if p.path.startswith("decoder/layers/")]
        # The layer's last product is not needed again.
        layers = [p for p in layers if "/down/" not in p.path or p.path.endswith("lora_a")]
        forward = sum(2 * math.prod(p.shape) * p.visits for p in layers) / devices
        moved = sum(self.used(p.path) * self.stored[p.path] for p in layers)
        moved += sum(self.input_width(group[0]) for group in self._by_input(layers))
        moved += 0 if self.config.model.decoder.parallel_block else self.stream()
        for p in layers:
            if p.path.endswith("kernel"):
                width_out = self.widths(p)[1]
                moved += self.rows(p) * math.prod(p.shape[:-2]) * width_out * self.compute
        return Again(forward + attention, moved + read)


def _name(path: str) -> str:
    """Gives the name of a linear: q, gate, token_kernel."""
    return path.removesuffix("/kernel").rpartition("/")[2]
