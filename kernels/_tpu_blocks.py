"""The block-diagonal inverse as a Pallas kernel for TPUs; every block is inverted on chip.

The kernel reads the gradients ``G_b`` (n, B) of a block of B coordinates once and writes B
results. The matrix unit forms the matrix of the cheaper side, n or B. Elimination factors it as
``L D L^T``, where L has a diagonal of ones:

    B <= n:  F_b = lambda I + G_b^T G_b / n,    W = L^-1,      F_b^-1 = W^T D^-1 W
    B > n:   A_b = n lambda I + G_b G_b^T,      W = L^-1 G_b,  F_b^-1 = (I - W^T D^-1 W) / lambda

The same elimination turns ``I`` or ``G_b`` into W.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mfac_jax.kernels._tpu import _LANES, _call, _like, _vary_alike

_SUBLANES = 16  # of bfloat16; float32 has half as many

# Columns in VMEM at a time: four blocks of 128 or two of 256, whose sweeps hide one another's
# latency. 1,024 gradients of 512 float32 numbers, and as many in flight, take 4 MiB. A matrix of
# 256 x 256 fills all vector registers.
_COLUMNS = 512
_MAX_ROWS = 1024
_MAX_SIZE = 256


def unsupported(shape: tuple[int, ...], dtype: DTypeLike) -> str | None:
    """Why these kernels cannot invert blocks (b, n, B) of this dtype; None if they can."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels need float32 or bfloat16 gradients, got {dtype.name}"
    if len(shape) != 3 or 0 in shape:
        return f"the TPU kernels need blocks (b, n, B) that are not empty, got shape {shape}"
    if shape[2] not in range(_LANES, _MAX_SIZE + 1, _LANES):
        return f"the TPU kernels need blocks of {_LANES} or {_MAX_SIZE} columns, got {shape[2]}"
    if shape[1] > _MAX_ROWS:
        return f"the TPU kernels need {_MAX_ROWS} gradients or fewer, got {shape[1]}"
    return None


def block_inverse_diagonal(
    batch: Float[Array, "b n B"], damping: Float[Array, ""], *, interpret: bool = False
) -> Float[Array, "b B"]:
    """``diag(F_b^-1)`` of every block."""
    return _run("mfac_block_inverse_diagonal", batch, damping, None, interpret)


def block_ihvp(
    batch: Float[Array, "b n B"],
    vectors: Float[Array, "b B"],
    damping: Float[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "b B"]:
    """``F_b^-1 v_b`` of every block."""
    return _run("mfac_block_ihvp", batch, damping, vectors, interpret)


def _run(
    name: str,
    batch: Float[Array, "b n B"],
    damping: Float[Array, ""],
    vectors: Float[Array, "b B"] | None,
    interpret: bool,
) -> Float[Array, "b B"]:
    count, n, size = batch.shape
    d = count * size
    # The kernel reads blocks side by side, which is the memory order of the gradients. XLA cancels
    # this transposition against the one that made the batch.
    matrix = jnp.moveaxis(batch, 0, 1).reshape(n, d)
    columns = min(_COLUMNS, d)
    rows = -(-n // _SUBLANES) * _SUBLANES
    side = min(size, rows)
    across = pl.BlockSpec((1, columns), lambda k: (0, k))
    operands = [damping.astype(jnp.float32).reshape(1), matrix]
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((rows, columns), lambda k: (0, k)),
    ]
    if vectors is not None:
        operands.append(vectors.astype(jnp.float32).reshape(1, d))
        in_specs.append(across)
    operands = list(_vary_alike(*operands))
    out = _call(
        functools.partial(_kernel, n=n, size=size),
        out_shape=_like(operands[0], (1, d), jnp.float32),
        grid=(pl.cdiv(d, columns),),
        in_specs=in_specs,
        out_specs=across,
        scratch_shapes=[
            pltpu.VMEM((columns // size, side, side), jnp.float32),
            pltpu.VMEM((columns // size, side, size), jnp.float32),
        ],
        name=name,
        interpret=interpret,
    )(*operands)
    return out.reshape(count, size)


def _kernel(damping_ref: jax.Ref, g_ref: jax.Ref, *refs: jax.Ref, n: int, size: int) -> None:
    *vector_refs, out_ref, matrices, targets = refs
    damping, direct = damping_ref[0], size <= n
    shift = damping if direct else n * damping
    side = matrices.shape[1]
    eye = _iota(side, 0) == _iota(side, 1)
    parts = [pl.ds(start, size) for start in range(0, g_ref.shape[1], size)]
    floors, fisher_diagonals = [], []

    for b, part in enumerate(parts):
        g = g_ref[:, part].astype(jnp.float32)
        # Memory below the last gradient may hold NaN.
        g = jnp.where(lax.broadcasted_iota(jnp.int32, g.shape, 0) < n, g, 0.0)
        axis = 0 if direct else 1
        matrix = lax.dot_general(g, g, (((axis,), (axis,)), ((), ())), precision="highest")
        matrix = matrix / n if direct else matrix
        matrix = jnp.where(eye, matrix + shift, matrix)
        # Rows and columns are scaled to a unit diagonal, so gradients or coordinates of very
        # different size do not disturb one another.
        scale = lax.rsqrt(jnp.sum(jnp.where(eye, matrix, 0.0), axis=0, keepdims=True))
        column = jnp.sum(jnp.where(eye, scale, 0.0), axis=1, keepdims=True)
        matrices[b] = matrix * scale * column
        targets[b] = jnp.where(eye, scale, 0.0) if direct else g * column
        floors.append(shift * scale * scale)
        fisher_diagonals.append(damping + jnp.sum(g * g, axis=0, keepdims=True) / n)

    _eliminate(matrices, targets, floors)

    for b, part in enumerate(parts):
        w, inverse_pivots = targets[b], matrices[b][:, :1]
        if vector_refs:
            vector = vector_refs[0][:, part]
            dots = jnp.sum(w * vector, axis=1, keepdims=True)
            out = jnp.sum(w * (inverse_pivots * dots), axis=0, keepdims=True)
            out_ref[:, part] = out if direct else (vector - out) / damping
        else:
            out = jnp.sum(w * w * inverse_pivots, axis=0, keepdims=True)
            out = out if direct else (1 - out) / damping
            # These bounds always hold; rounding may break them.
            out = jnp.maximum(out, 1 / fisher_diagonals[b])
            out_ref[:, part] = jnp.minimum(out, 1 / damping)


def _iota(side: int, axis: int) -> Int[Array, "s s"]:
    return lax.broadcasted_iota(jnp.int32, (side, side), axis)


def _eliminate(matrices: jax.Ref, targets: jax.Ref, floors: list[Float[Array, "1 s"]]) -> None:
    """Turns every target T into ``L^-1 T``, where ``L D L^T`` is its matrix.

    Args:
        matrices: (b, s, s), symmetric with a diagonal near 1. Afterwards every entry of row
            k is ``1 / D_k``, the inverse of its pivot.
        targets: (b, s, t).
        floors: the smallest value that the damping allows for each pivot.
    """
    count, side = matrices.shape[:2]
    lane = lax.broadcasted_iota(jnp.int32, (1, side), 1)
    sublane = lax.broadcasted_iota(jnp.int32, (side, 1), 0)
    eps = float(jnp.finfo(jnp.float32).eps)

    @pl.loop(0, side)
    def _(k: Int[Array, ""]) -> None:
        here, this = lane == k, pl.ds(k, 1)
        for b in range(count):
            matrix, row = matrices[b], matrices[b, this, :]
            pivot = jnp.sum(jnp.where(here, row, 0.0), axis=1, keepdims=True)
            floor = jnp.sum(jnp.where(here, floors[b], 0.0), axis=1, keepdims=True)
            inverse = 1 / jnp.maximum(pivot, jnp.maximum(floor, eps))
            # A pivot below eps consists of rounding errors, and so does the rest of its row.
            # It is subtracted from no other row.
            below = (sublane > k) & (pivot > eps)
            column = jnp.sum(jnp.where(here, matrix, 0.0), axis=1, keepdims=True)
            factor = jnp.where(below, column * inverse, 0.0)
            matrices[b] = matrix - factor * row
            matrices[b, this, :] = jnp.broadcast_to(inverse, row.shape)
            targets[b] -= factor * targets[b, this, :]
