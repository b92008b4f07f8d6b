"""Gradient rows: the one place that knows how ``m`` gradients of ``d`` entries are kept.

Everything above asks the rows for products and never for the array behind them
(:class:`GradientRows`), so a new way of storing gradients is one new file here.
"""

from mfac_jax.rows._base import GradientRows, Implementation, check_rows
from mfac_jax.rows._create import as_rows, check_storage, empty_rows
from mfac_jax.rows._flat import FlatRows
from mfac_jax.rows._per_leaf import PerLeafRows
from mfac_jax.rows._permuted import PermutedRows
from mfac_jax.rows._selected import SelectedRows
from mfac_jax.rows._transposed import TransposedRows, transposed, transposed_back

__all__ = [
    "FlatRows",
    "GradientRows",
    "Implementation",
    "PerLeafRows",
    "PermutedRows",
    "SelectedRows",
    "TransposedRows",
    "as_rows",
    "check_rows",
    "check_storage",
    "empty_rows",
    "transposed",
    "transposed_back",
]
