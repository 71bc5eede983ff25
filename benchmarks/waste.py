"""Compares the full-size training step, compiled for chips that are not here, with what it needs.

    python benchmarks/waste.py --topology=h100:1 --rows=16 --tokens=256 --images=1
    python benchmarks/waste.py --topology=v5e:4x4 --fsdp=16 --rows=16 --tokens=2048 --images=1

It compiles the step of benchmarks/accelerator.py (Uni-Med with LLaMA-2-7B, LoRA on all linears) ahead
of time, counts the compiled program by its text (unimed_jax/plan/program_cost.py), and divides by the
ideal (unimed_jax/plan/ideal.py); then come the collectives, how many of them start and end apart with
products between the two, and the operations that move most. `--out` keeps the text, `--flags` are added
to XLA_FLAGS (for TPUs to LIBTPU_INIT_ARGS).

GPUs get cuDNN's attention, although no card is here; `--attention=xla` compiles the plain form.
"""

import argparse
import dataclasses
import math
import os
import time

import harness

from unimed_jax.plan import topology as topologies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", required=True, help="such as h100:1, h100:8, v5e:4x4")
    parser.add_argument("--rows", type=harness.at_least(1), default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--images", type=int, default=1, help="of a row")
    parser.add_argument(
        "--answers", type=int, help="tokens of a row; by default a quarter of its tokens"
    )
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    parser.add_argument("--attention", default="auto", choices=("auto", "xla"))
    parser.add_argument(
        "--kernels", default="plain", choices=("plain", "int8", "nf4"), help="storage of frozen ones"
    )
    parser.add_argument("--features", action="store_true", help="train from cached features")
    for axis in ("data", "fsdp", "tensor", "expert"):
        parser.add_argument(
            f"--{axis}", type=harness.at_least(1), default=1, help="size of that axis of the mesh"
        )
    parser.add_argument("--flags", default="", help='for the compiler: --flags="--xla_... --xla_..."')
    parser.add_argument("--largest", type=int, default=12, help="operations to list")
    parser.add_argument("--tiny", action="store_true", help="a toy model, for a test")
    parser.add_argument("--out", type=harness.output(), help="file for the text of the compiled program")
    arguments = parser.parse_args()
    topology = topologies.parse(arguments.topology)
    topologies.check_compiler([topology])
    environment = topologies.environment(topology)
    kept = "LIBTPU_INIT_ARGS" if topology.platform == "tpu" else "XLA_FLAGS"
    environment[kept] = f"{environment.get(kept, '')} {arguments.flags}".strip()
    os.environ |= environment  # before jax starts
    report(arguments, topology)


def report(arguments: argparse.Namespace, topology: topologies.Topology) -> None:
    import accelerator_scales
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from unimed_jax.model import sharding
    from unimed_jax.plan.ideal import ideal
    from unimed_jax.plan.program_cost import program_cost
    from unimed_jax.train.program import build

    scale = accelerator_scales.SCALES["toy" if arguments.tiny else "full"]
    config = accelerator_scales.training(
        scale,
        arguments.rows,
        arguments.tokens,
        remat=arguments.remat,
        attention=arguments.attention,
    )
    data = dataclasses.replace(
        config.data,
        row_images=arguments.images,
        row_answers=arguments.answers or arguments.tokens // 4,
    )
    model = dataclasses.replace(config.model, frozen_kernels=arguments.kernels)
    train = dataclasses.replace(config.train, cache_features=arguments.features)
    config = dataclasses.replace(config, model=model, data=data, train=train)
    sizes = {axis: getattr(arguments, axis) for axis in sharding.MESH_AXES}
    devices = np.array(topologies.devices(topology))
    if math.prod(sizes.values()) != len(devices):
        raise harness.Failed(
            f"--topology={arguments.topology} has {len(devices)} devices, and the mesh "
            f"{math.prod(sizes.values())}: give --fsdp or other axes whose product is {len(devices)}."
        )
    devices = devices.reshape(tuple(sizes.values()))
    mesh = Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    start = time.perf_counter()
    with topologies.as_on_the_card(topology):
        compiled = build(config, mesh).lower().compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    held = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    print(
        f"compiled in {time.perf_counter() - start:.0f} s; arguments and temporaries take "
        f"{held[0] / 2**30:.2f} and {held[1] / 2**30:.2f} GiB"
    )
    if arguments.out:
        arguments.out.write_text(text)

    found, least = program_cost(text, sizes), ideal(config, sizes, "train")
    print("| of one device | compiled | ideal | ratio | ratio with what is computed again |")
    print("| --- | --- | --- | --- | --- |")
    again = least.again
    rows = (
        ("TFLOP", 1e12, found.flops, least.flops, again.flops),
        ("GB of memory", 1e9, found.bytes, least.bytes, again.bytes),
        ("GB sent", 1e9, found.collective_bytes, least.collective_bytes, 0),
    )
    for name, unit, ours, needed, more in rows:
        ratios = f"{ours / needed:.2f} | {ours / (needed + more):.2f}" if needed else "- | -"
        print(f"| {name} | {ours / unit:.2f} | {needed / unit:.2f} | {ratios} |")
    for c in found.collectives:
        print(f"{c.kind} over {'+'.join(c.axes)}: {c.bytes / 1e6:.0f} MB in {c.count:.0f}")
    print("{} of {} collectives with a start and an end have products between".format(*overlapped(text)))
    for field, unit, name in (("flops", 1e12, "TFLOP"), ("bytes", 1e9, "GB"), ("network", 1e6, "MB")):
        for o in found.by(field)[: arguments.largest]:
            if getattr(o, field):
                value = getattr(o, field) / unit
                print(f"{value:10.2f} {name} in {o.count:.0f}: {o.shape} {o.name}")
    for unknown in (*found.unknown_loops, *found.unknown_calls):
        print(f"not counted: {unknown}")


def overlapped(text: str) -> tuple[int, int]:
    """Counts the collectives between whose start and end products run, and all that have both."""
    from unimed_jax.plan import collectives, hlo
    from unimed_jax.plan.products import flops_of_product

    module = hlo.parse(text)

    def multiplies(here: hlo.Computation, i: hlo.Instruction) -> bool:
        inner = [module.computations[name] for name in i.called("calls")]
        return flops_of_product(here, i) > 0 or any(multiplies(c, j) for c in inner for j in c)

    hidden = apart = 0
    for here in module.computations.values():
        lines = list(here)
        place = {i.name: number for number, i in enumerate(lines)}
        for number, i in enumerate(lines):
            ends = [place[u.name] for u, _ in here.users[i.name] if u.opcode.endswith("-done")]
            if not ends or collectives.kind_of(i.opcode) is None:
                continue
            end = min(ends)
            apart += 1
            hidden += any(multiplies(here, j) for j in lines[number + 1 : end])
    return hidden, apart


if __name__ == "__main__":
    harness.run(main)
