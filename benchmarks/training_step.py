"""A jitted training step of ResNet-20 on CIFAR-shaped data, with each optimizer."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import timing
import workloads
from flax import nnx

from mfac_jax import mfac

BATCH = 128
BASELINE = "SGD + momentum"
WINDOW_SIZES = {f"M-FAC, m = {m}": m for m in (64, 512)}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    BASELINE: lambda: optax.sgd(0.1, momentum=0.9),
    "Adam": lambda: optax.adam(1e-3),
}
for _name, _size in WINDOW_SIZES.items():
    OPTIMIZERS[_name] = functools.partial(mfac, 0.1, _size)


class Residual(nnx.Module):
    """Two 3 x 3 convolutions beside an identity or a 1 x 1 convolution."""

    def __init__(self, width_in: int, width: int, rngs: nnx.Rngs):
        strides = 1 if width_in == width else 2
        self.conv1 = _conv(width_in, width, 3, strides, rngs)
        self.norm1 = nnx.BatchNorm(width, rngs=rngs)
        self.conv2 = _conv(width, width, 3, 1, rngs)
        self.norm2 = nnx.BatchNorm(width, rngs=rngs)
        self.shortcut = (
            None
            if width_in == width
            else nnx.Sequential(
                _conv(width_in, width, 1, strides, rngs), nnx.BatchNorm(width, rngs=rngs)
            )
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        out = nnx.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return nnx.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """Three stages of ``depth`` residual blocks: ResNet-20, 272,474 parameters, by default."""

    def __init__(self, rngs: nnx.Rngs, width: int = 16, depth: int = 3):
        self.conv = _conv(3, width, 3, 1, rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        widths = [width, *[w for w in (width, 2 * width, 4 * width) for _ in range(depth)]]
        blocks = [Residual(a, b, rngs) for a, b in itertools.pairwise(widths)]
        self.stages = nnx.Sequential(*blocks)
        self.dense = nnx.Linear(4 * width, 10, kernel_init=_kernel, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stages(nnx.relu(self.norm(self.conv(x))))
        return self.dense(x.mean((1, 2)))


def _conv(width_in: int, width: int, size: int, strides: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        width_in,
        width,
        (size, size),
        strides=strides,
        padding="SAME",
        use_bias=False,
        kernel_init=_kernel,
        rngs=rngs,
    )


def _kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal entries of variance 2 / fan-in, from NumPy: nothing to compile a shape."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / math.prod(shape[:-1])), dtype)


def _fill(tx: Any, name: str, gradient: Any, params: Any) -> Any:
    """A state as it is in the middle of training: a window is full.

    Of gradients that differ from ``gradient`` by noise of its own size.
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
