"""The forms that scans take on a GPU without a kernel, run here as well, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, PartitionSpec

from mfac_jax import kernels
from mfac_jax.kernels import _xla

TILE = 8
# (t, m, *shape): one tile and columns left over, parameters of several axes, a scalar one and
# none; more tiles than chunks, as many, fewer, and chunks that do not come out even.
SHAPES = [
    (1, 1, 7),
    (1, 3, TILE),
    (1, 5, 37 * TILE + 3),
    (1, 3, 4, 30),
    (1, 3),
    (1, 3, 0),
    (3, 40, 8),
    (16, 4, 8),
    (37, 5, 2, 4),
]
CASES = [(shape, dtype) for shape in SHAPES for dtype in (jnp.float32, jnp.bfloat16)]
CASES.append(((37, 5, 8), jnp.float16))
every_case = pytest.mark.parametrize(("shape", "dtype"), CASES)


@pytest.fixture(autouse=True)
def _narrow_tiles(monkeypatch):
    """Blocks of many tiles stay small; nothing that is jitted here is jitted elsewhere."""
    monkeypatch.setattr(_xla, "MAX_TILE", TILE)


def made(shape, dtype, rows=None):
    """A block, a mask and a matrix, and the block as float64 of (m, d)."""
    rng = np.random.default_rng(0)
    block = jnp.asarray(rng.normal(size=shape), dtype)
    mask = jnp.asarray(rng.random((shape[0], *shape[2:])) < 0.6)
    matrix = jnp.asarray(rng.normal(size=(rows or 2, shape[1])), jnp.float32)
    return block, mask, matrix, as_matrix(block)


def as_matrix(block):
    wide = np.moveaxis(np.asarray(block, np.float64), 1, 0)
    return wide.reshape(len(wide), -1)


def assert_small(got, want, scale, length):
    assert got.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(got, np.float64) - want)
    assert error <= oracles.tolerance(np.float32, length) * max(scale, 1e-30)


@every_case
@pytest.mark.parametrize("masked", [False, True])
def test_gram(shape, dtype, masked):
    block, mask, _, wide = made(shape, dtype)
    got = jax.jit(_xla.gram_by_chunks)(block, mask if masked else None)
    kept = wide * np.ravel(mask) if masked else wide
    assert_small(got, kept @ kept.T, np.sum(wide**2), wide.shape[1])


@every_case
@pytest.mark.parametrize("masked", [False, True])
def test_products_of_two_blocks(shape, dtype, masked):
    block, mask, _, wide = made(shape, dtype)
    other = jnp.asarray(np.random.default_rng(1).normal(size=(shape[0], 3, *shape[2:])))
    beside = as_matrix(other)
    kept = wide * np.ravel(mask) if masked else wide
    scale = np.linalg.norm(wide) * np.linalg.norm(beside)
    # Functions of this test alone: others are traced with wide tiles.
    for product in (_xla.products_by_chunks, functools.partial(_xla.products)):
        got = jax.jit(product)(block, other, mask if masked else None)
        assert_small(got, kept @ beside.T, scale, wide.shape[1])


@pytest.mark.parametrize(("shape", "dtype"), [case for case in CASES if case[0][0] > 1])
def test_transform(shape, dtype):
    block, _, matrix, wide = made(shape, dtype)
    got = jax.jit(_xla.transform_by_chunks)(block, matrix)
    assert got.shape == (shape[0], 2, *shape[2:])
    scale = np.linalg.norm(wide) * np.linalg.norm(matrix)
    got = jnp.moveaxis(got, 1, 0).reshape(2, -1)
    assert_small(got, np.asarray(matrix, np.float64) @ wide, scale, shape[1])


@every_case
def test_column_square_sums(shape, dtype):
    block, _, matrix, wide = made(shape, dtype, rows=shape[1])
    got = jax.jit(_xla.column_square_sums_by_chunks)(block, matrix)
    assert got.shape == (shape[0], *shape[2:])
    scale = np.sum(wide**2) * np.sum(np.asarray(matrix, np.float64) ** 2)
    want = np.sum((np.asarray(matrix, np.float64) @ wide) ** 2, axis=0)
    assert_small(got.ravel(), want, scale, shape[1])


@every_case
def test_combine(shape, dtype):
    block, _, matrix, wide = made(shape, dtype)
    got = jax.jit(_xla.combine_at_once)(block, matrix[0])
    assert got.shape == (shape[0], *shape[2:])
    scale = np.linalg.norm(wide) * np.linalg.norm(matrix[0])
    assert_small(got.ravel(), np.asarray(matrix[0], np.float64) @ wide, scale, shape[1])


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(3, 40, 8), (1, 5, 4, 30)])
def test_combine_under_vmap(axes, dtype, shape):
    block, _, matrix, wide = made(shape, dtype)
    given = jnp.stack([block, 2 * block]) if axes[0] == 0 else block
    weights = matrix if axes[1] == 0 else matrix[0]
    got = jax.jit(jax.vmap(_xla.combine_at_once, axes))(given, weights)
    assert got.shape == (2, shape[0], *shape[2:])
    factors = np.asarray([1.0, 1.0 if axes[0] is None else 2.0])[:, None]
    rows = np.asarray(matrix if axes[1] == 0 else matrix[:1], np.float64)
    scale = 2 * np.linalg.norm(wide) * np.linalg.norm(rows)
    assert_small(got.reshape(2, -1), factors * (rows @ wide), scale, shape[1])


def test_combine_has_the_derivatives_of_a_product():
    block, _, matrix, wide = made((3, 40, 8), jnp.float32)
    _, pull = jax.vjp(_xla.combine_at_once, block, matrix[0])
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    to_block, to_weights = pull(cotangent)
    flat, weights = (np.ravel(np.asarray(x, np.float64)) for x in (cotangent, matrix[0]))
    assert_small(to_weights, wide @ flat, np.linalg.norm(wide) * np.linalg.norm(flat), 24)
    want = np.outer(weights, flat)
    np.testing.assert_allclose(as_matrix(to_block), want, rtol=1e-6)
    direction = made((3, 40, 8), jnp.float32)[0] + 1
    forward = jax.jvp(_xla.combine_at_once, (block, matrix[0]), (direction, matrix[1]))[1]
    want = weights @ as_matrix(direction) + np.asarray(matrix[1], np.float64) @ wide
    scale = np.linalg.norm(matrix) * (np.linalg.norm(wide) + np.linalg.norm(direction))
    assert_small(forward.ravel(), want, scale, 40)


@pytest.mark.x64
def test_products_of_double_precision():
    block = jnp.asarray(np.random.default_rng(0).normal(size=(19, 4, 8)))
    wide = as_matrix(block)
    np.testing.assert_allclose(_xla.gram_by_chunks(block), wide @ wide.T, rtol=1e-12, atol=1e-12)
    weights = jnp.arange(1.0, 5.0)
    got = _xla.combine_at_once(block, weights).ravel()
    np.testing.assert_allclose(got, np.asarray(weights) @ wide, rtol=1e-12, atol=1e-12)


PRODUCTS = {
    "gram": lambda block: kernels.gram(block),
    "gram over a mask": lambda block: kernels.gram(block, block[:, 0] > 0),
    "gram of two blocks": lambda block: _xla.products(block, 2 * block[:, :2]),
    "transform": lambda block: kernels.transform(block, jnp.eye(block.shape[1])),
    "column square sums": lambda block: kernels.column_square_sums(block, jnp.eye(block.shape[1])),
}
every_product = pytest.mark.parametrize("name", PRODUCTS)


def combine(block):
    return kernels.combine(block, jnp.arange(1.0, 1 + block.shape[1]), implementation="xla")


CHOICES = {**PRODUCTS, "combine": combine}
every_choice = pytest.mark.parametrize("name", CHOICES)


@every_product
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(37, 5, 8), (1, 5, 37 * TILE + 3)])
def test_a_gpu_gets_no_loop(name, shape, dtype):
    block = jax.ShapeDtypeStruct(shape, dtype)
    # Functions of this test alone: others are traced with wide tiles.
    traced = jax.jit(functools.partial(PRODUCTS[name])).trace(block)
    on_gpu, elsewhere = (
        traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu")
    )
    assert "while" not in on_gpu
    assert ("while" in elsewhere) == (shape[0] > 1 or name != "transform")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gpu_combines_all_rows_at_once(dtype):
    block = jax.ShapeDtypeStruct((2, 256, 8), dtype)
    traced = jax.jit(functools.partial(combine)).trace(block)
    on_gpu, elsewhere = (
        traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu")
    )
    of_all_rows = "(tensor<2x256xf32>, tensor<2x256x8xf32>)"
    assert of_all_rows in on_gpu
    assert of_all_rows not in elsewhere
    assert ("dot_general" in elsewhere) == (dtype == jnp.float32)


@every_choice
def test_the_choice_is_transformed_as_either_form(name):
    product = CHOICES[name]
    blocks = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 8)), jnp.float32)
    one_by_one = jnp.stack([product(block) for block in blocks])
    np.testing.assert_allclose(jax.vmap(product)(blocks), one_by_one, rtol=1e-5, atol=1e-5)

    def size(block):
        return jnp.sum(product(block) ** 2)

    direction = blocks[1] / jnp.linalg.norm(blocks[1])
    forward = jax.jvp(size, (blocks[0],), (direction,))[1]
    ahead, back = size(blocks[0] + 1e-2 * direction), size(blocks[0] - 1e-2 * direction)
    np.testing.assert_allclose(forward, (ahead - back) / 2e-2, rtol=1e-2)
    if name != "column square sums":  # whose loop has a length that only a trace knows
        backward = jnp.sum(jax.grad(size)(blocks[0]) * direction)
        np.testing.assert_allclose(backward, forward, rtol=1e-4)


@every_choice
def test_the_choice_runs_inside_shard_map(name):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, None, "x")
    block = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 16)), jnp.float32)

    def on_each(block):
        out = CHOICES[name](block)
        return jax.lax.psum(out, "x") if name.startswith("gram") else out

    columns = PartitionSpec(None, "x")
    out = {"transform": spec, "column square sums": columns, "combine": columns}
    spread = jax.shard_map(
        on_each, mesh=mesh, in_specs=spec, out_specs=out.get(name, PartitionSpec())
    )
    np.testing.assert_allclose(jax.jit(spread)(block), CHOICES[name](block), rtol=1e-5, atol=1e-5)
