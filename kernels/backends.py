"""Which kernels there are: for each platform, backends in the order in which they are tried.

A backend is a set of kernels for one platform. It knows its own limits: devices, shapes and
dtypes. When a program is lowered, the first backend of the platform that can do an operation
does it; if none can, the plain form in ``jax.numpy`` does.

A new backend is one module with an object ``BACKEND`` and one line in ``_MODULES``. Outside of
this package it is an object that :func:`register` takes.
"""

from __future__ import annotations

import abc
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

__all__ = ["Backend", "names", "register"]

PLAIN = "xla"


class Backend(abc.ABC):
    """Kernels for one platform.

    Attributes:
        needs: what they run on, as in "an NVIDIA GPU"; for error messages.
    """

    needs: str

    @abc.abstractmethod
    def why_not(self, operation: str, block: jax.core.ShapedArray) -> str | None:
        """Why the backend cannot do an operation on gradients of this type.

        Args:
            operation: name of a function of :mod:`mfac_jax.kernels`: ``"dots"``,
                ``"write_row"``, ``"combine"``, ``"block_inverse_diagonal"`` or ``"block_ihvp"``.
            block: shape and dtype of the operation's first argument.

        Returns:
            The reason, a clause that may follow "cannot run:"; ``None`` if it can.
        """

    @abc.abstractmethod
    def run(self, operation: str, operands: Mapping[str, Array]) -> Any:
        """Does the operation; called while a program is lowered.

        Args:
            operation: as in :meth:`why_not`, which has returned ``None`` for it.
            operands: the arrays of the operation by the names of its arguments. Arguments
                that are ``None`` are left out.

        Returns:
            What the function of that name returns, in the same shapes and dtypes.
        """


class _Entry(NamedTuple):
    platform: str
    load: Callable[[], Backend]


_registry: dict[str, _Entry] = {}


def register(name: str, platform: str, load: Callable[[], Backend]) -> None:
    """Adds a backend, which is tried after those that the platform already has.

    Register it before the first program is traced: programs that are compiled stay as they are.

    Args:
        name: what ``implementation=`` calls it.
        platform: platform of JAX that it has kernels for, such as ``"cuda"``.
        load: returns the backend. It is called when the backend is first needed, so that
            programs for other platforms import none of its modules.

    Raises:
        ValueError: there is an implementation of this name.
    """
    if name in names():
        raise ValueError(f"name must be that of no implementation yet; got {name!r}.")
    _registry[name] = _Entry(platform, functools.cache(load))


def names() -> tuple[str, ...]:
    """Every name that ``implementation=`` takes: ``"xla"`` is the plain form."""
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


def check_implementation(implementation: Any) -> None:
    """Checks that ``implementation`` is ``None`` or the name of one.

    Raises:
        ValueError: it is not.
    """
    if implementation is not None and implementation not in names():
        known = ", ".join(map(repr, names()))
        raise ValueError(f"implementation must be None or one of {known}; got {implementation!r}.")


# Imported when a backend is first needed: a program for a CPU imports nothing of Pallas.
_MODULES = {
    "mosaic_gpu": ("cuda", "_mosaic_gpu"),
    "mosaic_tpu": ("tpu", "_mosaic_tpu"),
}


def _load(module: str) -> Backend:
    backend: Backend = importlib.import_module(f"mfac_jax.kernels.{module}").BACKEND
    return backend


for _name, (_platform, _module) in _MODULES.items():
    register(_name, _platform, functools.partial(_load, _module))
