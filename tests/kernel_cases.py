"""Blocks at which a kernel can go wrong, and GPU stores that behave as the hardware's do.

A block is ``(t, m, *shape)``. The first ones of a list are those that every run of the
suite takes. Free of the test packages: ``benchmarks/gpu_check.py`` runs them on a GPU.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from jax.experimental.pallas import mosaic_gpu as plgpu

from mfac_jax.kernels._xla import MAX_TILE

_F32, _BF16 = jnp.float32, jnp.bfloat16

XLA = [
    ((1, 5, 33), _F32),  # one tile
    ((1, 3, 2 * MAX_TILE + 37), _F32),  # wider than a tile may be, off the cut
    ((1, 2, 91, 100), _BF16),  # a parameter of several axes
    ((3, 5, 128), _BF16),  # several tiles
    ((2, 300, 24), _F32),  # enough rows for panels
    ((1, 3), _F32),  # a scalar parameter
    ((1, 3, 0), _F32),  # none
    ((1, 1, 7), _F32),  # one row
    ((1, 5, 33), _BF16),
    ((1, 5, 33), jnp.float16),
    ((1, 3, MAX_TILE), _F32),  # the widest that is not cut
    ((1, 3, MAX_TILE), _BF16),
    ((1, 3, 2 * MAX_TILE + 37), _BF16),
    ((1, 4, 3, 5), _F32),
    ((1, 2, 91, 100), _F32),
    ((3, 5, 128), _F32),
    ((2, 4, 3, 5), _F32),  # several tiles of several axes
    ((2, 4, 3, 5), _BF16),
    ((2, 300, 24), _BF16),
    ((2, 513, 24), _F32),  # one row too many to share them out evenly
    ((1, 257, MAX_TILE + 5), _F32),
    ((1, 257, MAX_TILE + 5), _BF16),
]

# In the words of the kernels' module.
MOSAIC_GPU = [
    ((1, 33, 1040), _F32),  # two row blocks, tails of columns and rows
    ((2, 40, 272), _BF16),  # several tiles, a tail of columns at the end of each
    ((1, 32, 2304), _BF16),  # more slabs than one chunk
    ((1, 1, 16), _F32),  # one row, far narrower than a slab
    ((1, 40, 272), _F32),
    ((1, 2, 1040), _BF16),
    ((3, 1, 384), _F32),  # several tiles of one row
    ((3, 5, 384), _F32),  # several tiles of whole slabs
    ((2, 5, 384), _BF16),  # one slab and a half: what a window in bfloat16 may have
    ((2, 3, 48), _F32),  # several narrow ones
]

# In tiles of 32 by 256, to which a test shrinks those of the kernels.
TPU = [
    ((1, 41, 700), _F32),  # tails each way
    ((3, 70, 384), _BF16),  # several tiles, tails
    ((1, 1, 7), _F32),  # less than a tile
    ((2, 64, 512), _F32),  # whole tiles
    ((3, 70, 384), _F32),
    ((1, 3, 33), _BF16),
]

NO_GPU_INTERPRETER = (
    ""
    if hasattr(plgpu, "InterpretGPUParams")
    else f"jax {jax.__version__} has no interpreter for GPU kernels; 0.11.2 has one"
)


def columns(shape):
    """The shape of a vector for a block of this shape."""
    return (shape[0], *shape[2:])


def as_matrix(block):
    """The rows (m, d) of a block, in float64."""
    block = np.moveaxis(np.asarray(block, np.float64), 1, 0)
    return block.reshape(block.shape[0], math.prod(block.shape[1:]))


def as_batch(matrix, size):
    """Blocks (b, n, B) of ``size`` neighbouring columns of a matrix (n, d)."""
    return jnp.moveaxis(jnp.asarray(matrix).reshape(matrix.shape[0], -1, size), 1, 0)


def error_of_allowed(got, terms, axis):
    """The largest error of sums of exact ``terms``, as a part of what rounding explains.

    Rounding is in proportion to the norm of the terms, which tells it from a term left
    out; in proportion to the sum of their sizes it would not in long sums.
    """
    exact = np.sum(terms, axis)
    allowed = oracles.tolerance(np.float32, terms.shape[axis]) * np.linalg.norm(terms, axis=axis)
    error = np.abs(np.asarray(got, np.float64).reshape(exact.shape) - exact)
    return float(np.max(error / np.maximum(allowed, 1e-300), initial=0))


def copy_as_the_hardware_does(monkeypatch):
    """Makes errors of what the interpreter allows and a GPU does not.

    A GPU cuts a contiguous store at the end of the array only, so in a tile that is not
    the last one it would change the next one. Where the rows of a copy from global memory
    do not start at multiples of 16 bytes, its instruction is illegal.
    """
    if NO_GPU_INTERPRETER:
        return
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    store = gpu_callbacks.AsyncCopySmemToGmemTask
    monkeypatch.setattr(store, "clips_out_of_bounds_destination", False)
    fetch = gpu_callbacks.AsyncCopyGmemToSmemTask
    before = fetch.pre_read

    def check(self, tma_thread_id, shared_memory):
        of_array = shared_memory.buffer_shape_and_dtype(self.src_allocation_key)
        itemsize = np.dtype(of_array.dtype).itemsize
        strides = itemsize * np.cumprod([1, *of_array.shape[:0:-1]])[::-1]
        starts = [part if isinstance(part, int) else part.start for part in self.src_access.range]
        if np.any(strides[:-1] % 16) or starts[-1] * itemsize % 16:
            raise IndexError(f"Misaligned copy of [{self.src_access}] from {of_array}")
        before(self, tma_thread_id, shared_memory)

    monkeypatch.setattr(fetch, "pre_read", check)
