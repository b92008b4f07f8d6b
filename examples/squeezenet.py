"""A small network for CIFAR-10 of SqueezeNet's fire modules, with batch normalisation, in Flax.

A fire module squeezes its channels by 1 x 1 convolutions and expands them by 1 x 1 and 3 x 3
convolutions side by side.

References:
    Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and < 0.5 MB model
    size", 2016.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

# Of each stage: the channels of the squeezing and of either expanding part of its modules.
STAGES = (((24, 48),), ((32, 64), (32, 64), (48, 96)), ((48, 96),))


class Unit(nnx.Module):
    """A convolution without a bias, batch normalisation and ReLU."""

    def __init__(self, width_in: int, width: int, size: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            width_in,
            width,
            (size, size),
            padding=size // 2,
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class Fire(nnx.Module):
    """A fire module; its output has ``2 expanded`` channels."""

    def __init__(self, width_in: int, squeezed: int, expanded: int, rngs: nnx.Rngs):
        self.squeeze = Unit(width_in, squeezed, 1, rngs)
        self.expand1 = Unit(squeezed, expanded, 1, rngs)
        self.expand3 = Unit(squeezed, expanded, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.squeeze(x)
        return jnp.concatenate([self.expand1(x), self.expand3(x)], axis=-1)


class SqueezeNet(nnx.Module):
    """A convolution, three stages of fire modules after pooling, and a linear classifier.

    It has 172,000 weights and takes 11 million multiplications for an image.
    """

    def __init__(self, rngs: nnx.Rngs, width: int = 32, stages: tuple[tuple, ...] = STAGES):
        self.first = Unit(3, width, 3, rngs)
        self.stages = nnx.List([])
        for stage in stages:
            fires = []
            for squeezed, expanded in stage:
                fires.append(Fire(width, squeezed, expanded, rngs))
                width = 2 * expanded
            self.stages.append(nnx.List(fires))
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        for stage in self.stages:
            x = _pooled(x)
            for fire in stage:
                x = fire(x)
        return self.head(x.mean((1, 2)))


def _pooled(x: jax.Array) -> jax.Array:
    """The largest of every 2 x 2 pixels; its gradient is fast on a CPU, unlike `nnx.max_pool`'s."""
    count, height, width, channels = x.shape
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).max((2, 4))
