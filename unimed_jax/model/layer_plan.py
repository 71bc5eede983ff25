"""Runs a decoder whose layers differ (with experts or without) as few scans over stacked layers.

`jax.lax.scan` runs one program many times, so it needs layers that are alike. A decoder with
experts in every second layer is not, but it repeats a unit of two layers that is. `LayerPlan` finds
such units, and `scan_plan` runs them. Compile time and program size then stay flat with depth.
`loop_layers` runs layers whose arrays are separate one after another.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unimed_jax.model.layers import scan_layers


class Stretch(NamedTuple):
    """Names consecutive layers that one scan can execute: `unit`, repeated `repeats` times."""

    first: int  # number of the first layer
    unit: tuple[bool, ...]  # for each layer of the unit, whether it has experts
    repeats: int

    @property
    def depth(self) -> int:
        return len(self.unit) * self.repeats


class Stacks(NamedTuple):
    """Holds what the layers consist of, each part stacked over the layers that have it."""

    shared: Any  # what every layer has
    experts: Any  # what layers with experts have besides
    mlps: Any  # what layers without experts have besides


class LayerPlan(NamedTuple):
    """Splits a layer pattern (True = has experts) into stretches that `jax.lax.scan` can execute.

    Examples, with T for True and F for False:

        TFTFTF -> (0, TF, 3)                 one scan of three steps, each a layer T and a layer F
        FFFTTT -> (0, F, 3), (3, T, 3)       two scans of three steps
        TFTFT  -> (0, TF, 2), (4, T, 1)      the last layer has no partner
    """

    pattern: tuple[bool, ...]
    stretches: tuple[Stretch, ...]

    @classmethod
    def of(cls, pattern: tuple[bool, ...]) -> "LayerPlan":
        """Takes, again and again, the shortest repeated unit that covers most remaining layers."""
        stretches: list[Stretch] = []
        first = 0
        while first < len(pattern):
            best = Stretch(first, pattern[first : first + 1], 1)
            for size in range(1, (len(pattern) - first) // 2 + 1):
                unit = pattern[first : first + size]
                repeats = _repeats(pattern[first:], unit)
                if repeats > 1 and repeats * size > best.depth:
                    best = Stretch(first, unit, repeats)
            stretches.append(best)
            first += best.depth
        return cls(pattern, tuple(stretches))

    def cut(self, stacks: Stacks, stretch: Stretch) -> Stacks:
        """Slices a stretch out: each leaf is [repeats, layers of a unit that have it, ...] (`_cut`)."""
        experts_before = sum(self.pattern[: stretch.first])
        experts_in_unit = sum(stretch.unit)
        mlps_before = stretch.first - experts_before
        mlps_in_unit = len(stretch.unit) - experts_in_unit
        return Stacks(
            _cut(stacks.shared, stretch.first, len(stretch.unit), stretch.repeats),
            _cut(stacks.experts, experts_before, experts_in_unit, stretch.repeats),
            _cut(stacks.mlps, mlps_before, mlps_in_unit, stretch.repeats),
        )


def _repeats(pattern: tuple[bool, ...], unit: tuple[bool, ...]) -> int:
    """Counts how often `pattern` repeats `unit` from its start on."""
    repeats = 0
    while pattern[repeats * len(unit) : (repeats + 1) * len(unit)] == unit:
        repeats += 1
    return repeats


def _cut(stacked: Any, first: int, size: int, repeats: int) -> Any:
    """Slices size * repeats layers from `first` on: [repeats, size, ...], or [repeats, ...] for size 1.

    A scan stacks what the backward pass reads of each layer. A kernel that its body receives whole stays
    where it lies; a slice taken inside the body is copied, as of the attention of alternating layers.
    """
    if size == 0:
        return None

    def cut(leaf):
        leaf = leaf[first : first + size * repeats]
        return leaf if size == 1 else leaf.reshape(repeats, size, *leaf.shape[1:])

    return jax.tree.map(cut, stacked)


# (carry, a layer's part of `shared`, of `experts` or None, of `mlps` or None) -> (carry, output)
RunLayer = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def scan_plan(
    run_layer: RunLayer,
    plan: LayerPlan,
    stacks: Stacks,
    carry: Any,
    *,
    remat: str,
    watch: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Runs all layers of a plan in their order, one scan per stretch.

    Returns the last carry, the outputs of the layers with experts (stacked over these layers), and
    `watch(carry)` after every layer (stacked over all layers; None without `watch`). `remat`: see
    `scan_layers`.
    """
    outputs, watched = [], []
    for stretch in plan.stretches:

        def body(carry, inputs: Stacks, unit=stretch.unit):
            from_experts, seen = [], []
            depth, count = len(unit), sum(unit)
            for i, has_experts in enumerate(unit):
                number = sum(unit[:i])  # its number among the unit's layers with experts
                experts = _at(inputs.experts, number, count) if has_experts else None
                mlp = None if has_experts else _at(inputs.mlps, i - number, depth - count)
                carry, output = run_layer(carry, _at(inputs.shared, i, depth), experts, mlp)
                if has_experts:
                    from_experts.append(output)
                if watch is not None:
                    seen.append(watch(carry))
            return carry, (_stack(from_experts), _stack(seen))

        inputs = plan.cut(stacks, stretch)
        carry, out = scan_layers(body, carry, inputs, stretch.repeats, remat)
        # [repeats, layers of a unit, ...] -> [layers of this stretch, ...]
        output, seen = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)
        outputs.append(output)
        watched.append(seen)
    return carry, _concatenate(outputs), _concatenate(watched)


def loop_layers(
    run_layer: RunLayer,
    layers: Iterable[Stacks],
    carry: Any,
    watch: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Runs layers one after another, each described by `Stacks` of its own parts or None.

    Returns what `scan_plan` does.
    """
    outputs, watched = [], []
    for layer in layers:
        carry, output = run_layer(carry, layer.shared, layer.experts, layer.mlps)
        if layer.experts is not None:
            outputs.append(output)
        if watch is not None:
            watched.append(watch(carry))
    return carry, _stack(outputs), _stack(watched)


def _at(part: Any, index: int, size: int) -> Any:
    """Takes one layer out of what `_cut` made for a unit with `size` such layers."""
    return part if size == 1 else jax.tree.map(lambda leaf: leaf[index], part)


def _stack(parts: list) -> Any:
    """Stacks trees along a new first axis; None if there are none."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if parts else None


def _concatenate(parts: list) -> Any:
    """Joins the outputs of all stretches along the axis of layers; None if there are none."""
    parts = [part for part in parts if part is not None]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts) if parts else None
