"""Rows of one parameter in blocks: products and combinations against matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest

from mfac_jax.rows import Dense, OutputRows
from mfac_jax.rows._blocks import number_of_blocks

M = 4


@pytest.mark.parametrize(
    ("shape", "axis", "num_rows", "expected"),
    [
        ((5, 6), -1, 5, 6),  # as many weights as gradients
        ((5, 6), -1, 6, 3),  # two outputs in a block
        ((5, 6), -1, 11, 2),
        ((5, 7), -1, 6, 1),  # 7 has no divisor but itself
        ((5, 6), 0, 6, 5),
        ((3, 3, 2, 8), -1, 16, 8),
        ((2, 2), -1, 64, 1),
        ((0, 3), -1, 2, 1),
        ((3, 0), -1, 2, 1),
    ],
)
def test_number_of_blocks(shape, axis, num_rows, expected):
    assert number_of_blocks(shape, axis, num_rows) == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), [((3, 4), -1), ((4, 3), 0), ((2, 2, 6), -1)])
def test_products_and_combinations_are_those_of_each_block(shape, axis, dtype):
    rows = Dense(dtype).by_output(jax.ShapeDtypeStruct(shape, jnp.float32), M, axis)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(M, *shape)).astype(np.float32)
    put = jax.jit(OutputRows.put)
    for i, gradient in enumerate(gradients):
        rows, dots = put(rows, jnp.int32(i), jnp.asarray(gradient), jnp.bool_(True))
    k = rows.num_blocks
    assert k == number_of_blocks(shape, axis, M) > 1
    stored = np.asarray(jnp.asarray(gradients).astype(dtype), np.float64)
    blocks = np.moveaxis(stored, axis % len(shape) + 1, 0)  # outputs, gradients, rest
    blocks = blocks.reshape(k, -1, M, blocks[0, 0].size).swapaxes(1, 2).reshape(k, M, -1)
    np.testing.assert_allclose(dots, np.einsum("kmb,kb->km", blocks, blocks[:, -1]), rtol=1e-5)
    c = rng.normal(size=(k, M)).astype(np.float32)
    got = np.asarray(rows.combine(jnp.asarray(c)))
    assert got.shape == shape
    want = np.einsum("km,kmb->kb", c, blocks)
    want = want.reshape(shape[axis], -1).reshape(shape[axis], *np.delete(shape, axis % len(shape)))
    np.testing.assert_allclose(got, np.moveaxis(want, 0, axis), rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_accepted_changes_nothing():
    rows = Dense().by_output(jnp.zeros((3, 4)), M, -1)
    rows, _ = rows.put(jnp.int32(1), jnp.ones((3, 4)), jnp.bool_(True))
    same, _ = rows.put(jnp.int32(1), jnp.full((3, 4), jnp.nan), jnp.bool_(False))
    np.testing.assert_array_equal(same.outputs, rows.outputs)


def test_one_that_is_too_large_to_square_leaves_zeros():
    rows = Dense().by_output(jnp.zeros((3, 4)), M, -1)
    rows, dots = rows.put(jnp.int32(1), jnp.full((3, 4), 1e30), jnp.bool_(True))
    assert not np.asarray(rows.outputs).any()
    assert not np.asarray(dots).any()


@pytest.mark.parametrize(("shape", "axis"), [((), 0), ((3,), 0), ((3, 4), 2)])
def test_a_parameter_without_such_an_axis_is_an_error(shape, axis):
    with pytest.raises(ValueError, match="expected a parameter of at least two axes with axis"):
        Dense().by_output(jnp.zeros(shape), M, axis)


def test_a_storage_without_rows_by_output_says_so():
    with pytest.raises(TypeError, match="Half has no rows by output: use another storage"):
        outside.Half().by_output(jnp.zeros((3, 4)), M, -1)
