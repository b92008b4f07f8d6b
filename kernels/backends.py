"""The registry of kernels: for each platform, backends in the order in which they are tried.

A backend is a set of kernels for one platform. It lists its operations and knows its own limits:
devices, shapes and dtypes. When a program is lowered, the first backend of the platform that
supports an operation runs it. If none does, the plain form in ``jax.numpy`` runs.

A new backend is one module with an object ``BACKEND`` and one line in ``_MODULES``. Outside of
this package it is an object that you pass to :func:`register`.
"""

from __future__ import annotations

import abc
import functools
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

__all__ = ["Backend", "names", "register"]

PLAIN = "xla"


class Backend(abc.ABC):
    """Kernels for one platform.

    Attributes:
        needs: the device that the kernels need, such as "an NVIDIA GPU"; for error messages.
        operations: the functions of :mod:`mfac_jax.kernels` that it has a kernel for, some of
            ``"dots"``, ``"write_row"``, ``"combine"``, ``"block_inverse_diagonal"`` and
            ``"block_ihvp"``.
    """

    needs: str
    operations: Collection[str]

    @abc.abstractmethod
    def why_not(self, operation: str, block: jax.core.ShapedArray) -> str | None:
        """Why the backend does not support an operation on gradients of this type.

        Args:
            operation: one of :attr:`operations`.
            block: the shape and dtype of the operation's first argument.

        Returns:
            The reason, a clause that follows "cannot run:"; ``None`` if the backend supports the
            operation.
        """

    @abc.abstractmethod
    def run(self, operation: str, operands: Mapping[str, Array]) -> Any:
        """Runs the operation; called while a program is lowered.

        Args:
            operation: an operation for which :meth:`why_not` returns ``None``.
            operands: the arrays of the operation, by the names of its arguments. Arguments
                that are ``None`` are missing.

        Returns:
            The result of the function of that name, in the same shapes and dtypes.
        """


class _Entry(NamedTuple):
    platform: str
    load: Callable[[], Backend]


_registry: dict[str, _Entry] = {}


def register(name: str, platform: str, load: Callable[[], Backend]) -> None:
    """Adds a backend. It is tried after the backends that the platform already has.

    Register it before the first program is traced: compiled programs do not change.

    Args:
        name: the name of the backend for ``implementation=``.
        platform: the platform of JAX that the kernels are for, in lower case, such as ``"cuda"``.
        load: returns the backend. It is called when the backend is first needed, so programs
            for other platforms import none of its modules.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an implementation of this name exists already, or ``name`` or ``platform`` is
            empty or not in the right form.
    """
    for value, what in ((name, "name"), (platform, "platform")):
        if not isinstance(value, str):
            raise TypeError(f"{what} must be a str, got {type(value).__name__}.")
        if not value or value != value.strip():
            raise ValueError(f"{what} must be a word, got {value!r}.")
    if platform != platform.lower():
        raise ValueError(f"platform must be in lower case, such as 'cuda'; got {platform!r}.")
    if not callable(load):
        raise TypeError(
            f"load must be a function that returns the backend, got {type(load).__name__}."
        )
    if name in names():
        raise ValueError(
            f"name must be new: there is an implementation of this name; got {name!r}."
        )
    _registry[name] = _Entry(platform, functools.cache(load))


def names() -> tuple[str, ...]:
    """Every name that ``implementation=`` accepts; ``"xla"`` is the plain form."""
    return (PLAIN, *_registry)


def platforms() -> tuple[str, ...]:
    """The platforms that have a backend."""
    return tuple(dict.fromkeys(entry.platform for entry in _registry.values()))


def platform_of(name: str) -> str:
    """The platform of the backend of this name."""
    return _registry[name].platform


def named(name: str) -> Backend:
    """The backend of this name."""
    return _registry[name].load()


def for_platform(platform: str) -> list[Backend]:
    """The backends of a platform, in the order in which they are tried."""
    return [entry.load() for entry in _registry.values() if entry.platform == platform]


def for_operation(name: str | None, operation: str) -> str | None:
    """What runs an operation on rows whose storage names an implementation.

    It is that implementation, or ``"xla"`` if its backend has no kernel for the operation; None
    for None.
    """
    if name in (None, PLAIN) or operation in named(name).operations:
        return name
    return PLAIN


def why_not(backend: Backend, operation: str, block: jax.core.ShapedArray) -> str | None:
    """Why a backend does not run an operation on these gradients; ``None`` if it does."""
    if operation not in backend.operations:
        return f"it has no kernel for {operation}"
    return backend.why_not(operation, block)


def check_supports(name: str | None, operation: str, block: jax.core.ShapedArray) -> None:
    """Checks that the backend of this name runs an operation on these gradients.

    Raises:
        ValueError: it does not; the error says why.
    """
    reason = None if name in (None, PLAIN) else why_not(named(name), operation, block)
    if reason is not None:
        raise cannot_run(name, reason)


def cannot_run(name: str | None, reason: str) -> ValueError:
    """The error for an implementation that cannot run."""
    return ValueError(f"implementation={name!r} cannot run: {reason}.")


def check_implementation(implementation: Any) -> None:
    """Checks that ``implementation`` is ``None`` or the name of an implementation.

    Raises:
        ValueError: there is no such implementation.
    """
    if implementation is not None and implementation not in names():
        known = ", ".join(map(repr, names()))
        raise ValueError(f"implementation must be None or one of {known}; got {implementation!r}.")


# A module is imported when its backend is first needed: a program for a CPU does not import Pallas.
_MODULES = {
    "mosaic_gpu": ("cuda", "_mosaic_gpu"),
    "mosaic_tpu": ("tpu", "_mosaic_tpu"),
}


def _load(module: str) -> Backend:
    backend: Backend = importlib.import_module(f"mfac_jax.kernels.{module}").BACKEND
    return backend


for _name, (_platform, _module) in _MODULES.items():
    register(_name, _platform, functools.partial(_load, _module))
