"""Gradient rows: how ``m`` gradients of ``d`` entries are stored.

Rows have three capabilities. All rows compute products (:class:`GradientRows`). Some rows can be
written (:class:`WritableRows`). The columns of some rows can be read (:class:`ColumnRows`). An
algorithm requires writing or columns only if it needs them. :class:`BlockSums` keep no gradients:
they have no products, and their columns are read block by block.

A :class:`Storage` makes rows. A new way to store gradients is a new storage with its own class of
rows; nothing else in the library changes.
"""

from mfac_jax._layout import Layout
from mfac_jax.rows._base import ColumnRows, GradientRows, WritableRows, is_small_enough
from mfac_jax.rows._block_sums import BlockSums, InBlocks
from mfac_jax.rows._blocks import BlockRows, OutputRows
from mfac_jax.rows._compressed import Compressed, CompressedRows
from mfac_jax.rows._dense import DenseRows
from mfac_jax.rows._files import FileRows, Files
from mfac_jax.rows._int8 import Int8
from mfac_jax.rows._paged import Paged, PagedRows
from mfac_jax.rows._partition import BlockRun, Blocks, Partition, partition
from mfac_jax.rows._stacked import StackedRows
from mfac_jax.rows._storage import Dense, Storage, as_rows, traced_bytes
from mfac_jax.rows._topk import TopK

__all__ = [
    "BlockRows",
    "BlockRun",
    "BlockSums",
    "Blocks",
    "ColumnRows",
    "Compressed",
    "CompressedRows",
    "Dense",
    "DenseRows",
    "FileRows",
    "Files",
    "GradientRows",
    "InBlocks",
    "Int8",
    "Layout",
    "OutputRows",
    "Paged",
    "PagedRows",
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
