"""Compiles the products of all gradients for an H200: no loop of the host, little memory.

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
