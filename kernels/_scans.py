"""The operations that the rest of the library calls, each with its choice of implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax.kernels import _dispatch, _xla, backends

# By default a scan of fewer entries runs in plain XLA: 16 MiB of float32 stay in the second-level
# cache of a GPU from one step to the next, so there is no bandwidth to gain. The number is not
# measured. TPUs use the same number for lack of a better one.
MIN_ENTRIES = 2**22


def dots(
    block: Float[Array, "t m *shape"],
    vector: Float[Array, "t *shape"],
    *,
    implementation: str | None = None,
) -> Float[Array, " m"]:
    """``G v``: the dot product of every row with ``vector``.

    Args:
        block: ``G``.
        vector: ``v``, cut into tiles like the rows.
        implementation: one of :func:`mfac_jax.kernels.backends.names`; by default the best
            one on each platform.

    Returns:
        ``G v``, in the accumulation dtype.

    Raises:
        ValueError: there is no such implementation, or it does not support this block.
        NotImplementedError: the program is compiled for a platform that the implementation
            does not support.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import kernels
        >>> block = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])  # one tile, two gradients
        >>> kernels.dots(block, jnp.array([[1.0, -1.0]]))
        Array([-1., -1.], dtype=float32)
    """
    return _scan("dots", implementation, _xla.dots, block, vector=vector)


def write_row(
    block: Float[Array, "t m *shape"],
    row: Int[Array, ""],
    vector: Float[Array, "t *shape"],
    where: Bool[Array, ""],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "t m *shape"], Float[Array, " m"]]:
    """Writes ``vector`` into ``row`` and returns the block and that row's ``G g``.

    The dot products use the row as it is stored, so a low-precision block and its Gram matrix
    describe the same gradients. They do not depend on the old contents of the row, which may be
    NaN.

    Args:
        block: ``G``.
        row: the number of the row, 0 to m - 1. A number out of range is moved to the nearest
            row, because a kernel would write outside of the block.
        vector: ``g``, cut into tiles like the rows.
        where: if false, the block is unchanged and the dot products have no meaning.
        implementation: as in :func:`dots`, with its errors.

    Returns:
        The block, and ``G g`` in the accumulation dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import kernels
        >>> block = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
        >>> gradient = jnp.array([[5.0, 6.0]])
        >>> block, dots = kernels.write_row(block, jnp.int32(1), gradient, jnp.bool_(True))
        >>> dots
        Array([17., 61.], dtype=float32)
    """
    row = jnp.clip(row, 0, block.shape[1] - 1)
    operands = {"row": row, "vector": vector, "where": where}
    return _scan("write_row", implementation, _xla.write_row, block, **operands)


def combine(
    block: Float[Array, "t m *shape"],
    coefficients: Float[Array, " m"],
    *,
    vector: Float[Array, "t *shape"] | None = None,
    scale: Float[Array, ""] | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "t *shape"]:
    """``G^T c``, the sum of the rows weighted by ``coefficients``; or ``(v - G^T c) scale``.

    Args:
        block: ``G``.
        coefficients: ``c``.
        vector: ``v``; without it the result is ``G^T c`` times ``scale``.
        scale: the factor of the result; 1 by default.
        dtype: the dtype of the result; the accumulation dtype by default.
        implementation: as in :func:`dots`, with its errors.

    Returns:
        The combination.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import kernels
        >>> block = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
        >>> kernels.combine(block, jnp.array([2.0, 1.0]))
        Array([[5., 8.]], dtype=float32)
    """
    operands = {"coefficients": coefficients, "vector": vector, "scale": scale}
    out = _scan("combine", implementation, _xla.combine, block, **operands)
    return out if dtype is None else out.astype(dtype)


def _scan(
    operation: str,
    implementation: str | None,
    plain: Callable[..., Any],
    block: Float[Array, "t m *shape"],
    **operands: Array | None,
) -> Any:
    if implementation is None and block.size < MIN_ENTRIES:
        implementation = backends.PLAIN
    given = {name: value for name, value in operands.items() if value is not None}
    return _dispatch.run(operation, implementation, plain, {"block": block, **given})


def block_inverse_diagonal(
    batch: Float[Array, "b n B"],
    damping: Float[Array, ""],
    *,
    plain: Callable[..., Float[Array, "b B"]],
    implementation: str | None = None,
) -> Float[Array, "b B"]:
    """``diag(F_b^-1)`` of the Fisher of every block of coordinates, by a kernel or ``plain``.

    Args:
        batch: ``G_b``, the gradients of b blocks of B coordinates.
        damping: ``lambda > 0``.
        plain: the same function of ``batch`` and ``damping`` in ``jax.numpy``. It runs if no
            kernel can. It is a key of the cache of programs, so every call needs the same object.
        implementation: as in :func:`dots`, with its errors.

    Returns:
        The diagonals, positive.
    """
    operands = {"batch": batch, "damping": damping}
    return _dispatch.run("block_inverse_diagonal", implementation, plain, operands)


def block_ihvp(
    batch: Float[Array, "b n B"],
    vectors: Float[Array, "b B"],
    damping: Float[Array, ""],
    *,
    plain: Callable[..., Float[Array, "b B"]],
    implementation: str | None = None,
) -> Float[Array, "b B"]:
    """``F_b^-1 v_b`` with the Fisher of every block of coordinates, by a kernel or ``plain``.

    Args:
        batch: ``G_b``, the gradients of b blocks of B coordinates.
        vectors: ``v_b``.
        damping: ``lambda > 0``.
        plain: the same function of ``batch``, ``vectors`` and ``damping``, as in
            :func:`block_inverse_diagonal`.
        implementation: as in :func:`dots`, with its errors.

    Returns:
        The products.
    """
    operands = {"batch": batch, "vectors": vectors, "damping": damping}
    return _dispatch.run("block_ihvp", implementation, plain, operands)
