"""Places arrays on a mesh of devices; no other file names a mesh axis.

Every dimension of a parameter has a logical name (`PARAMETERS`), and each logical name may be split
over some mesh axes (`AXES`). Activations are constrained, and kernels gathered, only where the compiler
would choose badly (`constrain`, `gathered`). Outside a mesh all of this does nothing, so the same code
runs on one device.
"""

import contextlib
import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from unimed_jax.config import MeshConfig
from unimed_jax.errors import UserError
from unimed_jax.model.quantised import Quantised

MESH_AXES = ("data", "fsdp", "tensor", "expert")

# Logical name -> mesh axes over which it may be split. A name that is missing here is never split.
AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "capacity": ("data", "fsdp"),  # places in the buffers of the decoder's experts
    # The connector's own widths are split over all chips. 5 experts divide no axis, but their
    # concatenated hidden units do; and a router of half a billion weights must never be gathered
    # (its inputs are gathered: they are small).
    "expert_hidden": MESH_AXES,
    "router_hidden": MESH_AXES,
}

# Path pattern -> logical names of the last dimensions (the axis of stacked layers comes before
# them, never split).
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


def make_mesh(
    config: MeshConfig,
    rows: int,
    frozen_bytes: int = 0,
    described: Sequence[Any] = (),
    limit: float | None = None,
) -> Mesh | None:
    """Makes the mesh over all devices of all processes, or None for a single device.

    With `config.auto` the `rows` of a batch are split over as many devices as divide them, and the
    remaining factor splits heads and hidden units. Frozen weights (`frozen_bytes`) stay replicated
    if they take less than half of a device's memory, else they are split too ("fsdp").

    described: devices to compile for that this machine may lack, a single one of which gets a mesh
    too, because nothing else names it; limit: the bytes that a program may use of each of them (of
    devices found here the device says so itself). Raises UserError if the sizes in `config` do not
    multiply to the number of devices, or do not divide the rows.
    """
    devices = list(described) or jax.devices()
    count = len(devices)
    if count == 1:
        if not config.auto and math.prod(getattr(config, axis) for axis in MESH_AXES) > 1:
            raise UserError(
                f"config.mesh asks for {math.prod(getattr(config, axis) for axis in MESH_AXES)} "
                "devices, but there is one; set config.mesh.auto=True, or all sizes to 1."
            )
        if not described:
            return None
    if config.auto:
        wide = math.gcd(count, rows)
        sizes = {"data": wide, "fsdp": 1, "tensor": count // wide, "expert": 1}
        if not described:
            stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
            limit = (stats or {}).get("bytes_limit")
        if limit and frozen_bytes / sizes["tensor"] > limit / 2:
            sizes["data"], sizes["fsdp"] = 1, wide
    else:
        sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
        if math.prod(sizes.values()) != count:
            named = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
            product = math.prod(sizes.values())
            raise UserError(f"config.mesh: {named} makes {product} devices, but there are {count}.")
    shares = math.prod(sizes[axis] for axis in AXES["batch"])
    if rows % shares:
        raise UserError(
            f"config.data.rows={rows} cannot be shared by {shares} devices; choose a multiple of "
            f"{shares}."
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis would take a part of a row of chips
        pass
    try:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as error:
        named = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise UserError(
            f"config.mesh: {named} cannot be laid over these {count} chips ({error}); choose other "
            "sizes."
        ) from error
    return Mesh(grid, MESH_AXES, axis_types=types)


def inside(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Gives the context in which the model is to be traced, so that it finds the mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def parameter_names(path: str) -> tuple[str | None, ...]:
    """Looks up the logical names of a parameter's last dimensions; () if it is replicated."""
    return next((names for pattern, names in PARAMETERS if fnmatch.fnmatchcase(path, pattern)), ())


def spec(
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    sizes: Mapping[str, int],
) -> PartitionSpec:
    """Turns logical names into the partition of an array, see `axes_by_dimension`."""
    return PartitionSpec(*(axes or None for axes in axes_by_dimension(shape, names, sizes)))


def axes_by_dimension(
    shape: tuple[int, ...], names: tuple[str | None, ...], sizes: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Finds the mesh axes that split each dimension, given the mesh's `sizes` by axis.

    An axis that does not divide the remaining dimension is skipped, so the dimension stays
    replicated over it. Example: with sizes {"data": 2, "fsdp": 1, "expert": 4}, a batch of 6 rows
    is split over ("data",) only.
    """
    entries: list[tuple[str, ...]] = []
    for dim, name in zip(shape, names, strict=True):
        axes: tuple[str, ...] = ()
        for axis in AXES.get(name or "", ()):
            if sizes[axis] > 1 and dim % sizes[axis] == 0:
                axes, dim = (*axes, axis), dim // sizes[axis]
        entries.append(axes)
    return entries


def parameter_shardings(leaves: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Gives the sharding of every leaf by path; anything with a shape will do as a leaf.

    Codes and scales of a quantised kernel have one sharding, that of the kernel if whole blocks can be
    split like its inputs. So no block lies on two devices.
    """
    return {path: _place(path, divided_shape(leaf), mesh) for path, leaf in leaves.items()}


def divided_shape(leaf: Any) -> tuple[int, ...]:
    """Gives the shape that a mesh divides: of a quantised kernel its blocks, else the leaf's own."""
    return leaf.scales.shape if isinstance(leaf, Quantised) else leaf.shape


def placed(tree: Any, places: Any) -> Any:
    """Gives the shapes of a tree with shardings; `places` has one for an array, or for a part."""

    def of(place: Any, part: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part)

    return jax.tree.map(of, places, tree)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Gives the shardings of a train state: moments lie where their parameter does."""

    def of(keys, leaf) -> NamedSharding:
        path = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), "")
        return _place(path, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(of, state)


def everywhere(mesh: Mesh) -> NamedSharding:
    """Gives the sharding of an array that every device holds whole (replicated)."""
    return NamedSharding(mesh, PartitionSpec())


def _place(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Gives the sharding of a parameter, or of an optimizer's array that belongs to it."""
    names = parameter_names(path)
    # An optimizer's array may have fewer dimensions than its leaf, as a count of steps has.
    leading = len(shape) - len(names)
    names = (None,) * leading + names if leading >= 0 else (None,) * len(shape)
    return NamedSharding(mesh, spec(shape, names, dict(mesh.shape)))


def constrain(x: Array, *names: str | None) -> Array:
    """Splits x over the mesh in context by logical names; without a mesh, returns x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, names, dict(mesh.shape)))


def gathered(kernel: Quantised, names: tuple[str | None, ...], rows: int) -> Quantised:
    """Makes every device hold the codes that its rows are multiplied with, before they become numbers.

    Left to itself, the compiler makes numbers of codes where they lie, and sends those: four or two
    times the bytes. A kernel stays split over axes that do not split so many rows: then partial sums
    of a few rows are sent, which is less. names: of the kernel's dimensions; () changes nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not names:
        return kernel
    sizes = dict(mesh.shape)
    (split,) = axes_by_dimension((rows,), ("batch",), sizes)
    kept = tuple(None if {*AXES.get(name or "", ())} & {*split} else name for name in names)
    place = spec(divided_shape(kernel), kept, sizes)
    return jax.tree.map(lambda part: jax.lax.with_sharding_constraint(part, place), kernel)


# --------------------------------------------------------------------------------------------------
# Batches, shared by processes
# --------------------------------------------------------------------------------------------------


def row_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Gives the sharding of an array of a batch, whose first dimension is its rows."""
    return NamedSharding(
        mesh,
        spec(shape, ("batch", *(None,) * (len(shape) - 1)), dict(mesh.shape)),
    )


def rows_multiple() -> int:
    """Counts the parts into which the mesh in context splits the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in AXES["batch"])


class Share(NamedTuple):
    """Names the rows of a batch that one process reads: those that lie on its devices."""

    rows: tuple[int, ...]  # in order; not always neighbours, as chips are ordered along rings
    of: int  # rows of the whole batch


def share_of_process(mesh: Mesh | None, rows: int) -> Share:
    """Says which rows of a batch this process reads.

    Processes whose devices split the model instead of the batch read the same rows.
    """
    if mesh is None:
        return Share(tuple(range(rows)), rows)
    slices = row_sharding((rows,), mesh).addressable_devices_indices_map((rows,)).values()
    own = {row for piece in slices if piece for row in range(*piece[0].indices(rows))}
    return Share(tuple(sorted(own)), rows)


def on_devices(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, share: Share | None = None
) -> dict[str, Any]:
    """Puts this process's rows of a batch on its devices, as arrays over the rows of all processes.

    share: which rows `batch` holds; by default all. The copies are started, not awaited, so they
    overlap with the step that still runs.
    """
    if mesh is None:
        return dict(batch)
    count = len(next(iter(batch.values())))
    rows, of = share or Share(tuple(range(count)), count)
    place = {row: i for i, row in enumerate(rows)}

    def cut(value: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """Cuts out the rows of one device, which are neighbours in the batch and so here."""
        first, stop, _ = index[0].indices(of)
        return value[place[first] : place[stop - 1] + 1]

    out = {}
    for name, value in batch.items():
        shape = (of, *value.shape[1:])
        piece = functools.partial(cut, value)
        out[name] = jax.make_array_from_callback(shape, row_sharding(shape, mesh), piece)
    return out
