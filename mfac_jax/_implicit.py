"""Rows that are computed when they are needed and never stored.

At fixed parameters, ``G v`` is one Jacobian-vector product of the losses of all rows, and
``G^T c`` is one vector-Jacobian product. Whatever needs gradients themselves computes some at a
time, as dense rows.

The host drives the loops, one program a batch. Batches then need not lie on the device, every
product is compiled once for each shape of batch, and XLA sees no loop: on a CPU the gradient of a
convolution takes about thirty times as long in one (jax 0.10.2).
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mfac_jax import _checks
from mfac_jax._collect import (
    NO_BATCH,
    LabelSampler,
    LossFn,
    Pending,
    Step,
    check_batches,
    check_functions,
    check_scalar,
    cycle,
    gradients_at_a_time,
    length_of_batch,
)
from mfac_jax._layout import Layout, PyTree
from mfac_jax.kernels._xla import accumulation_dtype
from mfac_jax.rows import Dense, DenseRows, GradientRows
from mfac_jax.rows._base import square_sums_by_rows

# The host runs ahead of the device by as many batches, which are on the device at the same time.
_BATCHES_AHEAD = 4


@dataclass(frozen=True, eq=False)
class ImplicitRows(GradientRows):
    """The gradients of a loss at fixed parameters, computed whenever they are needed.

    :func:`mfac_jax.gradients.implicit_rows` makes them and says what they cost. ``jit`` cannot
    trace them.

    Attributes:
        params: the parameters.
        pieces: for each batch of data the rows that it makes, and the batches of these rows,
            stacked: arrays ``(k, b, ...)`` for k rows. A mini-batch makes one row.
        layout: the parameters that the gradients belong to.
        num_rows: ``m``.
        loss_fn: ``loss_fn(params, batch)``, the loss of one row.
        chunk_size: the number of gradients that are held at a time.
    """

    params: PyTree
    pieces: tuple[tuple[Step, PyTree], ...]
    layout: Layout
    num_rows: int
    loss_fn: LossFn
    chunk_size: int
    is_traceable = False

    @property
    def dtype(self) -> jnp.dtype:
        """float64 for float64 parameters, float32 for all others."""
        return self.layout.dtype

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        leaves = map(jnp.asarray, self.layout.check(vector, "vector"))
        pairs = zip(leaves, self.layout.dtypes, strict=True)
        tangents = self._tree([leaf.astype(dtype) for leaf, dtype in pairs])
        found: list[Array] = []
        for _, batches in self.pieces:
            found.append(_tangents(self.params, tangents, batches, loss_fn=self.loss_fn))
            _wait(found)
        return jnp.asarray(np.concatenate(jax.device_get(found)).astype(self.dtype))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        leaves = None
        if vector is not None:
            leaves = [jnp.asarray(leaf) for leaf in self.layout.check(vector, "vector")]
        weights = np.asarray(coefficients, self.dtype)
        total = [jnp.zeros(shape, self.dtype) for shape in self.layout.shapes]
        losses: list[Array] = []
        for step, batches in self.pieces:
            own = weights[step.row : step.row + step.num_rows]
            total, loss = _add(total, self.params, batches, own, loss_fn=self.loss_fn)
            losses.append(loss)
            _wait(losses)
        return self._tree(_scaled(total, leaves, scale))

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        """See :meth:`mfac_jax.rows.GradientRows.gram`.

        Each chunk of gradients is computed again for every chunk after it.
        """
        gram = np.zeros((self.num_rows, self.num_rows), self.dtype)
        for first in self._starts:
            own = self._chunk(first)
            here = slice(first, first + own.num_rows)
            gram[here, here] = own.gram(mask)
            for start in range(0, first, self.chunk_size):
                there = slice(start, start + self.chunk_size)
                gram[here, there] = own.products(self._chunk(start), mask)
                gram[there, here] = gram[here, there].T
            del own  # before the next one is computed
        return jnp.asarray(gram)

    def products(self, other: GradientRows, mask: PyTree | None = None) -> Float[Array, "m k"]:
        """See :meth:`mfac_jax.rows.GradientRows.products`. Every gradient is computed once."""
        return jnp.concatenate([self._chunk(i).products(other, mask) for i in self._starts])

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> DenseRows:
        """See :meth:`mfac_jax.rows.GradientRows.transform`. Every gradient is computed once."""
        del lower  # gradients that a matrix does not read are not computed
        wide = np.asarray(matrix, self.dtype)
        total = Dense(packing="leaf").empty(self.params, len(wide))
        for first in self._starts:
            part = wide[:, first : first + self.chunk_size]
            if part.any():
                total = _sum(total, self._chunk(first).transform(jnp.asarray(part)))
        return total

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        """See :meth:`mfac_jax.rows.GradientRows.column_square_sums`."""
        del lower
        if matrix is not None:
            return square_sums_by_rows(self, matrix, self.chunk_size)
        sums = (self._chunk(first).column_square_sums() for first in self._starts)
        return functools.reduce(_sum, sums)

    @property
    def _starts(self) -> range:
        """The first row of every chunk."""
        return range(0, self.num_rows, self.chunk_size)

    @functools.cached_property
    def _first_rows(self) -> list[int]:
        """The first row of every piece."""
        return [step.row for step, _ in self.pieces]

    @functools.cached_property
    def _gradients_at_a_time(self) -> int:
        return min(self.chunk_size, max(step.num_rows for step, _ in self.pieces))

    def _tree(self, leaves: list[Array]) -> PyTree:
        return jax.tree.unflatten(self.layout.treedef, leaves)

    def _chunk(self, first: int) -> DenseRows:
        """The gradients from row ``first`` on, as many as a chunk has.

        Raises:
            FloatingPointError: one has NaN or Inf in it or is too large to square.
        """
        last = min(first + self.chunk_size, self.num_rows)
        rows = Dense(packing="leaf").empty(self.params, last - first)
        pending = Pending()
        for step, batches in self._pieces_of(first, last):
            start, stop = max(step.row, first), min(step.row + step.num_rows, last)
            size = self._gradients_at_a_time
            for row in range(start, stop, size):
                own = step.part(row, min(size, stop - row))
                gradients = _gradients(
                    self.params,
                    batches,
                    np.int32(row - step.row),
                    np.int32(own.num_rows),
                    loss_fn=self.loss_fn,
                    size=size,
                )
                rows, accepted = rows.write_rows(row - first, gradients, own.num_rows)
                del gradients  # frees them before the next ones are computed
                pending.add(own, accepted)
        pending.check_all()
        return rows

    def _pieces_of(self, first: int, last: int) -> Iterator[tuple[Step, PyTree]]:
        """The pieces with rows ``first .. last - 1``."""
        begin = bisect.bisect_right(self._first_rows, first) - 1
        end = bisect.bisect_left(self._first_rows, last)
        yield from self.pieces[begin:end]


def _wait(results: list[Array]) -> None:
    """Waits until few of the results are still being computed."""
    if len(results) > _BATCHES_AHEAD:
        results[-1 - _BATCHES_AHEAD].block_until_ready()


def _loss(loss_fn: LossFn, params: PyTree, batch: PyTree) -> Float[Array, ""]:
    # Both products round as little as they can: G^T should be the transpose of G.
    with jax.default_matmul_precision("highest"):
        loss = check_scalar(loss_fn(params, batch))
    return loss.astype(accumulation_dtype(loss.dtype))


def _losses(loss_fn: LossFn, params: PyTree, batches: PyTree) -> Float[Array, " k"]:
    """The losses of some rows: of one mini-batch or of several examples."""
    of_batch = functools.partial(_loss, loss_fn, params)
    if len(jax.tree.leaves(batches)[0]) == 1:
        return of_batch(jax.tree.map(lambda x: x[0], batches))[None]
    return jax.vmap(of_batch)(batches)


@functools.partial(jax.jit, static_argnames="loss_fn")
def _tangents(
    params: PyTree, tangents: PyTree, batches: PyTree, *, loss_fn: LossFn
) -> Float[Array, " k"]:
    """``G v`` for some rows."""
    losses = functools.partial(_losses, loss_fn, batches=batches)
    return jax.jvp(losses, (params,), (tangents,))[1]


@functools.partial(jax.jit, static_argnames="loss_fn", donate_argnums=0)
def _add(
    total: list[Array],
    params: PyTree,
    batches: PyTree,
    weights: Float[np.ndarray, " k"] | Float[Array, " k"],
    *,
    loss_fn: LossFn,
) -> tuple[list[Array], Float[Array, " k"]]:
    """Adds ``G^T c`` of some rows to ``total``; returns their losses, too."""
    losses, pull = jax.vjp(functools.partial(_losses, loss_fn, batches=batches), params)
    (found,) = pull(jnp.asarray(weights).astype(losses.dtype))
    pairs = zip(total, jax.tree.leaves(found), strict=True)
    return [x + g.astype(x.dtype) for x, g in pairs], losses


@functools.partial(jax.jit, static_argnames=("loss_fn", "size"))
def _gradients(
    params: PyTree,
    batches: PyTree,
    first: Int[Array, ""],
    count: Int[Array, ""],
    *,
    loss_fn: LossFn,
    size: int,
) -> PyTree:
    """The stacked gradients of ``count`` rows; further ones, up to ``size``, are padding."""
    gradient = functools.partial(jax.grad(functools.partial(_loss, loss_fn)), params)
    if size == 1:
        own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, first, keepdims=False), batches)
        return jax.tree.map(lambda g: g[None], gradient(own))
    picked = first + jnp.minimum(jnp.arange(size, dtype=jnp.int32), count - 1)
    return jax.vmap(gradient)(jax.tree.map(lambda x: x[picked], batches))


@jax.jit
def _scaled(
    total: list[Array], vector: list[Array] | None, scale: Float[Array, ""] | None
) -> list[Array]:
    if vector is not None:
        total = [v.astype(x.dtype) - x for v, x in zip(vector, total, strict=True)]
    return total if scale is None else [scale.astype(x.dtype) * x for x in total]


@functools.partial(jax.jit, donate_argnums=0)
def _sum(total: PyTree, part: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, total, part)


def rows_of(
    loss_fn: Any,
    params: PyTree,
    batches: Any,
    num_gradients: Any,
    *,
    per_example: Any,
    chunk_size: Any,
    sample_labels: Any,
    key: Any,
) -> ImplicitRows:
    """See :func:`mfac_jax.gradients.implicit_rows`."""
    check_functions(loss_fn, sample_labels, key)
    check_batches(batches, "batches")
    _checks.instance(per_example, "per_example", bool)
    if num_gradients is not None:
        _checks.positive_int(num_gradients, "num_gradients")
    layout = Layout(params)
    gradients_at_a_time(chunk_size, layout.size, 1)  # says what is wrong before data are read
    params = jax.tree.map(jnp.asarray, params)
    pieces = [
        (step, _labelled(params, data, step, sample_labels, key))
        for step, data in _pieces(batches, num_gradients, per_example=per_example)
    ]
    if not pieces:
        raise ValueError(NO_BATCH)
    first = jax.tree.map(lambda x: x[0], pieces[0][1])
    jax.eval_shape(functools.partial(_loss, loss_fn), params, first)
    m = pieces[-1][0].row + pieces[-1][0].num_rows
    chunk = gradients_at_a_time(chunk_size, layout.size, m)
    return ImplicitRows(params, tuple(pieces), layout, m, loss_fn, chunk)


def _pieces(batches: Any, m: int | None, *, per_example: bool) -> Iterator[tuple[Step, PyTree]]:
    """The rows that each batch of data makes, and their batches, stacked: m rows or one pass."""
    row = 0
    for number, batch in enumerate(batches) if m is None else cycle(batches):
        length = length_of_batch(batch, number)
        count = length if per_example else 1
        count = count if m is None else min(count, m - row)
        # A copy, because the caller may write to arrays that are not JAX's.
        own = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.array(x), batch)
        if per_example:
            own = jax.tree.map(lambda x, k=count: x[:k, None], own)
        else:
            own = jax.tree.map(lambda x: x[None], own)
        yield Step(row, count, number, 0 if per_example else None), own
        row += count
        if row == m:
            return


def _labelled(
    params: PyTree, batches: PyTree, step: Step, sample_labels: LabelSampler | None, key: Any
) -> PyTree:
    """The batches of some rows with labels from the sampler, if there is one."""
    if sample_labels is None:
        return batches
    rows = step.row + np.arange(step.num_rows, dtype=np.int32)
    return _with_labels(params, batches, rows, key, sample_labels=sample_labels)


@functools.partial(jax.jit, static_argnames="sample_labels")
def _with_labels(
    params: PyTree,
    batches: PyTree,
    rows: Int[Array, " k"],
    key: Array,
    *,
    sample_labels: LabelSampler,
) -> PyTree:
    def labelled(batch: PyTree, row: Int[Array, ""]) -> PyTree:
        return sample_labels(params, batch, jax.random.fold_in(key, row))

    if len(rows) == 1:
        own = labelled(jax.tree.map(lambda x: x[0], batches), rows[0])
        return jax.tree.map(lambda x: x[None], own)
    return jax.vmap(labelled)(batches, rows)
