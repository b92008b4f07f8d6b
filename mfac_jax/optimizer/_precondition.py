"""Gradients preconditioned by the inverse of a sliding-window Fisher, for optax.

:func:`mfac_precondition` turns a gradient ``g`` into the direction ``F^-1 g`` with

    F = lambda I + (1/n) sum_i g_i g_i^T

over the last ``n <= m`` gradients; ``g`` is the newest of them.

Reference: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of
Second-Order Information", NeurIPS 2021, sections 3.2 and 4.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks, incremental, window
from mfac_jax._layout import AnyLayout, Layout, PyTree, where
from mfac_jax.optimizer import _windows
from mfac_jax.optimizer._direction import Direction
from mfac_jax.optimizer._metric import Metric
from mfac_jax.optimizer._schedules import ScalarOrSchedule, check_dampings, damping_at
from mfac_jax.rows import Dense, Storage
from mfac_jax.rows._storage import check_storage

Mask = PyTree | Callable[[PyTree], PyTree]

DEFAULT_WINDOW_SIZE = 64
DEFAULT_RELATIVE_DAMPING = 0.01

# The smallest window whose state holds the inverse of the m x m matrix. incremental.newest decides
# on each platform whether a step uses it.
INCREMENTAL_FROM = 64


class MfacState(NamedTuple):
    """State of :func:`mfac_precondition`.

    Attributes:
        count: the number of updates so far, rejected gradients included; scalar int32.
        window: the gradients and their Gram matrix: a :class:`mfac_jax.window.Window` or, with
            ``blocks``, a :class:`BlockWindows`.
        inverse: the inverse of the m x m matrix, which makes the m x m step O(m^2). ``None`` if
            the window has fewer than 64 slots, because factoring is as fast there. In three
            cases the inverse stays empty and every step factors: in float64; if the window has
            at least as many slots as there are parameters; and on a CPU if the window has fewer
            than 128 slots. ``None`` as well if the direction is not ``F^-1 g``.
        metric: the state of the metric; ``None`` without a metric.
        values: the ``value`` of each gradient held, NaN in empty slots; (m,). ``None`` if no
            weights read them.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # tuples have a method of this name
    window: _windows.Windows
    inverse: incremental.IncrementalInverse | None
    metric: PyTree = None
    values: Float[Array, " m"] | None = None


def mfac_precondition(
    window_size: int = DEFAULT_WINDOW_SIZE,
    damping: ScalarOrSchedule | None = None,
    *,
    relative_damping: ScalarOrSchedule | None = None,
    normalize_by: str = "count",
    storage: Storage = Dense(),  # noqa: B008  (immutable)
    alive: Mask | None = None,
    metric: Metric | None = None,
    blocks: str | None = None,
    direction: Direction = Direction(),  # noqa: B008  (immutable)
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients by ``F^-1``; the window includes the gradient itself.

    The damping of a step is

        lambda = damping + relative_damping * trace(K) / n.

    ``trace(K) / n`` is the mean of ``|g_i|^2``, the trace of the undamped Fisher. A relative
    damping therefore means the same at every scale of the loss and for every number of
    parameters. If neither damping is given, ``relative_damping`` is 0.01; the page "Defaults"
    of the documentation says how it was found.

    A gradient with NaN or Inf in it, or whose ``value`` is NaN or Inf, is rejected: the window does
    not change, the direction is zero, and the count ``rejected`` of the window rises. Directions
    have the structure and the dtypes of the gradients.

    Args:
        window_size: ``m``, the number of gradients in a full window; at least 1. The window
            stores ``m d`` numbers.
        damping: ``lambda`` in the units of the squared gradient: a number, a scalar array or
            a schedule (a function of the number of updates so far).
        relative_damping: the damping as a fraction of the trace of the Fisher: a number, a
            scalar array or a schedule.
        normalize_by: ``"count"`` divides the sum of outer products by the number of gradients
            held. ``"window_size"`` divides by ``m`` from the first step, as the paper's code
            does. The two differ only until the window is full.
        storage: how the window's gradients are stored; see :class:`mfac_jax.rows.Dense`.
            ``Dense(jnp.bfloat16)`` halves the memory; ``Dense(packing="leaf")`` follows the
            sharding of the parameters.
        alive: which weights are alive: a tree of booleans with the structure of the
            parameters, or a function from the parameters to such a tree. Gradients in the
            window and directions are zero elsewhere. If weights leave it during training,
            :func:`mfac_jax.window.restrict` removes them from the gradients already held (of one
            window of all parameters; in blocks they leave with their gradients).
        metric: the diagonal ``D`` in ``F = lambda D + G^T G / n``, such as
            :class:`SecondMoments`; the identity by default. Each row keeps the ``D`` of the step
            in which it was pushed.
        blocks: ``"output"`` gives each output of a parameter a Gram matrix of its own, so ``F`` is
            block-diagonal. Outputs are the indices of the last axis, as in Flax, whatever the
            other axes mean; with ``"output_first"`` they are those of the first axis, as in
            PyTorch. Neighbours are joined so that a block has at least ``m`` weights; their number
            divides the axis. Parameters with one axis are one block. With ``"leaf"`` every
            parameter is one block. The trace in the damping is then the mean over the blocks of a
            parameter. By default all parameters are one block.
        direction: momentum, power, length and weights; see :class:`Direction`.

    Returns:
        The transformation. Its state is an :class:`MfacState`;
        ``optax.tree.get(state, "window")`` finds the window.

    Raises:
        TypeError: an argument has the wrong type; or, in ``init``, the rows of the storage cannot
            be written or ``jit`` cannot trace them. Under ``optax.inject_hyperparams``, name
            ``window_size`` in ``static_args``.
        ValueError: an argument has an impossible value.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mfac_jax import mfac_precondition
        >>> tx = optax.chain(
        ...     mfac_precondition(window_size=8, damping=0.1),
        ...     optax.scale_by_learning_rate(0.1),
        ... )
        >>> loss = lambda p: jnp.sum(jnp.array([1.0, 0.01]) * p**2)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(jax.grad(loss)(params), state)
        ...     return optax.apply_updates(params, updates), state
        >>> params = jnp.array([1.0, 1.0])
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     params, state = step(params, state)
        >>> bool(loss(params) < 1e-4)
        True

    Departures from the paper: a ring of gradients and their Gram matrix replace the triangular
    recursion; the direction is computed without subtraction (``n G^T A^-1 e`` for the newest
    gradient); while the window fills, the Fisher is the average over the gradients held.
    """
    m = _checks.positive_int(window_size, "window_size")
    _checks.one_of(normalize_by, "normalize_by", ("count", "window_size"))
    check_storage(storage)
    if damping is None and relative_damping is None:
        relative_damping = DEFAULT_RELATIVE_DAMPING
    check_dampings(damping, relative_damping)
    if blocks is not None:
        _checks.one_of(blocks, "blocks", _windows.BLOCKS)
    _checks.instance(metric, "metric", Metric | None)
    _checks.instance(direction, "direction", Direction)
    parts = _Preconditioner(
        window_size=m,
        damping=functools.partial(damping_at, damping, relative_damping),
        denominator=m if normalize_by == "window_size" else None,
        storage=storage,
        alive=alive,
        metric=metric,
        blocks=blocks,
        direction=direction,
    )
    return optax.GradientTransformationExtraArgs(parts.init, on_any_mesh(parts.update))


@dataclass(frozen=True, eq=False)
class _Preconditioner:
    """The options of :func:`mfac_precondition`, checked, and what they do.

    Attributes:
        window_size: ``m``.
        damping: ``lambda`` from the number of updates and the trace of the undamped Fisher.
        denominator: the divisor of the sum of outer products; None for the number of gradients.
        storage: how gradients are stored.
        alive: which weights are alive.
        metric: the diagonal ``D``; None for the identity.
        blocks: None, ``"leaf"``, ``"output"`` or ``"output_first"``.
        direction: what the direction is.
    """

    window_size: int
    damping: Callable[[Int[Array, ""], Float[Array, ""]], Float[Array, ""]]
    denominator: int | None
    storage: Storage
    alive: Mask | None
    metric: Metric | None
    blocks: str | None
    direction: Direction

    @property
    def is_newest(self) -> bool:
        """Whether the direction is ``F^-1 g`` of one window, which can be updated in O(m^2)."""
        return self.direction.is_newest and self.blocks is None

    def init(self, params: PyTree) -> MfacState:
        """The state before the first update."""
        m, weights = self.window_size, self.direction.weights
        held = _windows.init(params, m, self.storage, self.blocks)
        dtype = held.gram.dtype
        is_incremental = self.is_newest and m >= INCREMENTAL_FROM
        reads_values = weights is not None and weights.reads_values
        state = MfacState(
            count=jnp.zeros((), jnp.int32),
            window=held,
            inverse=incremental.empty(m, dtype) if is_incremental else None,
            metric=None if self.metric is None else self.metric.init(params),
            values=jnp.full((m,), jnp.nan, dtype) if reads_values else None,
        )
        if isinstance(params, _PLACEHOLDER):
            return _prefix_of_states(state)
        mask_leaves(self.alive, params, _windows.layout_of(held))
        return state

    def update(
        self,
        updates: PyTree,
        state: MfacState,
        params: PyTree | None = None,
        *,
        value: ArrayLike | None = None,
    ) -> tuple[PyTree, MfacState]:
        """The direction for a gradient, and the state after it."""
        layout = _windows.layout_of(state.window)
        alive = mask_leaves(self.alive, params, layout)
        gradient, moments, scale = masked(updates, alive), state.metric, None
        if state.values is not None:
            value = self._checked_value(value).astype(state.values.dtype)
            gradient = _or_nan(gradient, jnp.isfinite(value))
        if self.metric is not None:
            gradient, moments, scale = self._in_metric(gradient, state, layout)
        held, info = _windows.push(state.window, gradient)
        moments = jax.tree.map(
            lambda new, old: jnp.where(info.accepted, new, old), moments, state.metric
        )
        values = state.values
        if values is not None:
            values = jnp.where(info.accepted, values.at[info.slot].set(value), values)
        lam = functools.partial(self.damping, state.count)
        step, inverse = self._direction(held, lam, values, state.inverse)
        if scale is not None:
            step = _times(scale, step, layout)
        if not isinstance(self.direction.length, str):
            step = _of_rms(step, self.direction.length)
        step = masked(_as_updates(step, updates, info.accepted), alive)
        count = optax.safe_increment(state.count)
        return step, MfacState(count, held, inverse, moments, values)

    def _in_metric(
        self, gradient: PyTree, state: MfacState, layout: Layout
    ) -> tuple[PyTree, PyTree, PyTree]:
        """``D^-1/2 g``, the new state of the metric and ``D^-1/2``; NaN for a bad gradient."""
        assert self.metric is not None
        leaves = layout.check(gradient, "gradient")
        accepted = _windows.is_storable(leaves, state.window.gram.dtype, self.window_size)
        moments = self.metric.update(state.metric, gradient)
        scale = self.metric.scale(moments)
        return _or_nan(_times(scale, gradient, layout), accepted), moments, scale

    def _checked_value(self, value: ArrayLike | None) -> Array:
        """The value of a gradient, which is a scalar."""
        what = f"{self.direction.weights!r} needs the value of each gradient, for example its loss"
        if value is None:
            raise ValueError(
                f"{what}: call update(updates, state, params, value=loss), got value=None."
            )
        if jnp.shape(value) != ():
            raise ValueError(f"{what}: value must be a scalar, got shape {jnp.shape(value)}.")
        return jnp.asarray(value)

    def _direction(
        self,
        held: _windows.Windows,
        damping: Callable[[Float[Array, ""]], Float[Array, ""]],
        values: Float[Array, " m"] | None,
        inverse: incremental.IncrementalInverse | None,
    ) -> tuple[PyTree, incremental.IncrementalInverse | None]:
        """``G^T c`` in each window, and the inverse for the next step."""
        n = _denominator(held.stamps, self.denominator, held.gram.dtype)
        if self.is_newest and isinstance(held, window.Window):
            lam = damping(jnp.trace(held.gram) / n)
            return _newest_direction(held, lam, inverse, self.denominator)
        return _windows.step(held, self.direction, values, damping, n), inverse


def on_any_mesh(update: Callable[..., Any]) -> Callable[..., Any]:
    """``update`` of an optimizer, also for arrays on a mesh with explicit axes.

    Within such an update XLA places all arrays, as on a mesh with automatic axes. Its results have
    the shardings of the updates and the state that came in.
    """

    def updated(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> Any:
        del extra_args
        meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves((updates, state))]
        explicit = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
        if not explicit:
            return update(updates, state, params, value=value)

        def sharding(leaf: Any) -> NamedSharding:
            own: NamedSharding = jax.typeof(leaf).sharding
            return NamedSharding(explicit[0], PartitionSpec()) if own.mesh.empty else own

        def inner(updates: PyTree, state: PyTree, params: PyTree | None, value: Any) -> Any:
            return update(updates, state, params, value=value)

        results = jax.tree.map(sharding, (updates, state))
        whole = jax.sharding.auto_axes(inner, out_sharding=results)
        return whole(updates, state, params, value)

    return updated


def _prefix_of_states(state: MfacState) -> MfacState:
    """A tree that is a prefix of every state, from a state made from a placeholder.

    optax.tree.map_params calls ``init`` with a placeholder for the parameters and maps over the
    result together with the real state. A leaf replaces what depends on the parameters in another
    way than by a leaf for each: the layout, and the rows if each parameter has rows of its own.
    """

    def is_layout(node: Any) -> bool:
        return isinstance(node, Layout)

    held = state.window
    if isinstance(held, _windows.BlockWindows):
        leaf: Any = AnyLayout()
        return state._replace(window=held._replace(rows=leaf, layout=leaf))
    rows = jax.tree.map(
        lambda node: AnyLayout() if is_layout(node) else node, held.rows, is_leaf=is_layout
    )
    return state._replace(window=held._replace(rows=rows))


def _placeholder_type() -> type:
    """The private class of the placeholder that optax.tree.map_params uses; a call reveals it."""
    seen: list[PyTree] = []
    optax.tree.map_params(seen.append, lambda leaf: leaf, None)
    return type(seen[0])


_PLACEHOLDER = _placeholder_type()


def _times(scale: PyTree, tree: PyTree, layout: Layout) -> PyTree:
    """The product of two trees, leaf by leaf, in the dtype of the scale."""
    pairs = zip(jax.tree.leaves(scale), jax.tree.leaves(tree), strict=True)
    return jax.tree.unflatten(layout.treedef, [s * x.astype(s.dtype) for s, x in pairs])


def _or_nan(tree: PyTree, accepted: Bool[Array, ""]) -> PyTree:
    """The tree, with NaN everywhere if it is not accepted, so that the window rejects it."""
    return jax.tree.map(lambda x: jnp.where(accepted, x, jnp.full_like(x, jnp.nan)), tree)


def _of_rms(tree: PyTree, rms: float) -> PyTree:
    """The tree with the given root mean square of all entries."""
    count = max(optax.tree.size(tree), 1)
    square = optax.tree.norm(tree, squared=True) / count
    factor = jnp.where(square > 0, rms * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), tree)


def _denominator(
    stamps: Int[Array, " m"], denominator: int | None, dtype: jnp.dtype
) -> Float[Array, ""]:
    """``n``: the number of gradients held, or the given number."""
    if denominator is not None:
        return jnp.asarray(denominator, dtype)
    return jnp.maximum(jnp.sum(stamps >= 0, dtype=jnp.int32), 1).astype(dtype)


def _newest_direction(
    held: window.Window,
    lam: Float[Array, ""],
    inverse: incremental.IncrementalInverse | None,
    denominator: int | None,
) -> tuple[PyTree, incremental.IncrementalInverse | None]:
    """``F^-1 g`` for the newest gradient, and the inverse for the next step."""
    # The inverse checks its solutions for float32. With d <= m a d x d matrix may be better
    # conditioned than the m x m one; window.ihvp_newest can use it.
    is_incremental = held.gram.dtype == jnp.float32 and len(held.gram) < held.rows.layout.size
    if inverse is None or not is_incremental:
        return window.ihvp_newest(held, lam, denominator=denominator), inverse
    return window.ihvp_newest_incremental(held, lam, inverse, denominator=denominator)


def _as_updates(direction: PyTree, updates: PyTree, accepted: Bool[Array, ""]) -> PyTree:
    """The direction in the containers and dtypes of the updates; zero if not accepted."""
    # Leaf by leaf, because the updates may come in other containers than the parameters.
    leaves, treedef = jax.tree.flatten(updates)
    steps = [
        jnp.where(accepted, step, jnp.zeros_like(step)).astype(jnp.result_type(leaf))
        for step, leaf in zip(jax.tree.leaves(direction), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, steps)


def mask_leaves(alive: Mask | None, params: PyTree | None, layout: Layout) -> list[Array] | None:
    """The leaves of the mask of alive weights for these parameters, checked."""
    if alive is None:
        return None
    if callable(alive):
        if params is None:
            raise ValueError(
                "alive is a function of the parameters: call update(updates, state, params), "
                "got params=None."
            )
        alive = alive(params)
    return layout.check_mask(alive, "alive")


def masked(tree: PyTree, alive: list[Array] | None) -> PyTree:
    """The tree with zeros where weights are not alive."""
    return tree if alive is None else where(alive, tree)
