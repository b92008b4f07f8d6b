"""A jitted training step of ResNet-20 on CIFAR-shaped data, with each optimizer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import report
import timing
import workloads
from flax import nnx

from mfac_jax import mfac, mfacw

sys.path.insert(0, str(report.ROOT / "examples"))

from resnet20 import ResNet

BATCH = 128
BASELINE = "SGD + momentum"
WINDOW_SIZES = {f"M-FAC, m = {m}": m for m in (64, 512)}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    BASELINE: lambda: optax.sgd(0.1, momentum=0.9),
    "Adam": lambda: optax.adam(1e-3),
}
for _name, _size in WINDOW_SIZES.items():
    OPTIMIZERS[_name] = functools.partial(mfac, 0.1, _size)
OPTIMIZERS["mfacw"] = lambda: mfacw(1e-3)
WINDOW_SIZES["mfacw"] = 16


def _fill(tx: Any, name: str, gradient: Any, params: Any) -> Any:
    """A state as in the middle of training, with a full window.

    Its gradients differ from ``gradient`` by noise of the same size.
    """
    flat, unravel = jax.flatten_util.ravel_pytree(gradient)

    @jax.jit
    def push(i: jax.Array, state: Any) -> Any:
        noise = jax.random.normal(jax.random.key(i), flat.shape) * jnp.std(flat)
        return tx.update(unravel(flat + noise), state, params)[1]

    state = tx.init(params)
    for i in range(WINDOW_SIZES.get(name, 0)):
        state = push(i, state)
    return state


def measure(
    seconds: float,
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS),
    batch: int = BATCH,
    width: int = 16,
    depth: int = 3,
) -> dict[str, Any]:
    """Times a step with each optimizer, turn by turn, from the same start."""
    model = ResNet(nnx.Rngs(0), width, depth)
    graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, statistics = nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, batch, 32, 32, 3), np.float32)
    labels = rng.integers(0, 10, (4, batch), np.int32)
    batches = [(jnp.asarray(x), jnp.asarray(y)) for x, y in zip(images, labels, strict=True)]

    def loss_fn(params: Any, statistics: Any, x: jax.Array, y: jax.Array) -> tuple:
        model = nnx.merge(graph, params, statistics)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return losses.mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    grads_of = jax.jit(lambda *args: jax.grad(loss_fn, has_aux=True)(*args)[0])
    runs: dict[str, timing.Run] = {}
    records: dict[str, dict[str, Any]] = {}
    for name in optimizers:
        tx = OPTIMIZERS[name]()

        def step(held: Any, x: jax.Array, y: jax.Array, tx=tx) -> tuple:
            params, statistics, state = held
            grad = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, statistics), grads = grad(params, statistics, x, y)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), statistics, state), loss

        start = jax.tree.map(jnp.copy, (params, statistics))
        state = _fill(tx, name, grads_of(params, statistics, *batches[0]), params)
        records[name] = {"state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state))}
        held = [(*start, state)]
        program = workloads.compile_program(step, (held[0], *batches[0]), (0,))
        runs[name] = timing.in_turn(program, held, batches, donates=True)
    times = timing.interleave(runs, seconds)
    d = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "d": d,
        "batch": batch,
        "baseline": BASELINE,
        "optimizers": {name: records[name] | {"time": times[name]} for name in runs},
    }
