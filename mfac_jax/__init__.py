"""M-FAC in JAX: second-order information at first-order cost."""

from mfac_jax import (
    algebra,
    gradients,
    incremental,
    inverse,
    kernels,
    optimizer,
    planning,
    pruning,
    reference,
    rows,
    window,
)
from mfac_jax.gradients import collect_gradients
from mfac_jax.inverse import fisher_inverse
from mfac_jax.optimizer import mfac, mfac_precondition, mfacw, natural_gradient
from mfac_jax.planning import plan

__version__ = "0.2.0"

__all__ = [
    "__version__",
    "algebra",
    "collect_gradients",
    "fisher_inverse",
    "gradients",
    "incremental",
    "inverse",
    "kernels",
    "mfac",
    "mfac_precondition",
    "mfacw",
    "natural_gradient",
    "optimizer",
    "plan",
    "planning",
    "pruning",
    "reference",
    "rows",
    "window",
]
