"""Plans: what a computation takes, by component, before anything is allocated.

A plan follows from the shapes, dtypes and shardings of the parameters. The state of an optimizer is
exact, for every storage and option: JAX traces its ``init``. Temporary arrays are estimates; the
page "Planning" of the documentation compares them with XLA's own figures. A plan leaves out the
parameters, the data, and what the network takes to compute its gradient.

:func:`plan` is for :func:`mfac_jax.mfac_precondition`, :func:`plan_optimizer` for any optax
transformation, :func:`plan_inverse` for the static algorithm and :func:`plan_pruning` for
:func:`mfac_jax.pruning.prune`. :func:`fitting` finds the largest window that fits a budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from mfac_jax import _checks, _memory
from mfac_jax._layout import Layout, PyTree
from mfac_jax._memory import Component, Plan, check_memory
from mfac_jax.inverse._inverse import products_suffice
from mfac_jax.kernels._xla import accumulation_dtype
from mfac_jax.optimizer import mfac_precondition
from mfac_jax.optimizer._metric import Metric
from mfac_jax.optimizer._precondition import DEFAULT_WINDOW_SIZE
from mfac_jax.optimizer._windows import BlockWindows, step_bytes
from mfac_jax.pruning import Gradients
from mfac_jax.pruning._gradients import num_kept, num_new_parts
from mfac_jax.rows import Blocks, Dense, InBlocks, Storage, partition
from mfac_jax.rows._map import piece_entries
from mfac_jax.rows._room import spelled
from mfac_jax.rows._room import storages as known_storages
from mfac_jax.rows._storage import check_storage, vector_bytes
from mfac_jax.window import Window

__all__ = [
    "Choice",
    "Component",
    "Fitting",
    "Plan",
    "check_memory",
    "fitting",
    "plan",
    "plan_inverse",
    "plan_optimizer",
    "plan_pruning",
]

PLATFORMS = ("cpu", "gpu", "tpu")

# The vectors of a pruning step: parameters, changes, scores and masks of all settings, and the
# copies that sort them.
_VECTORS_OF_PRUNING = 28
# The matrices of a block during greedy removal: the Fisher, its factor and its inverse.
_MATRICES_OF_PRUNING = 3


def plan(
    params: PyTree,
    window_size: int = DEFAULT_WINDOW_SIZE,
    *,
    storage: Storage = Dense(),  # noqa: B008  (immutable)
    blocks: str | None = None,
    metric: Metric | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    platform: str | None = None,
) -> Plan:
    """What :func:`mfac_jax.mfac_precondition` takes: its state, and a step that donates the state.

    Args:
        params: the parameters, or ``jax.ShapeDtypeStruct`` with their shapes. A ``NamedSharding``
            of a leaf divides what follows it over the devices.
        window_size: see :func:`mfac_jax.mfac_precondition`.
        storage: see :func:`mfac_jax.mfac_precondition`.
        blocks: see :func:`mfac_jax.mfac_precondition`.
        metric: see :func:`mfac_jax.mfac_precondition`.
        mesh: stands for the mesh of the leaves that have a ``NamedSharding``, and has its axes.
            An ``AbstractMesh`` needs no devices.
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``, on which temporary arrays depend; by default
            that of the default device.

    Returns:
        The plan; its bytes are those of one device.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has an impossible value, the mesh does not fit a leaf, or there are
            leaves on different meshes.

    Example:
        >>> import jax
        >>> from mfac_jax import plan
        >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), "float32")}
        >>> print(plan(params, window_size=64, platform="gpu"))
        window of 64 gradients, Dense(), 1,000,000 parameters, on a gpu
        gradients            device  246.00 MiB
        Gram matrix          device   16.00 KiB
        other state          device   16.26 KiB
        gradient and update  device    7.63 MiB
        temporary arrays     device    5.19 MiB
        together             device  258.85 MiB
    """
    check_storage(storage)
    tx = mfac_precondition(window_size, storage=storage, blocks=blocks, metric=metric)
    made = plan_optimizer(tx, params, mesh=mesh, platform=platform)
    title = f"window of {window_size} gradients, {spelled(storage)}, {_size(params)}"
    return Plan(f"{title}, on a {_platform(platform)}", made.components)


def plan_optimizer(
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    platform: str | None = None,
) -> Plan:
    """What any optax transformation takes: its state, and a step that donates the state.

    Temporary arrays are those of the windows of :func:`mfac_jax.mfac_precondition` in it.

    Args:
        tx: the transformation, for example :func:`mfac_jax.mfacw` or a chain. If a leaf is sharded,
            ``init`` must read no values of the parameters.
        params: as in :func:`plan`.
        mesh: as in :func:`plan`.
        platform: as in :func:`plan`.

    Returns:
        The plan; its bytes are those of one device.

    Raises:
        TypeError: ``tx`` is no transformation.
        ValueError: as :func:`plan`.
    """
    _checks.instance(tx, "tx", optax.GradientTransformation)
    platform = _platform(platform)
    params = _memory.on_mesh(params, mesh)
    state = _memory.arrays(tx.init, params)
    windows = _nodes(state, (Window, BlockWindows))
    rows = _memory.bytes_by_place([held.rows for held in windows])
    gram = _memory.bytes_by_place([held.gram for held in windows])
    whole = _memory.bytes_by_place(state)
    other = {place: whole[place] - rows[place] - gram[place] for place in whole}
    temporary = sum(step_bytes(held, platform) for held in windows)
    sizes = {
        "gradients": rows,
        "Gram matrix": gram,
        "other state": other,
        "gradient and update": {"device": 2 * _memory.bytes_by_place(params)["device"]},
        "temporary arrays": {"device": temporary},
    }
    return _plan(f"optimizer of {_size(params)} on a {platform}", sizes)


def plan_inverse(
    params: PyTree,
    num_gradients: int,
    *,
    storage: Storage = Dense(),  # noqa: B008  (immutable)
    blocks: Blocks = None,
    whiten: bool = False,
    mesh: Mesh | AbstractMesh | None = None,
    platform: str | None = None,
) -> Plan:
    """What :func:`mfac_jax.fisher_inverse` takes, and gradients that are collected for it.

    Args:
        params: as in :func:`plan`.
        num_gradients: ``n``.
        storage: how gradients are stored.
        blocks: see :func:`mfac_jax.fisher_inverse`.
        whiten: whether ``W`` or the inverses of blocks are stored; see
            :meth:`mfac_jax.inverse.FisherInverse.whiten`.
        mesh: as in :func:`plan`.
        platform: as in :func:`plan`.

    Returns:
        The plan; its bytes are those of one device.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: as :func:`plan`; or it is unknown what the rows of the storage take.

    Example:
        >>> import jax
        >>> from mfac_jax import planning
        >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), "float32")}
        >>> made = planning.plan_inverse(params, 512, blocks=128, platform="cpu")
        >>> [(part.name, part.nbytes // 10**6) for part in made.components]
        [('gradients', 2063), ('vectors', 12), ('pieces of gradients', 603)]
    """
    n = _checks.positive_int(num_gradients, "num_gradients")
    platform = _platform(platform)
    params = _memory.on_mesh(params, mesh)
    layout = Layout(params)
    cut, wide = partition(layout, blocks), _width(storage, layout)
    rows = _rows_bytes(storage, params, n)
    if not storage.has_products and blocks is None:
        name = type(storage).__name__
        raise ValueError(f"{name} has no whole inverse: expected blocks=, got blocks=None.")
    storage.check_blocks(layout, cut)
    is_whole = products_suffice(n, cut) and storage.has_products
    # The square roots of sums are as many rows as a block has coordinates.
    held = n if storage.has_products else max(cut.sizes.tolist(), default=0)
    if is_whole:
        scan = storage.scan_bytes(params, n, platform)
        stored = storage.whitened_bytes(params, n)
    else:
        scan = {"device": wide * piece_entries(held, cut)}
        stored = {"device": wide * sum(run.width * min(n, run.size) for run in cut.runs)}
    sizes = {
        "gradients": rows,
        "Gram matrix and factor": {"device": 3 * wide * n**2 if is_whole else 0},
        "whitened gradients" if is_whole else "inverses of blocks": stored if whiten else {},
        "vectors": {"device": 3 * vector_bytes(params)},
        "pieces of gradients": scan,
    }
    title = f"inverse of {n} gradients, {spelled(storage)}, {_size(params)}, on a {platform}"
    return _plan(title, sizes)


def plan_pruning(
    params: PyTree,
    *,
    steps: int = 8,
    gradients: Gradients = Gradients(),  # noqa: B008  (immutable)
    blocks: Blocks = 128,
    mesh: Mesh | AbstractMesh | None = None,
    platform: str | None = None,
) -> Plan:
    """What :func:`mfac_jax.pruning.prune` takes beside given gradients.

    Args:
        params: as in :func:`plan`.
        steps: the number of steps.
        gradients: as in :func:`mfac_jax.pruning.prune`. Sums in blocks are planned if ``in_blocks``
            is true; None counts as false. What scans of other storages than ``Dense()`` take is
            an upper bound.
        blocks: the blocks of the setting with the largest ones.
        mesh: as in :func:`plan`.
        platform: as in :func:`plan`.

    Returns:
        The plan; its bytes are those of one device.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: as :func:`plan`; or it is unknown what the rows of the storage take.

    Example:
        >>> import jax
        >>> from mfac_jax import planning
        >>> from mfac_jax.pruning import Gradients
        >>> params = {"w": jax.ShapeDtypeStruct((1000, 100), "float32")}
        >>> made = planning.plan_pruning(params, gradients=Gradients(64), platform="cpu")
        >>> made.components[0].nbytes  # those of the step and of the step before
        51970048
    """
    steps = _checks.positive_int(steps, "steps")
    _checks.instance(gradients, "gradients", Gradients)
    platform = _platform(platform)
    params = _memory.on_mesh(params, mesh)
    layout = Layout(params)
    parts, count = num_new_parts(gradients, steps)
    storage, kept = gradients.storage, num_kept(gradients, steps)
    cut, wide = partition(layout, blocks), _width(storage, layout)
    if gradients.in_blocks:
        # The square roots of the sums stand for as many gradients as a block has coordinates.
        storage, parts, kept = InBlocks(blocks, storage), 1, max(cut.sizes.tolist(), default=0)
    rows = _rows_bytes(storage, params, count)
    pieces, scan = wide * piece_entries(kept, cut, _MATRICES_OF_PRUNING), {}
    if gradients.in_blocks:
        # The buffer, in which gradients wait for the sums, is free by then. The allocator reuses
        # about half of it (benchmarks/plan.py measures that).
        buffer = rows["device"] - wide * sum(size**2 for size in cut.sizes.tolist())
        pieces = max(pieces - buffer // 2, 0)
    else:
        # The gradients of all steps are read together.
        scan = storage.scan_bytes(params, count, platform)
        scan = {place: kept // count * nbytes for place, nbytes in scan.items()}
    sizes = {
        "gradients": {place: parts * nbytes for place, nbytes in rows.items()},
        "Gram matrices": {"device": 0 if gradients.in_blocks else 4 * wide * kept**2},
        "vectors": {"device": _VECTORS_OF_PRUNING * vector_bytes(params)},
        "pieces of gradients": scan | {"device": max(pieces, scan.get("device", 0))},
    }
    kept_as = "sums in blocks" if gradients.in_blocks else spelled(gradients.storage)
    title = f"pruning with {count} gradients a step, {kept_as}"
    return _plan(f"{title}, {_size(params)}, on a {platform}", sizes)


class Choice(NamedTuple):
    """One storage of a :class:`Fitting`.

    Attributes:
        storage: the storage.
        num_gradients: the largest number of gradients that fits, at most 2^24; 0 if none does.
        plan: the plan of these gradients; None if none fits.
    """

    storage: Storage
    num_gradients: int
    plan: Plan | None


@dataclass(frozen=True)
class Fitting:
    """What fits a budget; ``print`` shows a table.

    Attributes:
        budget: the bytes of a device.
        choices: the storages in the order in which they were given.
    """

    budget: int
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        lines = [
            (spelled(choice.storage), _number(choice.num_gradients), _taken(choice.plan))
            for choice in self.choices
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        shown = [f"{name:{widths[0]}}  {n:>{widths[1]}}  {size}" for name, n, size in lines]
        return "\n".join([f"the most that fit {_memory.with_unit(self.budget)}", *shown])


def fitting(
    budget: int,
    params: PyTree,
    *,
    make: Callable[..., Plan] = plan,
    storages: Sequence[Storage] | None = None,
    host_budget: int | None = None,
    disk_budget: int | None = None,
    **options: Any,
) -> Fitting:
    """The largest number of gradients that fits a budget, for each storage.

    Args:
        budget: the bytes of a device that the gradients and all that goes with them may take.
        params: as in :func:`plan`.
        make: :func:`plan`, :func:`plan_inverse` or :func:`plan_pruning`, for the gradients of a
            step.
        storages: the storages to compare; by default those in the memory of a device, and
            :class:`mfac_jax.rows.Paged` if there is a ``host_budget``, as far as ``options`` are
            for them.
        host_budget: the bytes of the host; storages that need them must have it.
        disk_budget: the same for the disk.
        options: further arguments of ``make``.

    Returns:
        The storages, each with its largest number of gradients.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a budget is below 1, or a storage needs one that is not given; there is no
            storage; or as ``make``.

    Example:
        >>> import jax
        >>> from mfac_jax import planning
        >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), "float32")}
        >>> print(planning.fitting(2**30, params, platform="gpu"))
        the most that fit 1.00 GiB
        Dense()                   262  1021.39 MiB
        Dense(dtype='bfloat16')   522  1022.21 MiB
        Int8()                    519  1023.19 MiB
        TopK()                   5822  1023.73 MiB
    """
    if make is plan_optimizer:
        raise ValueError(
            "make must plan a number of gradients: expected plan, plan_inverse or plan_pruning, "
            "got plan_optimizer."
        )
    if make is plan_pruning and options.get("gradients", Gradients()).given is not None:
        raise ValueError("gradients must not be given: fitting looks for their number.")
    given = {"budget": budget, "host_budget": host_budget, "disk_budget": disk_budget}
    for name, value in given.items():
        if value is not None:
            _checks.positive_int(value, name)
    budgets = dict(zip(_memory.PLACES, given.items(), strict=True))

    def best(storage: Storage) -> Choice:
        def of(count: int) -> Plan:
            if make is not plan_pruning:
                return make(params, count, storage=storage, **options)
            gradients = options.get("gradients", Gradients())
            gradients = replace(gradients, count=count, storage=storage)
            return plan_pruning(params, **(options | {"gradients": gradients}))

        def fits(count: int) -> bool:
            made = of(count)
            return all(has_room(made, place) for place in budgets)

        def has_room(made: Plan, place: str) -> bool:
            name, most = budgets[place]
            if most is None and made.nbytes(place):
                raise ValueError(
                    f"{spelled(storage)} takes memory of the {place}: give {name}, the bytes there."
                )
            return most is None or made.nbytes(place) <= most

        count = _memory.largest(fits)
        return Choice(storage, count, of(count) if count else None)

    if storages is None:
        known = known_storages(host=host_budget is not None)
        return Fitting(budget, _all_possible(best, known))
    if not storages:
        raise ValueError("storages must name at least one storage, got none.")
    return Fitting(budget, tuple(map(best, storages)))


def _all_possible(
    best: Callable[[Storage], Choice], storages: Sequence[Storage]
) -> tuple[Choice, ...]:
    """The choices of the storages that are for the options; if none is, the first error."""
    choices, refused = [], []
    for storage in storages:
        try:
            choices.append(best(storage))
        except TypeError as error:
            refused.append(error)
    if not choices:
        raise refused[0]
    return tuple(choices)


def _number(count: int) -> str:
    """A number of gradients; no larger one is tried than the last."""
    return f"{count} or more" if count == _memory.MOST else str(count)


def _plan(title: str, sizes: dict[str, dict[str, int]]) -> Plan:
    parts = [part for name, size in sizes.items() for part in _memory.components(name, size)]
    return Plan(title, tuple(parts))


def _taken(plan: Plan | None) -> str:
    if plan is None:
        return _memory.with_unit(0)
    elsewhere = [(place, plan.nbytes(place)) for place in _memory.PLACES[1:]]
    parts = [f"{_memory.with_unit(nbytes)} of the {place}" for place, nbytes in elsewhere if nbytes]
    return ", ".join([_memory.with_unit(plan.device_bytes), *parts])


def _platform(platform: str | None) -> str:
    if platform is None:
        return _memory.platform()
    _checks.one_of(platform, "platform", PLATFORMS)
    return platform


def _nodes(tree: PyTree, kinds: tuple[type, ...]) -> list[Any]:
    """The nodes of these types in a tree."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in nodes if isinstance(node, kinds)]


def _rows_bytes(storage: Storage, params: PyTree, num_rows: int) -> dict[str, int]:
    sizes = check_storage(storage).bytes_by_place(params, num_rows)
    if sizes is None:
        name = type(storage).__name__
        raise ValueError(
            f"{name} does not say what its rows take: expected {name}.bytes_by_place to return "
            "bytes, got None."
        )
    return sizes


def _width(storage: Storage, layout: Layout) -> int:
    """The bytes of a number in the accumulation dtype of the rows."""
    dtype = getattr(storage, "dtype", None)
    return (layout.dtype if dtype is None else accumulation_dtype(dtype)).itemsize


def _size(params: PyTree) -> str:
    return f"{sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)):,} parameters"
