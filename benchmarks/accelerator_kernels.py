"""Compares our kernels with their references and times both, for accelerator.py.

- `attention`: the device's fused kernel against the plain form: values and gradients of both against
  the plain form in float32, then the time of forward and backward pass.
- `experts`: the same for grouped experts of the decoder against the dense path.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_scales import TOY, Emit, Scale, Values, random_leaves, seconds
from flax import nnx

from unimed_jax.config import MoeConfig
from unimed_jax.model import attention, cache, dispatch


def kernels(scale: Scale, known: Values, emit: Emit) -> None:
    _attention(scale, emit)
    _experts(scale, emit)


def compared(scale: Scale, exact: Callable, sides: dict[str, Callable], inputs: tuple) -> Values:
    """Compares values and gradients with those of `exact` in float32, then times both passes.

    The sides are functions of the inputs with one output; an error is |x - exact| / |exact|.
    """

    def both(function: Callable) -> Callable:
        def run(inputs, dy):
            y, back = jax.vjp(lambda *inputs: function(*inputs), *inputs)
            return y, back(dy.astype(y.dtype))

        return jax.jit(run)

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    like = jax.eval_shape(exact, *wide)
    dy = random_leaves({"dy/lora_b": jax.ShapeDtypeStruct(like.shape, like.dtype)}, 9)["dy/lora_b"]
    wanted = jax.device_get(both(exact)(wide, dy))
    out: Values = {}
    for name, side in sides.items():
        run = both(side)
        found = jax.device_get(run(inputs, dy))
        errors = [
            float(np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        ]
        if not max(errors) < 0.05:  # so that NaN does not pass
            raise ValueError(f"{name} differs from the reference by {max(errors):.2g}")
        seconds(functools.partial(run, inputs, dy), 2)
        times = seconds(functools.partial(run, inputs, dy), 2 * scale.repeats)
        out |= {f"{name} ms": 1e3 * statistics.median(times)}
        out |= {f"{name} error": errors[0], f"{name} largest error of a gradient": max(errors[1:])}
    return out


def _attention(scale: Scale, emit: Emit) -> None:
    rows, tokens = scale.batch
    c = scale.model.decoder
    wide, narrow = (rows, tokens, c.heads, c.head_dim), (rows, c.kv_heads, tokens, c.head_dim)
    shapes = {
        f"{n}/positions": jax.ShapeDtypeStruct(s, jnp.bfloat16)
        for n, s in enumerate((wide, narrow, narrow))
    }
    q, k, v = (50 * x for x in random_leaves(shapes).values())  # of size 1
    half = np.repeat(np.arange(2), tokens // 2)[None].repeat(rows, axis=0)  # two segments a row
    place = np.tile(np.arange(tokens // 2), (rows, 2))
    mask = cache.visible(*(cache.Span(*map(jnp.asarray, (place, half + 1, half + 1))),) * 2)
    name = {"nvidia": "cudnn", "tpu": "splash"}.get(attention.hardware(), "cudnn")
    plain = functools.partial(attention.attend, mask=mask, implementation="xla")
    sides = {"plain": plain}
    refused = attention.refusal(name, q, k, mask, None)
    if refused is None:
        sides[name] = functools.partial(attention.attend, mask=mask, implementation=name)
    values = compared(scale, plain, sides, (q, k, v))
    emit("attention", **values, **({"no fused kernel": refused} if refused else {}))


def _experts(scale: Scale, emit: Emit) -> None:
    count, width, hidden, tokens = scale.experts
    decoder = dataclasses.replace(TOY.decoder, width=width, mlp_width=hidden, gated_mlp=True)
    moe = jax.eval_shape(
        lambda: dispatch.Moe(MoeConfig(experts=count, meta=False), decoder, nnx.Rngs(0))
    )
    graph, state = nnx.split(moe)
    leaves, tree = jax.tree.flatten(state)
    named = {f"{n}/kernel": jax.ShapeDtypeStruct(x.shape, jnp.float32) for n, x in enumerate(leaves)}
    rounded = [x.astype(jnp.bfloat16) for x in random_leaves(named).values()]
    x = random_leaves({"x/positions": jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16)})
    x = 50 * x["x/positions"]

    def path(name: str) -> Callable:
        def run(x, leaves):
            module = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
            module.config = dataclasses.replace(module.config, path=name)
            return module(x)[0]

        return run

    values = compared(
        scale, path("dense"), {"dense": path("dense"), "grouped": path("grouped")}, (x, rounded)
    )
    emit("experts", shape=f"{count} x {width} x {hidden}, {tokens} tokens", **values)
