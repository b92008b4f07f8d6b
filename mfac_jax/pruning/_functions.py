"""The common base of scores and updates: a function of a :class:`mfac_jax.pruning.Problem`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree


@dataclass(frozen=True)
class ProblemFunction:
    """A function of a problem, and what a step must know about it before it reads gradients.

    Attributes:
        function: the function.
        reads_columns: whether the function reads columns of the gradients.
    """

    function: Callable[..., PyTree]
    reads_columns: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be a function, got {self.function!r}.")
        if not isinstance(self.reads_columns, bool):
            raise TypeError(
                f"reads_columns must be a bool, got {type(self.reads_columns).__name__}."
            )


Kind = TypeVar("Kind", bound=ProblemFunction)


def as_kind(value: Any, name: str, known: Mapping[str, Kind], kind: type[Kind]) -> Kind:
    """A score or an update, from a name or from the caller's own function or object.

    Args:
        value: the caller's argument.
        name: the name of the argument.
        known: the scores or updates that have a name.
        kind: the class of scores or of updates.

    Raises:
        TypeError: ``value`` is of another kind.
        ValueError: ``known`` has no such name.
    """
    if isinstance(value, kind):
        return value
    found = _checks.named(value, name, known)
    return found if isinstance(found, kind) else kind(found)


def name_of(value: Any) -> str:
    """What reports and errors call a score or an update.

    A function is called by its ``__name__``, another callable by its type.
    """
    if isinstance(value, ProblemFunction):
        return name_of(value.function)
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


def call(function: ProblemFunction, layout: Layout, what: str, *arguments: Any) -> PyTree:
    """Calls a score or an update, and checks that it returns a tree like the parameters.

    Args:
        function: the score or the update.
        layout: the parameters.
        what: what it returns, for errors.
        arguments: its arguments.

    Raises:
        ValueError: the structure or a shape differs.
        TypeError: a leaf is not a real floating-point array.
    """
    found = function.function(*arguments)
    name = f"the {what} that {name_of(function)} returns"
    layout.leaves(found, name)
    leaves = layout.check(found, name if layout.paths == ("",) else f"{name}: ")
    return jax.tree.unflatten(layout.treedef, leaves)
