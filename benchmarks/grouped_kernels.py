"""Compares ways to multiply grouped experts: what their compiled programs do, or how long they take.

    python benchmarks/grouped_kernels.py --topology=v5e:2x2     # needs libtpu, no TPU; h100:1 likewise
    python benchmarks/grouped_kernels.py                        # on the accelerator of this machine

The experts of one layer of Med-MoE's third stage (StableLM-2: gate, up and down of 2048 x 5632, four
experts, bfloat16), forward, and forward with all gradients, for `--rows` tokens in blocks as
`model/dispatch.py` makes them.

- `blocks`, `experts`, `megablox` (on TPUs): unimed_jax/model/grouped.py.
- `ragged_dot`: jax.lax.ragged_dot.
- `mosaic` (on Hopper): JAX's Mosaic kernels (jax.experimental.pallas.ops.gpu). Ahead of time they get
  as far as a description; the compiler that makes code for the card of it runs beside the card.
- `tokamax`: tokamax.ragged_dot, if it is installed. It refuses where the default device is a CPU.

Without --topology every way is first compared with `blocks`, values and gradients by the worst
element, then all are timed in turn. FLOPs count all blocks that there may be, one an expert more than
the rows fill. GB moved count each operand and result of a kernel once; `read again` adds what
megablox reads again for its tiles.
"""

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness

from unimed_jax.plan import topology as topologies

EXPERTS, BLOCK = 4, 256
WAYS = ("blocks", "experts", "megablox", "ragged_dot", "mosaic", "tokamax")
HOPPER_CORES = 132
ONLY_ON = {"megablox": "tpu", "mosaic": "gpu"}  # else it would be interpreted, or not at all
TOLERANCE = 2e-2  # of the largest element, in bfloat16
ROUNDS = 10


def product(name: str) -> Callable[[Any, Any, Any], Any]:
    """Makes the function (x [M, b, D], kernels [E, D, F], owners [M]) -> [M, b, F] of a way."""
    import jax

    from unimed_jax.model.grouped import SHOWN, block_product

    if name in SHOWN:
        return lambda x, kernels, owners: block_product(x, kernels, owners, name)
    if name == "mosaic":
        multiply = mosaic()
    elif name == "tokamax":
        multiply = importlib.import_module("tokamax").ragged_dot
    else:
        multiply = jax.lax.ragged_dot

    def run(x, kernels, owners):
        sizes = BLOCK * (owners[:, None] == jax.numpy.arange(len(kernels))).sum(axis=0)
        y = multiply(x.reshape(-1, x.shape[2]), kernels, sizes.astype("int32"))
        return y.reshape(*x.shape[:2], -1)  # [M, b, F]

    return run


def mosaic() -> Callable[[Any, Any, Any], Any]:
    """Joins JAX's two kernels for Hopper into a product with gradients."""
    import jax

    ops = "jax.experimental.pallas.ops.gpu"
    forward = importlib.import_module(f"{ops}.ragged_dot_mgpu").ragged_dot
    transposed = importlib.import_module(f"{ops}.transposed_ragged_dot_mgpu")
    if jax.devices()[0].platform == "cpu":  # it asks the card, which is not here, for its cores
        transposed.jax = _JaxOnHopper()
    tiles = {"block_m": 128, "block_n": 128, "block_k": 64}
    tiles |= {"max_concurrent_steps": 4, "grid_block_n": 1}

    @jax.custom_vjp
    def multiply(x, kernels, sizes):
        return forward(x, kernels, group_sizes=sizes, **tiles)

    def backward(saved, dy):
        x, kernels, sizes = saved
        dx = forward(dy, kernels, group_sizes=sizes, transpose_rhs=True, **tiles)
        return dx, transposed.transposed_ragged_dot(x, dy, group_sizes=sizes, **tiles), None

    multiply.defvjp(lambda *saved: (multiply(*saved), saved), backward)
    return multiply


class _JaxOnHopper:
    """Stands for jax where a kernel asks for the cores of the card."""

    core_count = HOPPER_CORES

    def __getattr__(self, name: str) -> Any:
        import jax

        return (lambda: [self]) if name == "devices" else getattr(jax, name)


def experts_loss(name: str) -> Callable[..., Any]:
    """Makes the loss of a layer's experts: the sum of their outputs times a cotangent."""
    import jax
    import jax.numpy as jnp

    run = product(name)

    def loss(x, gate, up, down, owners, cotangent):
        hidden = jax.nn.silu(run(x, gate, owners)) * run(x, up, owners)
        return (run(hidden, down, owners) * cotangent).sum(dtype=jnp.float32)

    return loss


def shapes(arguments: argparse.Namespace) -> list[tuple[tuple[int, ...], str]]:
    """Lists the arguments of the loss: shapes and dtypes."""
    width, hidden = arguments.width, arguments.hidden
    blocks = arguments.rows // BLOCK + EXPERTS
    x, kernel = (blocks, BLOCK, width), (EXPERTS, width, hidden)
    of = "bfloat16"
    return [(x, of), (kernel, of), (kernel, of), (kernel[:1] + kernel[:0:-1], of)] + [
        ((blocks,), "int32"),
        (x, of),
    ]


def read_again(arguments: argparse.Namespace, gradients: bool) -> float:
    """Counts the bytes that megablox reads more than once: x for tiles of the output, and kernels."""
    from unimed_jax.model.grouped import gradient_tiles, tiles

    blocks = arguments.rows // BLOCK + EXPERTS
    total = 0.0

    def multiply(inner: int, outer: int) -> None:
        nonlocal total
        k, n = tiles(BLOCK, inner, outer, 2)
        total += blocks * BLOCK * inner * (outer / n - 1) * 2
        total += 0 if k == inner else (blocks - EXPERTS) * inner * outer * 2

    for inner, outer in [(arguments.width, arguments.hidden)] * 2 + [
        (arguments.hidden, arguments.width)
    ]:
        multiply(inner, outer)
        if gradients:
            multiply(outer, inner)
            k, n = gradient_tiles(BLOCK, inner, outer, 2)
            total += blocks * BLOCK * (inner * (outer / n - 1) + outer * (inner / k - 1)) * 2
    return total


def compiled(name: str, arguments: argparse.Namespace, device: Any) -> list[list[str]]:
    """Compiles both programs of a way for a device that is not here; returns rows of the table."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from unimed_jax.plan.program_cost import program_cost

    mesh = Mesh(np.array([device]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(*s, sharding=place) for s in shapes(arguments)]
    useful = 3 * 2 * arguments.rows * arguments.width * arguments.hidden
    found = []
    for what, times in (("forward", 1), ("with gradients", 3)):
        begun = time.perf_counter()
        try:
            loss = experts_loss(name)
            run = loss if times == 1 else jax.grad(loss, (0, 1, 2, 3))
            with jax.set_mesh(mesh):
                program = jax.jit(run).lower(*given).compile()
        except Exception as error:  # each library has its own
            found.append([name, what, f"does not compile: {' '.join(str(error).split())[:90]}"])
            continue
        temporaries = f"{program.memory_analysis().temp_size_in_bytes / 2**20:.0f}"
        seconds = f"{time.perf_counter() - begun:.0f}"
        try:
            cost = program_cost(program.as_text())
        except jax.errors.JaxRuntimeError:  # some TPU compilers keep no text
            found.append([name, what, "compiles, not counted", "", "", "", temporaries, seconds])
            continue
        flops = [f"{cost.flops / 1e12:.3f}", f"{cost.flops / useful / times:.2f}"]
        if cost.unknown_calls:
            flops = ["not known", ""]
        again = read_again(arguments, times > 1) if name == "megablox" else 0.0
        moved = [f"{cost.bytes / 1e9:.2f}", f"{again / 1e9:.2f}" if again else ""]
        found.append([name, what, *flops, *moved, temporaries, seconds])
    return found


def timed(arguments: argparse.Namespace) -> list[list[str]]:
    """Compares every way with `blocks` on this machine's device, then times all in turn."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    # Fewer blocks than there may be, as routing leaves them, in uneven groups.
    blocks = arguments.rows // BLOCK + EXPERTS
    full = np.sort(np.random.default_rng(0).integers(0, EXPERTS, blocks - EXPERTS))
    owners = jnp.array([*full, *[EXPERTS] * EXPERTS], jnp.int32)
    owned = (owners < EXPERTS)[:, None, None]

    def drawn(number: int, shape: tuple[int, ...]) -> Any:
        """Draws kernels of the usual size, and rows that are zero where nobody owns them."""
        x = jax.random.normal(jax.random.key(number), shape, jnp.bfloat16)
        return x * 0.02 if len(shape) == 3 and shape[0] == EXPERTS else x * owned

    given = [
        owners if dtype == "int32" else drawn(number, shape)
        for number, (shape, dtype) in enumerate(shapes(arguments))
    ]
    programs, reference, rows = {}, None, []
    for name in arguments.ways:
        if ONLY_ON.get(name, jax.default_backend()) != jax.default_backend():
            continue
        try:
            program = jax.jit(jax.value_and_grad(experts_loss(name), (0, 1, 2, 3)))
            found = jax.block_until_ready(program(*given))
        except Exception as error:  # each library has its own
            rows.append([name, f"does not run: {' '.join(str(error).split())[:90]}"])
            continue
        found = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(found)]
        reference = reference or found
        worst = max(
            np.abs(a - b).max() / max(np.abs(b).max(), 1e-9)
            for a, b in zip(found, reference, strict=True)
        )
        if not worst <= TOLERANCE:
            rows.append([name, f"differs from {arguments.ways[0]} by {worst:.1e}: no figure to give"])
            continue
        programs[name] = program
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            seconds[name].append(harness.seconds(lambda p=program: jax.block_until_ready(p(*given))))
    return rows + [[name, f"{1e3 * statistics.median(all_):.3f} ms"] for name, all_ in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", help="such as v5e:2x2, h100:1; nothing is run")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument(
        "--rows",
        type=harness.at_least(BLOCK, BLOCK),
        default=2048,
        help=f"tokens, a multiple of {BLOCK}",
    )
    parser.add_argument("--width", type=harness.at_least(1), default=2048)
    parser.add_argument("--hidden", type=harness.at_least(1), default=5632)
    arguments = parser.parse_args()
    if arguments.topology is None:
        print(harness.table(("way", "forward and gradients"), timed(arguments)))
        return
    topology = topologies.parse(arguments.topology)
    topologies.check_compiler([topology])
    os.environ |= topologies.environment(topology)  # before jax starts
    device = topologies.devices(topology)[0]
    head = ("way", "program", "TFLOP", "x useful", "GB moved", "read again", "temporaries MiB", "in s")
    ways = [name for name in arguments.ways if ONLY_ON.get(name, topology.platform) == topology.platform]
    rows = [row for name in ways for row in compiled(name, arguments, device)]
    print(harness.table(head, [row + [""] * (len(head) - len(row)) for row in rows]))


if __name__ == "__main__":
    harness.run(main)
