"""Gradients in 8 bits, with a scale for each tile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import Int8 as Int8Array

from mfac_jax._layout import PyTree
from mfac_jax.rows._compressed import Code, Compressed, check_width, map_tiles

_LARGEST = 127

# On a CPU as many numbers become float32 at a time, so that they stay in its cache. One fused loop
# over all of them takes more than ten times as long.
_ENTRIES_AT_A_TIME = 2**16


@dataclass(frozen=True)
class Int8(Compressed):
    """Stores gradients as integers of 8 bits, with a float32 scale for each tile of columns.

    A window of ``m`` gradients takes ``(1 + 4 / tile) m`` bytes for each parameter. Numbers are
    rounded to the nearest of 255, of which the largest is the largest of the tile. Rows by output
    follow the sharding of the outputs.

    Attributes:
        tile: the largest number of neighbouring entries that share a scale, a power of two from 2
            to 32,768. All tiles of a gradient, or of an output, are about as large.

    Raises:
        TypeError: ``tile`` is not an int.
        ValueError: ``tile`` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import mfac
        >>> from mfac_jax.rows import Int8
        >>> tx = mfac(0.1, window_size=64, storage=Int8())
    """

    tile: int = 256

    def __post_init__(self) -> None:
        check_width(self.tile, "tile")

    @property
    def most_columns(self) -> int:
        return self.tile

    def tiling(self, size: int) -> tuple[int, int]:
        # All tiles are about as wide, so that little is padded.
        count = max(-(-size // self.tile), 1)
        return count, max(-(-size // count), 1)

    def step_bytes(self, vector: int, code: int, piece: int, platform: str) -> int:
        # XLA for a GPU copies the window.
        if platform == "gpu":
            return vector + code
        return super().step_bytes(vector, code, piece, platform) - vector

    def blank(self, count: int, num_rows: int, width: int) -> Code:
        levels = jnp.zeros((count, num_rows, width), jnp.int8)
        return levels, jnp.zeros((count, num_rows), jnp.float32)

    def encode(self, tiles: Float[Array, "t k"], error: PyTree) -> tuple[Code, PyTree]:
        # A product, because XLA may or may not make one of a division by a constant.
        scale = jnp.max(jnp.abs(tiles), axis=1).astype(jnp.float32) * jnp.float32(1 / _LARGEST)
        wide = scale.astype(tiles.dtype)[:, None]
        levels = jnp.round(tiles / jnp.where(wide == 0, jnp.ones_like(wide), wide))
        levels = jnp.clip(levels, -_LARGEST, _LARGEST).astype(jnp.int8)
        return (levels, scale), error

    def decode(self, code: Code, width: int, dtype: jnp.dtype) -> Float[Array, "t m k"]:
        del width
        levels, scale = code
        return levels.astype(dtype) * scale.astype(dtype)[..., None]

    def dots(self, code: Code, vector: Float[Array, "t k"]) -> Float[Array, "t m"]:
        levels, scale = code
        return scale.astype(vector.dtype) * _product(levels, vector, "tmk,tk->tm")

    def combine(
        self, code: Code, coefficients: Float[Array, "t m"], width: int
    ) -> Float[Array, "t k"]:
        del width
        levels, scale = code
        return _product(levels, coefficients * scale.astype(coefficients.dtype), "tmk,tm->tk")

    def restrict(self, code: Code, error: PyTree, mask: Bool[Array, "t k"]) -> tuple[Code, PyTree]:
        levels, scale = code
        return (jnp.where(mask[:, None], levels, jnp.zeros_like(levels)), scale), error

    def take(
        self, code: Code, tile: Int[Array, " j"], column: Int[Array, " j"], dtype: jnp.dtype
    ) -> Float[Array, "m j"]:
        levels, scale = code
        return (levels[tile, :, column].astype(dtype) * scale[tile].astype(dtype)).T


def _product(
    levels: Int8Array[Array, "t m k"], factor: Float[Array, "t _"], subscripts: str
) -> Float[Array, "t _"]:
    """A product of every tile with a vector of its own."""

    def at_once(levels: Array, factor: Array) -> Array:
        return jnp.einsum(subscripts, levels.astype(factor.dtype), factor, precision="highest")

    def some_at_a_time(levels: Array, factor: Array) -> Array:
        batch = max(_ENTRIES_AT_A_TIME // math.prod(levels.shape[1:]), 1)
        return map_tiles(at_once, batch, levels, factor)

    return lax.platform_dependent(levels, factor, cpu=some_at_a_time, default=at_once)
