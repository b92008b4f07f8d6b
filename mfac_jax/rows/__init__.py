"""Gradient rows: how ``m`` gradients of ``d`` entries are stored.

Rows have three capabilities. All rows compute products (:class:`GradientRows`). Some rows can be
written (:class:`WritableRows`). The columns of some rows can be read (:class:`ColumnRows`). An
algorithm requires writing or columns only if it needs them.

A :class:`Storage` makes rows. A new way to store gradients is a new storage with its own class of
rows; nothing else in the library changes.
"""

from mfac_jax._layout import Layout
from mfac_jax.rows._base import ColumnRows, GradientRows, WritableRows, is_small_enough
from mfac_jax.rows._blocks import BlockRows, OutputRows
from mfac_jax.rows._compressed import Compressed, CompressedRows
from mfac_jax.rows._dense import DenseRows
from mfac_jax.rows._int8 import Int8
from mfac_jax.rows._partition import BlockRun, Blocks, Partition, partition
from mfac_jax.rows._stacked import StackedRows
from mfac_jax.rows._storage import Dense, Storage, as_rows, traced_bytes
from mfac_jax.rows._topk import TopK

__all__ = [
    "BlockRows",
    "BlockRun",
    "Blocks",
    "ColumnRows",
    "Compressed",
    "CompressedRows",
    "Dense",
    "DenseRows",
    "GradientRows",
    "Int8",
    "Layout",
    "OutputRows",
    "Partition",
    "StackedRows",
    "Storage",
    "TopK",
    "WritableRows",
    "as_rows",
    "is_small_enough",
    "partition",
    "traced_bytes",
]
