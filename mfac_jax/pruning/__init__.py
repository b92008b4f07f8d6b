"""Optimal Brain Surgeon pruning with the Fisher matrix of M-FAC.

Vocabulary. A *mask* is a tree of booleans with the structure of the parameters, true
where a weight is *alive*. *Sparsity* is the fraction of the prunable weights that are
pruned. ``F = lambda I + G^T G / n`` is the Fisher over the alive weights ``w``. Q is the set of
weights to prune, S the set to keep. A change ``delta`` with ``delta_Q = -w_Q`` costs

    1/2 delta^T F delta            (if the gradient is small).

- :func:`prune` does everything: give it a loss, batches and a sparsity. :class:`Scope` says what
  may be pruned, :class:`Gradients` which gradients each step uses, :class:`Search` which settings
  each step tries;
- :func:`prune_step` makes one step, for your own loop. :func:`sparsity_schedule` gives the
  sparsities of several steps, and :func:`step_blocks` the blocks for sums of gradients.
  :func:`sparse` and :func:`set_mask` train between steps;
- :class:`Unstructured`, :class:`NofM`, :class:`BlocksOf` and :class:`Slices` are the patterns;
  :class:`WithinOutputs` cuts the Fisher into blocks;
- :func:`prunable` says which leaves may be pruned; the others never move;
- :func:`saliency`, :func:`obd_saliency` and :func:`magnitude` score weights; the lowest scores
  go first;
- :func:`mask_to_sparsity` and :func:`mask_to_count` turn scores into a mask;
- :func:`joint_update`, :func:`reference_update` and :func:`removal` give ``delta``;
- :func:`save`, :func:`load` and :func:`to_bcoo` export the result.

Your own score or update is a function of a :class:`Problem`, or a :class:`Score` or
:class:`Update` that also says what the function needs. Your own pattern derives from
:class:`Pattern`. Your own budget is a function of the layers' shapes. All trees have the structure
of the parameters. The functions for scores, masks and updates use every leaf they are given.

References: Hassibi, Stork, "Second order derivatives for network pruning: Optimal
Brain Surgeon", NeurIPS 1992. Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free
Approximations of Second-Order Information", NeurIPS 2021, section 4.1.
"""

from mfac_jax.pruning._blocks import WithinOutputs
from mfac_jax.pruning._export import load, save, to_bcoo
from mfac_jax.pruning._filters import prunable
from mfac_jax.pruning._gradients import Gradients
from mfac_jax.pruning._interface import Groups, Pattern
from mfac_jax.pruning._masks import initial_mask, mask_to_count, mask_to_sparsity
from mfac_jax.pruning._patterns import BlocksOf, NofM, Slices, Unstructured
from mfac_jax.pruning._problem import Problem
from mfac_jax.pruning._prune import Pruned, prune
from mfac_jax.pruning._report import LayerReport, PruneReport, StepReport
from mfac_jax.pruning._schedules import sparsity_schedule
from mfac_jax.pruning._scope import Scope
from mfac_jax.pruning._scores import Score, magnitude, obd_saliency, saliency
from mfac_jax.pruning._search import Descent, Search, Setting, Trial, default_settings
from mfac_jax.pruning._sparse import SparseState, set_mask, sparse
from mfac_jax.pruning._step import PruneInfo, prune_step, step_blocks
from mfac_jax.pruning._updates import (
    Update,
    joint_update,
    predicted_loss_increase,
    reference_update,
    removal,
)

__all__ = [
    "BlocksOf",
    "Descent",
    "Gradients",
    "Groups",
    "LayerReport",
    "NofM",
    "Pattern",
    "Problem",
    "PruneInfo",
    "PruneReport",
    "Pruned",
    "Scope",
    "Score",
    "Search",
    "Setting",
    "Slices",
    "SparseState",
    "StepReport",
    "Trial",
    "Unstructured",
    "Update",
    "WithinOutputs",
    "default_settings",
    "initial_mask",
    "joint_update",
    "load",
    "magnitude",
    "mask_to_count",
    "mask_to_sparsity",
    "obd_saliency",
    "predicted_loss_increase",
    "prunable",
    "prune",
    "prune_step",
    "reference_update",
    "removal",
    "saliency",
    "save",
    "set_mask",
    "sparse",
    "sparsity_schedule",
    "step_blocks",
    "to_bcoo",
]
