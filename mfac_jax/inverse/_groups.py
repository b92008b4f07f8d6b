"""The blocks ``[F^-1]_QQ`` of groups of coordinates Q, and the cost of removing a group.

If the weights of Q go and all others compensate, the quadratic model rises by
``w_Q^T ([F^-1]_QQ)^-1 w_Q / 2``. Elimination computes this cost: that of the first weight, then
that of the second weight once the first is gone, and so on. For any positive definite ``F`` a pivot
is at least ``1 / F_jj``. Every pivot is raised to this bound if rounding takes it below.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from mfac_jax import algebra

# Groups of at most this many weights are eliminated weight by weight, all groups of a batch at the
# same time. Larger groups are factored.
_LARGEST_ELIMINATED = 16


@dataclass(frozen=True)
class GroupBlocks:
    """``[F^-1]_QQ`` of a batch of groups.

    Attributes:
        matrix: ``[F^-1]_QQ``; (``*b``, g, g).
        floor: ``1 / F_jj``, the lower bound of a pivot; (``*b``, g).
    """

    matrix: Float[Array, "*b g g"]
    floor: Float[Array, "*b g"]

    def inverse_quadratic_form(self, weights: Float[Array, "*b g"]) -> Float[Array, "*b"]:
        """``w_Q^T ([F^-1]_QQ)^-1 w_Q`` of every group."""
        inverse, floor, size = self.matrix, self.floor, weights.shape[-1]
        if size > _LARGEST_ELIMINATED:
            own = jnp.maximum(jnp.diagonal(inverse, axis1=-2, axis2=-1), floor)
            eye = jnp.broadcast_to(jnp.eye(size, dtype=bool), inverse.shape)
            root = algebra.inverse_root(
                jnp.where(eye, jnp.expand_dims(own, -1), inverse), jnp.zeros((), inverse.dtype)
            )
            half = jnp.einsum("...ij,...j->...i", root, weights, precision="highest")
            return jnp.sum(half * half, axis=-1)
        total = jnp.zeros_like(weights[..., 0])
        for j in range(size):
            pivot = jnp.maximum(inverse[..., j, j], floor[..., j])
            column = inverse[..., :, j] / pivot[..., None]
            total += weights[..., j] ** 2 / pivot
            weights = weights - column * weights[..., j, None]
            inverse = inverse - column[..., :, None] * inverse[..., j, None, :]
        return total


@dataclass(frozen=True)
class WideGroups(GroupBlocks):
    """Groups of more than n weights under the whole inverse, whose cost needs no ``matrix``.

    By the Woodbury identity, with ``A = n lambda I + G G^T`` and ``u = G_Q w_Q``,

        w_Q^T ([F^-1]_QQ)^-1 w_Q = lambda (|w_Q|^2 + u^T (A - G_Q G_Q^T)^-1 u).

    Inside ``jit``, ``matrix`` is computed only if it is used.

    Attributes:
        matrix: as in :class:`GroupBlocks`.
        floor: as in :class:`GroupBlocks`.
        batch: ``G_Q`` of every group.
        gram: ``G G^T``.
        damping: ``lambda``.
    """

    batch: Float[Array, "b n g"]
    gram: Float[Array, "n n"]
    damping: Float[Array, ""]

    def inverse_quadratic_form(self, weights: Float[Array, "b g"]) -> Float[Array, " b"]:
        """``w_Q^T ([F^-1]_QQ)^-1 w_Q`` of every group."""
        own = jnp.einsum("bng,bmg->bnm", self.batch, self.batch, precision="highest")
        dots = jnp.einsum("bng,bg->bn", self.batch, weights, precision="highest")
        rest = jnp.broadcast_to(self.gram, own.shape) - own
        root = algebra.inverse_root(rest, self.gram.shape[0] * self.damping)
        half = jnp.einsum("bnm,bm->bn", root, dots, precision="highest")
        squares = jnp.sum(weights * weights, axis=1) + jnp.sum(half * half, axis=1)
        return self.damping * squares


def whole_blocks(
    batch: Float[Array, "b n g"], lower: Float[Array, "n n"], damping: Float[Array, ""]
) -> Float[Array, "b g g"]:
    """``[F^-1]_QQ = (I - W_Q^T W_Q) / lambda`` with ``W_Q = L^-1 G_Q``."""
    whitened = jnp.einsum("nm,bmg->bng", lower, batch, precision="highest")
    inner = jnp.einsum("bng,bnh->bgh", whitened, whitened, precision="highest")
    eye = jnp.broadcast_to(jnp.eye(batch.shape[2], dtype=inner.dtype), inner.shape)
    return (eye - inner) / damping


def floors(batch: Float[Array, "b n B"], damping: Float[Array, ""]) -> Float[Array, "b B"]:
    """``1 / F_jj``."""
    return 1 / (damping + jnp.sum(batch * batch, axis=1) / batch.shape[1])
