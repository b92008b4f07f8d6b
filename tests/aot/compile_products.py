"""Compiles the plain form of all scans for an H200: no loop of the host, little memory.

Run it by name, in an environment that ``compile_cuda.py`` can use.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from mfac_jax import kernels

jax.config.update("jax_platforms", "cpu")

H200 = Path(__file__).parent / "h200.textproto"
BLOCKS = {
    "ResNet-20": ((34, 512, 8064), jnp.float32),
    "ResNet-20, bfloat16": ((34, 512, 8064), jnp.bfloat16),
    "ResNet-50, m = 64": ((3120, 64, 8192), jnp.float32),
    "ResNet-50, m = 512": ((3120, 512, 8192), jnp.float32),
    "ResNet-50, m = 512, bfloat16": ((3120, 512, 8192), jnp.bfloat16),
    "a convolution": ((1, 512, 3, 3, 512, 512), jnp.float32),
    "ResNet-50, one tile": ((1, 64, 25_557_032), jnp.float32),
}
# For the scans that memory bandwidth limits.
SCANNED = {
    "ResNet-20": BLOCKS["ResNet-20"],
    "ResNet-20, bfloat16": BLOCKS["ResNet-20, bfloat16"],
    "ResNet-50, m = 64": BLOCKS["ResNet-50, m = 64"],
    "ResNet-20, one tile": ((1, 512, 272_474), jnp.float32),
    "a small convolution": ((1, 64, 3, 3, 64, 64), jnp.float32),
    "a small convolution, bfloat16": ((1, 64, 3, 3, 64, 64), jnp.bfloat16),
}
BATCH = 4


@pytest.fixture(scope="module")
def sharding():
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200.read_text(), topology="1x1x1"
    )
    return SingleDeviceSharding(topology.devices[0])


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("product", ["gram", "gram over a mask", "transform", "square sums"])
def test_few_products_and_little_memory(sharding, product, name):
    shape, dtype = BLOCKS[name]
    place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    block, matrix = place(shape, dtype), place((shape[1], shape[1]), jnp.float32)
    mask = place((shape[0], *shape[2:]), bool)
    function, arguments = {
        "gram": (kernels.gram, (block,)),
        "gram over a mask": (kernels.gram, (block, mask)),
        "transform": (kernels.transform, (block, matrix)),
        "square sums": (kernels.column_square_sums, (block, matrix)),
    }[product]
    compiled = jax.jit(function).lower(*arguments).compile()
    assert "while(" not in compiled.as_text()
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * size


def assert_no_copy(compiled, vector):
    """Fails if there is a loop, or more is made on the way than a few vectors."""
    assert "while(" not in compiled.as_text()
    size = math.prod(vector.shape) * vector.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * size


@pytest.fixture(params=SCANNED)
def scanned(request, sharding):
    """A block, a vector and coefficients; each without its batch, or with one."""
    shape, dtype = SCANNED[request.param]
    shapes = {"block": shape, "vector": (shape[0], *shape[2:]), "coefficients": shape[1:2]}

    def place(name, *batch):
        wide = dtype if name == "block" else jnp.float32
        return jax.ShapeDtypeStruct((*batch, *shapes[name]), wide, sharding=sharding)

    return place


def scan_of(name):
    """The plain form of a scan, and what it takes beside the block."""
    other = {"dots": "vector", "combine": "coefficients"}[name]
    return functools.partial(getattr(kernels, name), implementation="xla"), other


@pytest.mark.parametrize("scan", ["dots", "combine"])
def test_the_plain_form_of_a_scan_copies_no_block(scanned, scan):
    function, other = scan_of(scan)
    compiled = jax.jit(function).lower(scanned("block"), scanned(other)).compile()
    assert_no_copy(compiled, scanned("vector"))


@pytest.mark.parametrize("scan", ["dots", "combine"])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_nor_does_it_under_vmap(scanned, scan, axes):
    function, other = scan_of(scan)
    arguments = [
        scanned(name, *[BATCH] * (axis == 0))
        for name, axis in zip(("block", other), axes, strict=True)
    ]
    compiled = jax.jit(jax.vmap(function, axes)).lower(*arguments).compile()
    assert_no_copy(compiled, scanned("vector", BATCH))


def test_a_combination_with_all_that_comes_after_copies_no_block(scanned, sharding):
    def direction(block, coefficients, vector, scale):
        extra = {"vector": vector, "scale": scale, "dtype": jnp.bfloat16}
        return kernels.combine(block, coefficients, implementation="xla", **extra)

    vector = scanned("vector")
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)
    arguments = scanned("block"), scanned("coefficients"), vector, scale
    assert_no_copy(jax.jit(direction).lower(*arguments).compile(), vector)


def test_a_row_is_written_in_place(scanned, sharding):
    write = functools.partial(kernels.write_row, implementation="xla")
    row, where = (jax.ShapeDtypeStruct((), d, sharding=sharding) for d in (jnp.int32, bool))
    block, vector = scanned("block"), scanned("vector")
    compiled = jax.jit(write, donate_argnums=0).lower(block, row, vector, where).compile()
    assert_no_copy(compiled, vector)
    size = math.prod(block.shape) * block.dtype.itemsize
    assert compiled.memory_analysis().alias_size_in_bytes >= size
