"""What views of rows have in common: every product is asked of the rows behind them."""

from __future__ import annotations

import abc
import dataclasses
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import GradientRows, Implementation

Self = TypeVar("Self", bound="RowsView")


class RowsView(abc.ABC):
    """Other parameters over the same rows. Implements most of :class:`GradientRows`.

    A view is a dataclass with the fields ``base`` and ``layout``; it says how trees of its
    parameters become trees of the base's and back, and gives the columns.
    """

    base: GradientRows
    layout: Layout

    @abc.abstractmethod
    def to_base(self, tree: PyTree) -> PyTree:
        """A tree of the view's parameters as one of the base's."""

    @abc.abstractmethod
    def from_base(self, tree: PyTree) -> PyTree:
        """And back."""

    @abc.abstractmethod
    def mask_to_base(self, mask: PyTree | None) -> PyTree | None:
        """The same for a mask; what the view does not show is not in it."""

    @property
    def implementation(self) -> Implementation:
        return self.base.implementation

    @property
    def num_rows(self) -> int:
        return self.base.num_rows

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def put(
        self: Self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[Self, Float[Array, " m"], Bool[Array, ""]]:
        base, dots, accepted = self.base.put(row, self._checked(gradient, "gradient"))
        return self._over(base), dots, accepted

    def write(self: Self, row: Int[Array, ""], gradient: PyTree) -> tuple[Self, Bool[Array, ""]]:
        base, accepted = self.base.write(row, self._checked(gradient, "gradient"))
        return self._over(base), accepted

    def clear(self: Self, row: Int[Array, ""]) -> Self:
        return self._over(self.base.clear(row))

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        return self.base.dots(self._checked(vector, "vector"))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        if vector is not None:
            vector = self._checked(vector, "vector")
        return self.from_base(self.base.combine(coefficients, vector=vector, scale=scale))

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        return self.base.gram(self.mask_to_base(mask))

    def restrict(self: Self, mask: PyTree) -> Self:
        return self._over(self.base.restrict(self.mask_to_base(mask)))

    def transform(self: Self, matrix: Float[Array, "k m"], *, lower: bool = False) -> Self:
        return self._over(self.base.transform(matrix, lower=lower))

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        return self.from_base(self.base.column_square_sums(matrix, lower=lower))

    def _checked(self, tree: PyTree, name: str) -> PyTree:
        self.layout.check(tree, name)
        return self.to_base(tree)

    def _over(self: Self, base: GradientRows) -> Self:
        return dataclasses.replace(self, base=base)  # type: ignore[type-var]
