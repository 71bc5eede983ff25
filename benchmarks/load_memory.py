"""Measures how much host memory loading a safetensors model takes beyond the arrays.

    python benchmarks/load_memory.py --gb=4 --devices=1

It writes a random LLaMA of that size into a temporary folder (which takes as much space on the disk),
loads it in a new process and prints one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CHILD = "UNIMED_LOAD_MEMORY"


def decoder(gigabytes: float):
    """Describes a LLaMA of about that many 10^9 bytes in bfloat16, with the 7B one's proportions."""
    from unimed_jax.config import DecoderConfig

    width, depth = 2048, max(1, round(gigabytes * 1e9 / 2 / 50.3e6))
    return DecoderConfig(
        vocab=32000,
        width=width,
        depth=depth,
        heads=16,
        kv_heads=16,
        head_dim=128,
        mlp_width=5504,
        tied_head=True,
    )


def table_and_leaves(gigabytes: float):
    import dataclasses

    import jax
    import jax.numpy as jnp

    from unimed_jax.config import LoraConfig, ModelConfig
    from unimed_jax.interop.families import hf
    from unimed_jax.model.parameters import abstract, parameters

    config = dataclasses.replace(ModelConfig(), decoder=decoder(gigabytes), lora=LoraConfig(rank=0))
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
        for path, leaf in parameters(abstract(config)).items()
        if path.startswith("decoder/")
    }
    return hf.hf_decoder_table(config.decoder), leaves


def write(folder: Path, gigabytes: float) -> None:
    """Writes random numbers between -1 and 1, a few megabytes at a time."""
    import ml_dtypes
    import numpy as np

    from unimed_jax.interop.tensors.files import write_safetensors
    from unimed_jax.interop.tensors.table import published_shapes

    table, leaves = table_and_leaves(gigabytes)
    stored = published_shapes(table, leaves)
    block = np.random.default_rng(0).standard_normal(3_000_017).astype(ml_dtypes.bfloat16)
    tensors = ((name, np.resize(block, shape)) for name, (shape, _) in stored.items())
    write_safetensors(folder, stored, tensors, limit=1 << 31)


def resident() -> int:
    """Returns the bytes of this process in memory, file pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Samples `resident()` every millisecond or so while it runs, and keeps the largest."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.running = resident(), True

    def run(self):
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.001)


def load(folder: Path, gigabytes: float, devices: int) -> dict:
    import jax

    from unimed_jax.config import MeshConfig
    from unimed_jax.interop.tensors.files import open_weights
    from unimed_jax.interop.tensors.load import Destination, load_leaves
    from unimed_jax.model.sharding import make_mesh, parameter_shardings

    table, leaves = table_and_leaves(gigabytes)
    jax.block_until_ready(jax.numpy.zeros(()))
    mesh = make_mesh(MeshConfig(auto=False, fsdp=devices), devices) if devices > 1 else None
    shardings = None if mesh is None else parameter_shardings(leaves, mesh)
    watch, before, start = Peak(), resident(), time.monotonic()
    watch.start()
    loaded = jax.block_until_ready(
        load_leaves(table, open_weights(folder), Destination(leaves, shardings))
    )
    seconds = time.monotonic() - start
    watch.running = False
    watch.join()
    # Copies for the devices of one host are arrays too.
    arrays = sum(shard.data.nbytes for leaf in loaded.values() for shard in leaf.addressable_shards)
    return {
        "devices": devices,
        "arrays_gb": round(arrays / 1e9, 3),
        "beyond_gb": round((watch.peak - before - arrays) / 1e9, 3),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gb", type=float, default=4.0)
    options.add_argument("--devices", type=int, default=1)
    options.add_argument(
        "--folder", default="", help="where to write the model (default: a temporary folder)"
    )
    known = options.parse_args()
    if os.environ.get(CHILD):
        print(json.dumps(load(Path(known.folder), known.gb, known.devices)))
        return
    with tempfile.TemporaryDirectory(dir=known.folder or None) as folder:
        write(Path(folder), known.gb)
        flags = f"--xla_force_host_platform_device_count={known.devices}"
        environment = os.environ | {CHILD: "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        words = [
            sys.executable,
            __file__,
            f"--gb={known.gb}",
            f"--devices={known.devices}",
            f"--folder={folder}",
        ]
        subprocess.run(words, check=True, env=environment)


if __name__ == "__main__":
    main()
