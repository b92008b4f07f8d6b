"""The inverse of the block-diagonal Fisher, every block on its cheaper side.

A block of B coordinates has the gradients ``G_b`` (n, B). If ``B <= n`` the B x B
matrix ``F_b = lambda I + G_b^T G_b / n`` is factored itself, ``F_b^-1 = X^T X`` with
``X = L^-1``: cheaper then, and free of cancellation. If ``B > n`` its gradients are
whitened as in the whole inverse. Blocks of one size are done as one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, Shaped

from mfac_jax import algebra, kernels
from mfac_jax._layout import Layout, PyTree
from mfac_jax.inverse._coordinates import as_coordinates, as_pairs
from mfac_jax.inverse._map import after
from mfac_jax.inverse._partition import BlockRun
from mfac_jax.rows import GradientRows, Implementation


def _cut(flat: Shaped[Array, " d"], run: BlockRun) -> Shaped[Array, "b B"]:
    return flat[run.start : run.start + run.width].reshape(run.count, run.size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _DirectBlocks:
    """A run of blocks with B <= n: ``F_b^-1 = X^T X``.

    Attributes:
        root: ``X``, lower triangular; (b, B, B).
    """

    root: Float[Array, "b B B"]

    @classmethod
    def build(cls, batch: Float[Array, "b n B"], damping: Float[Array, ""]) -> _DirectBlocks:
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

    def quadratic_form(self, vectors: Float[Array, "b B"]) -> Float[Array, ""]:
        half = jnp.einsum("bij,bj->bi", self.root, vectors, precision="highest")
        return jnp.sum(half * half)

    def log_det(self) -> Float[Array, ""]:
        return 2.0 * jnp.sum(jnp.log(jnp.diagonal(self.root, axis1=1, axis2=2)))

    def sample(self, key: Key[Array, ""]) -> Float[Array, "b B"]:
        noise = jax.random.normal(key, self.root.shape[:2], self.root.dtype)
        return jnp.einsum("bij,bi->bj", self.root, noise, precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _WhitenedBlocks:
    """A run of blocks with B > n: ``F_b^-1 = (I - W_b^T W_b) / lambda``.

    Attributes:
        whitened: ``W_b``; (b, n, B).
        factor: of ``A_b = n lambda I + G_b G_b^T``; (b, n, n).
        fisher_diagonal: the diagonal of ``F_b``; (b, B).
        damping: ``lambda``; scalar.
    """

    whitened: Float[Array, "b n B"]
    factor: algebra.Factor
    fisher_diagonal: Float[Array, "b B"]
    damping: Float[Array, ""]

    @classmethod
    def build(cls, batch: Float[Array, "b n B"], damping: Float[Array, ""]) -> _WhitenedBlocks:
        n = batch.shape[1]
        gram = jnp.einsum("bnj,bmj->bnm", batch, batch, precision="highest")
        factor = jax.vmap(algebra.factor, (0, None))(gram, n * damping)
        inverse = jax.vmap(algebra.inverse_lower)(factor)
        return cls(
            whitened=jnp.einsum("bnm,bmj->bnj", inverse, batch, precision="highest"),
            factor=factor,
            fisher_diagonal=damping + jnp.sum(batch * batch, axis=1) / n,
            damping=damping,
        )

    def apply(self, vectors: Float[Array, "b B"]) -> Float[Array, "b B"]:
        dots = jnp.einsum("bnj,bj->bn", self.whitened, vectors, precision="highest")
        inside = jnp.einsum("bnj,bn->bj", self.whitened, dots, precision="highest")
        return (vectors - inside) / self.damping

    def diagonal(self) -> Float[Array, "b B"]:
        squares = jnp.sum(self.whitened * self.whitened, axis=1)
        return jnp.maximum((1 - squares) / self.damping, 1 / self.fisher_diagonal)

    def diagonal_blocks(self, size: int) -> Float[Array, "b k g g"]:
        cut = self.whitened.reshape(*self.whitened.shape[:2], -1, size)
        inner = jnp.einsum("bnkg,bnkh->bkgh", cut, cut, precision="highest")
        own = self.diagonal().reshape(-1, cut.shape[2], size, 1)
        is_own = jnp.broadcast_to(jnp.eye(size, dtype=bool), inner.shape)
        return jnp.where(is_own, own, -inner / self.damping)

    def entries(
        self, block: Int[Array, " k"], i: Int[Array, " k"], j: Int[Array, " k"]
    ) -> Float[Array, " k"]:
        inner = jnp.sum(self.whitened[block, :, i] * self.whitened[block, :, j], axis=1)
        floor = 1 / self.fisher_diagonal[block, i]
        diagonal = jnp.maximum((1 - inner) / self.damping, floor)
        return jnp.where(i == j, diagonal, -inner / self.damping)

    def quadratic_form(self, vectors: Float[Array, "b B"]) -> Float[Array, ""]:
        dots = jnp.einsum("bnj,bj->bn", self.whitened, vectors, precision="highest")
        inside = jnp.einsum("bnj,bn->bj", self.whitened, dots, precision="highest")
        half = jax.vmap(algebra.transposed_half_solve)(self.factor, dots)
        n = self.whitened.shape[1]
        return jnp.sum((vectors - inside) ** 2) / self.damping + n * jnp.sum(half * half)

    def log_det(self) -> Float[Array, ""]:
        b, n, size = self.whitened.shape
        log_lambda = jnp.log(self.damping)
        dets = jnp.sum(jax.vmap(algebra.log_det)(self.factor))
        return -(b * size * log_lambda + dets - b * n * (jnp.log(n) + log_lambda))

    def sample(self, key: Key[Array, ""]) -> Float[Array, "b B"]:
        b, n, size = self.whitened.shape
        dtype = self.whitened.dtype
        key_d, key_n = jax.random.split(key)
        z_d = jax.random.normal(key_d, (b, size), dtype)
        z_n = jax.random.normal(key_n, (b, n), dtype)
        root = jnp.sqrt(self.damping)
        solved = root * jnp.sqrt(n).astype(dtype) * jax.vmap(algebra.half_solve)(self.factor, z_n)
        dots = jnp.einsum("bnj,bj->bn", self.whitened, z_d, precision="highest")
        inside = jnp.einsum("bnj,bn->bj", self.whitened, solved - dots, precision="highest")
        return (z_d + inside) / root


def invert_blocks(
    batch: Float[Array, "b n B"], damping: Float[Array, ""]
) -> _DirectBlocks | _WhitenedBlocks:
    """Blocks of one size inverted on their cheaper side."""
    side = _DirectBlocks if batch.shape[2] <= batch.shape[1] else _WhitenedBlocks
    return side.build(batch, damping)


def _of_blocks(implementation: Implementation) -> str | None:
    """XLA if it is asked for; a kernel's name speaks of the scans, and blocks of any size go."""
    return "xla" if implementation.name == "xla" else None


def block_diagonal(
    batch: Float[Array, "b n B"], damping: Float[Array, ""], implementation: Implementation
) -> Float[Array, "b B"]:
    """The diagonal of the inverse of every block."""
    count, n, size = batch.shape
    matrix = jnp.moveaxis(batch, 0, 1).reshape(n, count * size)
    flat = kernels.block_inverse_diagonal(
        matrix,
        damping,
        size,
        implementation=_of_blocks(implementation),
    )
    return flat.reshape(count, size)


def block_ihvp(
    batch: Float[Array, "b n B"],
    vectors: Float[Array, "b B"],
    damping: Float[Array, ""],
    implementation: Implementation,
) -> Float[Array, "b B"]:
    """``F_b^-1 v_b`` for every block, of B <= n coordinates."""
    count, n, size = batch.shape
    matrix = jnp.moveaxis(batch, 0, 1).reshape(n, count * size)
    flat = kernels.block_ihvp(
        matrix,
        vectors.reshape(-1),
        damping,
        size,
        implementation=_of_blocks(implementation),
    )
    return flat.reshape(count, size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockInverse:
    """``F^-1`` of the block-diagonal Fisher; see :func:`fisher_inverse`.

    It answers as :class:`WholeInverse` does; entries between two blocks are 0.

    Attributes:
        parts: one batch of inverted blocks for each run.
        runs: where the blocks lie (static).
        layout: the parameters (static).
    """

    parts: tuple[_DirectBlocks | _WhitenedBlocks, ...]
    runs: tuple[BlockRun, ...] = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})

    @classmethod
    def build(
        cls, rows: GradientRows, damping: Float[Array, ""], runs: tuple[BlockRun, ...]
    ) -> BlockInverse:
        """Inverts every block. O(d n min(n, B))."""
        parts: list[_DirectBlocks | _WhitenedBlocks] = []
        for run in runs:
            tile = rows.columns(run.start, run.width)
            batch = jnp.moveaxis(tile.reshape(rows.num_rows, run.count, run.size), 1, 0)
            parts.append(invert_blocks(after(batch, parts[-1:]), damping))
        return cls(tuple(parts), runs, rows.layout, rows.dtype)

    def ihvp(self, vector: PyTree) -> PyTree:
        """``F^-1 v``, block by block; as :meth:`WholeInverse.ihvp`."""
        tree = self.layout.as_tree(vector, "vector")
        flat = self.layout.flatten(tree, self.dtype, "vector")
        pairs = zip(self.parts, self.runs, strict=True)
        out = [part.apply(_cut(flat, run)) for part, run in pairs]
        return self.layout.like(self._tree(out), vector)

    def diagonal(self) -> PyTree:
        """``diag(F^-1)``, a tree like the parameters; positive."""
        return self._tree([part.diagonal() for part in self.parts])

    def entries(self, rows: ArrayLike, columns: ArrayLike) -> Float[Array, "..."]:
        """Single entries ``(F^-1)_ij``, O(min(n, B)) each; as :meth:`WholeInverse.entries`."""
        pairs = as_pairs(rows, columns, self.layout.size)
        out = jnp.where(pairs.valid, jnp.zeros((), self.dtype), jnp.full((), jnp.nan, self.dtype))
        for part, run in zip(self.parts, self.runs, strict=True):
            block_i, at_i = jnp.divmod(pairs.rows - run.start, run.size)
            block_j, at_j = jnp.divmod(pairs.columns - run.start, run.size)
            inside = (block_i == block_j) & (block_i >= 0) & (block_i < run.count) & pairs.valid
            values = part.entries(jnp.clip(block_i, 0, run.count - 1), at_i, at_j)
            out = jnp.where(inside, values, out)
        return out.reshape(pairs.shape)

    def submatrix(self, coordinates: ArrayLike) -> Float[Array, "k k"]:
        """``(F^-1)_QQ`` for the flat coordinates Q; as :meth:`WholeInverse.submatrix`."""
        q = as_coordinates(coordinates, self.layout.size)
        return self.entries(q[:, None], q[None, :])

    def quadratic_form(self, vector: PyTree) -> Float[Array, ""]:
        """``v^T F^-1 v``, a sum of squares; as :meth:`WholeInverse.quadratic_form`."""
        tree = self.layout.as_tree(vector, "vector")
        flat = self.layout.flatten(tree, self.dtype, "vector")
        pairs = zip(self.parts, self.runs, strict=True)
        terms = [part.quadratic_form(_cut(flat, run)) for part, run in pairs]
        return sum(terms, jnp.zeros((), self.dtype))

    def log_det(self) -> Float[Array, ""]:
        """``log det F^-1``."""
        return sum((part.log_det() for part in self.parts), jnp.zeros((), self.dtype))

    def sample(self, key: Key[Array, ""]) -> PyTree:
        """One draw from N(0, F^-1), a tree like the parameters."""
        keys = jax.random.split(key, max(len(self.parts), 1))
        draws = [part.sample(k) for part, k in zip(self.parts, keys, strict=False)]
        return self._tree(draws)

    def _tree(self, values: list[Float[Array, "_ _"]]) -> PyTree:
        flat = [value.reshape(-1) for value in values]
        return self.layout.unflatten(jnp.concatenate(flat) if flat else jnp.zeros(0, self.dtype))
