"""Functions of blocks, for :meth:`mfac_jax.rows.ColumnRows.map_blocks`.

Each function takes the gradients of a batch of blocks of one size. The functions are values: equal
functions share one compiled program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mfac_jax import algebra
from mfac_jax.inverse._block_products import block_ihvp
from mfac_jax.inverse._factored import invert_blocks
from mfac_jax.inverse._groups import GroupBlocks, WideGroups, floors, whole_blocks


@dataclass(frozen=True)
class Masked:
    """``function`` of gradients that are 0 where a mask is false.

    Attributes:
        function: ``function(batch, *rest)``.
        has_mask: whether there is a mask; it is the first of the parts.
    """

    function: Callable[..., Any]
    has_mask: bool

    def __call__(self, batch: Float[Array, "b n B"], *rest: Any) -> Any:
        if not self.has_mask:
            return self.function(batch, *rest)
        return self.function(masked(batch, rest[0]), *rest[1:])


@dataclass(frozen=True)
class MethodOfInverse:
    """A method of blocks that are inverted for this call only.

    Attributes:
        method: the name of the method; see :mod:`mfac_jax.inverse._factored`.
    """

    method: str

    def __call__(self, batch: Float[Array, "b n B"], *rest: Any) -> Any:
        *parts, damping = rest
        return getattr(invert_blocks(batch, damping), self.method)(*parts)


@dataclass(frozen=True)
class WithImplementation:
    """A function of this module or of :mod:`mfac_jax.inverse._block_products`.

    Attributes:
        function: ``function(batch, *rest, implementation=...)``.
        implementation: the implementation that the rows use.
    """

    function: Callable[..., Float[Array, "b B"]]
    implementation: str | None

    def __call__(self, batch: Float[Array, "b n B"], *rest: Any) -> Float[Array, "b B"]:
        return self.function(batch, *rest, implementation=self.implementation)


def combination(
    batch: Float[Array, "b n B"],
    damping: Float[Array, ""],
    coefficients: Float[Array, " n"],
    *,
    implementation: str | None,
) -> Float[Array, "b B"]:
    """``F_b^-1 G_b^T a``."""
    a = jnp.broadcast_to(batch.shape[1] * coefficients, batch.shape[:2])
    return _pushed_through(batch, a, damping, implementation)


def compensate(
    batch: Float[Array, "b n B"], *rest: Any, implementation: str | None
) -> Float[Array, "b B"]:
    """``G_K^T (n lambda I + G_K G_K^T)^-1 G v`` for the weights K of each block.

    Args:
        batch: the gradients of whole blocks.
        rest: the mask that selects K, if K is not the whole block; ``v``; and ``lambda``.
        implementation: the implementation that the rows use.
    """
    *masks, vectors, damping = rest
    within = masked(batch, *masks) if masks else batch
    dots = jnp.einsum("bnj,bj->bn", batch, vectors, precision="highest")
    return _pushed_through(within, dots, damping, implementation)


@dataclass(frozen=True)
class GroupsInBlocks:
    """``function`` of groups in blocks; see :meth:`FisherInverse.group_blocks`.

    Attributes:
        function: the function of the groups.
        num_vectors: the number of arguments that are parts of vectors.
        size: the number of coordinates in a group; None for a whole block.
    """

    function: Callable[..., Any]
    num_vectors: int
    size: int | None

    def __call__(self, batch: Float[Array, "b n B"], *rest: Any) -> Float[Array, "b B"]:
        parts, (damping, *constants) = rest[: self.num_vectors], rest[self.num_vectors :]
        count, _, width = batch.shape
        size = width if self.size is None else self.size
        cut = (count, width // size, size)
        inverse = invert_blocks(batch, damping).diagonal_blocks(size)
        groups = GroupBlocks(inverse, floors(batch, damping).reshape(cut))
        found = self.function(groups, *(part.reshape(cut) for part in parts), *constants)
        return found.reshape(count, width)


@dataclass(frozen=True)
class GroupsOfWhole:
    """``function`` of groups under the whole inverse; see :meth:`FisherInverse.group_blocks`.

    The gradients are those of the groups. The constants begin with the damping, ``G G^T`` and
    ``L^-1``.

    Attributes:
        function: the function of the groups.
        num_vectors: the number of arguments that are parts of vectors.
    """

    function: Callable[..., Any]
    num_vectors: int

    def __call__(self, batch: Float[Array, "b n g"], *rest: Any) -> Float[Array, "b g"]:
        parts, others = rest[: self.num_vectors], rest[self.num_vectors :]
        damping, gram, lower, *constants = others
        matrix, floor = whole_blocks(batch, lower, damping), floors(batch, damping)
        groups = GroupBlocks(matrix, floor)
        if batch.shape[2] > batch.shape[1]:
            groups = WideGroups(matrix, floor, batch, gram, damping)
        return self.function(groups, *parts, *constants)


def masked(batch: Float[Array, "b n B"], mask: Bool[Array, "b B"]) -> Float[Array, "b n B"]:
    """The gradients, 0 where the mask is false."""
    return jnp.where(mask[:, None], batch, jnp.zeros_like(batch))


def _pushed_through(
    batch: Float[Array, "b n B"],
    dots: Float[Array, "b n"],
    damping: Float[Array, ""],
    implementation: str | None,
) -> Float[Array, "b B"]:
    """``G_b^T (n lambda I + G_b G_b^T)^-1 u_b``, without a subtraction.

    By the push-through identity it equals ``(lambda I + G_b^T G_b / n)^-1 G_b^T u_b / n``. The
    smaller of the two matrices, n x n or B x B, is factored. If that is the n x n matrix, equal
    gradients share a coefficient.
    """
    n = batch.shape[1]
    if batch.shape[2] <= n:
        rhs = jnp.einsum("bn,bnj->bj", dots, batch, precision="highest") / n
        return block_ihvp(batch, rhs, damping, implementation=implementation)
    gram = jnp.einsum("bnj,bmj->bnm", batch, batch, precision="highest")

    def solve(gram: Float[Array, "n n"], dots: Float[Array, " n"]) -> Float[Array, " n"]:
        return algebra.share_between_equal_rows(
            gram,
            algebra.solve(
                algebra.factor(gram, n * damping), algebra.share_between_equal_rows(gram, dots)
            ),
        )

    return jnp.einsum("bn,bnj->bj", jax.vmap(solve)(gram, dots), batch, precision="highest")
