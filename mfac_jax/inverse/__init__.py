"""The static algorithm: the inverse of the damped Fisher, built once from its gradients.

:func:`fisher_inverse` factors ``F = lambda I + G^T G / n`` and returns an object that
answers, whole or block by block, with the products, entries, determinant and samples
of ``F^-1``; :func:`inverse_diagonal` goes for the diagonal alone, in a tile of memory.
"""

from mfac_jax.inverse._blocks import BlockInverse, block_ihvp, invert_blocks
from mfac_jax.inverse._create import fisher_inverse, inverse_diagonal
from mfac_jax.inverse._map import map_blocks
from mfac_jax.inverse._partition import BlockRun, Blocks, block_runs
from mfac_jax.inverse._whole import WholeInverse

__all__ = [
    "BlockInverse",
    "BlockRun",
    "Blocks",
    "WholeInverse",
    "block_ihvp",
    "block_runs",
    "fisher_inverse",
    "inverse_diagonal",
    "invert_blocks",
    "map_blocks",
]
