"""The methods of ``prune_networks.py``: settings of ``prune``, and parts of the default changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from prune_tables import DEFAULT, MAGNITUDE, OBD, REFERENCE, REFERENCE_BLOCKS

from mfac_jax import pruning
from mfac_jax.pruning import Setting, WithinOutputs
from mfac_jax.pruning._scores import SCORES

# The damping and the block of the paper's code.
DAMPING, BLOCK = 1e-5, 128
# The pattern, the sparsity and the filter of each; a filter is a method of the network.
PATTERNS: dict[str, tuple[pruning.Pattern, float, str]] = {
    "2:4": (pruning.NofM(2, 4), 0.5, "is_pruned"),
    "1 x 4": (pruning.BlocksOf(4), 0.5, "is_pruned"),
    "channels": (pruning.Slices(), 0.25, "is_channel"),
}


# Arguments of Gradients and of Search, and when statistics are recalibrated beside at the end.
Choice = tuple[dict[str, Any], dict[str, Any], str]
AFTER_STEPS, IN_TRIALS = "after each step", "in each trial"
BARE = "one setting, no history, no descents"


def first_order(factor: float, *, in_mask: bool) -> Setting:
    """The default's first setting with the first-order term of the local model.

    The minimum of ``1/2 delta^T F delta + factor g^T delta`` without pruning is ``u = -factor F^-1
    g``, where g is the mean of the gradients. The term therefore moves the weights by u before
    scores and updates see them. Gradients of earlier steps would enter the mean: use ``history=0``.
    """

    def move(problem: pruning.Problem) -> Any:
        n = problem.rows.num_rows
        mean = problem.rows.combine(jnp.full(n, 1 / n, problem.rows.dtype))
        return jax.tree.map(lambda x: -factor * x, problem.inverse.ihvp(mean))

    def score(problem: pruning.Problem) -> Any:
        moved = copy.copy(problem)
        alive = problem.mask
        moved.weights = jax.tree.map(
            lambda w, u, a: jnp.where(a, w + u, 0), problem.weights, move(problem), alive
        )
        return SCORES["greedy"].function(moved)

    def update(problem: pruning.Problem, kept: Any) -> Any:
        u = move(problem)
        removed = jax.tree.map(
            lambda w, u, k: jnp.where(k | (w == 0), 0, w + u), problem.removed(kept), u, kept
        )
        return jax.tree.map(jnp.add, u, problem.inverse_over(kept).compensate(removed))

    own = pruning.Score(score, reads_columns=True, of_groups=True, check=SCORES["greedy"].check)
    settings = pruning.default_settings()
    return settings[0]._replace(
        score=own if in_mask else "greedy", update=pruning.Update(update, reads_columns=True)
    )


def _defaults(**changes: Any) -> tuple[Setting, ...]:
    first, second, *others = pruning.default_settings()
    return first._replace(**changes), second._replace(**changes), *others


def _times(factor: float) -> tuple[Setting, ...]:
    first, second, *others = pruning.default_settings()
    score = first.damping * factor
    return (
        first._replace(damping=score),
        second._replace(damping=second.damping * factor, score_damping=score),
        *others,
    )


def _with_reference() -> tuple[Setting, ...]:
    return *pruning.default_settings(), setting_of(REFERENCE, None)


def _bare(setting: Setting) -> Choice:
    """One setting and nothing else, to see what a change of it gives."""
    return {"history": 0}, {"settings": [setting], "descents": ()}, ""


def _descents(factor: float) -> Choice:
    """Descents at other rates."""
    own = pruning.Search().descents
    rates = [x._replace(learning_rate=factor * x.learning_rate) for x in own]
    return {}, {"descents": rates}, ""


# The rival's damping is relative to each step's diagonal; here it stays that of the paper.
PAPER_IN_BLOCKS = "reference, blocks, damping 1e-5, 8 x"
# The default with one part changed, for the choice on validation data. The first-order term is
# compared with the bare setting.
CHOICES: dict[str, Callable[[], Choice]] = {
    DEFAULT: lambda: ({}, {}, ""),
    "blocks of 72": lambda: ({}, {"settings": _defaults(blocks=WithinOutputs(72))}, ""),
    "blocks of 288": lambda: ({}, {"settings": _defaults(blocks=WithinOutputs(288))}, ""),
    "a third of the dampings": lambda: ({}, {"settings": _times(1 / 3)}, ""),
    "three times the dampings": lambda: ({}, {"settings": _times(3)}, ""),
    "a mask for each damping": lambda: ({}, {"settings": _defaults(score_damping=None)}, ""),
    "one setting": lambda: ({}, {"settings": pruning.default_settings()[:1]}, ""),
    "the paper's setting as well": lambda: ({}, {"settings": _with_reference()}, ""),
    "no descents": lambda: ({}, {"descents": ()}, ""),
    "no history": lambda: ({"history": 0}, {}, ""),
    "history of three steps": lambda: ({"history": 3}, {}, ""),
    BARE: lambda: _bare(pruning.default_settings()[0]),
    f"{BARE}, first-order term in the update": lambda: _bare(first_order(1 / 32, in_mask=False)),
    f"{BARE}, first-order term in both": lambda: _bare(first_order(1 / 32, in_mask=True)),
    "a third of the descents' rates": lambda: _descents(1 / 3),
    "three times the descents' rates": lambda: _descents(3),
    "one setting, no history": lambda: (
        {"history": 0},
        {"settings": pruning.default_settings()[:1]},
        "",
    ),
    PAPER_IN_BLOCKS: lambda: _bare(Setting("mfac", "reference", BLOCK, DAMPING)),
    f"statistics recalibrated {AFTER_STEPS}": lambda: ({}, {}, AFTER_STEPS),
    f"statistics recalibrated {IN_TRIALS}": lambda: ({}, {}, IN_TRIALS),
}


def setting_of(method: str, damping: float | None) -> Setting:
    """The only setting of a method of the paper or of its own rivals."""
    if method == REFERENCE_BLOCKS:
        assert damping is not None
        return Setting("mfac", "reference", BLOCK, damping, relative=True)
    return {
        MAGNITUDE: Setting("magnitude", "none", None, DAMPING),
        OBD: Setting("obd", "none", None, DAMPING),
        REFERENCE: Setting("mfac", "reference", None, DAMPING),
    }[method]
