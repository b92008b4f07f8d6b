"""Arithmetic on unevaluated sums of two numbers: twice the digits of the working dtype."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

TwoWords = tuple[Array, Array]

# Slices that are added up in one round of a sum.
_FAN_IN = 16


def product(x: Array, y: Array) -> TwoWords:
    """``x y`` in two words.

    Half words multiply exactly, so that it does not matter whether a compiler fuses a
    product with the addition that follows.
    """
    a, b = halves(x)
    c, d = halves(y)
    middle, rest = exact_sum(a * d, b * c)
    high, low = exact_sum(a * c, middle)
    return high, low + (rest + b * d)


def add(x: TwoWords, y: TwoWords) -> TwoWords:
    """``x + y``."""
    high, low = exact_sum(x[0], y[0])
    return high, low + (x[1] + y[1])


def exact_sum(x: Array, y: Array) -> TwoWords:
    """``x + y`` of two numbers and its rounding error (Knuth)."""
    high = x + y
    part = high - x
    return high, (x - (high - part)) + (y - part)


def summed(x: TwoWords, axis: int) -> TwoWords:
    """The sum of ``x`` along ``axis``.

    In rounds, each of which adds up slices elementwise: on every device that is a few
    loops over vectors, where a reduction of pairs is a chain of single numbers.
    """
    while (length := x[0].shape[axis]) > 1:
        size = -(-length // _FAN_IN)
        starts = range(0, length, size)
        x = functools.reduce(add, [_slice(x, start, size, axis) for start in starts])
    return x[0].squeeze(axis), x[1].squeeze(axis)


def total(x: TwoWords, axis: int) -> Array:
    """The sum of ``x`` along ``axis``, rounded once at the end."""
    high, low = summed(x, axis)
    return high + low


def _slice(x: TwoWords, start: int, size: int, axis: int) -> TwoWords:
    """``size`` entries from ``start`` on, zeros beyond the end."""

    def cut(word: Array) -> Array:
        stop = min(start + size, word.shape[axis])
        padding = [(0, 0)] * word.ndim
        padding[axis] = (0, start + size - stop)
        return jnp.pad(lax.slice_in_dim(word, start, stop, axis=axis), padding)

    return cut(x[0]), cut(x[1])


def halves(x: Array) -> TwoWords:
    """``x`` as the sum of two numbers of half its digits each."""
    info = jnp.finfo(x.dtype)
    mask = jnp.asarray(-1 << (info.nmant // 2 + 1), jnp.dtype(f"int{info.bits}"))
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, mask.dtype) & mask, x.dtype)
    return high, x - high
