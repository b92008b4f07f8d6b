"""What the algorithms ask of stored gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mfac_jax._layout import Layout, PyTree

Self = TypeVar("Self", bound="GradientRows")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Implementation:
    """Which implementation ``put``, ``dots`` and ``combine`` of rows use.

    Static, a pytree node without leaves.

    Attributes:
        name: one of ``mfac_jax.kernels.IMPLEMENTATIONS``, or ``None`` for the best one
            on each platform.
    """

    name: str | None = None


@runtime_checkable
class GradientRows(Protocol):
    """``m`` gradients ``g_1 .. g_m`` in R^d, the rows of ``G``; an immutable pytree.

    Vectors of R^d go in and out as trees with the structure of the parameters;
    those that come out are in the accumulation dtype (float32 at least).
    """

    @property
    def layout(self) -> Layout:
        """The parameters the gradients belong to."""
        ...

    @property
    def implementation(self) -> Implementation:
        """Of the scans."""
        ...

    @property
    def num_rows(self) -> int:
        """``m``; rows not yet written are zero."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """The accumulation dtype, which is also that of every n x n quantity."""
        ...

    def put(
        self: Self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[Self, Float[Array, " m"], Bool[Array, ""]]:
        """Writes a gradient; returns the rows, ``G g`` and whether it was accepted.

        ``G g`` is taken with the gradient as stored and with the new row in place. A
        gradient that is not finite or too large (``is_small_enough``) is not
        written: then the rows are as before and ``G g`` means nothing.
        """
        ...

    def write(self: Self, row: Int[Array, ""], gradient: PyTree) -> tuple[Self, Bool[Array, ""]]:
        """:meth:`put` without ``G g``: no scan."""
        ...

    def clear(self: Self, row: Int[Array, ""]) -> Self:
        """Sets a row to zero."""
        ...

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        """``G v``."""
        ...

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        """``G^T c``, or ``v - G^T c``, times ``scale``; in one pass."""
        ...

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        """``G G^T``, over the coordinates where ``mask`` is true if there is one."""
        ...

    def restrict(self: Self, mask: PyTree) -> Self:
        """The rows with zeros where ``mask`` is false."""
        ...

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> GradientRows:
        """``M G`` as rows of its own, in the accumulation dtype.

        ``lower`` says that ``M`` is lower triangular, which saves time.
        """
        ...

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        """``diag((M G)^T (M G))``, without storing ``M G``; ``M = I`` if not given."""
        ...

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        """The coordinates ``start .. start + size - 1`` of every row."""
        ...

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        """Single coordinates of every row."""
        ...


def is_small_enough(square: Float[Array, ""], num_rows: int) -> Bool[Array, ""]:
    """Whether ``|g|^2`` is finite, and so small that sums over the rows stay finite too."""
    return square <= jnp.finfo(square.dtype).max / (4 * num_rows)


def check_rows(rows: Any) -> None:
    """``rows`` are gradient rows.

    Raises:
        TypeError: they are not.
    """
    if not isinstance(rows, GradientRows):
        raise TypeError(
            "rows must be gradient rows (from mfac_jax.collect_gradients or "
            f"mfac_jax.rows.as_rows), got {type(rows).__name__}."
        )
