"""What arrays take and what is free: plans of allocations, and their refusal.

A plan is made from shapes alone. An allocation that its plan cannot fit is refused before anything
is allocated.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from mfac_jax import _checks

PyTree = Any

PLACES = ("device", "host", "disk")

# The largest number of gradients that is tried.
MOST = 2**24

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Component(NamedTuple):
    """One line of a :class:`Plan`.

    Attributes:
        name: what takes the memory.
        place: ``"device"`` (each device), ``"host"`` or ``"disk"``.
        nbytes: the bytes.
    """

    name: str
    place: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What a computation takes at its largest, by component; ``print`` shows a table.

    Attributes:
        title: what is planned.
        components: the parts.
    """

    title: str
    components: tuple[Component, ...]

    def nbytes(self, place: str) -> int:
        """The bytes in one place: ``"device"``, ``"host"`` or ``"disk"``."""
        return sum(part.nbytes for part in self.components if part.place == place)

    @property
    def device_bytes(self) -> int:
        """The bytes in the memory of each device."""
        return self.nbytes("device")

    @property
    def host_bytes(self) -> int:
        """The bytes in the memory of the host, beside those of a CPU as the device."""
        return self.nbytes("host")

    @property
    def disk_bytes(self) -> int:
        """The bytes in files."""
        return self.nbytes("disk")

    def __str__(self) -> str:
        totals = [Component("together", place, self.nbytes(place)) for place in PLACES]
        lines = [(part.name, part.place, with_unit(part.nbytes)) for part in self.components]
        lines += [(part.name, part.place, with_unit(part.nbytes)) for part in totals if part.nbytes]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        shown = [
            f"{name:{widths[0]}}  {place:{widths[1]}}  {size:>{widths[2]}}"
            for name, place, size in lines
        ]
        return "\n".join([self.title, *shown])


def with_unit(nbytes: int) -> str:
    """Bytes in the unit that suits their size."""
    power = min(int(math.log2(max(nbytes, 1)) // 10), len(_UNITS) - 1)
    value = nbytes / 1024**power
    return f"{value:.0f} {_UNITS[power]}" if power == 0 else f"{value:.2f} {_UNITS[power]}"


def components(name: str, sizes: Mapping[str, int]) -> list[Component]:
    """Bytes by place as components of one name."""
    return [Component(name, place, sizes[place]) for place in PLACES if sizes.get(place)]


def on_mesh(params: PyTree, mesh: Mesh | AbstractMesh | None = None) -> PyTree:
    """The shapes, dtypes and shardings of parameters, for :func:`arrays`.

    Args:
        params: arrays or ``jax.ShapeDtypeStruct``.
        mesh: stands for the mesh of every leaf that has a ``NamedSharding``. There must be one.

    Raises:
        TypeError: ``mesh`` is no mesh.
        ValueError: the mesh does not have an axis of a leaf, or does not divide the leaf; no leaf
            has a ``NamedSharding``; or there are leaves on different meshes.
    """
    _checks.instance(mesh, "mesh", Mesh | AbstractMesh | None)

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return jax.ShapeDtypeStruct(shape, dtype)
        # With explicit axes JAX follows the sharding of each array as it traces a function.
        own = sharding.mesh if mesh is None else mesh
        types = (AxisType.Explicit,) * len(own.axis_names)
        abstract = AbstractMesh(own.axis_sizes, own.axis_names, axis_types=types)
        placed = NamedSharding(abstract, sharding.spec)
        placed.shard_shape(shape)  # raises the error
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    structs = jax.tree.map(struct, params)
    meshes = _meshes(structs)
    if mesh is not None and not meshes:
        raise ValueError(
            "a mesh is for parameters with a NamedSharding, which says along which axes it cuts "
            "them; got none."
        )
    if len(meshes) > 1:
        shapes = sorted(str(dict(own.shape)) for own in meshes)
        raise ValueError(
            f"the leaves of params must be on one mesh, got meshes of {', '.join(shapes)}."
        )
    return structs


def _meshes(structs: PyTree) -> set[AbstractMesh]:
    leaves = jax.tree.leaves(structs)
    return {leaf.sharding.mesh for leaf in leaves if leaf.sharding is not None}


def arrays(function: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """The arrays that ``function(params)`` makes, as shapes with dtypes, shardings and places.

    Args:
        function: a function that JAX can trace. It reads no values if a leaf is sharded.
        params: the result of :func:`on_mesh`.
    """
    meshes = _meshes(params)
    if not meshes:
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(params)
    else:
        # Tracers would hide their sharding from the function.
        with jax.sharding.use_abstract_mesh(meshes.pop()):
            jaxpr, shapes = jax.make_jaxpr(lambda: function(params), return_shape=True)()
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)


def bytes_by_place(tree: PyTree) -> dict[str, int]:
    """The bytes of the arrays that :func:`arrays` found, on each device and on the host."""
    found = dict.fromkeys(PLACES, 0)
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        space = getattr(leaf, "memory_space", None)
        place = "host" if space == jax.memory.Space.Host else "device"
        found[place] += math.prod(shape) * leaf.dtype.itemsize
    return found


_is_checked = contextvars.ContextVar("mfac_jax_check_memory", default=True)


@contextlib.contextmanager
def check_memory(enabled: bool) -> Iterator[None]:
    """Turns the refusal of allocations that cannot fit on or off.

    Args:
        enabled: whether allocations that cannot fit are refused, as they are by default.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import planning, window
        >>> with planning.check_memory(False):
        ...     w = window.init(jnp.zeros(3), window_size=2)
    """
    token = _is_checked.set(bool(enabled))
    try:
        yield
    finally:
        _is_checked.reset(token)


def require(plan: Callable[[], Plan | None], advice: Callable[[], str]) -> None:
    """Refuses an allocation that cannot fit. Checks nothing under ``jit``, or if it is turned off.

    Args:
        plan: makes the plan of the allocation; None if what it takes is unknown.
        advice: says what would fit.

    Raises:
        MemoryError: more is needed than is free. The message holds the plan and the advice.
    """
    if not _is_checked.get() or isinstance(jnp.zeros(()), jax.core.Tracer):
        return
    made = plan()
    missing = [] if made is None else lacking(made)
    if missing:
        flag = "mfac_jax.planning.check_memory(False) turns this check off."
        raise MemoryError(
            "\n\n".join([f"It does not fit: {missing[0]}", str(made), advice(), flag])
        )


def lacking(plan: Plan) -> list[str]:
    """Each place where less is free than the plan needs."""
    on_host, on_device = free_on_host(), free_on_device()
    needs = [("device", plan.device_bytes, on_device), ("host", plan.host_bytes, on_host)]
    if is_host():  # of several devices one is counted
        needs = [("host", plan.device_bytes + plan.host_bytes, on_host)]
    return [
        f"{with_unit(needed)} are needed and {with_unit(free)} are free on the {place}."
        for place, needed, free in needs
        if free is not None and needed > free
    ]


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest number from 0 to ``most`` that fits, if all smaller ones fit."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def free_on_device() -> int | None:
    """The free bytes of the default device; None if they are unknown."""
    if is_host():
        return free_on_host()
    stats = _device().memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: that of the default device."""
    name = _device().platform
    return name if name in ("cpu", "tpu") else "gpu"


def is_host() -> bool:
    """Whether the memory of the default device is that of the host."""
    return _device().platform == "cpu"


def _device() -> jax.Device:
    """The device on which new arrays are made."""
    return next(iter(jnp.zeros(()).devices()))


def free_on_host(root: Path = Path("/")) -> int | None:
    """The free bytes of the host, in a container those that its limit leaves; None if unknown.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
    """
    info = root / "proc" / "meminfo"
    if not info.exists():
        return None
    lines = (line.split(":") for line in info.read_text().splitlines())
    fields = {name: 1024 * int(value.split()[0]) for name, value in lines}
    found = [fields[name] for name in ("MemAvailable",) if name in fields]
    return min([*found, *_left_by_limits(root)], default=None)


def _left_by_limits(root: Path) -> Iterator[int]:
    """What the control groups of this process leave free: version 2, then version 1."""
    groups = root / "sys" / "fs" / "cgroup"
    own = root / "proc" / "self" / "cgroup"
    paths = [line.split(":", 2) for line in own.read_text().splitlines()] if own.exists() else []
    for _, controllers, path in paths:
        if controllers not in ("", "memory"):
            continue
        top = groups / controllers
        inner = top / path.lstrip("/")
        is_new = controllers == ""
        limit = "memory.max" if is_new else "memory.limit_in_bytes"
        usage = "memory.current" if is_new else "memory.usage_in_bytes"
        cache = "inactive_file" if is_new else "total_inactive_file"
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(top):
                break
            yield from _left_by(folder, limit, usage, cache)


def _left_by(folder: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    files = [folder / name for name in (limit, usage, "memory.stat")]
    if not all(file.exists() for file in files):
        return
    most, used, stat = (file.read_text() for file in files)
    if most.strip() == "max":
        return
    # The kernel drops cached files when memory runs short.
    fields = dict(line.split() for line in stat.splitlines())
    yield max(int(most) - int(used) + int(fields.get(cache, 0)), 0)
