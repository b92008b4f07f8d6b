"""SGD preconditioned by the inverse of a sliding-window Fisher, for optax.

:func:`mfac_precondition` turns a gradient ``g`` into the direction ``F^-1 g`` with

    F = lambda I + (1/n) sum_i g_i g_i^T

over the last ``n <= m`` gradients; ``g`` is the newest of them. :func:`mfac` is the complete
optimizer: it adds momentum, weight decay and the learning rate.

Reference: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of
Second-Order Information", NeurIPS 2021, sections 3.2 and 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks, incremental, window
from mfac_jax._layout import AnyLayout, Layout, PyTree, where
from mfac_jax.rows import Dense, Storage
from mfac_jax.rows._base import check_traceable
from mfac_jax.rows._storage import check_storage

ScalarOrSchedule = ArrayLike | Callable[[Int[Array, ""]], ArrayLike]
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
        window: the gradients and their Gram matrix.
        inverse: the inverse of the m x m matrix, which makes the m x m step O(m^2). ``None`` if
            the window has fewer than 64 slots, because factoring is as fast there. In three
            cases the inverse stays empty and every step factors: in float64; if the window has
            at least as many slots as there are parameters; and on a CPU if the window has fewer
            than 128 slots.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # tuples have a method of this name
    window: window.Window
    inverse: incremental.IncrementalInverse | None


def mfac_precondition(
    window_size: int = DEFAULT_WINDOW_SIZE,
    damping: ScalarOrSchedule | None = None,
    *,
    relative_damping: ScalarOrSchedule | None = None,
    normalize_by: str = "count",
    storage: Storage = Dense(),  # noqa: B008  (immutable)
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients by ``F^-1``; the window includes the gradient itself.

    The damping of a step is

        lambda = damping + relative_damping * trace(K) / n.

    ``trace(K) / n`` is the mean of ``|g_i|^2``, the trace of the undamped Fisher. A relative
    damping therefore means the same at every scale of the loss and for every number of
    parameters. If neither damping is given, ``relative_damping`` is 0.01; the page "Defaults"
    of the documentation says how it was found.

    A gradient with NaN or Inf in it is rejected: the window does not change, the direction is
    zero, and the count ``rejected`` of the window rises. Directions have the structure and the
    dtypes of the gradients.

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
        mask: which weights are alive: a tree of booleans with the structure of the
            parameters, or a function from the parameters to such a tree. Gradients in the
            window and directions are zero elsewhere. If the mask loses weights during training,
            :func:`mfac_jax.window.restrict` removes them from the gradients already held.

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
    for value, name in ((damping, "damping"), (relative_damping, "relative_damping")):
        if value is not None and not callable(value):
            _checks.positive_scalar(value, name)
    denominator = m if normalize_by == "window_size" else None

    def init(params: PyTree) -> MfacState:
        held = window.init(params, m, storage=storage)
        check_traceable(held.rows, "a window under jit")
        inverse = incremental.empty(m, held.gram.dtype) if m >= INCREMENTAL_FROM else None
        state = MfacState(jnp.zeros((), jnp.int32), held, inverse)
        if isinstance(params, _PLACEHOLDER):
            return _prefix_of_states(state)
        _mask_leaves(mask, params, held.rows.layout)
        return state

    def update(
        updates: PyTree, state: MfacState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, MfacState]:
        del extra_args
        alive = _mask_leaves(mask, params, state.window.rows.layout)
        held, info = window.push(state.window, _masked(updates, alive))
        lam = _damping(damping, relative_damping, state.count, held)
        direction, inverse = _newest_direction(held, lam, state.inverse, denominator)
        direction = _masked(_as_updates(direction, updates, info.accepted), alive)
        return direction, MfacState(optax.safe_increment(state.count), held, inverse)

    return optax.GradientTransformationExtraArgs(init, update)


def mfac(
    learning_rate: ScalarOrSchedule,
    window_size: int = DEFAULT_WINDOW_SIZE,
    damping: ScalarOrSchedule | None = None,
    *,
    relative_damping: ScalarOrSchedule | None = None,
    momentum: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Mask | None = None,
    normalize_by: str = "count",
    storage: Storage = Dense(),  # noqa: B008  (immutable)
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with M-FAC directions: precondition, momentum, weight decay, learning rate.

    Args:
        learning_rate: a number, a scalar array or a schedule.
        window_size: see :func:`mfac_precondition`.
        damping: see :func:`mfac_precondition`.
        relative_damping: see :func:`mfac_precondition`.
        momentum: decay of a heavy-ball sum of the directions; no momentum by default.
        weight_decay: decoupled weight decay: ``weight_decay * w`` is added to the
            preconditioned direction, and the learning rate scales their sum.
        weight_decay_mask: which weights decay, as in ``optax.add_decayed_weights``.
        normalize_by: see :func:`mfac_precondition`.
        storage: see :func:`mfac_precondition`.
        mask: see :func:`mfac_precondition`. The updates of weights that are not alive are
            zero: neither weight decay nor an earlier momentum moves them.

    Returns:
        The optimizer.

    Raises:
        TypeError: as :func:`mfac_precondition`.
        ValueError: as :func:`mfac_precondition`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mfac_jax import mfac
        >>> tx = mfac(optax.cosine_decay_schedule(0.1, 100), window_size=16, momentum=0.9)
        >>> params = {"w": jnp.ones(3)}
        >>> updates, state = tx.update({"w": jnp.ones(3)}, tx.init(params), params)
        >>> updates["w"].shape
        (3,)
    """
    parts = [
        mfac_precondition(
            window_size,
            damping,
            relative_damping=relative_damping,
            normalize_by=normalize_by,
            storage=storage,
            mask=mask,
        )
    ]
    if momentum is not None:
        parts.append(optax.trace(decay=momentum))
    if not (isinstance(weight_decay, int | float) and weight_decay == 0):
        parts.append(optax.add_decayed_weights(weight_decay, weight_decay_mask))
    if mask is not None:
        parts.append(_restrict(mask))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*parts)


def _prefix_of_states(state: MfacState) -> MfacState:
    """A tree that is a prefix of every state, from a state made from a placeholder.

    optax.tree.map_params calls ``init`` with a placeholder for the parameters and maps over the
    result together with the real state. The two states differ only in the layout of the rows.
    A leaf replaces the layout, which rows keep as a child.
    """

    def is_layout(node: Any) -> bool:
        return isinstance(node, Layout)

    rows = jax.tree.map(
        lambda node: AnyLayout() if is_layout(node) else node, state.window.rows, is_leaf=is_layout
    )
    return state._replace(window=state.window._replace(rows=rows))


def _placeholder_type() -> type:
    """The private class of the placeholder that optax.tree.map_params uses; a call reveals it."""
    seen: list[PyTree] = []
    optax.tree.map_params(seen.append, lambda leaf: leaf, None)
    return type(seen[0])


_PLACEHOLDER = _placeholder_type()


def _damping(
    damping: ScalarOrSchedule | None,
    relative: ScalarOrSchedule | None,
    count: Int[Array, ""],
    held: window.Window,
) -> Float[Array, ""]:
    """``lambda`` of this step."""
    dtype = held.rows.dtype

    def at(value: ScalarOrSchedule | None) -> Float[Array, ""]:
        if value is None:
            return jnp.zeros((), dtype)
        return jnp.asarray(value(count) if callable(value) else value).astype(dtype)

    return at(damping) + at(relative) * window.fisher_trace(held)


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


def _mask_leaves(mask: Mask | None, params: PyTree | None, layout: Layout) -> list[Array] | None:
    """The leaves of the mask for these parameters, checked."""
    if mask is None:
        return None
    if callable(mask):
        if params is None:
            raise ValueError(
                "mask is a function of the parameters: call update(updates, state, params), "
                "got params=None."
            )
        mask = mask(params)
    return layout.check_mask(mask)


def _restrict(mask: Mask) -> optax.GradientTransformation:
    """Sets the updates of weights that are not alive to zero."""

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        return _masked(updates, _mask_leaves(mask, params, Layout(updates, "updates")))

    return optax.stateless(update)


def _masked(tree: PyTree, alive: list[Array] | None) -> PyTree:
    """The tree with zeros where weights are not alive."""
    return tree if alive is None else where(alive, tree)
