"""Rows of one parameter in blocks: products and combinations against matrices."""

import chex
import few_bits
import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest

from mfac_jax import mfac_precondition
from mfac_jax.rows import Dense, Int8, TopK
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


STORAGES = {
    "float32": Dense(jnp.float32),
    "bfloat16": Dense(jnp.bfloat16),
    "int8": Int8(2),
    "largest": TopK(0.3, block=4),
    "largest, 4 bits": TopK(0.6, block=2, error_bits=4),
}


def stored_by(storage, gradients, axis):
    """The gradients as the storage keeps them, each output by itself."""
    if isinstance(storage, Dense):
        return np.asarray(jnp.asarray(gradients).astype(storage.dtype), np.float64)
    outputs = np.moveaxis(gradients, axis % (gradients.ndim - 1) + 1, 1)
    stored = np.empty(outputs.shape)
    for i in range(outputs.shape[1]):
        model = few_bits.Model(storage)
        for each, kept in zip(outputs[:, i], stored[:, i], strict=True):
            kept[...] = model(each.ravel()).reshape(each.shape)
    return np.moveaxis(stored, 1, axis % (gradients.ndim - 1) + 1)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize(("shape", "axis"), [((3, 4), -1), ((4, 3), 0), ((2, 2, 6), -1)])
def test_products_and_combinations_are_those_of_each_block(shape, axis, storage):
    rows = storage.by_output(jax.ShapeDtypeStruct(shape, jnp.float32), M, axis)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(M, *shape)).astype(np.float32)
    put = jax.jit(type(rows).put)
    for i, gradient in enumerate(gradients):
        rows, dots = put(rows, jnp.int32(i), jnp.asarray(gradient), jnp.bool_(True))
    k = rows.num_blocks
    assert k == number_of_blocks(shape, axis, M) > 1
    stored = stored_by(storage, gradients, axis)
    blocks = np.moveaxis(stored, axis % len(shape) + 1, 0)  # outputs, gradients, rest
    blocks = blocks.reshape(k, -1, M, blocks[0, 0].size).swapaxes(1, 2).reshape(k, M, -1)
    np.testing.assert_allclose(dots, np.einsum("kmb,kb->km", blocks, blocks[:, -1]), rtol=1e-5)
    c = rng.normal(size=(k, M)).astype(np.float32)
    got = np.asarray(rows.combine(jnp.asarray(c)))
    assert got.shape == shape
    want = np.einsum("km,kmb->kb", c, blocks)
    want = want.reshape(shape[axis], -1).reshape(shape[axis], *np.delete(shape, axis % len(shape)))
    np.testing.assert_allclose(got, np.moveaxis(want, 0, axis), rtol=1e-5, atol=1e-5)


every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


@every_storage
def test_a_gradient_that_is_not_accepted_changes_nothing(storage):
    rows = storage.by_output(jnp.zeros((3, 4)), M, -1)
    rows, _ = rows.put(jnp.int32(1), jnp.arange(12.0).reshape(3, 4), jnp.bool_(True))
    same, _ = rows.put(jnp.int32(1), jnp.full((3, 4), jnp.nan), jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, same, rows)


@every_storage
def test_one_that_is_too_large_to_square_leaves_zeros(storage):
    rows = storage.by_output(jnp.zeros((3, 4)), M, -1)
    rows, dots = rows.put(jnp.int32(1), jnp.full((3, 4), 1e30), jnp.bool_(True))
    assert not np.asarray(rows.combine(jnp.ones((rows.num_blocks, M)))).any()
    assert not np.asarray(dots).any()
    again, _ = rows.put(jnp.int32(2), jnp.ones((3, 4)), jnp.bool_(True))
    assert np.isfinite(np.asarray(again.combine(jnp.ones((rows.num_blocks, M))))).all()


@every_storage
@pytest.mark.parametrize(("shape", "axis"), [((), 0), ((3,), 0), ((3, 4), 2)])
def test_a_parameter_without_such_an_axis_is_an_error(shape, axis, storage):
    with pytest.raises(ValueError, match="expected a parameter of at least two axes with axis"):
        storage.by_output(jnp.zeros(shape), M, axis)


@pytest.mark.parametrize("storage", [Dense(), Int8(4), TopK(0.5, block=4)])
@pytest.mark.parametrize("blocks", ["output", "output_first"])
def test_a_parameter_without_entries_has_a_direction(storage, blocks):
    params = {"w": jnp.ones((4, 3)), "none": jnp.zeros((3, 0)), "of none": jnp.zeros((0, 3))}
    tx = mfac_precondition(4, damping=0.1, storage=storage, blocks=blocks)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state)
    chex.assert_trees_all_equal_shapes(updates, params)
    assert np.isfinite(updates["w"]).all()


def test_a_storage_without_rows_by_output_says_so():
    with pytest.raises(TypeError, match="Half has no rows by output: use another storage"):
        outside.Half().by_output(jnp.zeros((3, 4)), M, -1)
