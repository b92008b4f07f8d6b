"""Ready-made optimizers around :func:`mfac_precondition`."""

from __future__ import annotations

import optax
from jax.typing import ArrayLike

from mfac_jax._layout import Layout, PyTree
from mfac_jax.optimizer._direction import Direction
from mfac_jax.optimizer._metric import Metric, SecondMoments
from mfac_jax.optimizer._precondition import (
    DEFAULT_WINDOW_SIZE,
    Mask,
    mask_leaves,
    masked,
    mfac_precondition,
)
from mfac_jax.optimizer._schedules import ScalarOrSchedule
from mfac_jax.rows import Dense, Storage


def mfac(
    learning_rate: ScalarOrSchedule,
    window_size: int = DEFAULT_WINDOW_SIZE,
    damping: ScalarOrSchedule | None = None,
    *,
    relative_damping: ScalarOrSchedule | None = None,
    momentum: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: Mask | None = None,
    normalize_by: str = "count",
    storage: Storage = Dense(),  # noqa: B008  (immutable)
    alive: Mask | None = None,
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
        mask: which weights decay, as in ``optax.adamw``.
        normalize_by: see :func:`mfac_precondition`.
        storage: see :func:`mfac_precondition`.
        alive: see :func:`mfac_precondition`. The updates of weights that are not alive are
            zero: neither weight decay nor an earlier momentum moves them.

    Returns:
        The optimizer.

    Raises:
        TypeError: as :func:`mfac_precondition`.
        ValueError: as :func:`mfac_precondition`; or there is a ``mask`` and no weight decay.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mfac_jax import mfac
        >>> tx = mfac(optax.cosine_decay_schedule(0.1, 100), window_size=16, momentum=0.9)
        >>> params = {"w": jnp.ones(3)}
        >>> updates, state = tx.update({"w": jnp.ones(3)}, tx.init(params), params)
        >>> updates["w"].shape
        (3,)
    """
    is_decaying = not (isinstance(weight_decay, int | float) and weight_decay == 0)
    if mask is not None and not is_decaying:
        raise ValueError(
            "mask says which weights decay, but weight_decay is 0; alive says which are alive."
        )
    parts = [
        mfac_precondition(
            window_size,
            damping,
            relative_damping=relative_damping,
            normalize_by=normalize_by,
            storage=storage,
            alive=alive,
        )
    ]
    if momentum is not None:
        parts.append(optax.trace(decay=momentum))
    if is_decaying:
        parts.append(optax.add_decayed_weights(weight_decay, mask))
    if alive is not None:
        parts.append(_restrict(alive))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*parts)


def mfacw(
    learning_rate: ScalarOrSchedule,
    weight_decay: ArrayLike = 1e-4,
    *,
    momentum: ArrayLike = 0.9,
    metric: Metric = SecondMoments(),  # noqa: B008  (immutable)
    window_size: int = 16,
    relative_damping: ScalarOrSchedule = 3e-3,
    blocks: str | None = "output",
    storage: Storage = Dense(),  # noqa: B008  (immutable)
    mask: Mask | None = None,
    alive: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """M-FAC in the place of ``optax.adamw``: the same two numbers mean the same.

    The window lives in Adam's metric: ``F = lambda sqrt(nu) + (1/n) sum_i g_i g_i^T`` with Adam's
    second moments ``nu``, in blocks, one for each output of a layer. A small window suffices for
    such blocks. The direction is ``F^-1`` times the mean of the window's gradients with Nesterov
    momentum, and in each parameter it has the length that Adam's direction with this momentum has
    in the metric. So AdamW's learning rate and weight decay serve. With a large damping it is
    NAdamW with three differences: the momentum ends after ``m`` gradients, the first step is
    Adam's, and an older gradient keeps the second moments of its own step in one of two factors
    ``nu^-1/4``.

    The state takes ``4 m + 4 + 4 m^2 / B`` bytes for each parameter, ``B`` weights a block, and
    ``2 m + 4 + 4 m^2 / B`` with ``storage=Dense(jnp.bfloat16)``. Under
    ``optax.inject_hyperparams``, name ``window_size`` in ``static_args``.

    With jaxlib 0.10.2 on a CPU, two ``mfacw`` for hundreds of outputs in one program, as
    ``optax.partition`` makes them, can wait for each other for ever: its parallel factorizations of
    batches block the threads that they need. jaxlib 0.12 does not do so.

    Args:
        learning_rate: AdamW's: a number, a scalar array or a schedule.
        weight_decay: AdamW's decoupled weight decay.
        momentum: Adam's ``b1``; it takes no memory.
        metric: Adam's ``b2`` and ``eps``, or another diagonal.
        window_size: ``m``; see :func:`mfac_precondition`.
        relative_damping: see :func:`mfac_precondition`.
        blocks: see :func:`mfac_precondition`; ``"output_first"`` for kernels shaped as in PyTorch.
        storage: see :func:`mfac_precondition`.
        mask: which weights decay, as in ``optax.adamw``.
        alive: see :func:`mfac_precondition`; updates are zero where a weight is not alive.

    Returns:
        The optimizer.

    Raises:
        TypeError: as :func:`mfac_precondition`.
        ValueError: as :func:`mfac_precondition`.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import mfacw
        >>> tx = mfacw(1e-3, weight_decay=0.1)
        >>> params = {"w": jnp.ones(3)}
        >>> updates, state = tx.update({"w": jnp.ones(3)}, tx.init(params), params)
        >>> updates["w"]  # Adam's first step and the decay
        Array([-0.0011, -0.0011, -0.0011], dtype=float32)
    """
    parts = [
        mfac_precondition(
            window_size,
            relative_damping=relative_damping,
            storage=storage,
            alive=alive,
            metric=metric,
            blocks=blocks,
            direction=Direction(momentum=momentum, nesterov=True, length="graft"),
        ),
        optax.add_decayed_weights(weight_decay, mask),
    ]
    if alive is not None:
        parts.append(_restrict(alive))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*parts)


def _restrict(alive: Mask) -> optax.GradientTransformation:
    """Sets the updates of weights that are not alive to zero."""

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        return masked(updates, mask_leaves(alive, params, Layout(updates, "updates")))

    return optax.stateless(update)
