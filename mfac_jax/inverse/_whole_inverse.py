"""The whole inverse, from G and the factor of the n x n matrix ``A = n lambda I + G G^T``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mfac_jax import algebra
from mfac_jax._layout import PyTree
from mfac_jax.inverse import _whole_algebra
from mfac_jax.inverse._base import FisherInverse
from mfac_jax.inverse._block_functions import GroupsOfWhole
from mfac_jax.inverse._coordinates import Pairs
from mfac_jax.rows import GradientRows, Partition
from mfac_jax.rows._base import check_columns


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeInverse(FisherInverse):
    """:class:`FisherInverse` of one block.

    Attributes:
        gram: ``G G^T`` over the mask; (n, n).
        factor: ``L`` of ``A = n lambda I + G G^T``.
        whitened: ``W = L^-1 G``; None until :meth:`whiten` stores it.
    """

    gram: Float[Array, "n n"]
    factor: algebra.Factor
    whitened: GradientRows | None = None

    @property
    def is_whole(self) -> bool:
        return True

    def _ihvp(self, tree: PyTree) -> PyTree:
        inside = self._where_in(tree)
        solved = self._solve(self.rows.dots(inside))
        out = self.rows.combine(solved, vector=inside, scale=1 / self.damping)
        if self.mask is not None:
            out = _whole_algebra.where_or_scaled(self.mask, out, tree, self.damping)
        return out

    def _combination(self, a: Float[Array, " n"]) -> PyTree:
        return self._where_in(self.rows.combine(self._shared_solve(a, self.rows.num_rows)))

    def _compensate(self, tree: PyTree) -> PyTree:
        return self._where_in(self.rows.combine(self._shared_solve(self.rows.dots(tree), 1)))

    def diagonal(self) -> PyTree:
        rows = self.rows
        if self.whitened is None:
            lower = _whole_algebra.inverse_lower(self.factor)
            squares, inner = rows.both_column_square_sums(lower, lower=True)
        else:
            squares, inner = rows.column_square_sums(), self.whitened.column_square_sums()
        return _whole_algebra.diagonal(
            inner, squares, self.damping, self.mask, num_rows=rows.num_rows
        )

    def _group_blocks(
        self, groups: Any, function: Callable[..., Any], vectors: tuple[PyTree, ...], constants: Any
    ) -> Any:
        if not isinstance(groups, Partition):
            groups = self._neighbours(groups)
        constants = (self.gram, _whole_algebra.inverse_lower(self.factor), *constants)
        of_whole = GroupsOfWhole(function, len(vectors))
        return self._map("group_blocks", groups, of_whole, *vectors, constants=constants)

    def _entries(self, pairs: Pairs) -> Float[Array, "..."]:
        g = self._columns("entries")
        given, whitened = (g.take(pairs.rows), g.take(pairs.columns)), None
        if self.whitened is not None:
            w = check_columns(self.whitened, "whitened rows")
            whitened = w.take(pairs.rows), w.take(pairs.columns)
        layout = g.layout
        return _whole_algebra.entries(
            pairs, given, whitened, self.factor, self.damping, layout, self.mask
        )

    def _quadratic_form(self, tree: PyTree) -> Float[Array, ""]:
        inside = self._where_in(tree)
        solved = self._solve(self.rows.dots(inside))
        outside = self.rows.combine(solved, vector=inside)
        if self.mask is not None:
            outside = _whole_algebra.where_or_scaled(
                self.mask, outside, tree, jnp.ones_like(self.damping)
            )
        return _whole_algebra.sum_of_squares(outside, solved, self.damping)

    def log_det(self) -> Float[Array, ""]:
        n, log_lambda = self.rows.num_rows, jnp.log(self.damping)
        determinant = algebra.log_det(self.factor) - n * (jnp.log(n) + log_lambda)
        return -(self.rows.layout.size * log_lambda + determinant)

    def _sample(self, noise: PyTree, key: Key[Array, ""]) -> PyTree:
        n, dtype = self.rows.num_rows, self.rows.dtype
        z_n = jax.random.normal(key, (n,), dtype)
        inner = jnp.sqrt(self.damping) * jnp.sqrt(n).astype(dtype) * z_n
        solved = self._solve(inner - self.rows.dots(self._where_in(noise)))
        return _whole_algebra.sample(noise, self._where_in(self.rows.combine(solved)), self.damping)

    def whiten(self) -> WholeInverse:
        lower = _whole_algebra.inverse_lower(self.factor)
        return replace(self, whitened=self.rows.transform(lower, lower=True))

    def _solve(self, dots: Float[Array, " n"]) -> Float[Array, " n"]:
        return _whole_algebra.refined_solve(self.factor, self.gram, self.damping, dots)

    def _shared_solve(self, rhs: Float[Array, " n"], scale: int) -> Float[Array, " n"]:
        """``scale A^-1 b`` for a product with ``G^T``; one program for every scale."""
        number = np.asarray(scale, self.rows.dtype)
        return _whole_algebra.shared_solve(self.factor, self.gram, self.damping, rhs, number)

    def _where_in(self, tree: PyTree) -> PyTree:
        return tree if self.mask is None else _whole_algebra.where(self.mask, tree)
