"""The d-sized scans of M-FAC: every operation that touches all of the gradients.

A *block* is an array of ``m`` gradients, cut into ``t`` tiles of columns; its shape is
``(t, m, *shape)``. Flattened gradients are cut into tiles of at most 8,192
columns. The tiles lie in memory one after another, so a scan reads memory from end to end.
The block of a single parameter is one tile with the shape of the parameter: ``(1, m, *shape)``.

Everything else in the library works on ``m`` or ``m x m`` numbers, so these functions decide
speed and memory. Each accumulates in float32 at least (float64 for float64 blocks), never in a
reduced-precision matrix product. Each widens a low-precision block part by part. (XLA for
the CPU in jax 0.10 still widens the whole block in :func:`gram` and
:func:`column_square_sums`.)

Memory bandwidth limits :func:`dots`, :func:`write_row` and :func:`combine`. They have Pallas
kernels for NVIDIA GPUs (H100, H200, B200) and for TPUs. XLA's own code runs on other devices and
for small blocks. It also runs every operation that matrix products limit.
:func:`block_inverse_diagonal` and :func:`block_ihvp` have kernels for TPUs. Their plain forms
are algebra; the caller passes them.

:mod:`mfac_jax.kernels.backends` lists the kernels of each platform and registers new ones.
"""

from mfac_jax.kernels._scans import (
    block_ihvp,
    block_inverse_diagonal,
    combine,
    dots,
    write_row,
)
from mfac_jax.kernels._xla import column_square_sums, gram, transform

__all__ = [
    "block_ihvp",
    "block_inverse_diagonal",
    "column_square_sums",
    "combine",
    "dots",
    "gram",
    "transform",
    "write_row",
]
