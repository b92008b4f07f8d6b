"""A storage, a pattern, a score and an update from outside the package.

The guide to extending the library shows them, each from its marker to the next.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from mfac_jax.pruning import Groups, Pattern
from mfac_jax.rows import ColumnRows, Layout, Storage, WritableRows, is_small_enough


# -- A storage --
class Reads:
    """Counts the calls of each operation, over all rows of a storage."""

    def __init__(self):
        self.of = collections.Counter()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HalfRows(WritableRows, ColumnRows):
    """Gradients in float16, as one matrix. They count how often they are read."""

    matrix: jax.Array
    layout: Layout
    num_rows: int = field(metadata={"static": True})
    reads: Reads = field(metadata={"static": True})
    dtype = jnp.dtype("float32")

    def read(self, what):
        self.reads.of[what] += 1
        return self.matrix.astype(self.dtype)

    def dots(self, vector):
        flat = self.layout.flatten(vector, self.dtype, "vector")
        return jnp.matmul(self.read("dots"), flat, precision="highest")

    def combine(self, coefficients, *, vector=None, scale=None):
        out = jnp.matmul(coefficients, self.read("combine"), precision="highest")
        out = out if vector is None else self.layout.flatten(vector, self.dtype, "vector") - out
        return self.layout.unflatten(out if scale is None else scale * out)

    def gram(self, mask=None):
        g = self.read("gram")
        g = g if mask is None else jnp.where(self.layout.flat_mask(mask)[None], g, 0.0)
        return jnp.matmul(g, g.T, precision="highest")

    def take(self, coordinates):
        return self.read("take")[:, coordinates]

    def map_blocks(self, partition, function, *vectors, **options):
        self.reads.of["map_blocks"] += 1
        return super().map_blocks(partition, function, *vectors, **options)

    def write(self, row, gradient):
        new = self.layout.flatten(gradient, self.matrix.dtype, "gradient")
        accepted = is_small_enough(jnp.sum(new.astype(self.dtype) ** 2), self.num_rows)
        written = self.matrix.at[row].set(new)
        return replace(self, matrix=jnp.where(accepted, written, self.matrix)), accepted

    def put(self, row, gradient):
        rows, accepted = self.write(row, gradient)
        g = rows.read("put")
        return rows, jnp.matmul(g, g[row], precision="highest"), accepted

    def clear(self, row):
        return replace(self, matrix=self.matrix.at[row].set(0))

    def restrict(self, mask):
        zero = jnp.zeros((), self.matrix.dtype)
        keep = self.layout.flat_mask(mask)[None]
        return replace(self, matrix=jnp.where(keep, self.matrix, zero))


@dataclass(frozen=True)
class Half(Storage):
    """Stores gradients in float16 and counts how often they are read."""

    reads: Reads = field(default_factory=Reads)

    def empty(self, params, num_rows):
        layout = Layout(params)
        matrix = jnp.zeros((num_rows, layout.size), jnp.float16)
        return HalfRows(matrix, layout, num_rows, self.reads)


# -- Rows in host memory --
@dataclass(frozen=True, eq=False)
class HostRows(WritableRows, ColumnRows):
    """Gradients in one NumPy matrix, which ``jit`` cannot trace. A write copies the matrix."""

    matrix: np.ndarray
    layout: Layout
    num_rows: int
    dtype = jnp.dtype("float32")
    is_traceable = False

    def dots(self, vector):
        flat = self.layout.flatten(vector, self.dtype, "vector")
        return jnp.asarray(self.matrix @ np.asarray(flat))

    def combine(self, coefficients, *, vector=None, scale=None):
        out = jnp.asarray(np.asarray(coefficients) @ self.matrix)
        out = out if vector is None else self.layout.flatten(vector, self.dtype, "vector") - out
        return self.layout.unflatten(out if scale is None else scale * out)

    def gram(self, mask=None):
        g = self.matrix
        g = g if mask is None else np.where(self.layout.flat_mask(mask), g, 0)
        return jnp.asarray(g @ g.T)

    def take(self, coordinates):
        return jnp.asarray(self.matrix[:, np.asarray(coordinates)])

    def write(self, row, gradient):
        new = self.layout.flatten(gradient, self.dtype, "gradient")
        accepted = is_small_enough(jnp.sum(new**2), self.num_rows)
        matrix = self.matrix.copy()
        if accepted:
            matrix[int(row)] = new
        return replace(self, matrix=matrix), accepted

    def put(self, row, gradient):
        rows, accepted = self.write(row, gradient)
        return rows, jnp.asarray(rows.matrix @ rows.matrix[int(row)]), accepted

    def clear(self, row):
        there = np.arange(self.num_rows)[:, None] == int(row)
        return replace(self, matrix=np.where(there, np.float32(0), self.matrix))

    def restrict(self, mask):
        keep = np.asarray(self.layout.flat_mask(mask))
        return replace(self, matrix=np.where(keep, self.matrix, np.float32(0)))


@dataclass(frozen=True)
class Host(Storage):
    """Stores gradients in the memory of the host."""

    is_traceable = False

    def bytes_by_place(self, params, num_rows):
        return {"host": 4 * num_rows * Layout(params).size}

    def empty(self, params, num_rows):
        layout = Layout(params)
        return HostRows(np.zeros((num_rows, layout.size), np.float32), layout, num_rows)


# -- A pattern --
@dataclass(frozen=True)
class Diagonals(Pattern):
    """The weights on one diagonal of a matrix go together.

    Diagonals wrap around: diagonal k of an r x c matrix has the r weights (i, (i + k) mod c).
    """

    def groups(self, shape, output_axis, name):
        """The groups of a leaf: one diagonal after another."""
        if len(shape) != 2:
            raise ValueError(
                f"{self} needs matrices, but params{name} has shape {shape}; "
                "leave the leaf out with path_filter."
            )
        rows, columns = shape
        i, k = np.arange(rows), np.arange(columns)
        places = columns * i + (i + k[:, None]) % columns
        return Groups(size=rows, order=places.reshape(-1))


# -- A score --
def taylor(problem):
    """``|w g|`` with the mean gradient ``g``: the change of the loss to first order.

    The pattern adds up the scores of the weights of a group.

    Reference: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019.
    """
    n = problem.rows.num_rows
    mean = problem.rows.combine(jnp.full(n, 1 / n, problem.rows.dtype))
    return jax.tree.map(lambda w, g: jnp.abs(w * g), problem.weights, mean)


# -- An update --
def bounded_joint(problem, kept):
    """The joint update, scaled down if its norm exceeds the norm of the weights that go.

    With few gradients the quadratic model can compensate by changes far larger than the weights
    that go.
    """
    removed = problem.removed(kept)
    changes = problem.inverse_over(kept).compensate(removed)
    length, longest = norm(changes), norm(removed)
    scale = jnp.where(length > longest, longest / length, 1.0)
    return jax.tree.map(lambda leaf: scale * leaf, changes)


def norm(tree):
    """The Euclidean norm of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
