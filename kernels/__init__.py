"""The d-sized scans of M-FAC: every operation that touches all of the gradients.

A *block* is an array of ``m`` gradients cut into ``t`` tiles of columns: its shape is
``(t, m, *shape)``. Flattened gradients are cut into tiles of at most :data:`MAX_TILE`
columns, which lie in memory one after another, so that a scan reads it from end to end.
A parameter that has a block to itself is one tile: ``(1, m, *shape)`` with its own shape.

All else in the library works on ``m`` or ``m x m`` numbers, so speed and memory are
decided here and nowhere else. Each function accumulates in float32 at least (float64 for
float64 blocks), never in a reduced-precision matrix-product mode, and is written so that
a low-precision block is widened a part at a time. (XLA for the CPU in jax 0.10 widens it
whole all the same in :func:`gram` and :func:`column_square_sums`.)

:func:`dots`, :func:`write_row` and :func:`combine`, which memory bandwidth limits, have
Pallas kernels for NVIDIA GPUs (H100, H200, B200) and for TPUs; on other devices, for small
blocks, and for all that matrix products limit, XLA's own code runs. So it does for
:func:`block_inverse_diagonal` and :func:`block_ihvp` everywhere but on TPUs.
"""

from mfac_jax.kernels._dispatch import IMPLEMENTATIONS, check_implementation
from mfac_jax.kernels._scans import (
    block_ihvp,
    block_inverse_diagonal,
    combine,
    dots,
    write_row,
)
from mfac_jax.kernels._xla import (
    MAX_TILE,
    accumulation_dtype,
    column_square_sums,
    gram,
    set_row,
    transform,
)

__all__ = [
    "IMPLEMENTATIONS",
    "MAX_TILE",
    "accumulation_dtype",
    "block_ihvp",
    "block_inverse_diagonal",
    "check_implementation",
    "column_square_sums",
    "combine",
    "dots",
    "gram",
    "set_row",
    "transform",
    "write_row",
]
