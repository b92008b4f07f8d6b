"""How ``prune_networks.py`` trains the networks that it does not find pretrained.

Results depend on the trained weights, of which they have a digest, but not on this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Training(NamedTuple):
    """How a network is trained before it is pruned: steps, examples in a step, optimizer."""

    steps: int
    batch: int
    tx: optax.GradientTransformation


def recipe(name: str, smoke: bool) -> Training:
    """How a network is trained.

    Args:
        name: the name of the network.
        smoke: whether only to try.
    """
    if name == "squeezenet":
        steps, size = (3, 16) if smoke else (6_000, 64)
        rate = optax.cosine_onecycle_schedule(steps, 0.1, 0.2)
        sgd = optax.sgd(rate, momentum=0.9, nesterov=True)
        return Training(steps, size, optax.chain(optax.add_decayed_weights(5e-4), sgd))
    if name == "mlp":
        steps, size = (3, 16) if smoke else (5_000, 64)
        return Training(steps, size, optax.adam(optax.cosine_decay_schedule(1e-3, steps)))
    if name == "characters":
        steps, size = (3, 4) if smoke else (800, 32)
        rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(steps // 20, 1), steps)
        return Training(steps, size, optax.adamw(rate, weight_decay=0.1))
    if name == "minilm":
        cycle, size = (1, 8) if smoke else (2_000, 32)
        rate = optax.warmup_cosine_decay_schedule(0.0, 1.5e-4, max(cycle // 10, 1), cycle + 1)
        rates = optax.join_schedules([rate] * 3, [cycle, 2 * cycle])
        adamw = optax.adamw(rates, weight_decay=0.01)
        return Training(3 * cycle, size, averaged(adamw, [cycle, 2 * cycle, 3 * cycle]))
    raise ValueError(f"{name} is not trained here.")


class _Averaged(NamedTuple):
    """The state of :func:`averaged`."""

    inner: Any
    count: jax.Array
    mean: Any


def averaged(
    tx: optax.GradientTransformation, after: Sequence[int]
) -> optax.GradientTransformation:
    """An optimizer whose last step moves to the mean of the weights after some of its steps.

    This is stochastic weight averaging (Izmailov et al., UAI 2018).

    Args:
        tx: the optimizer.
        after: the numbers of the steps; the last of them is the last step.
    """

    def init(params: Any) -> _Averaged:
        return _Averaged(tx.init(params), jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: _Averaged, params: Any) -> tuple[Any, _Averaged]:
        updates, inner = tx.update(updates, state.inner, params)
        count = state.count + 1
        share = jnp.isin(count, jnp.array(after)) / len(after)
        mean = jax.tree.map(lambda m, p, u: m + share * (p + u), state.mean, params, updates)
        is_last = count == after[-1]
        updates = jax.tree.map(lambda m, p, u: jnp.where(is_last, m - p, u), mean, params, updates)
        return updates, _Averaged(inner, count, mean)

    return optax.GradientTransformation(init, update)
