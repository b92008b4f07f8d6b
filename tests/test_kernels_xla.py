"""What only XLA's own code does: products of matrices, float64, other row numbers.

The contract that it shares with the kernels is in ``test_kernels.py``.
"""

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import oracles
import pytest
from kernel_cases import as_matrix

from mfac_jax import kernels
from mfac_jax.inverse import _block_products
from mfac_jax.kernels._xla import MAX_TILE as TILE
from mfac_jax.kernels._xla import WIDENS_WHOLE_BLOCKS

row_shape = kernel_cases.columns


def block_of(shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    block = jnp.asarray(rng.normal(size=shape), dtype)
    vector = jnp.asarray(rng.normal(size=row_shape(shape)), dtype)
    return block, vector, as_matrix(block), np.asarray(vector, np.float64).ravel()


# The shapes at which a scan can go wrong, and enough rows for panels of several sizes.
_MORE = [((2, 400, 24), jnp.float32), ((2, 400, 24), jnp.bfloat16)]
_QUICK = 5
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] * (index >= _QUICK))
    for index, case in enumerate([*kernel_cases.XLA, *_MORE])
]
every_case = pytest.mark.parametrize(("shape", "dtype"), CASES)
every_shape = pytest.mark.parametrize(
    "shape", [pytest.param(c.values[0], marks=c.marks) for c in CASES if c.values[1] == jnp.float32]
)


def total(wide, vector):
    """The size of what is added up, against which rounding is measured."""
    return np.linalg.norm(wide) * np.linalg.norm(vector)


def assert_small(error, scale, length):
    assert np.linalg.norm(error) <= oracles.tolerance(np.float32, length) * max(scale, 1e-30)


@every_case
def test_gram(shape, dtype):
    block, _, wide, _ = block_of(shape, dtype)
    got = jax.jit(kernels.gram)(block)
    assert got.dtype == jnp.float32
    assert_small(np.asarray(got, np.float64) - wide @ wide.T, total(wide, wide), wide.shape[1])


@every_shape
def test_gram_over_a_mask(shape):
    block, vector, wide, flat = block_of(shape)
    got = jax.jit(kernels.gram)(block, vector > 0)
    kept = wide * (flat > 0)
    assert_small(np.asarray(got, np.float64) - kept @ kept.T, total(wide, wide), wide.shape[1])


@every_case
def test_transform(shape, dtype):
    block, _, wide, _ = block_of(shape, dtype)
    matrix = np.random.default_rng(1).normal(size=(2, shape[1])).astype(np.float32)
    got = jax.jit(kernels.transform)(block, jnp.asarray(matrix))
    assert got.dtype == jnp.float32
    assert got.shape == (shape[0], 2, *shape[2:])
    assert_small(as_matrix(got) - matrix @ wide, total(wide, matrix), shape[1])


@every_shape
def test_a_lower_triangular_matrix(shape):
    block, _, wide, _ = block_of(shape)
    matrix = np.tril(np.random.default_rng(1).normal(size=(shape[1],) * 2)).astype(np.float32)
    image = matrix @ wide
    got = kernels.transform(block, jnp.asarray(matrix), lower=True)
    assert_small(as_matrix(got) - image, total(wide, matrix), shape[1])
    sums = kernels.column_square_sums(block, jnp.asarray(matrix), lower=True)
    want = np.sum(image**2, axis=0)
    assert_small(np.asarray(sums, np.float64).ravel() - want, total(image, image), shape[1])


@every_case
@pytest.mark.parametrize("with_matrix", [False, True])
def test_column_square_sums(shape, dtype, with_matrix):
    block, _, wide, _ = block_of(shape, dtype)
    matrix = np.random.default_rng(1).normal(size=(2, shape[1])).astype(np.float32)
    image = matrix @ wide if with_matrix else wide
    got = jax.jit(kernels.column_square_sums)(block, jnp.asarray(matrix) if with_matrix else None)
    assert got.dtype == jnp.float32
    assert got.shape == row_shape(shape)
    error = np.asarray(got, np.float64).ravel() - np.sum(image**2, axis=0)
    assert_small(error, total(image, image), shape[1])


def test_combine_returns_the_dtype_asked_for():
    block, _, wide, _ = block_of((1, 3, 5))
    got = kernels.combine(block, jnp.ones(3), dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got[0], np.float64), wide.sum(0), 1e-2, 1e-2)


@pytest.mark.x64
def test_float64_blocks_stay_in_float64():
    block, vector, wide, flat = block_of((1, 3, TILE + 5), jnp.float64)
    one = jnp.asarray(np.ones((1, 3)))
    np.testing.assert_allclose(kernels.dots(block, vector), wide @ flat, 1e-12)
    np.testing.assert_allclose(kernels.gram(block), wide @ wide.T, 1e-11, 1e-11)
    np.testing.assert_allclose(kernels.combine(block, one[0])[0], wide.sum(0), 1e-12, 1e-13)
    np.testing.assert_allclose(kernels.transform(block, one)[0, 0], wide.sum(0), 1e-12, 1e-13)
    np.testing.assert_allclose(kernels.column_square_sums(block)[0], (wide**2).sum(0), 1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (12, 5), (12, 12), (5, 12)])
def test_blocks_on_both_block_inverse(n, size, dtype):
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(3, n, size)), dtype)
    vectors = jnp.asarray(rng.normal(size=(3, size)), jnp.float32)
    inverses = [oracles.inverse(part, 0.1) for part in np.asarray(batch, np.float64)]
    got = _block_products.block_inverse_diagonal(batch, jnp.float32(0.1))
    assert got.dtype == jnp.float32
    want = np.stack([np.diagonal(inverse) for inverse in inverses])
    oracles.assert_close(got, want, length=n, condition=100)
    got = _block_products.block_ihvp(batch, vectors, jnp.float32(0.1))
    want = np.stack([inverse @ v for inverse, v in zip(inverses, vectors, strict=True)])
    oracles.assert_close(got, want, length=n, condition=100)


@pytest.mark.parametrize(("row", "written"), [(-9, 0), (-1, 0), (4, 4), (5, 4), (99, 4)])
def test_rows_out_of_range_are_the_nearest(row, written):
    block, new = jnp.ones((2, 5, 3)), jnp.full((2, 3), 2.0)
    got, dots = kernels.write_row(block, jnp.int32(row), new, jnp.bool_(True))
    np.testing.assert_array_equal(got, block.at[:, written].set(2.0))
    np.testing.assert_array_equal(dots, jnp.full(5, 12.0).at[written].set(24.0))


OLD_XLA = pytest.mark.skipif(
    WIDENS_WHOLE_BLOCKS, reason="XLA moves the widening of a tile out of the loop"
)


@pytest.mark.parametrize("shape", [(1, 8, 16 * TILE), (1, 8, 64, 2048), (16, 8, TILE)])
@pytest.mark.parametrize(
    "scan",
    [
        "dots",
        "combine",
        "write_row",
        pytest.param("gram", marks=OLD_XLA),
        "column_square_sums",
        pytest.param("image_square_sums", marks=OLD_XLA),
    ],
)
def test_a_low_precision_block_is_not_widened_whole(scan, shape):
    arguments = {
        "dots": (jax.ShapeDtypeStruct(row_shape(shape), jnp.float32),),
        "combine": (jax.ShapeDtypeStruct(shape[1:2], jnp.float32),),
        "write_row": (
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct(row_shape(shape), jnp.float32),
            jax.ShapeDtypeStruct((), bool),
        ),
        "image_square_sums": (jax.ShapeDtypeStruct((8, 8), jnp.float32),),
    }
    block = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    donated = 0 if scan == "write_row" else ()
    name = scan.replace("image", "column")
    jitted = jax.jit(getattr(kernels, name), donate_argnums=donated)
    lowered = jitted.lower(block, *arguments.get(scan, ()))
    # In float32 the block takes 4 MiB, and a tile of it 256 KiB.
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**21


def test_dots_of_correlated_rows_are_as_accurate_as_the_window_needs():
    rng = np.random.default_rng(0)
    rows = (0.9 * rng.normal(size=20_000) + 0.45 * rng.normal(size=(128, 20_000))).astype(
        np.float32
    )
    want = rows.astype(np.float64) @ rows[-1].astype(np.float64)
    tiles = rows.reshape(128, 4, 5000)
    got = jax.jit(kernels.dots)(jnp.asarray(np.moveaxis(tiles, 1, 0)), jnp.asarray(tiles[-1]))
    assert np.mean(np.abs(np.asarray(got, np.float64) / want - 1)) < 1.2e-7
