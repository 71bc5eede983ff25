"""Finds how often the loops of a compiled program run."""

import math
import re

from unimed_jax.plan.hlo import Computation, Instruction, Module


def trip_count(module: Module, here: Computation, loop: Instruction) -> float | None:
    """Finds how often a loop runs: as the compiler noted it, or from a comparison with a constant.

    A loop whose length is decided while it runs may have its largest in its name, at_most_2.5_times;
    else None.
    """
    if found := re.search(r"/at_most_([\d.]+)_times/while$", loop.op_name):
        return float(found[1])
    if found := re.search(r'"known_trip_count":\s*\{"n":"?(\d+)', loop.attributes):
        return int(found[1])
    (name,) = loop.called("condition")
    condition = module.computations[name]
    compare, scope, outer = condition.root, condition, None
    if compare is not None and compare.opcode == "fusion":
        outer = compare
        scope = module.computations[compare.called("calls")[0]]
        compare = scope.root
    if compare is None or compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None

    def resolve(number: int) -> Instruction:
        found = scope.operand(compare, number)
        if found.opcode == "parameter" and outer is not None:
            return condition.operand(outer, int(found.literal))
        return found

    counter, limit = resolve(0), resolve(1)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    place, start = int(counter.attribute("index")), here.operand(loop, 0)
    if start.opcode != "tuple":
        return None
    first = _unmoved(here, here.operand(start, place))
    step = _step(module, module.computations[loop.called("body")[0]], place)
    if first.opcode != "constant" or step is None:
        return None
    return max(0, math.ceil((int(limit.literal) - int(first.literal)) / step))


def _step(module: Module, body: Computation, place: int) -> int | None:
    """Finds what a loop's body adds to the value at that place of what it carries."""
    if body.root is None or body.root.opcode != "tuple":
        return None
    last, scope = _unmoved(body, body.operand(body.root, place)), body
    number = 0
    if last.opcode == "get-tuple-element":  # of a fusion with several results
        number, last = int(last.attribute("index")), body.operand(last, 0)
    if last.opcode == "fusion":
        scope = module.computations[last.called("calls")[0]]
        last = scope.roots[number]
    if last.opcode != "add":
        return None
    values = [_unmoved(scope, scope.operand(last, n)) for n in range(2)]
    steps = [int(v.literal) for v in values if v.opcode == "constant"]
    return steps[0] if len(steps) == 1 and steps[0] > 0 else None


def _unmoved(here: Computation, i: Instruction) -> Instruction:
    """Follows copies of a value back to where it comes from."""
    while i.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        i = here.operand(i, 0)
    return i
