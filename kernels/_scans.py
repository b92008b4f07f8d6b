"""What the rest of the library calls, each with its choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax.kernels import _dispatch, _xla, _xla_blocks


def dots(
    block: Float[Array, "t m *shape"],
    vector: Float[Array, "t *shape"],
    *,
    compensated: bool = False,
    implementation: str | None = None,
) -> Float[Array, " m"]:
    """``G v``: the dot product of every row with ``vector``.

    Args:
        block: ``G``.
        vector: ``v``, cut into tiles as the rows are.
        compensated: accumulate in two words (error-free products and sums) and round
            once at the end: float32 gradients then give dot products as if in float64. It
            reads nothing more, but takes about 20 operations an entry in place of 2.
        implementation: ``"xla"``, ``"mosaic_gpu"`` or ``"mosaic_tpu"``; by default the
            best one on each platform.

    Returns:
        ``G v``, in the accumulation dtype.

    Raises:
        ValueError: there is no such implementation, or it cannot work on such a block.
        NotImplementedError: it is not for the platform the program is compiled for.
    """
    operands: dict[str, Array | None] = {"block": block, "vector": vector}
    return _dispatch.run("dots", implementation, _xla.dots, operands, compensated=compensated)


def write_row(
    block: Float[Array, "t m *shape"],
    row: Int[Array, ""],
    vector: Float[Array, "t *shape"],
    where: Bool[Array, ""],
    *,
    compensated: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "t m *shape"], Float[Array, " m"]]:
    """Writes ``vector`` into ``row`` and returns the block and that row's ``G g``.

    Where ``where`` is false the block comes back as it was and the dot products mean
    nothing. Otherwise they are those of the row as it is stored, so that a
    low-precision block and its Gram matrix describe the same gradients. What was in the
    row before, NaN perhaps, has no part in them. ``row`` counts from the end if it is
    negative, and is moved to the nearest row if there is none such.

    The other arguments and the errors are those of :func:`dots`.
    """
    m = block.shape[1]
    operands: dict[str, Array | None] = {
        "block": block,
        "row": jnp.clip(jnp.where(row < 0, row + m, row), 0, m - 1),
        "vector": vector,
        "where": where,
    }
    return _dispatch.run(
        "write_row", implementation, _xla.write_row, operands, compensated=compensated
    )


def combine(
    block: Float[Array, "t m *shape"],
    coefficients: Float[Array, " m"],
    *,
    vector: Float[Array, "t *shape"] | None = None,
    scale: Float[Array, ""] | None = None,
    mask: Bool[Array, "t *shape"] | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "t *shape"]:
    """``G^T c``: the rows added up with ``coefficients``; or ``(v - G^T c) scale``.

    Args:
        block: ``G``.
        coefficients: ``c``.
        vector: ``v``; without it the result is ``G^T c`` times ``scale``.
        scale: a factor for the result, 1 by default.
        mask: the result is 0 where it is false.
        dtype: that of the result; the accumulation dtype by default.
        implementation: as in :func:`dots`.

    Returns:
        The combination.

    Raises:
        ValueError: as :func:`dots`.
        NotImplementedError: as :func:`dots`.
    """
    operands = {
        "block": block,
        "coefficients": coefficients,
        "vector": vector,
        "scale": scale,
        "mask": mask,
    }
    return _dispatch.run("combine", implementation, _xla.combine, operands, dtype=dtype)


def block_inverse_diagonal(
    block: Float[Array, "n d"],
    damping: Float[Array, ""],
    size: int,
    *,
    implementation: str | None = None,
) -> Float[Array, " d"]:
    """``diag(F^-1)`` of the Fisher cut into blocks of ``size`` coordinates.

    On a TPU a kernel reads each block once and keeps it on the chip until its part of the
    diagonal is written.

    Args:
        block: ``G``; whole blocks of columns.
        damping: ``lambda > 0``.
        size: columns a block has.
        implementation: as in :func:`dots`.

    Returns:
        The diagonal, positive.

    Raises:
        ValueError: as :func:`dots`, or the blocks are not whole.
        NotImplementedError: as :func:`dots`.
    """
    _check_blocks(block, size)
    operands: dict[str, Array | None] = {"block": block, "damping": damping}
    name, plain_form = "block_inverse_diagonal", _xla_blocks.block_inverse_diagonal
    return _dispatch.run(name, implementation, plain_form, operands, size=size)


def block_ihvp(
    block: Float[Array, "n d"],
    vector: Float[Array, " d"],
    damping: Float[Array, ""],
    size: int,
    *,
    implementation: str | None = None,
) -> Float[Array, " d"]:
    """``F^-1 v`` with the Fisher cut into blocks of ``size`` coordinates.

    The other arguments, the result's meaning and the errors are those of
    :func:`block_inverse_diagonal`.
    """
    _check_blocks(block, size)
    operands: dict[str, Array | None] = {"block": block, "vector": vector, "damping": damping}
    plain_form = _xla_blocks.block_ihvp
    return _dispatch.run("block_ihvp", implementation, plain_form, operands, size=size)


def _check_blocks(block: Float[Array, "n d"], size: int) -> None:
    if size < 1 or block.shape[1] % size:
        raise ValueError(f"block must be whole blocks of size={size} columns, got {block.shape}.")
