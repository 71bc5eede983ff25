"""Where arrays live on a mesh of devices: the one table, and the only file that names a mesh axis.

Every dimension of every parameter has a logical name (`PARAMETERS`), and each logical name is laid over mesh axes
(`AXES`). Activations are pinned at the few places where the compiler would choose badly (`constrain`). Outside a
mesh all of this does nothing, so that the same code runs on one device.
"""

import contextlib
import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from unimed_jax.config import MeshConfig
from unimed_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "expert")

# Logical name -> mesh axes that may share it. Names that are missing here are never split.
AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "capacity": ("data", "fsdp"),  # places in the buffers of the decoder's experts
    # The connector's own widths go over all chips: 5 experts divide no axis, their joined hidden units do, and a
    # router of half a billion weights must never be gathered (its inputs are, which are small).
    "expert_hidden": MESH_AXES,
    "router_hidden": MESH_AXES,
}

# Path pattern -> logical names of the last dimensions (stacked layers come before them and are never split).
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("connector/experts/up", (None, "expert_hidden")),
    ("connector/experts/up_bias", ("expert_hidden",)),
    ("connector/experts/down", ("expert_hidden", None)),
    ("connector/router/t*_kernel", (None, "router_hidden")),
    ("connector/router/out_kernel", ("router_hidden", None)),
    ("connector/router/bias", ("router_hidden",)),
    ("decoder/embedding", ("vocab", "embed")),
    ("decoder/head", ("embed", "vocab")),
    ("decoder/head_bias", ("vocab",)),
    ("*/attention/[qkv]/kernel", ("embed", "heads")),
    ("*/attention/[qkv]/lora_b", (None, "heads")),
    ("*/attention/qkv/kernel", ("embed", "heads")),
    ("*/attention/o/kernel", ("heads", "embed")),
    ("*/attention/o/lora_a", ("heads", None)),
    ("*/attention/out/kernel", ("heads", "embed")),
    ("*/experts/gate/kernel", ("expert", "embed", "mlp")),
    ("*/experts/up/kernel", ("expert", "embed", "mlp")),
    ("*/experts/down/kernel", ("expert", "mlp", "embed")),
    ("*/experts/*/bias", ("expert", None)),
    ("*/gate/kernel", ("embed", "mlp")),
    ("*/gate/lora_b", (None, "mlp")),
    ("*/up/kernel", ("embed", "mlp")),
    ("*/up/lora_b", (None, "mlp")),
    ("*/down/kernel", ("mlp", "embed")),
    ("*/down/lora_a", ("mlp", None)),
)


def make_mesh(config: MeshConfig, rows: int, frozen_bytes: int = 0) -> Mesh | None:
    """The mesh over all devices of all processes, or None for a single device.

    With `auto` the rows of a batch go over as many devices as divide them; the rest split heads and hidden units.
    The frozen weights (`frozen_bytes`) are kept whole on every device where they take less than half its memory,
    else they are split too ("fsdp"). Raises UserError where the named axes do not multiply to the devices.
    """
    devices = jax.devices()
    count = len(devices)
    if count == 1:
        return None
    if config.auto:
        wide = math.gcd(count, rows)
        sizes = {"data": wide, "fsdp": 1, "tensor": count // wide, "expert": 1}
        limit = (devices[0].memory_stats() or {}).get("bytes_limit") if devices[0].platform != "cpu" else None
        if limit and frozen_bytes / sizes["tensor"] > limit / 2:
            sizes["data"], sizes["fsdp"] = 1, wide
    else:
        sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
        if math.prod(sizes.values()) != count:
            named = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
            raise UserError(f"config.mesh: {named} makes {math.prod(sizes.values())} devices, but there are {count}.")
    shared = math.prod(sizes[axis] for axis in AXES["batch"])
    if rows % shared:
        raise UserError(f"config.data.rows={rows} cannot be shared by {shared} devices; choose a multiple of {shared}.")
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def inside(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which the model is traced, so that `constrain` finds the mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def parameter_names(path: str) -> tuple[str | None, ...]:
    """Logical names of a parameter's last dimensions; none for one that every device keeps whole."""
    return next((names for pattern, names in PARAMETERS if fnmatch.fnmatchcase(path, pattern)), ())


def spec(shape: tuple[int, ...], names: tuple[str | None, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Mesh axes per dimension, see `shared`."""
    return PartitionSpec(*(axes or None for axes in shared(shape, names, sizes)))


def shared(shape: tuple[int, ...], names: tuple[str | None, ...], sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The mesh axes that share each dimension. One that does not divide what is left of it is dropped: whole there."""
    entries: list[tuple[str, ...]] = []
    for dim, name in zip(shape, names, strict=True):
        axes: tuple[str, ...] = ()
        for axis in AXES.get(name or "", ()):
            if sizes[axis] > 1 and dim % sizes[axis] == 0:
                axes, dim = (*axes, axis), dim // sizes[axis]
        entries.append(axes)
    return entries


def parameter_shardings(leaves: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Path -> sharding, for leaves or anything with their shapes."""
    return {path: _place(path, leaf.shape, mesh) for path, leaf in leaves.items()}


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a train state: what belongs to a parameter (moments) lies where it does, the rest everywhere."""

    def of(keys, leaf) -> NamedSharding:
        path = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), "")
        return _place(path, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(of, state)


def everywhere(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def _place(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    names = parameter_names(path)
    # A count of a leaf's steps, say, has fewer dimensions than the leaf.
    names = (None,) * (len(shape) - len(names)) + names if len(shape) >= len(names) else (None,) * len(shape)
    return NamedSharding(mesh, spec(shape, names, dict(mesh.shape)))


def constrain(x: Array, *names: str | None) -> Array:
    """x with its dimensions laid over the mesh in whose context it is traced; x itself outside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, names, dict(mesh.shape)))


# --------------------------------------------------------------------------------------------------
# Batches, shared by processes
# --------------------------------------------------------------------------------------------------


def row_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of an array of a batch, whose first dimension are its rows."""
    return NamedSharding(mesh, spec(shape, ("batch", *(None,) * (len(shape) - 1)), dict(mesh.shape)))


def rows_of_process(mesh: Mesh | None, rows: int) -> tuple[int, int]:
    """(share, shares): this process's devices read share number `share` of the batch's rows, cut into `shares`.

    Processes whose devices split the model, not the batch, read the same rows.
    """
    if mesh is None:
        return 0, 1
    sharding = row_sharding((rows,), mesh)
    pieces = [piece[0].indices(rows) for piece in sharding.addressable_devices_indices_map((rows,)).values() if piece]
    start, stop = min(a for a, _, _ in pieces), max(b for _, b, _ in pieces)
    return start // (stop - start), rows // (stop - start)


def on_devices(batch: Mapping[str, np.ndarray], mesh: Mesh | None, shares: int) -> dict[str, Any]:
    """A process's rows of a batch as arrays over all rows, spread over the mesh, while the step before still runs."""
    if mesh is None:
        return dict(batch)
    out = {}
    for name, value in batch.items():
        shape = (value.shape[0] * shares, *value.shape[1:])
        out[name] = jax.make_array_from_process_local_data(row_sharding(shape, mesh), value, shape)
    return out
