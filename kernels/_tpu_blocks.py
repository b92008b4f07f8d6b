"""The block-diagonal inverse as a Pallas kernel for TPUs, every block inverted on chip.

A block of B coordinates is read once, as its gradients ``G_b`` (n, B), and leaves as the
B numbers that were asked for. In between lies a matrix of the cheaper side, which the
matrix unit forms and elimination turns into ``L D L^T`` (L with a diagonal of ones):

    B <= n:  F_b = lambda I + G_b^T G_b / n,    W = L^-1,      F_b^-1 = W^T D^-1 W
    B > n:   A_b = n lambda I + G_b G_b^T,      W = L^-1 G_b,  F_b^-1 = (I - W^T D^-1 W) / lambda

W is what the same elimination makes of ``I`` or ``G_b`` beside the matrix.
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

# Columns in VMEM at a time: four blocks of 128 or two of 256, whose sweeps hide one
# another's latency. 1,024 gradients of 512 float32 numbers, and as many on their way, are
# 4 MiB; a matrix of 256 x 256 fills as many vector registers as there are.
_COLUMNS = 512
_MAX_ROWS = 1024
_MAX_SIZE = 256


def unsupported_blocks(shape: tuple[int, ...], dtype: DTypeLike, size: int) -> str | None:
    """Why this cannot be cut into blocks of ``size`` columns and inverted, or None."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels need float32 or bfloat16 gradients, got {dtype.name}"
    if size not in range(_LANES, _MAX_SIZE + 1, _LANES):
        return f"the TPU kernels need blocks of {_LANES} or {_MAX_SIZE} columns, got {size}"
    if len(shape) != 2 or 0 in shape or shape[1] % size:
        return f"the TPU kernels need whole blocks of {size} columns, got shape {shape}"
    if shape[0] > _MAX_ROWS:
        return f"the TPU kernels need {_MAX_ROWS} gradients or fewer, got {shape[0]}"
    return None


def block_inverse_diagonal(
    block: Float[Array, "n d"],
    damping: Float[Array, ""],
    size: int,
    *,
    interpret: bool = False,
) -> Float[Array, " d"]:
    """``diag(F^-1)`` of the Fisher that is cut into blocks of ``size`` coordinates."""
    return _run("mfac_block_inverse_diagonal", block, damping, None, size, interpret)


def block_ihvp(
    block: Float[Array, "n d"],
    vector: Float[Array, " d"],
    damping: Float[Array, ""],
    size: int,
    *,
    interpret: bool = False,
) -> Float[Array, " d"]:
    """``F^-1 v`` with the Fisher that is cut into blocks of ``size`` coordinates."""
    return _run("mfac_block_ihvp", block, damping, vector, size, interpret)


def _run(
    name: str,
    block: Float[Array, "n d"],
    damping: Float[Array, ""],
    vector: Float[Array, " d"] | None,
    size: int,
    interpret: bool,
) -> Float[Array, " d"]:
    n, d = block.shape
    columns = min(_COLUMNS, d)
    rows = -(-n // _SUBLANES) * _SUBLANES
    side = min(size, rows)
    across = pl.BlockSpec((1, columns), lambda k: (0, k))
    operands = [damping.astype(jnp.float32).reshape(1), block]
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((rows, columns), lambda k: (0, k)),
    ]
    if vector is not None:
        operands.append(vector.astype(jnp.float32)[None])
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
    return out[0]


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
        # Below the last gradient memory may hold NaN.
        g = jnp.where(lax.broadcasted_iota(jnp.int32, g.shape, 0) < n, g, 0.0)
        axis = 0 if direct else 1
        matrix = lax.dot_general(g, g, (((axis,), (axis,)), ((), ())), precision="highest")
        matrix = matrix / n if direct else matrix
        matrix = jnp.where(eye, matrix + shift, matrix)
        # Rows and columns are scaled to a unit diagonal, hence gradients or coordinates
        # of very different size do not disturb one another.
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
            # Rounding may leave nothing of either; these bounds always hold.
            out = jnp.maximum(out, 1 / fisher_diagonals[b])
            out_ref[:, part] = jnp.minimum(out, 1 / damping)


def _iota(side: int, axis: int) -> Int[Array, "s s"]:
    return lax.broadcasted_iota(jnp.int32, (side, side), axis)


def _eliminate(matrices: jax.Ref, targets: jax.Ref, floors: list[Float[Array, "1 s"]]) -> None:
    """Turns every target T into ``L^-1 T``, where ``L D L^T`` is its matrix.

    Args:
        matrices: (b, s, s), symmetric with a diagonal near 1; afterwards row k holds
            ``1 / D_k``, the inverse of its pivot, throughout.
        targets: (b, s, t).
        floors: what the damping alone leaves of each pivot.
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
            # A pivot below eps is made of rounding errors, and so is the rest of its row:
            # no other row loses anything to it.
            below = (sublane > k) & (pivot > eps)
            column = jnp.sum(jnp.where(here, matrix, 0.0), axis=1, keepdims=True)
            factor = jnp.where(below, column * inverse, 0.0)
            matrices[b] = matrix - factor * row
            matrices[b, this, :] = jnp.broadcast_to(inverse, row.shape)
            targets[b] -= factor * targets[b, this, :]
