"""Making rows: empty ones to fill, or from gradients that exist already."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mfac_jax import _checks, kernels
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import GradientRows, Implementation
from mfac_jax.rows._flat import FlatRows, tiling
from mfac_jax.rows._per_leaf import PerLeafRows

STORAGES = ("flat", "per_leaf")
DTYPES = ("float32", "bfloat16", "float64")


def empty_rows(
    params: PyTree,
    num_rows: int,
    *,
    storage: str = "flat",
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> GradientRows:
    """``num_rows`` zero rows for gradients of ``params``.

    Args:
        params: arrays, or anything with a shape and dtype, of the parameters.
        num_rows: ``m``, the number of rows.
        storage: ``"flat"`` for one block, (t, m, k): m rows of t tiles; or ``"per_leaf"``
            for a block ``(m, *shape)`` a parameter, sharded as the parameter is if that
            has a ``NamedSharding``.
        dtype: what the rows are stored in: float32, bfloat16 or float64. By default
            float64 for float64 parameters and float32 for all others.
        implementation: of the scans, ``"xla"``, ``"mosaic_gpu"`` or ``"mosaic_tpu"``; by
            default the best one on each platform. See :mod:`mfac_jax.kernels`.

    Returns:
        The rows.

    Raises:
        TypeError: ``num_rows`` is not an int, ``dtype`` is not a dtype, or a leaf is not
            real floating point.
        ValueError: ``num_rows`` is below 1, or ``storage``, ``dtype`` or
            ``implementation`` is none of these.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import rows
        >>> rows.empty_rows({"w": jnp.zeros((2, 3))}, 4).block.shape
        (1, 4, 6)
    """
    m = _checks.positive_int(num_rows, "num_rows")
    check_storage(storage, dtype, implementation)
    layout = Layout(params)
    chosen = _storage_dtype(layout, dtype)
    if storage == "flat":
        count, width = tiling(layout.size)
        block = jnp.zeros((count, m, width), chosen)
        return FlatRows(block, layout, Implementation(implementation))
    blocks = jax.tree.map(
        lambda leaf: jnp.zeros((m, *jnp.shape(leaf)), chosen, device=_sharding(leaf)), params
    )
    return PerLeafRows(blocks, jnp.zeros(m, bool), layout, Implementation(implementation))


def as_rows(
    gradients: PyTree,
    params: PyTree | None = None,
    *,
    storage: str = "flat",
    implementation: str | None = None,
) -> GradientRows:
    """Rows from gradients that are stacked along a leading axis.

    Args:
        gradients: a tree with leaves ``(n, *shape)``, or one array ``(n, d)``.
        params: the parameters; needed when ``gradients`` is one (n, d) array for a
            tree of parameters. By default the tree of one row of ``gradients``.
        storage: as in :func:`empty_rows`.
        implementation: as in :func:`empty_rows`.

    Returns:
        The rows, in the dtype of the gradients (the widest of them for ``"flat"``).

    Raises:
        TypeError: a leaf is not real floating point.
        ValueError: leading axes differ, there is no row, ``params`` do not fit, or
            ``implementation`` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import rows
        >>> rows.as_rows({"w": jnp.ones((4, 2, 3)), "b": jnp.ones((4, 3))}).num_rows
        4
    """
    _checks.one_of(storage, "storage", STORAGES)
    kernels.check_implementation(implementation)
    stacked = Layout(gradients, "gradients")
    counts = {shape[0] if shape else None for shape in stacked.shapes}
    if len(counts) != 1 or counts & {None, 0}:
        raise ValueError(
            "gradients must have one leading axis of the same length >= 1 on every leaf, "
            f"got {stacked.describe()}."
        )
    n = counts.pop()
    if params is None:
        params = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), gradients)
    layout = Layout(params)
    one_matrix = len(stacked.shapes) == 1 and stacked.shapes[0] == (n, layout.size)
    if one_matrix and stacked.treedef == jax.tree.structure(0):
        gradients = jax.vmap(layout.unflatten)(jnp.asarray(gradients))
    row_layout = Layout(
        jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), gradients)
    )
    if row_layout.treedef != layout.treedef or row_layout.shapes != layout.shapes:
        raise ValueError(
            f"gradients do not fit params: expected rows of {layout.describe()}, "
            f"got rows of {row_layout.describe()}."
        )
    if storage == "per_leaf":
        blocks = jax.tree.map(jnp.asarray, gradients)
        return PerLeafRows(blocks, jnp.zeros(n, bool), layout, Implementation(implementation))
    leaves = [jnp.asarray(leaf).reshape(n, -1) for leaf in jax.tree.leaves(gradients)]
    dtype = functools.reduce(np.promote_types, [leaf.dtype for leaf in leaves])
    matrix = jnp.concatenate([leaf.astype(dtype) for leaf in leaves], axis=1)
    return FlatRows.of(matrix, layout, Implementation(implementation))


def _sharding(leaf: Any) -> NamedSharding | None:
    """The leaf's own sharding behind an unsharded axis of rows, if it has one."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def check_storage(storage: Any, dtype: DTypeLike | None, implementation: Any) -> None:
    """The arguments are ones that :func:`empty_rows` knows.

    Raises:
        TypeError: ``dtype`` is not a dtype.
        ValueError: there is no such storage or implementation, or rows cannot be stored
            in ``dtype``.
    """
    _checks.one_of(storage, "storage", STORAGES)
    kernels.check_implementation(implementation)
    if dtype is None:
        return
    try:
        chosen = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.") from error
    if chosen.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {chosen.name}.")
    if chosen == jnp.float64 and implementation not in (None, "xla"):
        raise ValueError(
            f"implementation={implementation!r} needs float32 or bfloat16 gradients, got float64."
        )
    if chosen == jnp.float64 and jnp.result_type(float) != chosen:
        raise ValueError("dtype float64 needs jax_enable_x64, which is off.")


def _storage_dtype(layout: Layout, dtype: DTypeLike | None) -> jnp.dtype:
    if dtype is None:
        return jnp.dtype(jnp.float64 if jnp.dtype("float64") in layout.dtypes else jnp.float32)
    return jnp.dtype(dtype)
