"""The scans in plain ``jax.numpy``: the default on every device, and the oracle.

Two facts shape this file. A matrix-vector product on the CPU adds up a row in one
long chain (relative error 3e-6 at d = 270,000), while a fused multiply-reduce of a
large block adds in vector lanes (1e-7) at the same speed, and a small block can
afford to be added up in segments (5e-8), so :func:`dots` does the one or the other.
And partial sums over column tiles keep a Gram matrix accurate and bound the memory
of anything that is computed a tile at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Carry = TypeVar("Carry")

# Columns handled at a time. 8,192 float32 columns of 512 rows are 16 MiB: small
# against any window worth tiling, large enough that a tile's matrix product runs
# at full speed (measured on two CPU cores: 2,048 to 8,192 within 5 %).
_TILE = 8192

# Up to this many entries (64 MiB of float32) dot products are added up in segments.
# Sixteen take the relative error from 2.3e-7 to 5e-8 (128 x 20,000 on the CPU, where XLA
# sums a small block in one chain; fewer leave 1e-7 with some versions of XLA) and take
# up to twice as long, 2 ms more at the most. Beyond it XLA sums in lanes and threads by
# itself, to 1e-7, and time counts. The segments are as large as so many rows, hence a
# block of few rows, whose directions depend less on its dot products, goes without.
_SMALL_BLOCK = 2**24
_SEGMENTS = 16


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype products of ``dtype`` are accumulated in: float32 at least."""
    return np.promote_types(dtype, np.float32)


def _matrix(block: Float[Array, "m *shape"]) -> Float[Array, "m d"]:
    return block.reshape(block.shape[0], math.prod(block.shape[1:]))


def _fold_tiles(
    matrix: Float[Array, "m d"],
    step: Callable[[Carry, Float[Array, "m t"], Int[Array, ""]], Carry],
    carry: Carry,
) -> Carry:
    """Folds ``step(carry, tile, first_column)`` over column tiles of ``matrix``.

    Tiles reach ``step`` in the accumulation dtype; only one is wide at a time.
    """
    acc = accumulation_dtype(matrix.dtype)
    full = matrix.shape[1] // _TILE

    def body(carry: Carry, i: Int[Array, ""]) -> tuple[Carry, None]:
        tile = lax.dynamic_slice_in_dim(matrix, i * _TILE, _TILE, axis=1)
        return step(carry, tile.astype(acc), i * _TILE), None

    if full:
        carry, _ = lax.scan(body, carry, jnp.arange(full))
    if matrix.shape[1] % _TILE:
        tail = matrix[:, full * _TILE :].astype(acc)
        carry = step(carry, tail, jnp.asarray(full * _TILE))
    return carry


def dots(block: Float[Array, "m *shape"], vector: Float[Array, "*shape"]) -> Float[Array, " m"]:
    """``G v``: the dot product of every row with ``vector``."""
    acc = accumulation_dtype(block.dtype)
    vector = vector.astype(acc)
    if block.dtype == acc:
        if block.ndim > 2:  # no reshape: it would gather a leaf that is sharded
            axes = tuple(range(vector.ndim))
            return jnp.tensordot(
                block, vector, (tuple(a + 1 for a in axes), axes), precision="highest"
            )
        if block.size <= _SMALL_BLOCK and block.shape[0] >= 4 * _SEGMENTS:
            return _segmented_dots(block, vector)
    # One fused loop, the widening included: a product would want a wide copy first.
    return jnp.sum(block.astype(acc) * vector[None], axis=tuple(range(1, block.ndim)))


def _segmented_dots(
    block: Float[Array, "m *shape"], vector: Float[Array, "*shape"]
) -> Float[Array, " m"]:
    """``G v`` as one product with the segments of ``v``, zero elsewhere.

    Adding zeros is exact, so each sum rounds over its own segment only.
    """
    matrix, flat = _matrix(block), vector.reshape(-1)
    segment = jnp.arange(flat.size) * _SEGMENTS // max(flat.size, 1)
    own = segment[None] == jnp.arange(_SEGMENTS)[:, None]
    pieces = jnp.where(own, flat[None], jnp.zeros((), flat.dtype))
    parts = lax.dot_general(matrix, pieces, (((1,), (1,)), ((), ())), precision="highest")
    return jnp.sum(parts, axis=1)


def combine(
    block: Float[Array, "m *shape"], coefficients: Float[Array, " m"]
) -> Float[Array, "*shape"]:
    """``G^T c``: the rows added up with ``coefficients``, in the accumulation dtype."""
    acc = accumulation_dtype(block.dtype)
    coefficients = coefficients.astype(acc)
    if block.dtype == acc:
        return jnp.tensordot(coefficients, block, 1, precision="highest")
    weights = coefficients.reshape(-1, *[1] * (block.ndim - 1))
    return jnp.sum(block.astype(acc) * weights, axis=0)  # fused, as in dots


def gram(
    block: Float[Array, "m *shape"], mask: Bool[Array, "*shape"] | None = None
) -> Float[Array, "m m"]:
    """``G G^T``, or ``G_S G_S^T`` over the coordinates where ``mask`` is true."""
    matrix = _matrix(block)
    keep = None if mask is None else mask.reshape(matrix.shape[1])

    def step(total: Array, tile: Array, start: Array) -> Array:
        if keep is not None:
            part = lax.dynamic_slice_in_dim(keep, start, tile.shape[1])
            tile = jnp.where(part[None], tile, jnp.zeros((), tile.dtype))
        return total + jnp.dot(tile, tile.T, precision="highest")

    m = matrix.shape[0]
    return _fold_tiles(matrix, step, jnp.zeros((m, m), accumulation_dtype(block.dtype)))


def write_row(
    block: Float[Array, "m *shape"],
    row: Int[Array, ""],
    vector: Float[Array, "*shape"],
    where: Bool[Array, ""],
) -> tuple[Float[Array, "m *shape"], Float[Array, " m"]]:
    """Writes ``vector`` into ``row`` and returns the block and that row's ``G g``.

    Where ``where`` is false the block comes back as it was and the dot products mean
    nothing. Otherwise they are those of the row as it is stored, so that a
    low-precision block and its Gram matrix describe the same gradients.
    """
    stored = vector.astype(block.dtype)

    # A branch, not a select of the old row: XLA fuses the select into both the write and
    # the dot products and then copies the whole block twice to keep them apart.
    def write(block: Array) -> Array:
        return lax.dynamic_update_index_in_dim(block, stored, row, axis=0)

    block = lax.cond(where, write, lambda block: block, block)
    return block, dots(block, stored)


def transform(
    block: Float[Array, "m *shape"], matrix: Float[Array, "k m"]
) -> Float[Array, "k *shape"]:
    """``M G``, in the accumulation dtype."""
    acc = accumulation_dtype(block.dtype)
    return jnp.tensordot(matrix.astype(acc), block.astype(acc), 1, precision="highest")


def column_square_sums(
    block: Float[Array, "m *shape"], matrix: Float[Array, "k m"] | None = None
) -> Float[Array, "*shape"]:
    """``diag((M G)^T (M G))``, a tile at a time: ``M G`` is never stored.

    Without ``matrix`` it is the identity.
    """
    acc = accumulation_dtype(block.dtype)
    flat = _matrix(block)

    def step(out: Array, tile: Array, start: Array) -> Array:
        image = tile if matrix is None else jnp.dot(matrix.astype(acc), tile, precision="highest")
        return lax.dynamic_update_slice_in_dim(out, jnp.sum(image * image, axis=0), start, axis=0)

    out = _fold_tiles(flat, step, jnp.zeros(flat.shape[1], acc))
    return out.reshape(block.shape[1:])
