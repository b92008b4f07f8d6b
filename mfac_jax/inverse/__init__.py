"""The static algorithm: the inverse of the damped Fisher of given gradients.

:func:`fisher_inverse` returns a :class:`FisherInverse`: the inverse of
``F = lambda I + G^T G / n``, whole or in blocks. It computes products, the diagonal, entries, the
determinant and samples.
"""

from mfac_jax.inverse._base import FisherInverse
from mfac_jax.inverse._groups import GroupBlocks
from mfac_jax.inverse._inverse import fisher_inverse

__all__ = ["FisherInverse", "GroupBlocks", "fisher_inverse"]
