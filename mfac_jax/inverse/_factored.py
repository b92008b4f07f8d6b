"""Blocks of the Fisher, inverted on their cheaper side.

A block of B coordinates has the gradients ``G_b`` (n, B). If ``B <= n``, the B x B matrix
``F_b = lambda I + G_b^T G_b / n`` is factored: ``F_b^-1 = X^T X`` with ``X = L^-1``. This is
cheaper and free of cancellation. If ``B > n``, the gradients are whitened. Blocks of one size
are one batch.

Both classes have the same methods: ``apply`` (``F_b^-1 v_b``), ``diagonal``, ``diagonal_blocks``,
``entries``, ``quadratic_form``, ``log_det`` and ``sample``.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import algebra


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DirectBlocks:
    """Blocks with B <= n: ``F_b^-1 = X^T X``.

    Attributes:
        root: ``X``, lower triangular; (b, B, B).
    """

    root: Float[Array, "b B B"]

    @classmethod
    def build(cls, batch: Float[Array, "b n B"], damping: Float[Array, ""]) -> DirectBlocks:
        fisher = jnp.einsum("bni,bnj->bij", batch, batch, precision="highest") / batch.shape[1]
        return cls(algebra.inverse_root(fisher, damping))

    def apply(self, vectors: Float[Array, "b B"]) -> Float[Array, "b B"]:
        half = jnp.einsum("bij,bj->bi", self.root, vectors, precision="highest")
        return jnp.einsum("bij,bi->bj", self.root, half, precision="highest")

    def diagonal(self) -> Float[Array, "b B"]:
        return jnp.sum(self.root * self.root, axis=1)

    def diagonal_blocks(self, size: int) -> Float[Array, "b k g g"]:
        cut = self.root.reshape(*self.root.shape[:2], -1, size)
        return jnp.einsum("bikg,bikh->bkgh", cut, cut, precision="highest")

    def entries(
        self, block: Int[Array, " k"], i: Int[Array, " k"], j: Int[Array, " k"]
    ) -> Float[Array, " k"]:
        return jnp.sum(self.root[block, :, i] * self.root[block, :, j], axis=1)

    def quadratic_form(self, vectors: Float[Array, "b B"]) -> Float[Array, " b"]:
        half = jnp.einsum("bij,bj->bi", self.root, vectors, precision="highest")
        return jnp.sum(half * half, axis=1)

    def log_det(self, there: Bool[Array, "b B"]) -> Float[Array, " b"]:
        """``log det F_b^-1`` over the coordinates that are there; others are padding."""
        logs = jnp.log(jnp.diagonal(self.root, axis1=1, axis2=2))
        return 2.0 * jnp.sum(jnp.where(there, logs, jnp.zeros_like(logs)), axis=1)

    def sample(
        self, noise: Float[Array, "b B"], inner_noise: Float[Array, "b B"]
    ) -> Float[Array, "b B"]:
        del inner_noise
        return jnp.einsum("bij,bi->bj", self.root, noise, precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WhitenedBlocks:
    """Blocks with B > n: ``F_b^-1 = (I - W_b^T W_b) / lambda``.

    Attributes:
        whitened: ``W_b``; (b, n, B).
        factor: the factor of ``A_b = n lambda I + G_b G_b^T``; (b, n, n).
        fisher_diagonal: the diagonal of ``F_b``; (b, B).
        damping: ``lambda`` of every block; (b,).
    """

    whitened: Float[Array, "b n B"]
    factor: algebra.Factor
    fisher_diagonal: Float[Array, "b B"]
    damping: Float[Array, " b"]

    @classmethod
    def build(cls, batch: Float[Array, "b n B"], damping: Float[Array, ""]) -> WhitenedBlocks:
        n = batch.shape[1]
        gram = jnp.einsum("bnj,bmj->bnm", batch, batch, precision="highest")
        factor = jax.vmap(algebra.factor, (0, None))(gram, n * damping)
        inverse = jax.vmap(algebra.inverse_lower)(factor)
        return cls(
            whitened=jnp.einsum("bnm,bmj->bnj", inverse, batch, precision="highest"),
            factor=factor,
            fisher_diagonal=damping + jnp.sum(batch * batch, axis=1) / n,
            damping=jnp.broadcast_to(damping, batch.shape[:1]),
        )

    def apply(self, vectors: Float[Array, "b B"]) -> Float[Array, "b B"]:
        dots = jnp.einsum("bnj,bj->bn", self.whitened, vectors, precision="highest")
        inside = jnp.einsum("bnj,bn->bj", self.whitened, dots, precision="highest")
        return (vectors - inside) / self.damping[:, None]

    def diagonal(self) -> Float[Array, "b B"]:
        squares = jnp.sum(self.whitened * self.whitened, axis=1)
        return jnp.maximum((1 - squares) / self.damping[:, None], 1 / self.fisher_diagonal)

    def diagonal_blocks(self, size: int) -> Float[Array, "b k g g"]:
        cut = self.whitened.reshape(*self.whitened.shape[:2], -1, size)
        inner = jnp.einsum("bnkg,bnkh->bkgh", cut, cut, precision="highest")
        own = self.diagonal().reshape(-1, cut.shape[2], size, 1)
        is_own = jnp.broadcast_to(jnp.eye(size, dtype=bool), inner.shape)
        return jnp.where(is_own, own, -inner / self.damping[:, None, None, None])

    def entries(
        self, block: Int[Array, " k"], i: Int[Array, " k"], j: Int[Array, " k"]
    ) -> Float[Array, " k"]:
        inner = jnp.sum(self.whitened[block, :, i] * self.whitened[block, :, j], axis=1)
        floor = 1 / self.fisher_diagonal[block, i]
        damping = self.damping[block]
        diagonal = jnp.maximum((1 - inner) / damping, floor)
        return jnp.where(i == j, diagonal, -inner / damping)

    def quadratic_form(self, vectors: Float[Array, "b B"]) -> Float[Array, " b"]:
        dots = jnp.einsum("bnj,bj->bn", self.whitened, vectors, precision="highest")
        inside = jnp.einsum("bnj,bn->bj", self.whitened, dots, precision="highest")
        half = jax.vmap(algebra.transposed_half_solve)(self.factor, dots)
        n = self.whitened.shape[1]
        outside = jnp.sum((vectors - inside) ** 2, axis=1)
        return outside / self.damping + n * jnp.sum(half * half, axis=1)

    def log_det(self, there: Bool[Array, "b B"]) -> Float[Array, " b"]:
        """``log det F_b^-1`` over the coordinates that are there; others are padding."""
        n, log_lambda = self.whitened.shape[1], jnp.log(self.damping)
        dets = jax.vmap(algebra.log_det)(self.factor)
        size = jnp.sum(there, axis=1).astype(dets.dtype)
        return n * (jnp.log(n) + log_lambda) - dets - size * log_lambda

    def sample(
        self, noise: Float[Array, "b B"], inner_noise: Float[Array, "b B"]
    ) -> Float[Array, "b B"]:
        n, root = self.whitened.shape[1], jnp.sqrt(self.damping)[:, None]
        z_n = root * jnp.sqrt(n).astype(noise.dtype) * inner_noise[:, :n]
        solved = jax.vmap(algebra.half_solve)(self.factor, z_n)
        dots = jnp.einsum("bnj,bj->bn", self.whitened, noise, precision="highest")
        inside = jnp.einsum("bnj,bn->bj", self.whitened, solved - dots, precision="highest")
        return (noise + inside) / root


Inverted = DirectBlocks | WhitenedBlocks


def invert_blocks(batch: Float[Array, "b n B"], damping: Float[Array, ""]) -> Inverted:
    """Inverts blocks of one size on their cheaper side."""
    side = DirectBlocks if batch.shape[2] <= batch.shape[1] else WhitenedBlocks
    return side.build(batch, damping)
