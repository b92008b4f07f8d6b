"""The inverse of the whole Fisher by whitened gradients.

With ``A = n lambda I + G G^T = L L^T`` and ``W = L^-1 G``,

    F^-1 = (I - W^T W) / lambda.

The paper's recursion (its equations 3 to 6) arrives at the same rows one by one: its
``h_i / sqrt(n + g_i . h_i)`` is row i of ``W`` over ``sqrt(lambda)``. One Cholesky
factorization and one triangular product do that work as matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from mfac_jax import algebra
from mfac_jax._layout import PyTree
from mfac_jax.inverse._coordinates import as_coordinates, as_pairs
from mfac_jax.rows import GradientRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeInverse:
    """``F^-1`` from ``n`` whitened gradients; see :func:`fisher_inverse`.

    Attributes:
        whitened: ``W``; n rows of d entries.
        factor: ``L`` of ``A = n lambda I + G G^T``.
        fisher_diagonal: the diagonal of ``F``; (d,).
        damping: ``lambda``; scalar.
    """

    whitened: GradientRows
    factor: algebra.Factor
    fisher_diagonal: Float[Array, " d"]
    damping: Float[Array, ""]

    @classmethod
    def build(cls, rows: GradientRows, damping: Float[Array, ""]) -> WholeInverse:
        """Factors and whitens. O(d n^2 + n^3)."""
        n = rows.num_rows
        factor = algebra.factor(rows.gram(), n * damping)
        squares = rows.column_square_sums()
        return cls(
            whitened=rows.transform(algebra.inverse_lower(factor), lower=True),
            factor=factor,
            fisher_diagonal=damping + rows.layout.flatten(squares, rows.dtype, "squares") / n,
            damping=damping,
        )

    def ihvp(self, vector: PyTree) -> PyTree:
        """``F^-1 v = (v - W^T W v) / lambda`` in two scans. O(d n).

        In float32 the part of ``v`` inside the span of the gradients loses about
        ``eps |g|^2 / lambda`` to cancellation. For a combination of the gradients
        themselves use :func:`mfac_jax.window.ihvp_combination` on
        :func:`mfac_jax.window.from_rows`.

        Args:
            vector: ``v``, a tree like the parameters or one flat vector (d,).

        Returns:
            ``F^-1 v`` in the form and the dtypes of ``vector``.

        Raises:
            ValueError: ``vector`` does not fit the parameters.
        """
        layout = self.whitened.layout
        tree = layout.as_tree(vector, "vector")
        dots = self.whitened.dots(tree)
        out = self.whitened.combine(dots, vector=tree, scale=1 / self.damping)
        return layout.like(out, vector)

    def diagonal(self) -> PyTree:
        """``diag(F^-1)_j = (1 - |w_j|^2) / lambda``, a tree like the parameters. O(d n).

        No entry is below ``1 / F_jj``, its lower bound for any positive definite
        ``F``, whatever rounding does to the subtraction.
        """
        layout, dtype = self.whitened.layout, self.whitened.dtype
        squares = layout.flatten(self.whitened.column_square_sums(), dtype, "squares")
        return layout.unflatten(self._diagonal_entry(squares, self.fisher_diagonal))

    def entries(self, rows: ArrayLike, columns: ArrayLike) -> Float[Array, "..."]:
        """Single entries ``(F^-1)_ij = (delta_ij - w_i . w_j) / lambda``. O(n) each.

        Args:
            rows: flat coordinates i; any shape.
            columns: flat coordinates j; broadcast against ``rows``.

        Returns:
            The entries, in the broadcast shape; NaN for traced indices out of range.

        Raises:
            TypeError: an index is not an integer.
            ValueError: an index that is not traced lies outside 0 .. d-1.
        """
        pairs = as_pairs(rows, columns, self.whitened.layout.size)
        w_i, w_j = self.whitened.take(pairs.rows), self.whitened.take(pairs.columns)
        inner = jnp.sum(w_i * w_j, axis=0)
        on_diagonal = self._diagonal_entry(inner, self.fisher_diagonal[pairs.rows])
        out = jnp.where(pairs.rows == pairs.columns, on_diagonal, -inner / self.damping)
        return jnp.where(pairs.valid, out, jnp.full_like(out, jnp.nan)).reshape(pairs.shape)

    def submatrix(self, coordinates: ArrayLike) -> Float[Array, "k k"]:
        """``(F^-1)_QQ`` for the flat coordinates Q. O(k^2 n).

        Args:
            coordinates: Q; (k,).

        Returns:
            The entries; (k, k).

        Raises:
            TypeError: an index is not an integer.
            ValueError: Q is not a list, or an index that is not traced lies outside
                0 .. d-1.
        """
        q = as_coordinates(coordinates, self.whitened.layout.size)
        return self.entries(q[:, None], q[None, :])

    def quadratic_form(self, vector: PyTree) -> Float[Array, ""]:
        """``v^T F^-1 v = |v - W^T W v|^2 / lambda + n |L^-T W v|^2``, in two scans.

        A sum of squares, so it is never negative and loses nothing to cancellation,
        which ``(|v|^2 - |W v|^2) / lambda`` does for ``v`` in the span of the gradients.

        Args:
            vector: ``v``, a tree like the parameters or one flat vector (d,).

        Returns:
            The value; a scalar.

        Raises:
            ValueError: ``vector`` does not fit the parameters.
        """
        layout, rows = self.whitened.layout, self.whitened
        flat = layout.flatten(layout.as_tree(vector, "vector"), rows.dtype, "vector")
        dots = rows.dots(layout.unflatten(flat))
        outside = flat - layout.flatten(rows.combine(dots), rows.dtype, "vector")
        inside = algebra.transposed_half_solve(self.factor, dots)
        n = rows.num_rows
        return jnp.sum(outside * outside) / self.damping + n * jnp.sum(inside * inside)

    def log_det(self) -> Float[Array, ""]:
        """``log det F^-1 = -(d log lambda + log det(A / (n lambda)))``."""
        n, d = self.whitened.num_rows, self.whitened.layout.size
        log_lambda = jnp.log(self.damping)
        return -(d * log_lambda + algebra.log_det(self.factor) - n * (jnp.log(n) + log_lambda))

    def sample(self, key: Key[Array, ""]) -> PyTree:
        """One draw from N(0, F^-1), a tree like the parameters.

        ``F^-1 (sqrt(lambda) z_d + G^T z_n / sqrt(n))`` for standard normal ``z``; the
        second part is ``sqrt(n) W^T L^-1 z_n``, free of cancellation.
        """
        layout, dtype = self.whitened.layout, self.whitened.dtype
        key_d, key_n = jax.random.split(key)
        z_d = layout.unflatten(jax.random.normal(key_d, (layout.size,), dtype))
        z_n = jax.random.normal(key_n, (self.whitened.num_rows,), dtype)
        n = self.whitened.num_rows
        inside = self.whitened.combine(
            jnp.sqrt(self.damping)
            * jnp.sqrt(n).astype(dtype)
            * algebra.half_solve(self.factor, z_n)
            - self.whitened.dots(z_d)
        )
        return jax.tree.map(lambda z, s: (z + s) / jnp.sqrt(self.damping), z_d, inside)

    def _diagonal_entry(self, square: Array, fisher: Array) -> Array:
        return jnp.maximum((1 - square) / self.damping, 1 / fisher)
