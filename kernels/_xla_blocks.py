"""The block-diagonal inverse in plain ``jax.numpy``, every block on its cheaper side.

B <= n:  F_b = lambda I + G_b^T G_b / n                       (B x B)
B > n:   F_b^-1 = (I - W^T W) / lambda,  W = L^-1 G_b,  L L^T = n lambda I + G_b G_b^T
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mfac_jax import algebra
from mfac_jax.kernels._xla import accumulation_dtype


def block_inverse_diagonal(
    block: Float[Array, "n d"], damping: Float[Array, ""], size: int
) -> Float[Array, " d"]:
    """``diag(F^-1)``, at least ``1 / diag(F)``."""
    batch = _batch(block, size)
    n = batch.shape[1]
    if size <= n:
        root = algebra.inverse_root(_fisher(batch), damping)
        return jnp.sum(root * root, axis=1).reshape(-1)
    whitened = _whitened(batch, damping)
    squares = jnp.sum(whitened * whitened, axis=1)
    fisher_diagonal = damping + jnp.sum(batch * batch, axis=1) / n
    return jnp.maximum((1 - squares) / damping, 1 / fisher_diagonal).reshape(-1)


def block_ihvp(
    block: Float[Array, "n d"], vector: Float[Array, " d"], damping: Float[Array, ""], size: int
) -> Float[Array, " d"]:
    """``F^-1 v``."""
    batch = _batch(block, size)
    vectors = vector.astype(batch.dtype).reshape(-1, size)
    if size <= batch.shape[1]:
        factor = jax.vmap(algebra.factor, (0, None))(_fisher(batch), damping)
        return jax.vmap(algebra.solve)(factor, vectors).reshape(-1)
    whitened = _whitened(batch, damping)
    dots = jnp.einsum("bnj,bj->bn", whitened, vectors, precision="highest")
    inside = jnp.einsum("bnj,bn->bj", whitened, dots, precision="highest")
    return ((vectors - inside) / damping).reshape(-1)


def _batch(block: Float[Array, "n d"], size: int) -> Float[Array, "b n B"]:
    wide = block.astype(accumulation_dtype(block.dtype))
    return jnp.moveaxis(wide.reshape(block.shape[0], -1, size), 1, 0)


def _fisher(batch: Float[Array, "b n B"]) -> Float[Array, "b B B"]:
    return jnp.einsum("bni,bnj->bij", batch, batch, precision="highest") / batch.shape[1]


def _whitened(batch: Float[Array, "b n B"], damping: Float[Array, ""]) -> Float[Array, "b n B"]:
    gram = jnp.einsum("bnj,bmj->bnm", batch, batch, precision="highest")
    inverse = algebra.inverse_root(gram, batch.shape[1] * damping)
    return jnp.einsum("bnm,bmj->bnj", inverse, batch, precision="highest")
