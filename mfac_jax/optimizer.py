"""SGD preconditioned by the inverse of a sliding-window Fisher, as optax pieces.

:func:`mfac_precondition` turns a gradient ``g`` into ``F^-1 g``, where

    F = lambda I + (1/n) sum_i g_i g_i^T

runs over the last ``n <= m`` gradients, ``g`` the newest of them. :func:`mfac` is
the ready-made optimizer around it.

Reference: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations
of Second-Order Information", NeurIPS 2021, sections 3.2 and 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from mfac_jax import _checks, carried, window
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows import check_storage

ScalarOrSchedule = ArrayLike | Callable[[Int[Array, ""]], ArrayLike]

DEFAULT_WINDOW_SIZE = 64
DEFAULT_RELATIVE_DAMPING = 0.01

# From this window size on the state has room for the inverse of the m x m matrix. Whether a step
# uses it, carried.newest decides for each platform.
CARRY_FROM = 64


class MfacState(NamedTuple):
    """State of :func:`mfac_precondition`.

    Attributes:
        count: updates so far, those of rejected gradients included; scalar int32.
        window: the gradients and their Gram matrix.
        inverse: what makes the m x m step cheap, m^2 numbers; ``None`` in small windows,
            where it is cheap without, and of size 1, unused, in float64 and where there are
            no more parameters than gradients. On a CPU it stays empty in windows of fewer
            than 128.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # as in every optax state
    window: window.Window
    inverse: carried.CarriedInverse | None


def mfac_precondition(
    window_size: int = DEFAULT_WINDOW_SIZE,
    damping: ScalarOrSchedule | None = None,
    *,
    relative_damping: ScalarOrSchedule | None = None,
    normalize_by: str = "count",
    storage: str = "flat",
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients by ``F^-1``, the gradient itself being in the window.

    The damping of a step is

        lambda = damping + relative_damping * trace(K) / n,

    where the last factor is the trace of the undamped Fisher, ``d`` times the mean of
    its diagonal and the mean of ``|g_i|^2``. A relative damping means the same whatever
    the scale of the loss and the number of parameters. If neither is given,
    ``relative_damping`` is 0.01 (how that was found is in the documentation,
    "Defaults").

    A gradient with NaN or Inf in it leaves the window as it was, gives a direction of
    zero and is counted in ``rejected`` of the window. Directions have the structure
    and the dtypes of the gradients.

    Args:
        window_size: ``m``, how many gradients are kept; any int from 1 up. The
            window takes ``m d`` entries of ``dtype``.
        damping: ``lambda`` in the units of the squared gradient: a number, a scalar
            array or a schedule (a function of the number of updates so far).
        relative_damping: the same, as a fraction of the trace of the Fisher.
        normalize_by: ``"count"`` divides the sum of outer products by the number of
            gradients held; ``"window_size"`` by ``m`` from the first step on, as the
            paper's code does. They differ only until the window is full.
        storage: ``"flat"`` (one block, fastest) or ``"per_leaf"`` (one block a
            parameter, follows the parameters' sharding).
        dtype: what gradients are stored in; float32 by default, float64 for float64
            parameters; bfloat16 halves the memory.
        implementation: of the scans over the window: ``"xla"``, ``"mosaic_gpu"`` or
            ``"mosaic_tpu"``; by default the best one on each platform.
        mask: which weights are alive, a tree of booleans with the structure of the
            parameters or a function from the parameters to one. Gradients enter the
            window, and directions leave it, with zeros elsewhere. When a mask loses
            weights in the course of training, :func:`mfac_jax.window.restrict`
            removes them from the gradients that are in the window already.

    Returns:
        The transformation. Its state is an :class:`MfacState`;
        ``optax.tree.get(state, "window")`` finds the window.

    Raises:
        TypeError: an argument has the wrong type; under ``optax.inject_hyperparams``
            name ``window_size`` in ``static_args``.
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

    Departures from the paper: gradients are kept in a ring with their Gram matrix in
    place of the paper's triangular recursion, the direction is computed without
    subtraction (``n G^T A^-1 e`` for the newest gradient), and while the window fills
    the Fisher is an average over the gradients that are there.
    """
    m = _checks.positive_int(window_size, "window_size")
    _checks.one_of(normalize_by, "normalize_by", ("count", "window_size"))
    check_storage(storage, dtype, implementation)
    if damping is None and relative_damping is None:
        relative_damping = DEFAULT_RELATIVE_DAMPING
    for value, name in ((damping, "damping"), (relative_damping, "relative_damping")):
        if value is not None and not callable(value):
            _checks.positive_scalar(value, name)

    def init(params: PyTree) -> MfacState:
        held = window.init(params, m, storage=storage, dtype=dtype, implementation=implementation)
        # optax.tree.map_params builds a state from a placeholder without leaves.
        if held.rows.layout.shapes:
            _mask_leaves(mask, params, held.rows.layout)
        inverse = None
        if m >= CARRY_FROM:  # for any parameters, since optax.tree.map_params passes none
            is_used = m < held.rows.layout.size and held.gram.dtype == jnp.float32
            inverse = carried.empty(m if is_used else 1)
        return MfacState(jnp.zeros((), jnp.int32), held, inverse)

    def update(
        updates: PyTree, state: MfacState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, MfacState]:
        del extra_args
        alive = _mask_leaves(mask, params, state.window.rows.layout)
        new_window, info = window.push(state.window, _masked(updates, alive))
        lam = _damping(damping, relative_damping, state.count, new_window)
        denominator = m if normalize_by == "window_size" else None
        inverse = state.inverse
        if inverse is None or len(inverse.matrix) != m:
            direction = window.ihvp_newest(new_window, lam, denominator=denominator)
        else:
            direction, inverse = window.ihvp_newest_carried(
                new_window, lam, inverse, denominator=denominator
            )

        # Leaf by leaf: the gradients may come in other containers than the parameters.
        gradients, treedef = jax.tree.flatten(updates)
        steps = [
            jnp.where(info.accepted, step, jnp.zeros_like(step)).astype(jnp.result_type(gradient))
            for step, gradient in zip(jax.tree.leaves(direction), gradients, strict=True)
        ]
        direction = _masked(jax.tree.unflatten(treedef, steps), alive)
        return direction, MfacState(optax.safe_increment(state.count), new_window, inverse)

    return optax.GradientTransformationExtraArgs(init, update)


def mfac(
    learning_rate: ScalarOrSchedule,
    window_size: int = DEFAULT_WINDOW_SIZE,
    damping: ScalarOrSchedule | None = None,
    *,
    relative_damping: ScalarOrSchedule | None = None,
    momentum: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    normalize_by: str = "count",
    storage: str = "flat",
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """M-FAC preconditioned SGD: precondition, momentum, weight decay, learning rate.

    Args:
        learning_rate: a number, a scalar array or a schedule.
        window_size: as in :func:`mfac_precondition`, like all that is not named here.
        damping: see there.
        relative_damping: see there.
        momentum: decay of a heavy-ball sum of the directions; none by default.
        weight_decay: decoupled: ``weight_decay * w`` joins the direction after the
            preconditioning, and is scaled by the learning rate with it.
        weight_decay_mask: which weights decay, as in ``optax.add_decayed_weights``.
        normalize_by: see :func:`mfac_precondition`.
        storage: see there.
        dtype: see there.
        implementation: see there.
        mask: see there. Weights that are masked out get no weight decay, and nothing
            from a momentum they may have had, either.

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
            dtype=dtype,
            implementation=implementation,
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


def _damping(
    damping: ScalarOrSchedule | None,
    relative: ScalarOrSchedule | None,
    count: Int[Array, ""],
    held: window.Window,
) -> Float[Array, ""]:
    dtype = held.rows.dtype

    def at(value: ScalarOrSchedule | None) -> Float[Array, ""]:
        if value is None:
            return jnp.zeros((), dtype)
        return jnp.asarray(value(count) if callable(value) else value).astype(dtype)

    return at(damping) + at(relative) * window.fisher_trace(held)


def _mask_leaves(
    mask: PyTree | Callable[[PyTree], PyTree] | None, params: PyTree | None, layout: Layout
) -> list[Array] | None:
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


def _restrict(mask: PyTree | Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        return _masked(updates, _mask_leaves(mask, params, Layout(updates, "updates")))

    return optax.stateless(update)


def _masked(tree: PyTree, alive: list[Array] | None) -> PyTree:
    if alive is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    kept = [
        jnp.where(keep, leaf, jnp.zeros_like(leaf))
        for keep, leaf in zip(alive, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, kept)
