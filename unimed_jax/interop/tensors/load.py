"""Weights from files straight into sharded device arrays: each device's part is read by slices, in strips."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from unimed_jax.interop.tensors.table import Region, Table, Tensors, check, read_region

STRIP = 128 << 20  # bytes of a device's part of a leaf that are in host memory at a time


@dataclasses.dataclass(frozen=True)
class Destination:
    """Says where loaded weights go, by the path of the leaf.

    leaves: anything with shape and dtype; shardings: where each lies (None: on the first device); dtypes: replace
    those of `leaves`, for the paths that are named.
    """

    leaves: Mapping[str, Any]
    shardings: Mapping[str, Sharding] | None = None
    dtypes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(self.dtypes.get(path, self.leaves[path].dtype))

    def sharding(self, path: str) -> Sharding:
        return SingleDeviceSharding(jax.local_devices()[0]) if self.shardings is None else self.shardings[path]


def load_leaves(table: Table, tensors: Tensors, to: Destination) -> dict[str, jax.Array]:
    """Reads the leaves that the table names from the file's tensors, in the layout and dtypes of `to`.

    A process reads what its own devices hold and nothing else; host memory holds one strip per device at a time.
    Raises UserError, before anything is read, for all that does not fit (`check`), and for the first tensor met
    that is not finite.
    """
    check(table, tensors, to.leaves)
    out = {}
    for path in table.paths():
        shape, dtype = tuple(to.leaves[path].shape), to.dtype(path)
        read_part = functools.partial(read_region, table, tensors, path, shape, dtype=dtype)
        out[path] = filled(shape, dtype, to.sharding(path), read_part)
    return out


def filled(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, read_part: Callable) -> jax.Array:
    """An array of which every device's part is made of strips of `read_part(region)`, copies of a part from one."""
    own = sharding.shard_shape(shape)
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}  # region -> devices that hold a copy of it
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        region = tuple(part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True))
        holders.setdefault(region, []).append(device)

    def strip(start: int, rows: int) -> jax.Array:
        """Rows start .. start + rows of every device's own part, side by side as one array."""
        parts = []
        for region, devices in holders.items():
            (first, _), *rest = region
            part: Region = (slice(first + start, first + start + rows), *(slice(*r) for r in rest))
            values = read_part(part)
            parts += [jax.device_put(values, device) for device in devices]
        whole = (shape[0] // own[0] * rows, *shape[1:])
        return jax.make_array_from_single_device_arrays(whole, sharding, parts)

    row_bytes = max(1, int(np.prod(own[1:], dtype=np.int64)) * dtype.itemsize)
    count = -(-own[0] // max(1, STRIP // row_bytes))
    if count <= 1:
        return strip(0, own[0])
    rows = -(-own[0] // count)
    out = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, dtype)
    for i in range(count):
        start = min(i * rows, own[0] - rows)  # the last one overlaps, so that one program writes all
        out = _write(out, strip(start, rows), start, sharding)
        out.block_until_ready()  # else strips pile up in host memory
    return out


@functools.partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def _write(out, strip, start, sharding: Sharding):
    """`out`, in place, with the strip from row `start` on of every device's own part."""

    def put(part, values, start):
        return jax.lax.dynamic_update_slice_in_dim(part, values, start, 0)

    if not isinstance(sharding, NamedSharding):
        return put(out, strip, start)
    specs = (sharding.spec, sharding.spec, jax.sharding.PartitionSpec())
    return jax.shard_map(put, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False)(
        out, strip, start
    )
