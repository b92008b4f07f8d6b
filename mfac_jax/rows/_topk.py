"""The largest entries of each gradient; what is left out goes into the next one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.rows._compressed import Code, Compressed, check_width

VALUES = ("bfloat16", "float32")
ERROR_BITS = (0, 4, 16)

# With 4 bits, as many neighbouring errors share a scale in bfloat16, a quarter of a bit for each.
_GROUP = 64
_LARGEST = 7  # of a signed integer of 4 bits, by symmetry


@dataclass(frozen=True)
class TopK(Compressed):
    """Stores the largest entries of each gradient, with error feedback.

    Each gradient is flattened and cut into blocks. What earlier gradients left out is added to it.
    Of each block the entries of largest absolute value are stored, with their places in 16 bits,
    and the rest is left for the next gradient. So a window of ``m`` gradients takes
    ``4 density m`` bytes for each parameter with bfloat16 values, and the errors 2 bytes more. Rows
    by output follow the sharding of the outputs.

    Reference: Modoranu et al., "Error Feedback Can Accurately Compress Preconditioners", ICML 2024;
    Modoranu et al., "MicroAdam: Accurate Adaptive Optimization with Low Space Overhead and Provable
    Convergence", NeurIPS 2024.

    Attributes:
        density: the fraction of the entries that is stored, in (0, 1]; at least one entry of each
            block.
        block: the number of entries of a block, a power of two from 2 to 32,768. Gradients of
            fewer entries have smaller blocks.
        values: the dtype of stored entries, bfloat16 or float32.
        error_bits: the bits of the error of an entry: 16 (bfloat16), 4 (integers with a scale for
            64 entries, which takes a quarter of a bit), or 0 for no error feedback.

    Raises:
        TypeError: an attribute has the wrong type.
        ValueError: an attribute is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax.rows import TopK, as_rows
        >>> gradients = jnp.array([[1.0, -4.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0]])
        >>> rows = as_rows(gradients, storage=TopK(0.5))
        >>> rows.columns(0, 4)  # the second has the 2 that the first left out
        Array([[ 0., -4.,  0.,  3.],
               [ 0.,  0.,  2.,  1.]], dtype=float32)
    """

    density: float = 0.01
    block: int = 4096
    values: DTypeLike = "bfloat16"
    error_bits: int = 16

    def __post_init__(self) -> None:
        _checks.positive_scalar(self.density, "density")
        if not 0 < float(self.density) <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}.")
        object.__setattr__(self, "density", float(self.density))
        check_width(self.block, "block")
        object.__setattr__(self, "values", _checks.dtype(self.values, "values", VALUES))
        if _checks.non_negative_int(self.error_bits, "error_bits") not in ERROR_BITS:
            raise ValueError(f"error_bits must be 0, 4 or 16, got {self.error_bits}.")

    @property
    def most_columns(self) -> int:
        return self.block

    @property
    def is_read_in_place(self) -> bool:
        return True

    def step_bytes(self, vector: int, code: int, piece: int, platform: str) -> int:
        usual = super().step_bytes(vector, code, piece, platform)
        # A CPU computes with stored entries in float32, and with their places in 32 bits.
        return max(usual, vector + 4 * piece) if platform == "cpu" else usual

    def kept(self, width: int) -> int:
        """The number of entries stored of a block."""
        return max(math.ceil(self.density * width), 1)

    def blank(self, count: int, num_rows: int, width: int) -> Code:
        shape = (count, num_rows, self.kept(width))
        return jnp.zeros(shape, self.values), jnp.zeros(shape, jnp.int16)

    def blank_error(self, count: int, width: int) -> PyTree:
        if self.error_bits == 0:
            return None
        return self._pack(jnp.zeros((count, width), jnp.float32))

    def with_error(self, tiles: Float[Array, "t k"], error: PyTree) -> Float[Array, "t k"]:
        return tiles if error is None else tiles + self._unpack(error).astype(tiles.dtype)

    def encode(self, tiles: Float[Array, "t k"], error: PyTree) -> tuple[Code, PyTree]:
        tiles = self.with_error(tiles, error)
        _, places = lax.top_k(jnp.abs(tiles), self.kept(tiles.shape[1]))
        places = jnp.sort(places, axis=1)  # reading one coordinate searches them
        values = jnp.take_along_axis(tiles, places, axis=1).astype(self.values)
        if error is not None:
            left = jax.vmap(lambda x, i, v: x.at[i].add(-v))(
                tiles, places, values.astype(tiles.dtype)
            )
            error = self._pack(left)
        return (values, places.astype(jnp.int16)), error

    def decode(self, code: Code, width: int, dtype: jnp.dtype) -> Float[Array, "t m k"]:
        values, places = code
        flat = values.reshape(-1, values.shape[2]).astype(dtype)
        out = jax.vmap(lambda v, i: jnp.zeros(width, dtype).at[i].add(v))(
            flat, places.reshape(flat.shape).astype(jnp.int32)
        )
        return out.reshape(*values.shape[:2], width)

    def dots(self, code: Code, vector: Float[Array, "t k"]) -> Float[Array, "t m"]:
        values, places = code
        found = jax.vmap(lambda x, i: x[i])(vector, places.astype(jnp.int32))
        return jnp.sum(found * values.astype(vector.dtype), axis=2)

    def combine(
        self, code: Code, coefficients: Float[Array, "t m"], width: int
    ) -> Float[Array, "t k"]:
        values, places = code
        weighted = values.astype(coefficients.dtype) * coefficients[:, :, None]

        def of_tile(v: Float[Array, "m j"], i: Int[Array, "m j"]) -> Float[Array, " k"]:
            out = jnp.zeros(width, v.dtype)
            return out.at[i.reshape(-1).astype(jnp.int32)].add(v.reshape(-1))

        return jax.vmap(of_tile)(weighted, places)

    def restrict(self, code: Code, error: PyTree, mask: Bool[Array, "t k"]) -> tuple[Code, PyTree]:
        values, places = code
        keep = jax.vmap(lambda x, i: x[i])(mask, places.astype(jnp.int32))
        if error is not None:
            left = self._unpack(error)
            error = self._pack(jnp.where(mask, left, jnp.zeros_like(left)))
        return (jnp.where(keep, values, jnp.zeros_like(values)), places), error

    def take(
        self, code: Code, tile: Int[Array, " j"], column: Int[Array, " j"], dtype: jnp.dtype
    ) -> Float[Array, "m j"]:
        values, places = code
        count, column = places.shape[2], column.astype(places.dtype)

        def of_row(row: Int[Array, ""]) -> Float[Array, " j"]:
            # The last of the stored places, which are in order, that is not beyond the column.
            def halve(i: Int[Array, ""], at: Int[Array, " j"]) -> Int[Array, " j"]:
                further = jnp.minimum(at + (first >> i), count - 1)
                return jnp.where(places[tile, row, further] <= column, further, at)

            at = lax.fori_loop(0, steps, halve, jnp.zeros_like(tile))
            found = values[tile, row, at].astype(dtype)
            return jnp.where(places[tile, row, at] == column, found, jnp.zeros_like(found))

        steps = max(math.ceil(math.log2(count)), 1)
        first = jnp.int32(2 ** (steps - 1))
        return lax.map(of_row, jnp.arange(places.shape[1], dtype=jnp.int32))

    def _pack(self, left: Float[Array, "t k"]) -> PyTree:
        """Errors in few bits."""
        if self.error_bits == 16:
            return left.astype(jnp.bfloat16)
        grouped = left.reshape(len(left), -1, min(_GROUP, left.shape[1]))
        scale = (jnp.max(jnp.abs(grouped), axis=2) / _LARGEST).astype(jnp.bfloat16)
        wide = scale.astype(left.dtype)[:, :, None]
        levels = jnp.round(grouped / jnp.where(wide == 0, jnp.ones_like(wide), wide))
        return _nibbles(jnp.clip(levels, -_LARGEST, _LARGEST).reshape(left.shape)), scale

    def _unpack(self, error: PyTree) -> Float[Array, "t k"]:
        """Errors in float32."""
        if self.error_bits == 16:
            wide: Array = error.astype(jnp.float32)
            return wide
        pairs, scale = error
        low, high = (pairs & 15).astype(jnp.int8), (pairs >> 4).astype(jnp.int8)
        levels = (jnp.stack([low, high], axis=2) - 8).reshape(len(pairs), -1)
        grouped = levels.reshape(*scale.shape, -1).astype(jnp.float32)
        return (grouped * scale.astype(jnp.float32)[:, :, None]).reshape(levels.shape)


def _nibbles(levels: Float[Array, "t k"]) -> UInt8[Array, "t k2"]:
    """Integers in -7..7, two in a byte."""
    pairs = (levels.astype(jnp.int8) + 8).astype(jnp.uint8).reshape(len(levels), -1, 2)
    return pairs[:, :, 0] | (pairs[:, :, 1] << 4)
