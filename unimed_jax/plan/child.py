"""Compiles one program for one topology in this process, and writes what it needs to a folder.

    python -m unimed_jax.plan.child FOLDER

`compile.py` starts it and stands at the other end of its input, whose end also ends this process.
FOLDER/job.json says what to compile; FOLDER/result.json says what came of it, and program.txt.gz is
the compiled program.
"""

import gzip
import json
import os
import re
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

from unimed_jax.errors import UserError


def main(folder: Path) -> None:
    """Reads the job, compiles, and writes the result: numbers, or one sentence."""
    threading.Thread(target=_end_with_starter, daemon=True).start()
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        result = compiled(job, folder)
    except UserError as error:
        result = {"refused": str(error)}
    temporary = folder / "result.json.part"
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.rename(folder / "result.json")


def _end_with_starter() -> None:
    """Ends this process when the one that started it is gone, in the middle of a compilation too."""
    while os.read(sys.stdin.fileno(), 1 << 16):  # a read of `sys.stdin` would abort Python's own end
        pass
    os._exit(1)


def compiled(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Lowers and compiles the job's program; returns its memory in bytes a device, and seconds.

    If the compiler says that the program does not fit into a chip's memory, `exceeds` holds its
    words and the numbers of the compiled program are left out.
    """
    import jax

    from unimed_jax.plan import topology as topologies
    from unimed_jax.plan.programs import planned
    from unimed_jax.settings import from_config_dict
    from unimed_jax.train.program import make_mesh

    topology = topologies.parse(job["topology"])
    config = from_config_dict(job["config"])
    devices = topologies.devices(topology)
    mesh = make_mesh(config, devices, topology.chip and topology.chip.usable)
    assert mesh is not None  # described devices always get one
    begun = time.perf_counter()
    with topologies.as_on_the_card(topology):
        program = planned(config, mesh, job["program"])
    lowered = time.perf_counter()
    result = {
        "device": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "arguments": program.arguments,
        "activations": program.activations,
        "experts": experts_way(config, mesh),
        "sizes": program.sizes and program.sizes._asdict(),
        "seconds": {"lower": lowered - begun},
    }
    try:
        executable = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            words = " ".join(str(error).split())[:400]
            raise UserError(
                f"{job['program']} does not compile for {topology.text} ({words}); plan another "
                "mesh, or report it."
            ) from error
        return result | {"exceeds": exceeds(str(error))}
    used = resource.getrusage(resource.RUSAGE_SELF)
    result["seconds"] |= {
        "compile": time.perf_counter() - lowered,
        "cpu": used.ru_utime + used.ru_stime,
    }
    memory = executable.memory_analysis()
    result["memory"] = {
        name: getattr(memory, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    try:
        text = executable.as_text()
    except jax.errors.JaxRuntimeError:  # some TPU compilers keep no text
        text = ""
    if text:
        with gzip.open(folder / "program.txt.gz", "wt", encoding="utf-8", compresslevel=3) as file:
            file.write(text)
    return result | {"text": bool(text)}


def experts_way(config: Any, mesh: Any) -> str:
    """Names how grouped experts of the decoder are multiplied on these devices; "" without them."""
    from unimed_jax.model import sharding
    from unimed_jax.model.dispatch import way_of

    with sharding.inside(mesh):
        return way_of(config.model) or ""


def exceeds(words: str) -> dict[str, Any]:
    """Reads, from the compiler's words, the bytes that a program would use and those that there are."""
    sizes = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", words)
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found: dict[str, Any] = {"words": " ".join(words.split())[:300]}
    if sizes:
        found["needed"] = float(sizes[1]) * unit[sizes[2]]
        found["usable"] = float(sizes[3]) * unit[sizes[4]]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
