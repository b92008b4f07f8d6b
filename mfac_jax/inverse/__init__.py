"""The static algorithm: the inverse of the damped Fisher of given gradients.

:func:`fisher_inverse` makes a :class:`FisherInverse`, which stands for the inverse of
``F = lambda I + G^T G / n``, whole or block by block. It answers products, the diagonal, entries,
the determinant and samples.
"""

from mfac_jax.inverse._groups import GroupBlocks
from mfac_jax.inverse._inverse import FisherInverse, fisher_inverse, is_scanned

__all__ = ["FisherInverse", "GroupBlocks", "fisher_inverse", "is_scanned"]
