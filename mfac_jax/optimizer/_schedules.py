"""Numbers that may follow a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mfac_jax import _checks

ScalarOrSchedule = ArrayLike | Callable[[Int[Array, ""]], ArrayLike]


def check_dampings(damping: Any, relative: Any) -> None:
    """Checks dampings that are numbers.

    Raises:
        TypeError: a damping is not a number or a scalar array.
        ValueError: a damping is not positive.
    """
    for value, name in ((damping, "damping"), (relative, "relative_damping")):
        if value is not None and not callable(value):
            _checks.positive_scalar(value, name)


def damping_at(
    damping: ScalarOrSchedule | None,
    relative: ScalarOrSchedule | None,
    count: Int[Array, ""],
    trace: Float[Array, "*l"],
) -> Float[Array, "*l"]:
    """``lambda = damping + relative * trace``, where ``trace`` is that of the undamped Fisher.

    While all gradients are zero, a relative damping alone is 1 and not 0: the direction is zero.
    """

    def at(value: ScalarOrSchedule | None) -> Float[Array, ""]:
        if value is None:
            return jnp.zeros((), trace.dtype)
        return jnp.asarray(value(count) if callable(value) else value).astype(trace.dtype)

    lam = at(damping) + at(relative) * trace
    return jnp.where((trace == 0) & (lam == 0), jnp.ones_like(lam), lam)
