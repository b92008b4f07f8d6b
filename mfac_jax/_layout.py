"""How a pytree of parameters maps onto the coordinates of a gradient.

A :class:`Layout` describes the parameters of a set of gradients: tree structure, shapes and
dtypes, all static. Coordinates are numbered 0 .. d-1 in the order of ``jax.tree.leaves``, each leaf
in row-major order. A layout is a pytree node without leaves. States contain it, so every function
can check whether a tree fits.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

PyTree = Any

# Errors show two tree structures whole up to this length together.
_LONGEST = 500


@jax.tree_util.register_static
class Layout:
    """Structure, shapes and dtypes of the parameters; hashable and immutable.

    Attributes:
        treedef: the tree structure.
        paths: the path of every leaf as text, for messages.
        shapes: the leaves' shapes.
        dtypes: the leaves' dtypes.
    """

    __slots__ = ("dtypes", "paths", "shapes", "treedef")
    treedef: Any

    def __init__(self, tree: PyTree, name: str = "params"):
        """Reads the layout of a tree.

        Args:
            tree: a tree of arrays, tracers or ``ShapeDtypeStruct``.
            name: the name of the tree in errors.

        Raises:
            TypeError: a leaf is not a real floating-point array.
        """
        leaves, self.treedef = jax.tree_util.tree_flatten_with_path(tree)
        self.paths = tuple(_path(path) for path, _ in leaves)
        for path, (_, leaf) in zip(self.paths, leaves, strict=True):
            _require_real(leaf, f"{name}{path}")
        self.shapes = tuple(tuple(np.shape(leaf)) for _, leaf in leaves)
        self.dtypes = tuple(jnp.result_type(leaf) for _, leaf in leaves)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return (
            self.shapes == other.shapes
            and self.dtypes == other.dtypes
            and self.treedef == other.treedef
        )

    def __hash__(self) -> int:
        return hash((self.shapes, self.dtypes))

    def __repr__(self) -> str:
        return f"Layout(d={self.size}, {self.describe()})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of coordinates of each leaf."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """``d``: the number of coordinates."""
        return sum(self.sizes)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of sums: float64 if a leaf is float64, float32 otherwise."""
        is_double = np.dtype("float64") in self.dtypes
        return np.dtype("float64" if is_double else "float32")

    def describe(self) -> str:
        """The path, dtype and shape of every leaf, on one line."""
        parts = [
            f"{path or 'value'}: {dtype.name}{list(shape)}"
            for path, dtype, shape in zip(self.paths, self.dtypes, self.shapes, strict=True)
        ]
        return "{" + ", ".join(parts) + "}"

    def check(self, tree: PyTree, name: str) -> list[Any]:
        """Checks that ``tree`` has the structure and the shapes of the layout.

        Args:
            tree: a tree of arrays.
            name: the name of the tree in errors.

        Returns:
            The leaves of ``tree``.

        Raises:
            ValueError: the structure or a shape differs; the message says how.
            TypeError: a leaf is not a real floating-point array.
        """
        leaves = self.leaves(tree, name)
        for path, shape, leaf in zip(self.paths, self.shapes, leaves, strict=True):
            if tuple(np.shape(leaf)) != shape:
                raise ValueError(
                    f"{name}{path} has the wrong shape: expected {shape}, got {np.shape(leaf)}."
                )
            _require_real(leaf, f"{name}{path}")
        return leaves

    def check_mask(self, mask: PyTree, name: str = "mask") -> list[Array]:
        """Checks that ``mask`` is boolean and has the structure and the shapes of the layout.

        A scalar leaf stands for a leaf of equal entries.

        Args:
            mask: a tree of booleans.
            name: the name of the tree in errors.

        Returns:
            The leaves of ``mask``, in the shapes of the layout.

        Raises:
            ValueError: the structure or a shape differs; the message says how.
            TypeError: a leaf is not boolean.
        """
        leaves = self.leaves(mask, name)
        for path, shape, leaf in zip(self.paths, self.shapes, leaves, strict=True):
            if jnp.result_type(leaf) != jnp.bool_:
                raise TypeError(f"{name}{path} must be boolean, got {jnp.result_type(leaf).name}.")
            if np.shape(leaf) not in ((), shape):
                raise ValueError(
                    f"{name}{path} has the wrong shape: expected {shape} or (), "
                    f"got {np.shape(leaf)}."
                )
        return [
            jnp.asarray(leaf) if np.shape(leaf) == shape else jnp.broadcast_to(leaf, shape)
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        ]

    def leaves(self, tree: PyTree, name: str) -> list[Any]:
        """The leaves of ``tree``.

        Args:
            tree: a tree with the structure of the layout.
            name: the name of the tree in errors.

        Raises:
            ValueError: the structure differs.
        """
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        if treedef != self.treedef:
            # nnx.Optimizer calls init with variables and update with the arrays in them. A tree
            # with the same paths therefore fits as well.
            named = jax.tree_util.tree_leaves_with_path(tree)
            paths = tuple(_path(path) for path, _ in named)
            if paths != self.paths:
                raise ValueError(
                    f"{name} does not have the structure of the parameters: "
                    f"{self._difference(treedef, paths)}."
                )
        return leaves

    def _difference(self, treedef: Any, paths: tuple[str, ...]) -> str:
        """How a tree differs; of large trees, only leaves that differ are named."""
        whole = f"expected {self.treedef}, got {treedef}"
        if len(whole) <= _LONGEST:
            return whole
        missing = [path for path in self.paths if path not in paths]
        unknown = [path for path in paths if path not in self.paths]
        shown = [
            f"{word}: {len(names)} ({', '.join(name or 'no path' for name in names[:3])}"
            f"{', ...' if len(names) > 3 else ''})"
            for word, names in (("missing", missing), ("unexpected", unknown))
            if names
        ]
        return "; ".join(shown) or "the order of the leaves differs"

    def flatten(self, tree: PyTree, dtype: jnp.dtype, name: str) -> Float[Array, " d"]:
        """``tree`` as one vector of ``dtype``; the inverse of :meth:`unflatten`."""
        leaves = self.check(tree, name)
        if not leaves:
            return jnp.zeros((0,), dtype)
        return jnp.concatenate([jnp.ravel(jnp.asarray(leaf)).astype(dtype) for leaf in leaves])

    def flat_mask(self, mask: PyTree, name: str = "mask") -> Bool[Array, " d"]:
        """A boolean mask as one vector."""
        leaves = self.check_mask(mask, name)
        return jnp.concatenate([*map(jnp.ravel, leaves), jnp.zeros(0, bool)])

    def unflatten(self, vector: Shaped[Array, " d"]) -> PyTree:
        """A vector of ``d`` coordinates as a tree, in the vector's dtype."""
        parts = jnp.split(vector, np.cumsum(self.sizes)[:-1]) if self.sizes else []
        leaves = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

    def is_flat(self, value: PyTree) -> bool:
        """Whether ``value`` is one vector of all ``d`` coordinates, not a tree."""
        is_vector = isinstance(value, jax.Array | np.ndarray) and value.shape == (self.size,)
        return is_vector and self.treedef != jax.tree_util.tree_structure(0)

    def as_tree(self, value: PyTree, name: str) -> PyTree:
        """``value`` as a tree of arrays; it is a tree or one flat vector."""
        if self.is_flat(value):
            _require_real(value, name)
            return self.unflatten(jnp.asarray(value))
        return jax.tree_util.tree_unflatten(
            self.treedef, [jnp.asarray(leaf) for leaf in self.check(value, name)]
        )

    def like(self, tree: PyTree, value: PyTree) -> PyTree:
        """``tree`` in the form of ``value`` (a tree or one flat vector) and in its dtypes."""
        if self.is_flat(value):
            return self.flatten(tree, jnp.result_type(value), "result")
        leaves, treedef = jax.tree_util.tree_flatten(value)
        converted = [
            x.astype(jnp.result_type(v)) for x, v in zip(jax.tree.leaves(tree), leaves, strict=True)
        ]
        return jax.tree_util.tree_unflatten(treedef, converted)


def where(mask: PyTree, tree: PyTree) -> PyTree:
    """``tree`` where the mask is true, 0 elsewhere; in the structure of ``tree``."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(jax.tree.leaves(mask), leaves, strict=True)
    inside = [jnp.where(keep, leaf, jnp.zeros_like(leaf)) for keep, leaf in pairs]
    return jax.tree.unflatten(treedef, inside)


class AnyLayout(Layout):
    """Stands for every layout, in a tree that is a prefix of other trees.

    JAX does not register this class as a node, so it is a leaf. A leaf is a prefix of any layout.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(None)


def _path(path: tuple[Any, ...]) -> str:
    wrapped = path and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(path[:-1] if wrapped else path)


def _require_real(leaf: Any, name: str) -> None:
    try:
        dtype = jnp.result_type(leaf)
    except TypeError as error:
        raise TypeError(f"{name} must be an array, got {type(leaf).__name__}.") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        hint = "Convert it to float32."
        if name.startswith("params"):
            hint = (
                "Integer and complex parameters have no gradient row; leave them out, "
                "for example with optax.masked."
            )
        raise TypeError(
            f"{name} must be a real floating-point array, got {dtype.name}{list(np.shape(leaf))}. "
            f"{hint}"
        )
