"""Checks of static arguments. Every error says what was expected and what the caller gave."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType


def automatic_axes(params: Any, name: str) -> None:
    """Checks that no array lies on a mesh with explicit axes."""
    for leaf in jax.tree.leaves(params):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f"the mesh of {name} must have automatic axes, got {mesh.axis_types}; give "
                "jax.make_mesh axis_types=(jax.sharding.AxisType.Auto,) * number_of_axes. (The "
                "optimizers take either.)"
            )


def positive_int(value: Any, name: str) -> int:
    """``value`` as a Python int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        hint = (
            " It is a size, so it cannot be an array; with optax.inject_hyperparams, "
            f"name it in static_args={(name,)!r}."
            if isinstance(value, jax.Array)
            else ""
        )
        raise TypeError(f"{name} must be a Python int, got {type(value).__name__}.{hint}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return int(value)


def non_negative_int(value: Any, name: str) -> int:
    """``value`` as a Python int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a Python int, got {type(value).__name__}.")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}.")
    return int(value)


def positive_scalar(value: Any, name: str) -> None:
    """Checks for a finite scalar above 0. A traced scalar is checked for shape and dtype only."""
    number = _number(value, name)
    if number is not None and not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}.")


def unit_interval(value: Any, name: str) -> None:
    """Checks for a scalar in [0, 1]. A traced scalar is checked for shape and dtype only."""
    number = _number(value, name)
    if number is not None and not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}.")


def decay(value: Any, name: str) -> None:
    """Checks for a scalar in [0, 1). A traced scalar is checked for shape and dtype only."""
    number = _number(value, name)
    if number is not None and not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}.")


def static_decay(value: Any, name: str) -> None:
    """Checks for a Python number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a Python number, got {type(value).__name__}. Under "
            f"optax.inject_hyperparams, name {name} in static_args."
        )
    decay(value, name)


def instance(value: Any, name: str, kind: Any) -> None:
    """Checks the type of ``value``; ``kind`` is a type or a union."""
    if not isinstance(value, kind):
        kinds = (kind,) if isinstance(kind, type) else kind.__args__
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}.")


def scalar(value: Any, name: str) -> None:
    """Checks for a real scalar of any value."""
    _number(value, name)


def _number(value: Any, name: str) -> float | None:
    """The value of a scalar, or None if it is traced."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if isinstance(value, bool) or not (is_array or isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number or a scalar array, got {type(value).__name__}.")
    if is_array:
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got an array of shape {value.shape}.")
        if not (
            jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        ):
            raise TypeError(f"{name} must be a real number, got {value.dtype.name}.")
    return None if isinstance(value, jax.core.Tracer) else float(value)


def folder(value: Any, name: str) -> None:
    """Checks for the path of a folder, which need not exist."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}.")
    if not os.fspath(value):
        raise ValueError(f"{name} must name a folder, got {value!r}.")


def one_of(value: Any, name: str, choices: Sequence[str]) -> None:
    """Checks that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def dtype(value: Any, name: str, choices: Sequence[str]) -> np.dtype:
    """``value`` as a dtype whose name is one of ``choices``."""
    try:
        chosen = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"{name} must be one of {', '.join(choices)}; got {value!r}.") from error
    if chosen.name not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {chosen.name}.")
    return chosen


def named(value: Any, name: str, known: Mapping[str, Any]) -> Any:
    """The entry of ``known`` with the name ``value``, or ``value`` itself if it is a function."""
    if isinstance(value, str):
        one_of(value, name, tuple(known))
        return known[value]
    if not callable(value):
        raise TypeError(
            f"{name} must be one of {', '.join(map(repr, known))} or a function, got {value!r}."
        )
    return value


def index(value: Any, name: str, size: int) -> None:
    """Checks indices into ``size`` items. Traced indices are checked for their dtype only."""
    dtype = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    if not np.issubdtype(dtype, np.integer):
        raise TypeError(f"{name} must be an integer index, got {dtype}.")
    if isinstance(value, jax.core.Tracer):
        return
    values = np.asarray(value)
    if values.size and not (values.min() >= 0 and values.max() < size):
        wrong = values[(values < 0) | (values >= size)].flat[0]
        raise ValueError(f"{name} must lie in 0..{size - 1}, got {wrong}.")


def axis(value: object, name: str) -> None:
    """Checks that ``value`` is an int.

    Raises:
        TypeError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a Python int, got {type(value).__name__}.")
