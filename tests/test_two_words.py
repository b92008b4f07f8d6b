"""Two-word arithmetic against arithmetic in exact integers and fractions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import _two_words


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.x64
def test_halves_multiply_exactly(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=200) * 10.0 ** rng.integers(-12, 12, 200), dtype)
    high, low = _two_words.halves(x)
    np.testing.assert_array_equal(high + low, x)
    exact = np.asarray(high, np.longdouble) ** 2
    np.testing.assert_array_equal(np.asarray(high**2, np.longdouble), exact)


@pytest.mark.x64
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_sums_of_products_lose_nothing_that_cancels(dtype):
    rng = np.random.default_rng(1)
    x = rng.normal(size=500).astype(dtype)
    y = rng.normal(size=500).astype(dtype)
    # The sum of the first half and minus itself, and something small.
    x, y = np.concatenate([x, -x, [1e-3]]), np.concatenate([y, y, [1e-3]])
    x, y = np.asarray(x, dtype), np.asarray(y, dtype)

    @jax.jit
    def dot(x, y):
        high, low = _two_words.summed(_two_words.product(x, y), axis=0)
        return high + low

    want = float(sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, y, strict=True)))
    plain = abs(float(jnp.sum(x * y)) - want)
    got = abs(float(dot(jnp.asarray(x), jnp.asarray(y))) - want)
    eps = float(np.finfo(dtype).eps)
    assert got <= eps * abs(want) + 8 * eps**2 * float(np.sum(np.abs(x * y)))
    assert plain > 100 * got
