"""Loads weights from files straight into sharded device arrays.

Each device's shard is read in slices, one strip of rows after the other, so that a large model never
sits whole in host memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from unimed_jax.interop.tensors.table import Region, Table, Tensors, check, read_region
from unimed_jax.model.quantised import Kind, Quantised, quantise
from unimed_jax.processes import say

STRIP = 128 << 20  # bytes of a shard that are in host memory at a time


@dataclasses.dataclass(frozen=True)
class Destination:
    """Says which leaves are wanted, on which devices and in which dtypes.

    All are given by the path of the leaf.

    leaves: anything with a shape and a dtype; `Quantised` shapes are for kernels that are rounded as
    they are read. shardings: None puts all on the first device. dtypes: replace those of `leaves`, for
    the paths that are named.
    """

    leaves: Mapping[str, Any]
    shardings: Mapping[str, Sharding] | None = None
    dtypes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(self.dtypes.get(path, self.leaves[path].dtype))

    def sharding(self, path: str) -> Sharding:
        return (
            SingleDeviceSharding(jax.local_devices()[0])
            if self.shardings is None
            else self.shardings[path]
        )


def load_leaves(table: Table, tensors: Tensors, to: Destination) -> dict[str, jax.Array]:
    """Reads the leaves that the table names from the file's tensors.

    They get the layout and dtypes of `to`.

    A process reads what its own devices hold and nothing else; host memory holds one strip per device
    at a time. Raises UserError before anything is read for everything that does not fit (`check`), and
    later for the first tensor that is not finite.
    """
    check(table, tensors, to.leaves)
    _say_what_is_rounded_twice(table, tensors, to)
    out = {}
    for path in table.paths():
        leaf, dtype, sharding = to.leaves[path], to.dtype(path), to.sharding(path)
        shape = tuple(leaf.shape)
        store = None
        if isinstance(leaf, Quantised):
            dtype = np.dtype(np.float32)  # of a strip, before it is rounded to codes
            store = functools.partial(_quantised, kind=leaf.kind, dtype=leaf.dtype, sharding=sharding)
        read_part = functools.partial(read_region, table, tensors, path, shape, dtype=dtype)
        out[path] = filled(shape, dtype, sharding, read_part, store)
    return out


def _say_what_is_rounded_twice(table: Table, tensors: Tensors, to: Destination) -> None:
    """Says that codes of a file become codes of another kind, which loses more than one rounding."""
    again = [entry for entry in table if isinstance(to.leaves[entry.path], Quantised)]
    kinds = sorted({kind for entry in again if (kind := tensors.quantisation(entry.name))})
    if kinds:
        say(
            f"{tensors.origin} holds kernels as {', '.join(kinds)}, which are rounded once more, to "
            f"{to.leaves[again[0].path].kind} (config.model.frozen_kernels); a file of F16 or BF16 "
            "loses less"
        )


def filled(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    read_part: Callable,
    store: Callable[[jax.Array], Any] | None = None,
) -> Any:
    """Builds a sharded array; each device's shard is read in strips, and replicas share one read.

    read_part: region of the whole array -> its values. store: a strip on the devices -> the arrays, of
    the same sharding, that are kept in its place.
    """
    shard = sharding.shard_shape(shape)
    devices_of = _devices_by_region(shape, sharding)

    def strip(start: int, rows: int) -> Any:
        """Reads `rows` rows of every shard, from its row `start` on, as one array sharded alike."""
        parts = []
        for region, devices in devices_of.items():
            (first, _), *rest = region
            part: Region = (slice(first + start, first + start + rows), *(slice(*r) for r in rest))
            values = read_part(part)
            parts += [jax.device_put(values, device) for device in devices]
        whole = (shape[0] // shard[0] * rows, *shape[1:])
        array = jax.make_array_from_single_device_arrays(whole, sharding, parts)
        return array if store is None else store(array)

    row_bytes = max(1, int(np.prod(shard[1:], dtype=np.int64)) * dtype.itemsize)
    count = -(-shard[0] // max(1, STRIP // row_bytes))
    if count <= 1:
        return strip(0, shard[0])
    rows = -(-shard[0] // count)
    like = jax.ShapeDtypeStruct(shape, dtype)
    like = like if store is None else jax.eval_shape(store, like)
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)
    out = jax.tree.map(lambda x: zeros(x.shape, x.dtype), like)
    for i in range(count):
        # the last strip may overlap, so that all are written by one program
        start = min(i * rows, shard[0] - rows)
        out = _write(out, strip(start, rows), start, sharding)
        jax.block_until_ready(out)  # otherwise strips pile up in host memory
    return out


def _devices_by_region(
    shape: tuple[int, ...], sharding: Sharding
) -> dict[tuple[tuple[int, int], ...], list[Any]]:
    """Lists the devices that hold a copy of each region, for all shards of this process."""
    devices_of: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        region = tuple(part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True))
        devices_of.setdefault(region, []).append(device)
    return devices_of


@functools.partial(jax.jit, static_argnames=("kind", "dtype", "sharding"))
def _quantised(strip: jax.Array, kind: Kind, dtype: np.dtype, sharding: Sharding) -> Quantised:
    """Rounds a strip of stacked kernels to codes, on the devices where it lies."""
    out = quantise(strip, kind, dtype)
    here = isinstance(sharding, NamedSharding)
    return jax.lax.with_sharding_constraint(out, sharding) if here else out


@functools.partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def _write(out, strip, start, sharding: Sharding):
    """Writes the strip into every shard of `out`, from row `start` of the shard on, in place.

    Both may be trees of arrays.
    """

    def put(shards, values, start):
        def into(shard, part):
            return jax.lax.dynamic_update_slice_in_dim(shard, part, start, 0)

        return jax.tree.map(into, shards, values)

    if not isinstance(sharding, NamedSharding):
        return put(out, strip, start)
    write = jax.shard_map(
        put,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, sharding.spec, jax.sharding.PartitionSpec()),
        out_specs=sharding.spec,
        check_vma=False,
    )
    return write(out, strip, start)
