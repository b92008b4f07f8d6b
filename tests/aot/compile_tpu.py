"""Compiles every TPU kernel, machine code included, for a TPU that need not be there.

Run it by name, with ``jax[tpu]`` of jax's own version installed::

    pytest tests/aot/compile_tpu.py
"""

import functools
import math

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mfac_jax.kernels import _tpu, _tpu_blocks
from mfac_jax.kernels._xla import MAX_TILE

jax.config.update("jax_platforms", "cpu")  # libtpu compiles; there is no TPU to start


def tiles(m, d):
    """The block that flattened gradients of d parameters are kept in."""
    count = -(-d // MAX_TILE)
    return count, m, -(-d // (128 * count)) * 128


# (t, m, k), storage. All fit the 16 GiB of a v5e.
BLOCKS = {
    "ResNet-20": (tiles(512, 272_474), jnp.float32),
    "ResNet-50": (tiles(64, 25_557_032), jnp.float32),
    "BERT-base": (tiles(16, 110_000_000), jnp.bfloat16),
    "one row": (tiles(1, 1_000_000), jnp.bfloat16),
    "two tiles, 150 rows": (tiles(150, 9_000), jnp.bfloat16),
    "a bias": ((1, 5, 33), jnp.float32),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(scope="session")
def devices():
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    except Exception as error:
        version = jax.__version__
        raise RuntimeError(f"no TPU compiler: pip install 'jax[tpu]=={version}'") from error
    return np.array(topology.devices)


@pytest.fixture
def compile_for_tpu(devices):
    """Compiles a function of arrays with these shapes, laid out as XLA likes."""

    def compile_for_tpu(function, *arguments, **options):
        device = SingleDeviceSharding(devices.flat[0])
        given = [jax.ShapeDtypeStruct(*argument, sharding=device) for argument in arguments]
        return jax.jit(function, **options).lower(*given).compile()

    return compile_for_tpu


def size_in_bytes(shape, dtype):
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def assert_streams(compiled, name, shape, dtype, vectors=0):
    """Fails unless the kernel is there and no more is made for it than float32 vectors."""
    assert name in compiled.as_text()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    row = size_in_bytes((*shape[:-2], shape[-1]), jnp.float32)
    assert temporary <= vectors * row + 2**20
    # One vector is at most an eighth of these blocks, or they are small.
    assert temporary <= max(size_in_bytes(shape, dtype) / 7, 2**20)


def in_one_piece(shape, dtype):
    """A vector as it comes from parameters that were flattened: cut into tiles later."""
    return (shape[0] * shape[2],), dtype


def cut(vector, shape):
    return vector.reshape(shape[0], shape[2])


@every_block
def test_dots(compile_for_tpu, name):
    shape, dtype = BLOCKS[name]

    def dots(block, vector):
        return _tpu.dots(block, cut(vector, shape))

    compiled = compile_for_tpu(dots, (shape, dtype), in_one_piece(shape, jnp.float32))
    assert_streams(compiled, "mfac_dots", shape, dtype)


@every_block
def test_write_row_in_place(compile_for_tpu, name):
    shape, dtype = BLOCKS[name]

    def write_row(block, row, vector, where):
        return _tpu.write_row(block, row, cut(vector, shape), where)

    compiled = compile_for_tpu(
        write_row,
        (shape, dtype),
        ((), jnp.int32),
        in_one_piece(shape, dtype),
        ((), jnp.bool_),
        donate_argnums=0,
    )
    # A bfloat16 vector is widened.
    assert_streams(compiled, "mfac_write_row", shape, dtype, vectors=int(dtype != jnp.float32))
    assert compiled.memory_analysis().alias_size_in_bytes >= size_in_bytes(shape, dtype)


@every_block
def test_combine(compile_for_tpu, name):
    shape, dtype = BLOCKS[name]

    def combine(block, coefficients):
        return _tpu.combine(block, coefficients).reshape(-1)

    compiled = compile_for_tpu(combine, (shape, dtype), (shape[1:2], jnp.float32))
    assert_streams(compiled, "mfac_combine", shape, dtype)


@every_block
def test_combine_with_all_that_it_can_do_at_the_end(compile_for_tpu, name):
    shape, dtype = BLOCKS[name]

    def direction(block, coefficients, vector, scale):
        options = {"vector": cut(vector, shape), "scale": scale}
        return _tpu.combine(block, coefficients, **options).reshape(-1)

    compiled = compile_for_tpu(
        direction,
        (shape, dtype),
        (shape[1:2], jnp.float32),
        in_one_piece(shape, jnp.float32),
        ((), jnp.float32),
    )
    assert_streams(compiled, "mfac_combine", shape, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("n", "size"), [(64, 128), (256, 128), (100, 256), (1024, 256)])
def test_blocks(compile_for_tpu, n, size, dtype):
    """The gradients lie in memory as a matrix; no copy of them is made to cut it into blocks."""
    shape = (n, 272_384)
    damping, vector = ((), jnp.float32), (shape[1:], jnp.float32)

    def diagonal(matrix, damping):
        batch = kernel_cases.as_batch(matrix, size)
        return _tpu_blocks.block_inverse_diagonal(batch, damping).reshape(-1)

    def ihvp(matrix, vector, damping):
        batch = kernel_cases.as_batch(matrix, size)
        return _tpu_blocks.block_ihvp(batch, vector.reshape(-1, size), damping).reshape(-1)

    compiled = compile_for_tpu(diagonal, (shape, dtype), damping)
    assert_streams(compiled, "mfac_block_inverse_diagonal", shape, dtype)
    compiled = compile_for_tpu(ihvp, (shape, dtype), vector, damping)
    assert_streams(compiled, "mfac_block_ihvp", shape, dtype)


def test_four_devices_share_dot_products_only(devices):
    mesh = Mesh(devices.reshape(-1), ("d",), axis_types=(AxisType.Auto,))
    shape = tiles(64, 4_000_000)
    shape = (shape[0] + -shape[0] % 4, *shape[1:])

    @functools.partial(jax.shard_map, in_specs=(P("d"), P("d")), out_specs=P(), mesh=mesh)
    def dots(block, vector):
        return jax.lax.psum(_tpu.dots(block, vector), "d")

    spread = NamedSharding(mesh, P("d"))
    block, vector = (
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=spread) for s in (shape, shape[::2])
    )
    compiled = jax.jit(dots).lower(block, vector).compile()
    part = (shape[0] // 4, *shape[1:])
    assert_streams(compiled, "mfac_dots", part, jnp.float32, vectors=1)
    assert "all-reduce" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()
