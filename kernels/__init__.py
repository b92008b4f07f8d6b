"""The d-sized scans of M-FAC: every operation that touches all of the gradients.

A *block* is an array of ``m`` gradients, one a row: shape ``(m, *shape)``, where
``shape`` is ``(d,)`` for flattened gradients or the shape of one parameter. All
else in the library works on ``m`` or ``m x m`` numbers, so speed and memory are
decided here and nowhere else.

Each function accumulates in float32 at least (float64 for float64 blocks), never
in a reduced-precision matrix-product mode, and is written so that a low-precision
block is widened a part at a time. (XLA for the CPU in jax 0.10 widens it whole all
the same in :func:`gram`, :func:`column_square_sums` and :func:`write_row`.)
"""

from mfac_jax.kernels._scans import (
    accumulation_dtype,
    column_square_sums,
    combine,
    dots,
    gram,
    transform,
    write_row,
)

__all__ = [
    "accumulation_dtype",
    "column_square_sums",
    "combine",
    "dots",
    "gram",
    "transform",
    "write_row",
]
