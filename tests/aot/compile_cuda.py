"""Compiles every kernel for GPUs, machine code included, for an H200 that need not be there.

Run it by name, with the plugin and compiler of CUDA 13 installed::

    pytest tests/aot/compile_cuda.py
"""

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mfac_jax.kernels import _mosaic_gpu

jax.config.update("jax_platforms", "cpu")  # the plugin compiles; there is no GPU to start

TARGET = Path(__file__).parent / "h200.textproto"

# ([t,] m, k), storage. All fit the 141 GB of an H200.
BLOCKS = {
    "ResNet-20": ((34, 512, 8064), jnp.float32),
    "ResNet-20, bfloat16": ((34, 512, 8064), jnp.bfloat16),
    "ResNet-20, m = 1,024": ((1024, 272_480), jnp.float32),
    "ResNet-20, an odd number of rows": ((1023, 272_480), jnp.float32),
    "ResNet-50, m = 64": ((3120, 64, 8192), jnp.float32),
    "ResNet-50, m = 512": ((3120, 512, 8192), jnp.float32),
    "ResNet-50, one tile": ((512, 25_557_040), jnp.float32),
    "BERT-base": ((13_428, 64, 8192), jnp.bfloat16),
    "BERT-base, one tile": ((64, 110_000_000), jnp.bfloat16),
    "one row": ((1, 1_000_000), jnp.float32),
    "one row in tiles": ((1221, 1, 8192), jnp.float32),
    "a vocabulary's bias, padded": ((64, 50_304), jnp.float32),
    "one small leaf": ((5, 48), jnp.bfloat16),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(scope="session")
def mesh():
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=TARGET.read_text(),
            topology="1x1x1",
        )
    except Exception as error:
        version = jax.__version__
        raise RuntimeError(
            f"no compiler for GPUs: pip install jax-cuda13-pjrt=={version} "
            f"jax-cuda13-plugin=={version} nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvrtc "
            "nvidia-cuda-runtime nvidia-cuda-crt"
        ) from error
    return Mesh(np.array(topology.devices), ("x",))


@pytest.fixture
def compile_for_cuda(mesh):
    """Compiles a function of arrays with these shapes, dtypes and, perhaps, specs."""

    def compile_for_cuda(function, *arguments, **options):
        def place(argument):
            shape, dtype, *spec = argument
            sharding = NamedSharding(mesh, P(*spec))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return jax.jit(function, **options).lower(*map(place, arguments)).compile()

    return compile_for_cuda


def columns(shape):
    return (*shape[:-2], shape[-1])


def test_the_kernels_for_blackwell():
    """In a process of its own: one that has compiled for one GPU cannot for another."""
    script = Path(__file__).parent / "blackwell.py"
    subprocess.run([sys.executable, script], check=True, timeout=300)


def size_in_bytes(shape, dtype):
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def assert_streams(compiled, name, shape, dtype):
    """Fails unless the kernel is there and little more is made for it than a copy of a row."""
    assert name in compiled.as_text()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    row = size_in_bytes(columns(shape), jnp.float32)
    assert temporary <= row + 0.005 * size_in_bytes(shape, dtype) + 2**20


@every_block
def test_dots(compile_for_cuda, name):
    shape, dtype = BLOCKS[name]
    compiled = compile_for_cuda(_mosaic_gpu.dots, (shape, dtype), (columns(shape), jnp.float32))
    assert_streams(compiled, "mfac_dots", shape, dtype)


@every_block
def test_combine(compile_for_cuda, name):
    shape, dtype = BLOCKS[name]
    weights = ((shape[-2],), jnp.float32)
    compiled = compile_for_cuda(_mosaic_gpu.combine, (shape, dtype), weights)
    assert_streams(compiled, "mfac_combine", shape, dtype)


@pytest.mark.parametrize("name", ["ResNet-20", "ResNet-20, bfloat16", "ResNet-50, m = 64"])
def test_combine_writes_tiles_where_they_stay(compile_for_cuda, name):
    shape, dtype = BLOCKS[name]
    weights = ((shape[-2],), jnp.float32)
    compiled = compile_for_cuda(_mosaic_gpu.combine, (shape, dtype), weights)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16


def test_an_update_reads_a_combination_before_it_is_cut(compile_for_cuda):
    shape, dtype = BLOCKS["ResNet-20, m = 1,024"]

    def update(params, block, coefficients):
        return params - 0.1 * _mosaic_gpu.combine(block, coefficients)

    arguments = (columns(shape), jnp.float32), (shape, dtype), ((shape[-2],), jnp.float32)
    compiled = compile_for_cuda(update, *arguments)
    # The kernel's output, and no copy of the part of it that counts.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.01 * size_in_bytes(*arguments[0])


@every_block
def test_combine_with_all_that_it_can_do_at_the_end(compile_for_cuda, name):
    shape, dtype = BLOCKS[name]

    def direction(block, coefficients, vector, scale):
        return _mosaic_gpu.combine(block, coefficients, vector=vector, scale=scale)

    arguments = [
        (shape, dtype),
        ((shape[-2],), jnp.float32),
        (columns(shape), jnp.float32),
        ((), jnp.float32),
    ]
    compiled = compile_for_cuda(direction, *arguments)
    assert_streams(compiled, "mfac_combine", shape, dtype)


def assert_in_place(compiled, shape, dtype):
    assert compiled.memory_analysis().alias_size_in_bytes >= size_in_bytes(shape, dtype)
    text = compiled.as_text()
    assert "conditional(" not in text  # it would wait for the host
    assert "while(" not in text


@every_block
def test_write_row_works_in_place(compile_for_cuda, name):
    shape, dtype = BLOCKS[name]
    arguments = [
        (shape, dtype),
        ((), jnp.int32),
        (columns(shape), jnp.float32),
        ((), jnp.bool_),
    ]
    compiled = compile_for_cuda(_mosaic_gpu.write_row, *arguments, donate_argnums=0)
    assert_streams(compiled, "mfac_write_row", shape, dtype)
    assert_in_place(compiled, shape, dtype)


@every_block
@pytest.mark.parametrize("check_vma", [False, True])
def test_write_row_works_in_place_inside_shard_map(compile_for_cuda, mesh, name, check_vma):
    shape, dtype = BLOCKS[name]
    spread, row = P(*[None] * (len(shape) - 1), "x"), P(*[None] * (len(shape) - 2), "x")

    def write(*arguments):
        block, products = _mosaic_gpu.write_row(*arguments)
        return block, jax.lax.psum(products, "x")

    compiled = compile_for_cuda(
        jax.shard_map(
            write,
            mesh=mesh,
            in_specs=(spread, P(), row, P()),
            out_specs=(spread, P()),
            check_vma=check_vma,
        ),
        (shape, dtype, *spread),
        ((), jnp.int32),
        (columns(shape), jnp.float32, *row),
        ((), jnp.bool_),
        donate_argnums=0,
    )
    assert_streams(compiled, "mfac_dots" if check_vma else "mfac_write_row", shape, dtype)
    assert_in_place(compiled, shape, dtype)


def test_a_window_in_a_loop_stays_where_it_is(compile_for_cuda):
    shape, dtype = BLOCKS["ResNet-20"]

    def step(block, x):
        row, vector = x
        block, products = _mosaic_gpu.write_row(block, row, vector, jnp.bool_(True))
        return block, _mosaic_gpu.combine(block, products, vector=vector)

    compiled = compile_for_cuda(
        lambda block, rows, vectors: jax.lax.scan(step, block, (rows, vectors)),
        (shape, dtype),
        ((3,), jnp.int32),
        ((3, *columns(shape)), jnp.float32),
        donate_argnums=0,
    )
    assert_streams(compiled, "mfac_write_row", shape, dtype)
    assert compiled.memory_analysis().alias_size_in_bytes >= size_in_bytes(shape, dtype)
