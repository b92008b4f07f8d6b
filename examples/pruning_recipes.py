"""How ``prune_networks.py`` trains the networks that it does not find pretrained.

Results depend on the trained weights, of which they have a digest, but not on this file.
"""

from __future__ import annotations

from typing import NamedTuple

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
        steps, size = (3, 8) if smoke else (5_000, 32)
        warm_up, most = max(steps // 10, 1), 1e-4
        up = optax.linear_schedule(0.0, most, warm_up)
        down = optax.linear_schedule(most, 0.0, steps - warm_up)
        schedule = optax.join_schedules([up, down], [warm_up])
        return Training(steps, size, optax.adamw(schedule, weight_decay=0.01))
    raise ValueError(f"{name} is not trained here.")
