"""Double-word arithmetic: a number is the unevaluated sum of two words of the working dtype.

Two words hold twice the digits of one (Dekker; Knuth, "The Art of Computer Programming", 4.2.2).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

TwoWords = tuple[Array, Array]

# The number of slices that one round of a sum adds up.
_FAN_IN = 16


def product(x: Array, y: Array) -> TwoWords:
    """``x y`` in two words.

    Products of half words are exact. The result is therefore the same whether or not a compiler
    fuses a product with the addition that follows.
    """
    a, b = halves(x)
    c, d = halves(y)
    middle, rest = exact_sum(a * d, b * c)
    high, low = exact_sum(a * c, middle)
    return high, low + (rest + b * d)


def add(x: TwoWords, y: TwoWords) -> TwoWords:
    """``x + y`` in two words."""
    high, low = exact_sum(x[0], y[0])
    return high, low + (x[1] + y[1])


def exact_sum(x: Array, y: Array) -> TwoWords:
    """``x + y`` of two single words: the rounded sum and its rounding error (Knuth)."""
    high = x + y
    part = high - x
    return high, (x - (high - part)) + (y - part)


def summed(x: TwoWords, axis: int) -> TwoWords:
    """The sum of ``x`` along ``axis``, in two words.

    The sum runs in rounds. Each round adds slices elementwise, which is a few loops over vectors
    on every device; a reduction over pairs would be a chain of scalar operations.
    """
    while (length := x[0].shape[axis]) > 1:
        size = -(-length // _FAN_IN)
        starts = range(0, length, size)
        x = functools.reduce(add, [_slice(x, start, size, axis) for start in starts])
    return x[0].squeeze(axis), x[1].squeeze(axis)


def _slice(x: TwoWords, start: int, size: int, axis: int) -> TwoWords:
    """Entries ``start .. start + size - 1`` along ``axis``; zeros beyond the end."""

    def cut(word: Array) -> Array:
        stop = min(start + size, word.shape[axis])
        padding = [(0, 0)] * word.ndim
        padding[axis] = (0, start + size - stop)
        return jnp.pad(lax.slice_in_dim(word, start, stop, axis=axis), padding)

    return cut(x[0]), cut(x[1])


def halves(x: Array) -> TwoWords:
    """``x`` as the sum of two numbers, each with half as many digits."""
    info = jnp.finfo(x.dtype)
    mask = jnp.asarray(-1 << (info.nmant // 2 + 1), jnp.dtype(f"int{info.bits}"))
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, mask.dtype) & mask, x.dtype)
    return high, x - high
