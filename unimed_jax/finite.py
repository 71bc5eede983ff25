"""Refuses parameters that are not finite, so that no run saves, exports or answers from them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unimed_jax.errors import UserError


def refuse_not_finite(leaves: Mapping[str, Any], where: str, advice: str) -> None:
    """Raises UserError, as "<where>: ... ; <advice>.", if a leaf holds NaN or infinity.

    `leaves`: path -> array of any shape, or a tree of arrays. On a mesh all processes make the same
    call.
    """
    if wrong := not_finite(leaves):
        raise UserError(f"{where}: {named(wrong)} not finite (NaN or infinity); {advice}.")


def not_finite(leaves: Mapping[str, Any]) -> list[str]:
    """Lists the paths of the leaves that hold a number that is not finite."""
    finite = jax.device_get(_finite(dict(leaves)))
    return [path for path, true in finite.items() if not true]


def named(paths: list[str]) -> str:
    """Names parameters by their groups, in the words that begin a sentence.

    For example: "2 parameters of connector/experts are".
    """
    groups = list(dict.fromkeys(path.rpartition("/")[0] or path for path in paths))
    shown = ", ".join(groups[:3]) + (f" and {len(groups) - 3} more groups" if len(groups) > 3 else "")
    return f"{len(paths)} parameters of {shown} are" if len(paths) > 1 else f"parameter {paths[0]} is"


@jax.jit
def _finite(leaves: dict[str, Any]) -> dict[str, Any]:
    return {
        path: jnp.stack([all_finite(x) for x in jax.tree.leaves(leaf)]).all()
        for path, leaf in leaves.items()
    }


def all_finite(leaf: jax.Array) -> jax.Array:
    """Computes, bool [], whether every number of an array of any shape is finite."""
    return jnp.isfinite(leaf).all() if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.bool_(True)
