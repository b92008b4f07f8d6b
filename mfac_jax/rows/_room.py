"""Rows that cannot fit are refused before they are allocated, with advice on what would fit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mfac_jax import _memory
from mfac_jax._layout import Layout, PyTree
from mfac_jax._memory import Plan

if TYPE_CHECKING:
    from mfac_jax.rows._storage import Storage


def require_room(
    storage: Storage,
    params: PyTree,
    num_rows: int,
    name: str,
    *,
    parts: int = 1,
    gram: bool = False,
    step: bool = False,
) -> None:
    """Refuses rows that cannot fit. Checks nothing under ``jit``.

    Args:
        storage: how the gradients are stored.
        params: the parameters or their shapes.
        num_rows: the number of rows of each part.
        name: the argument that sets the number, for the error.
        parts: how many such rows there are together.
        gram: whether they come with a Gram matrix.
        step: whether an optimizer takes steps with them.

    Raises:
        MemoryError: the plan needs more than is free.
    """
    layout = Layout(params)  # says which parameter is no array
    shapes = _memory.on_mesh(params)

    def plan(storage: Storage, count: int) -> Plan | None:
        rows = storage.bytes_by_place(params, count)
        if rows is None:
            return None
        held = {place: parts * nbytes for place, nbytes in rows.items()}
        square = {"device": layout.dtype.itemsize * (parts * count) ** 2 if gram else 0}
        named = _memory.components("gradients", held) + _memory.components("Gram matrix", square)
        if step and storage.is_traceable:
            made = _memory.arrays(lambda params: storage.empty(params, count), shapes)
            used = {"device": made.step_bytes(_memory.platform())}
            named += _memory.components("temporary arrays", used)
        return Plan(f"{name}={count}, {spelled(storage)}", tuple(named))

    def most(storage: Storage) -> str:
        return f"{largest(functools.partial(plan, storage))} with {spelled(storage)}"

    def advice() -> str:
        found = map(most, dict.fromkeys([storage, *storages(host=not _memory.is_host())]))
        return (
            f"The largest {name} that fits: {', '.join(found)}. Files(directory) stores gradients "
            "on disk, for the static algorithm."
        )

    _memory.require(lambda: plan(storage, num_rows), advice)


def require_room_of(
    make: Callable[[PyTree, int], Any], params: PyTree, num_rows: int, name: str
) -> None:
    """Refuses what ``make(params, num_rows)`` allocates, if it cannot fit; see above."""
    shapes = _memory.on_mesh(params)

    def plan(count: int) -> Plan:
        made = _memory.arrays(lambda params: make(params, count), shapes)
        named = _memory.components("gradients", _memory.bytes_by_place(made))
        return Plan(f"{name}={count}", tuple(named))

    _memory.require(
        lambda: plan(num_rows), lambda: f"The largest {name} that fits is {largest(plan)}."
    )


def largest(plan: Callable[[int], Plan | None]) -> int:
    """The largest number of rows whose plan fits what is free."""

    def fits(count: int) -> bool:
        made = plan(count)
        return made is not None and not _memory.lacking(made)

    return _memory.largest(fits)


def storages(*, host: bool) -> tuple[Storage, ...]:
    """Storages in the memory of a device, from the largest to the smallest, and of the host."""
    # Imported here because the storages refuse rows with the functions of this module.
    from mfac_jax.rows._int8 import Int8
    from mfac_jax.rows._paged import Paged
    from mfac_jax.rows._storage import Dense
    from mfac_jax.rows._topk import TopK

    on_device = Dense(), Dense("bfloat16"), Int8(), TopK()
    return (*on_device, Paged()) if host else on_device


def spelled(storage: Storage) -> str:
    """A storage as its user writes it, without what is by default."""
    if not dataclasses.is_dataclass(storage):
        return repr(storage)
    values = {field: getattr(storage, field.name) for field in dataclasses.fields(storage)}
    given = [
        f"{field.name}={getattr(value, 'name', value)!r}"
        for field, value in values.items()
        if value != field.default
    ]
    return f"{type(storage).__name__}({', '.join(given)})"
