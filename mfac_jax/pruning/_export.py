"""Exports pruned parameters: to files, and to JAX's own sparse arrays."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jax_sparse
from jaxtyping import Array

from mfac_jax._layout import Layout, PyTree

_MASK = "mask/"


def save(path: str | os.PathLike[str], params: PyTree, mask: PyTree) -> None:
    """Writes parameters and mask to a file, ``.npz`` or ``.safetensors``.

    The name of an array is its path in the tree, with slashes between the keys. The name of its
    mask is ``mask/`` and the same path. Pruned weights are written as zeros.

    Args:
        path: the file to write; an existing file is replaced.
        params: the parameters, a tree of real floating-point arrays.
        mask: a tree of booleans like ``params``, true where a weight is alive.

    Raises:
        TypeError: a leaf is not real floating point, or the mask is not boolean.
        ValueError: the mask does not fit, the suffix is unknown, or two arrays have the same
            name.
        ImportError: the suffix is ``.safetensors``, and safetensors is not installed.
    """
    path = _checked(path)
    layout = Layout(params)
    masks = layout.check_mask(mask)
    arrays: dict[str, np.ndarray] = {}
    for name, leaf, alive in zip(_names(params), jax.tree.leaves(params), masks, strict=True):
        if {name, _MASK + name} & arrays.keys():
            raise ValueError(f"two arrays would have the name {name!r} or {_MASK + name!r}.")
        arrays[name] = np.where(alive, leaf, np.zeros((), jnp.result_type(leaf)))
        arrays[_MASK + name] = np.asarray(alive)
    if path.suffix == ".npz":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in arrays.items():
                # NumPy has no name for bfloat16; float32 holds its values exactly.
                known = array if array.dtype.isbuiltin == 1 else array.astype(np.float32)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, known, allow_pickle=False)
        return
    from safetensors.flax import save_file

    save_file({name: jnp.asarray(array) for name, array in arrays.items()}, str(path))


def load(path: str | os.PathLike[str], params: PyTree) -> tuple[PyTree, PyTree]:
    """Reads what :func:`save` has written.

    Args:
        path: the file.
        params: the parameters, or anything with their structure and shapes.

    Returns:
        The parameters, in the dtypes of ``params``, and the mask.

    Raises:
        ValueError: an array is missing or has another shape, or the suffix is unknown.
        ImportError: as :func:`save`.
    """
    path = _checked(path)
    layout = Layout(params)
    arrays: dict[str, Any]
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
    else:
        from safetensors.flax import load_file

        arrays = load_file(str(path))
    leaves: list[Array] = []
    masks: list[Array] = []
    for name, shape, dtype in zip(_names(params), layout.shapes, layout.dtypes, strict=True):
        for key, into in ((name, leaves), (_MASK + name, masks)):
            if key not in arrays:
                raise ValueError(f"{path} has no array {key!r}; it has {sorted(arrays)}.")
            if arrays[key].shape != shape:
                raise ValueError(
                    f"{key!r} in {path} has the wrong shape: expected {shape}, "
                    f"got {arrays[key].shape}."
                )
            into.append(jnp.asarray(arrays[key], jnp.bool_ if into is masks else dtype))
    return jax.tree.unflatten(layout.treedef, leaves), jax.tree.unflatten(layout.treedef, masks)


def to_bcoo(params: PyTree, mask: PyTree) -> PyTree:
    """The alive weights as :class:`jax.experimental.sparse.BCOO` arrays.

    Leaves without a pruned weight stay dense, and so do scalars. The function cannot run under
    ``jit``: the number of alive weights is part of an array's shape.

    Args:
        params: the parameters, a tree of real floating-point arrays.
        mask: a tree of booleans like ``params``.

    Returns:
        A tree like ``params``.

    Raises:
        TypeError: a leaf is not real floating point, or the mask is not boolean.
        ValueError: the mask does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax.pruning import to_bcoo
        >>> weights = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> (to_bcoo(weights, weights != 0) @ jnp.ones(2)).tolist()
        [1.0, 2.0]
    """
    layout = Layout(params)

    def convert(leaf: Any, alive: Any) -> Any:
        alive = np.asarray(alive)
        if alive.all() or not alive.ndim:
            return jnp.asarray(leaf)
        indices = np.argwhere(alive).astype(np.int32)
        data = jnp.asarray(leaf)[tuple(indices.T)]
        return jax_sparse.BCOO(
            (data, jnp.asarray(indices)),
            shape=jnp.shape(leaf),
            indices_sorted=True,
            unique_indices=True,
        )

    pairs = zip(jax.tree.leaves(params), layout.check_mask(mask), strict=True)
    return jax.tree.unflatten(layout.treedef, [convert(*pair) for pair in pairs])


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"path must end in .npz or .safetensors, got {str(path)!r}.")
    return path


def _names(params: PyTree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") or "value" for path, _ in leaves]
