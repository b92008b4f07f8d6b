"""Blocks of the Fisher on their cheaper side: the diagonal of ``F_b^-1``, and ``F_b^-1 v_b``.

A block of B coordinates has the gradients ``G_b`` (n, B) and the Fisher
``F_b = lambda I + G_b^T G_b / n``. Blocks of one size are one batch (b, n, B).

    B <= n:  F_b is factored                                           (B x B)
    B > n:   F_b^-1 = (I - W^T W) / lambda,  W = L^-1 G_b,
             L L^T = n lambda I + G_b G_b^T                            (n x n)

On a TPU a kernel reads each block once and keeps it on the chip until its result is written.
On other platforms, and for blocks that the kernel does not support, the plain forms below run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mfac_jax import algebra, kernels
from mfac_jax.kernels._xla import accumulation_dtype
from mfac_jax.kernels.backends import for_operation


def block_inverse_diagonal(
    batch: Float[Array, "b n B"],
    damping: Float[Array, ""],
    *,
    implementation: str | None = None,
) -> Float[Array, "b B"]:
    """``diag(F_b^-1)`` of every block.

    Args:
        batch: ``G_b`` of every block.
        damping: ``lambda > 0``.
        implementation: the implementation that the rows use. The plain form replaces a backend
            that has no kernel for blocks.

    Returns:
        The diagonals, positive, in the accumulation dtype of ``batch``.
    """
    chosen = for_operation(implementation, "block_inverse_diagonal")
    return kernels.block_inverse_diagonal(
        batch, damping, plain=_inverse_diagonal, implementation=chosen
    )


def block_ihvp(
    batch: Float[Array, "b n B"],
    vectors: Float[Array, "b B"],
    damping: Float[Array, ""],
    *,
    implementation: str | None = None,
) -> Float[Array, "b B"]:
    """``F_b^-1 v_b`` of every block.

    Args:
        batch: ``G_b`` of every block.
        vectors: ``v_b`` of every block.
        damping: ``lambda > 0``.
        implementation: as in :func:`block_inverse_diagonal`.

    Returns:
        The products, in the accumulation dtype of ``batch``.
    """
    chosen = for_operation(implementation, "block_ihvp")
    return kernels.block_ihvp(batch, vectors, damping, plain=_ihvp, implementation=chosen)


def _inverse_diagonal(
    batch: Float[Array, "b n B"], damping: Float[Array, ""]
) -> Float[Array, "b B"]:
    """The plain form of :func:`block_inverse_diagonal`; at least ``1 / diag(F_b)``."""
    batch = _widened(batch)
    _, n, size = batch.shape
    if size <= n:
        root = algebra.inverse_root(_fisher(batch), damping)
        return jnp.sum(root * root, axis=1)
    whitened = _whitened(batch, damping)
    squares = jnp.sum(whitened * whitened, axis=1)
    fisher_diagonal = damping + jnp.sum(batch * batch, axis=1) / n
    return jnp.maximum((1 - squares) / damping, 1 / fisher_diagonal)


def _ihvp(
    batch: Float[Array, "b n B"], vectors: Float[Array, "b B"], damping: Float[Array, ""]
) -> Float[Array, "b B"]:
    """The plain form of :func:`block_ihvp`."""
    batch = _widened(batch)
    vectors = vectors.astype(batch.dtype)
    _, n, size = batch.shape
    if size <= n:
        factor = jax.vmap(algebra.factor, (0, None))(_fisher(batch), damping)
        return jax.vmap(algebra.solve)(factor, vectors)
    whitened = _whitened(batch, damping)
    dots = jnp.einsum("bnj,bj->bn", whitened, vectors, precision="highest")
    inside = jnp.einsum("bnj,bn->bj", whitened, dots, precision="highest")
    return (vectors - inside) / damping


def _widened(batch: Float[Array, "b n B"]) -> Float[Array, "b n B"]:
    return batch.astype(accumulation_dtype(batch.dtype))


def _fisher(batch: Float[Array, "b n B"]) -> Float[Array, "b B B"]:
    """``G_b^T G_b / n``, without the damping."""
    return jnp.einsum("bni,bnj->bij", batch, batch, precision="highest") / batch.shape[1]


def _whitened(batch: Float[Array, "b n B"], damping: Float[Array, ""]) -> Float[Array, "b n B"]:
    """``W = L^-1 G_b``."""
    gram = jnp.einsum("bnj,bmj->bnm", batch, batch, precision="highest")
    inverse = algebra.inverse_root(gram, batch.shape[1] * damping)
    return jnp.einsum("bnm,bmj->bnj", inverse, batch, precision="highest")
