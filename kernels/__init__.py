"""The d-sized scans of M-FAC: every operation that touches all of the gradients.

A *block* is an array of ``m`` gradients, one a row: shape ``(m, *shape)``, where
``shape`` is ``(d,)`` for flattened gradients or the shape of one parameter. All
else in the library works on ``m`` or ``m x m`` numbers, so speed and memory are
decided here and nowhere else.

Each function accumulates in float32 at least (float64 for float64 blocks), never
in a reduced-precision matrix-product mode, and reads a low-precision block
without making a wide copy of it.
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
