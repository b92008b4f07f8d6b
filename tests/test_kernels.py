"""Every scan against float64, at the shapes where a scan can go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import kernels
from mfac_jax.kernels import _scans

TILE = _scans._TILE
# (m, *shape): one row, below a tile, many rows, one tile, above and off the tile, leaves.
SHAPES = [
    (1, 7),
    (5, 33),
    (66, 33),
    (3, TILE),
    (3, 2 * TILE + 37),
    (4, 3, 5),
    (2, 91, 100),
    (3,),
    (3, 0),
]


def block_of(shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    block = jnp.asarray(rng.normal(size=shape), dtype)
    vector = jnp.asarray(rng.normal(size=shape[1:]), dtype)
    wide = np.asarray(block, np.float64).reshape(shape[0], -1)
    return block, vector, wide, np.asarray(vector, np.float64).ravel()


CASES = [(shape, dtype) for shape in SHAPES for dtype in (jnp.float32, jnp.bfloat16)]
CASES.append(((5, 33), jnp.float16))
every_case = pytest.mark.parametrize(("shape", "dtype"), CASES)


def total(wide, vector):
    """The size of what is added up, against which rounding is measured."""
    return np.linalg.norm(wide) * np.linalg.norm(vector)


def assert_small(error, scale, length):
    assert np.linalg.norm(error) <= oracles.tolerance(np.float32, length) * max(scale, 1e-30)


@every_case
def test_dots(shape, dtype):
    block, vector, wide, flat = block_of(shape, dtype)
    got = jax.jit(kernels.dots)(block, vector)
    assert got.dtype == jnp.float32
    assert got.shape == shape[:1]
    assert_small(np.asarray(got, np.float64) - wide @ flat, total(wide, flat), flat.size)


@every_case
def test_combine(shape, dtype):
    block, _, wide, _ = block_of(shape, dtype)
    c = np.random.default_rng(1).normal(size=shape[0]).astype(np.float32)
    got = jax.jit(kernels.combine)(block, jnp.asarray(c))
    assert got.dtype == jnp.float32
    assert got.shape == shape[1:]
    assert_small(np.asarray(got, np.float64).ravel() - c @ wide, total(wide, c), shape[0])


@every_case
def test_gram(shape, dtype):
    block, _, wide, _ = block_of(shape, dtype)
    got = jax.jit(kernels.gram)(block)
    assert got.dtype == jnp.float32
    assert_small(np.asarray(got, np.float64) - wide @ wide.T, total(wide, wide), wide.shape[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_over_a_mask(shape):
    block, vector, wide, flat = block_of(shape)
    got = jax.jit(kernels.gram)(block, vector > 0)
    kept = wide * (flat > 0)
    assert_small(np.asarray(got, np.float64) - kept @ kept.T, total(wide, wide), wide.shape[1])


@every_case
def test_transform(shape, dtype):
    block, _, wide, _ = block_of(shape, dtype)
    matrix = np.random.default_rng(1).normal(size=(2, shape[0])).astype(np.float32)
    got = jax.jit(kernels.transform)(block, jnp.asarray(matrix))
    assert got.dtype == jnp.float32
    assert got.shape == (2, *shape[1:])
    error = np.asarray(got, np.float64).reshape(2, -1) - matrix @ wide
    assert_small(error, total(wide, matrix), shape[0])


@every_case
@pytest.mark.parametrize("with_matrix", [False, True])
def test_column_square_sums(shape, dtype, with_matrix):
    block, _, wide, _ = block_of(shape, dtype)
    matrix = np.random.default_rng(1).normal(size=(2, shape[0])).astype(np.float32)
    image = matrix @ wide if with_matrix else wide
    got = jax.jit(kernels.column_square_sums)(block, jnp.asarray(matrix) if with_matrix else None)
    assert got.dtype == jnp.float32
    assert got.shape == shape[1:]
    error = np.asarray(got, np.float64).ravel() - np.sum(image**2, axis=0)
    assert_small(error, total(image, image), shape[0])


@every_case
def test_write_row_stores_and_multiplies_what_is_stored(shape, dtype):
    block, _, wide, _ = block_of(shape, dtype)
    new = jnp.asarray(np.random.default_rng(2).normal(size=shape[1:]), jnp.float32)
    row = shape[0] - 1
    out, dots = jax.jit(kernels.write_row)(block, jnp.int32(row), new, jnp.bool_(True))
    assert out.dtype == dtype
    stored = np.asarray(new.astype(dtype), np.float64).ravel()
    wide[row] = stored
    np.testing.assert_array_equal(np.asarray(out, np.float64).reshape(wide.shape), wide)
    assert_small(np.asarray(dots, np.float64) - wide @ stored, total(wide, stored), stored.size)


@every_case
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_refused_row_leaves_the_block_untouched(shape, dtype, bad):
    block, vector, _, _ = block_of(shape, dtype)
    new = jnp.full_like(vector, bad)
    out, _ = jax.jit(kernels.write_row)(block, jnp.int32(0), new, jnp.bool_(False))
    np.testing.assert_array_equal(out, block)


def test_the_large_and_the_small_way_agree(monkeypatch):
    block, vector, wide, flat = block_of((64, 33))
    small = kernels.dots(block, vector)
    monkeypatch.setattr(_scans, "_SMALL_BLOCK", 0)
    large = kernels.dots(block, vector)
    for got in (small, large):
        assert_small(np.asarray(got, np.float64) - wide @ flat, total(wide, flat), flat.size)


@pytest.mark.x64
def test_float64_blocks_stay_in_float64():
    block, vector, wide, flat = block_of((3, TILE + 5), jnp.float64)
    one = jnp.asarray(np.ones((1, 3)))
    np.testing.assert_allclose(kernels.dots(block, vector), wide @ flat, 1e-12)
    np.testing.assert_allclose(kernels.gram(block), wide @ wide.T, 1e-11, 1e-11)
    np.testing.assert_allclose(kernels.combine(block, one[0]), wide.sum(0), 1e-12, 1e-13)
    np.testing.assert_allclose(kernels.transform(block, one)[0], wide.sum(0), 1e-12, 1e-13)
    np.testing.assert_allclose(kernels.column_square_sums(block), (wide**2).sum(0), 1e-12)


OLD_XLA = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="XLA moves the widening of a tile out of the loop"
)


@pytest.mark.parametrize("shape", [(8, 16 * TILE), (8, 64, 2048)])
@pytest.mark.parametrize(
    "scan",
    [
        "dots",
        "combine",
        pytest.param("gram", marks=OLD_XLA),
        pytest.param("column_square_sums", marks=OLD_XLA),
    ],
)
def test_a_low_precision_block_is_not_widened_whole(scan, shape):
    arguments = {
        "dots": (jax.ShapeDtypeStruct(shape[1:], jnp.float32),),
        "combine": (jax.ShapeDtypeStruct(shape[:1], jnp.float32),),
    }
    block = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    lowered = jax.jit(getattr(kernels, scan)).lower(block, *arguments.get(scan, ()))
    # In float32 the block takes 4 MiB, and a tile of it 256 KiB.
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**21


def test_dots_of_correlated_rows_are_as_accurate_as_the_window_needs():
    rng = np.random.default_rng(0)
    rows = (0.9 * rng.normal(size=20_000) + 0.45 * rng.normal(size=(128, 20_000))).astype(
        np.float32
    )
    want = rows.astype(np.float64) @ rows[-1].astype(np.float64)
    got = jax.jit(kernels.dots)(jnp.asarray(rows), jnp.asarray(rows[-1]))
    assert np.mean(np.abs(np.asarray(got, np.float64) / want - 1)) < 1.2e-7
