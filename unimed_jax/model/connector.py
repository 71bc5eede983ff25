"""Implements the connector mixture of experts, CMoE (Uni-Med section 3.2).

It aggregates patches into visual tokens, routes them by task and runs projection experts on them.

The experts are stored concatenated, so that two matrix products run all of them and any number of
experts shards over any number of chips. The router's first layer is stored as two kernels, one for
the task token and one for the visual token, so its task half is computed once per task.
`form="literal"` runs the same parameters as the original does, in a loop over experts; it is the
reference that the fast form is tested against.

Shapes: N images, T visual tokens per image, D channels of a visual token, E experts of H hidden
units, O channels of the decoder, R hidden units of the router, C channels of a task token.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from unimed_jax.config import VISUAL_TASKS, ConnectorConfig, ModelConfig
from unimed_jax.model.layers import ACTIVATIONS, Linear, broadcast_channels, normal
from unimed_jax.model.sharding import constrain


class ConnectorOutput(NamedTuple):
    """Names what a connector returns."""

    tokens: Array  # [N, T, decoder width]
    routing: Array | None  # [N, T, experts], float32; None for a dense connector


def aggregate(
    x: Float[Array, "N patches width"],
    kind: str,
    rate: int,
) -> Float[Array, "N T features"]:
    """Joins `rate` patches into each of T = patches / rate visual tokens.

    kind: "projection" concatenates consecutive patches in raster order (the published strip),
    "block" concatenates a square of patches, "avgpool" and "maxpool" pool the patches of a square.
    """
    images, patches, width = x.shape
    if kind == "projection":
        return x.reshape(images, patches // rate, rate * width)  # [N, T, rate * width]
    grid, side = round(patches**0.5), round(rate**0.5)
    x = x.reshape(images, grid // side, side, grid // side, side, width).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(images, patches // rate, rate, width)  # [N, T, rate, width]
    if kind == "block":
        return x.reshape(images, patches // rate, rate * width)  # [N, T, rate * width]
    return x.mean(axis=2) if kind == "avgpool" else x.max(axis=2)


def visual_features(config: ModelConfig) -> int:
    """Computes the channels of an aggregated visual token, which the connector reads."""
    joined = config.connector.aggregation in ("projection", "block")
    return config.vision.width * (config.connector.rate if joined else 1)


class Experts(nnx.Module):
    """Runs all projection experts at once, because their weights are concatenated over E.

    moe_mlp: up [D, E*H], up_bias [E*H], down [E*H, O], bias [E, O]; moe_linear: up [D, E*O], bias
    [E, O].
    """

    def __init__(self, config: ConnectorConfig, width: int, out: int, rngs: nnx.Rngs):
        count, mlp = config.experts, config.kind == "moe_mlp"
        self.count, self.activation = count, config.activation
        inner = (config.hidden or out) if mlp else out
        self.up = nnx.Param(normal(rngs.params(), (width, count * inner), width**-0.5))
        self.bias = nnx.Param(jnp.zeros((count, out)))
        self.up_bias = nnx.Param(jnp.zeros(count * inner)) if mlp else None
        down = normal(rngs.params(), (count * inner, out), inner**-0.5) if mlp else None
        self.down = None if down is None else nnx.Param(down)

    def __call__(
        self,
        x: Float[Array, "N T D"],
        routing: Float[Array, "N #T E"],
    ) -> Float[Array, "N T O"]:
        """Computes sum over e of routing_e * expert_e(x).

        The routing scales each expert's hidden units before the second product, whose sum over all
        hidden units is then also the sum over experts.
        """
        images, tokens, width = x.shape
        routing = jnp.broadcast_to(routing, (images, tokens, self.count))
        routing = routing.reshape(-1, self.count, 1).astype(x.dtype)  # [N * T, E, 1]
        x = x.reshape(-1, width)  # [N * T, D]
        h = constrain(x @ self.up[...].astype(x.dtype), None, "expert_hidden")
        bias = jnp.einsum("ne,eo->no", routing[..., 0], self.bias[...].astype(x.dtype))
        if self.up_bias is not None:
            h = ACTIVATIONS[self.activation](h + self.up_bias[...].astype(x.dtype)[None])
        scale = jnp.broadcast_to(routing, (len(x), self.count, h.shape[1] // self.count))
        scale = constrain(scale.reshape(h.shape), None, "expert_hidden")
        h = h * scale  # [N * T, E * H] (moe_linear: E * O)
        by_expert = h.reshape(len(x), self.count, -1)  # [N * T, E, H or O]
        y = by_expert.sum(axis=1) if self.down is None else h @ self.down[...].astype(x.dtype)
        return (y + bias).reshape(images, tokens, -1)  # [N, T, O]

    def literal(
        self,
        x: Float[Array, "N T D"],
        routing: Float[Array, "N #T E"],
    ) -> Float[Array, "N T O"]:
        """Computes the same as the original does, one expert after another."""
        ups = jnp.split(self.up[...].astype(x.dtype), self.count, axis=1)
        total = jnp.zeros((), x.dtype)
        for e in range(self.count):
            y = x @ ups[e]
            if self.down is not None:
                assert self.up_bias is not None
                up_bias = jnp.split(self.up_bias[...].astype(x.dtype), self.count)[e]
                down = jnp.split(self.down[...].astype(x.dtype), self.count, axis=0)[e]
                y = ACTIVATIONS[self.activation](y + broadcast_channels(up_bias, y)) @ down
            bias = self.bias[...][e].astype(x.dtype)
            total += routing[..., e : e + 1].astype(x.dtype) * (y + broadcast_channels(bias, y))
        return total


class Router(nnx.Module):
    """Computes expert logits by an MLP over concat(task token, visual token) (Uni-Med section 3.2).

    task_kernel [C, R], token_kernel [D, R], bias [R], out_kernel [R, E], out_bias [E].
    """

    def __init__(self, config: ConnectorConfig, width: int, rngs: nnx.Rngs):
        self.activation, inputs, experts = config.activation, config.router_input, config.experts
        widths = {"task": config.task_token_width or width, "token": width}
        widths = {name: w for name, w in widths.items() if name in inputs.split("_")}
        total = sum(widths.values())
        hidden = config.router_hidden or 4 * total
        std = total**-0.5
        kernels = {name: normal(rngs.params(), (w, hidden), std) for name, w in widths.items()}
        self.task_kernel = nnx.Param(kernels["task"]) if "task" in kernels else None
        self.token_kernel = nnx.Param(kernels["token"]) if "token" in kernels else None
        self.bias = nnx.Param(jnp.zeros(hidden))
        self.out_kernel = nnx.Param(normal(rngs.params(), (hidden, experts), hidden**-0.5))
        self.out_bias = nnx.Param(jnp.zeros(experts))

    def __call__(
        self,
        x: Float[Array, "N T D"],
        tasks: Int[Array, "N"],
        task_tokens: Float[Array, "tasks C"] | None,
    ) -> Float[Array, "N #T E"]:
        """Computes the logits in float32; T is 1 if only the task token is read."""
        hidden = self.bias[...].astype(x.dtype)[None, None]
        if self.task_kernel is not None:
            assert task_tokens is not None
            kernel = self.task_kernel[...].astype(x.dtype)
            table = task_tokens.astype(x.dtype) @ kernel  # [tasks, R]
            hidden = hidden + table[tasks][:, None]  # [N, 1, R]
        if self.token_kernel is not None:
            hidden = hidden + x @ self.token_kernel[...].astype(x.dtype)  # [N, T, R]
        return self._out(constrain(hidden, None, None, "router_hidden"))

    def literal(
        self,
        x: Float[Array, "N T D"],
        tasks: Int[Array, "N"],
        task_tokens: Float[Array, "tasks C"] | None,
    ) -> Float[Array, "N #T E"]:
        """Computes the same as the original does, with the task token next to every visual token."""
        kernels = [k[...] for k in (self.task_kernel, self.token_kernel) if k is not None]
        parts = []
        if self.task_kernel is not None:
            assert task_tokens is not None
            repeated = jnp.repeat(task_tokens[tasks][:, None], x.shape[1], axis=1)  # [N, T, C]
            parts.append(repeated.astype(x.dtype))
        if self.token_kernel is not None:
            parts.append(x)
        hidden = jnp.concatenate(parts, axis=-1) @ jnp.concatenate(kernels).astype(x.dtype)
        return self._out(hidden + broadcast_channels(self.bias[...].astype(x.dtype), hidden))

    def _out(self, hidden: Float[Array, "N T R"]) -> Float[Array, "N T E"]:
        """Applies the activation and the second layer."""
        hidden = ACTIVATIONS[self.activation](hidden)
        logits = (hidden @ self.out_kernel[...].astype(hidden.dtype)).astype(jnp.float32)
        return logits + broadcast_channels(self.out_bias[...], logits)


def expert_weights(
    logits: Float[Array, "N T E"] | None,
    kind: str,
    top_k: int,
    tasks: Int[Array, "N"],
    experts: int,
) -> Float[Array, "N #T E"]:
    """Turns the router's logits into the weights of the experts (Uni-Med section 3.2).

    kind: "soft" divides the sigmoids by their sum (it is not a softmax over logits), "sparse" takes
    the softmax over the `top_k` largest logits and 0 for the others, "hard" gives weight 1 to the
    expert with the task's number, and "constant" gives 1 / E to every expert. The last two need no
    logits.
    """
    if kind == "hard":
        return jax.nn.one_hot(tasks, experts)[:, None]  # [N, 1, E]
    if kind == "constant":
        return jnp.full((len(tasks), 1, experts), 1 / experts)
    assert logits is not None
    if kind == "soft":
        # Computed in log space: a shared offset of the logits is unconstrained, and when they drift
        # far below 0 the gradient of the plain quotient is NaN.
        return jax.nn.softmax(jax.nn.log_sigmoid(logits), axis=-1)
    kept = jax.nn.one_hot(jax.lax.top_k(logits, top_k)[1], experts, dtype=bool).any(axis=-2)
    return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)


def among_kept(routing: Float[Array, "N #T E"], kept: Float[Array, "E"]) -> Float[Array, "N #T E"]:
    """Gives experts that are off the weight 0 and scales the others' weights to sum to 1.

    Where nothing is left, all weights are 0.
    """
    left = routing * kept[None, None]
    total = left.sum(axis=-1, keepdims=True)
    return left / jnp.where(total > 0, total, 1)


class Connector(nnx.Module):
    """Turns the patch features of images, each with its task, into visual tokens."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = c = config.connector
        width, out = visual_features(config), config.decoder.width
        shape = (len(VISUAL_TASKS), c.task_token_width or width)
        self.task_tokens = nnx.Param(normal(rngs.params(), shape, 0.02)) if c.task_tokens else None
        routed = c.is_moe and c.router in ("soft", "sparse")
        self.router = Router(c, width, rngs) if routed else None
        self.experts = Experts(c, width, out, rngs) if c.is_moe else None
        widths = [width, *[c.hidden or out] * (c.layers - 1), out] if c.layers else []
        self.layers = nnx.List([Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        # [E]: 0 for an expert that is off (analyze/ablation.py), else 1; None: all are on.
        self.kept: nnx.Variable | None = nnx.data(None)

    def __call__(
        self,
        patches: Float[Array, "N patches width"],
        tasks: Int[Array, "N"],
    ) -> ConnectorOutput:
        """Runs the experts, or for a dense connector its layers.

        `tasks`: numbers in VISUAL_TASKS. An unused image slot has task -1; it is computed like task
        0 and never read.
        """
        c = self.config
        x = aggregate(patches, c.aggregation, c.rate)
        if self.experts is None:
            for i, layer in enumerate(self.layers):
                x = layer(ACTIVATIONS[c.activation](x) if i else x)
            return ConnectorOutput(x, None)
        tasks = jnp.maximum(tasks, 0)
        # Every chip holds a part of each expert and of the router, so every chip needs all tokens.
        x = constrain(x, None, None, None)
        literal = c.form == "literal"
        logits = None
        if self.router is not None:
            task_tokens = None if self.task_tokens is None else self.task_tokens[...]
            run_router = self.router.literal if literal else self.router
            logits = run_router(x, tasks, task_tokens)
        routing = expert_weights(logits, c.router, c.top_k, tasks, c.experts)
        if self.kept is not None:
            routing = among_kept(routing, self.kept[...])
        run_experts = self.experts.literal if literal else self.experts
        tokens = constrain(run_experts(x, routing), "batch", None, None)
        return ConnectorOutput(tokens, jnp.broadcast_to(routing, (*x.shape[:2], c.experts)))
