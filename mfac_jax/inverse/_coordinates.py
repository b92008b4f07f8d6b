"""Flat coordinates as arguments: known ones are checked, traced ones are clipped into range."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from mfac_jax import _checks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """Pairs of coordinates, flattened.

    Attributes:
        rows: i; (k,), in range.
        columns: j; (k,), in range.
        valid: whether both coordinates were in range before clipping; (k,).
        shape: the shape of the pairs before flattening (static).
    """

    rows: Int[Array, " k"]
    columns: Int[Array, " k"]
    valid: Bool[Array, " k"]
    shape: tuple[int, ...] = field(metadata={"static": True})


def as_pairs(rows: ArrayLike, columns: ArrayLike, d: int) -> Pairs:
    """The pairs ``(i, j)`` of coordinates; rows and columns are broadcast against one another.

    Raises:
        TypeError: an index is not an integer.
        ValueError: an index that is not traced lies outside 0 .. d-1.
    """
    _checks.index(rows, "rows", d)
    _checks.index(columns, "columns", d)
    return _pairs(jnp.asarray(rows), jnp.asarray(columns), d=d)


# Jitted for eager callers.
@functools.partial(jax.jit, static_argnames="d")
def _pairs(rows: Int[Array, "..."], columns: Int[Array, "..."], *, d: int) -> Pairs:
    i, j = jnp.broadcast_arrays(rows, columns)
    shape, i, j = i.shape, i.ravel(), j.ravel()
    valid = (i >= 0) & (i < d) & (j >= 0) & (j < d)
    return Pairs(jnp.clip(i, 0, d - 1), jnp.clip(j, 0, d - 1), valid, shape)


def as_coordinates(coordinates: ArrayLike, d: int) -> Int[Array, " k"]:
    """Checks a list of coordinates and returns it as an array.

    Raises:
        TypeError: an index is not an integer.
        ValueError: ``coordinates`` is not a list, or an index that is not traced lies outside
            0 .. d-1.
    """
    if np.ndim(coordinates) != 1 or np.size(coordinates) == 0:
        raise ValueError(
            "coordinates must be a list of one index or more, got an array of shape "
            f"{np.shape(coordinates)}."
        )
    _checks.index(coordinates, "coordinates", d)
    return jnp.asarray(coordinates)
