"""Optimizers for optax.

- :func:`mfac_precondition` turns gradients into M-FAC directions: the paper's algorithm, and with
  its options a metric, momentum, lengths and blocks;
- :func:`mfac` is the paper's optimizer; :func:`mfacw` takes the place of ``optax.adamw``;
- :func:`natural_gradient` is for problems whose rows all belong to the current step: least squares,
  physics-informed networks, variational Monte Carlo.
"""

from mfac_jax.optimizer._direction import ByAge, ByValue, Direction, Held, UnitNorm, Weights
from mfac_jax.optimizer._metric import Diagonal, Metric, SecondMoments, SecondMomentsState
from mfac_jax.optimizer._natural import NaturalGradientState, natural_gradient
from mfac_jax.optimizer._precondition import (
    MfacState,
    mfac_precondition,
)
from mfac_jax.optimizer._ready import mfac, mfacw
from mfac_jax.optimizer._windows import BlockWindows

__all__ = [
    "BlockWindows",
    "ByAge",
    "ByValue",
    "Diagonal",
    "Direction",
    "Held",
    "Metric",
    "MfacState",
    "NaturalGradientState",
    "SecondMoments",
    "SecondMomentsState",
    "UnitNorm",
    "Weights",
    "mfac",
    "mfac_precondition",
    "mfacw",
    "natural_gradient",
]
