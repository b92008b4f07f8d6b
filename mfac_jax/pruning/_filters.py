"""Which parameters may be pruned, by their path in the tree.

A path consists of the keys from the root to a leaf, with slashes between them. It looks the same
for every kind of tree: ``"params/Dense_0/kernel"`` (Flax Linen), ``"linear/kernel/value"``
(Flax NNX), ``"layers/0/weight"`` (Equinox), ``"w1"`` (a dictionary).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mfac_jax._layout import Layout, PyTree

PathFilter = str | Callable[[str, Any], bool] | None

# In NNX an array is the value of a variable. Its path then ends in a key without meaning.
_BOXES = {"value", "raw_value"}
_BIAS_WORDS = {"bias", "biases"}
_SCALES = {"b", "scale", "gamma", "beta", "mean", "var"}
_NORM_WORDS = {"norms", "bn", "gn", "ln", "normalization", "normalisation"}


def prunable(params: PyTree, path_filter: PathFilter = None) -> PyTree:
    """Says which leaves of ``params`` may be pruned.

    Args:
        params: the parameters, or anything with their shapes and dtypes.
        path_filter: a regular expression to search for in the path, or a function
            ``(path, leaf) -> bool``. By default a leaf may be pruned if it has at least two
            axes and its path does not name a bias, or the scale or module of a
            normalisation. The name matters because biases of stacked layers and of
            convolutions can have several axes.

    Returns:
        A tree of Python booleans with the structure of ``params``.

    Raises:
        TypeError: ``path_filter`` has another type or does not return a bool, or a leaf is
            not real floating point.
        ValueError: the expression is malformed, or no leaf is selected.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax.pruning import prunable
        >>> params = {"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
        >>> prunable(params)
        {'fc': {'bias': False, 'kernel': True}}
    """
    Layout(params)
    selects = as_filter(path_filter)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    flags = []
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        flag = selects(path, leaf)
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"path_filter must return a bool, got {type(flag).__name__} for {path!r}."
            )
        flags.append(bool(flag))
    if not any(flags):
        raise ValueError(
            "path_filter must select at least one parameter to prune: "
            f"got none of {paths} with path_filter={path_filter!r}."
        )
    return jax.tree_util.tree_unflatten(treedef, flags)


def as_filter(path_filter: PathFilter) -> Callable[[str, Any], bool]:
    """The function ``(path, leaf) -> bool`` of a filter.

    Raises:
        TypeError: ``path_filter`` has another type.
        ValueError: the expression is malformed.
    """
    if path_filter is None:
        return _is_weight
    if isinstance(path_filter, str):
        try:
            pattern = re.compile(path_filter)
        except re.error as error:
            raise ValueError(
                f"path_filter must be a regular expression, got {path_filter!r}: {error}."
            ) from error
        return lambda path, _: pattern.search(path) is not None
    if callable(path_filter):
        return path_filter
    raise TypeError(
        "path_filter must be None, a regular expression or a function of path and leaf, "
        f"got {type(path_filter).__name__}."
    )


def _is_weight(path: str, leaf: Any) -> bool:
    keys = [key for key in path.split("/") if key and not key.isdigit()]
    if keys and keys[-1] in _BOXES:
        keys.pop()
    if keys and (keys[-1].rstrip("0123456789") in _SCALES or _BIAS_WORDS & set(_words(keys[-1]))):
        return False
    # Only the leaf and its module; further up, "norm" may name a whole tower.
    for word in (word for key in keys[-2:] for word in _words(key)):
        if word in _NORM_WORDS or word.endswith("norm"):
            return False
    return len(np.shape(leaf)) >= 2


def _words(key: str) -> list[str]:
    """The words of a name in any style: ``LayerNorm_0`` gives layer and norm."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", key)]
