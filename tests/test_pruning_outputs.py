"""Blocks of the Fisher within outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import pruning, rows
from mfac_jax._layout import Layout
from mfac_jax.pruning._outputs import cut as cut_blocks
from mfac_jax.pruning._patterns import group


def cut(shapes, most, pattern=pruning.Unstructured(), output_axis=-1):  # noqa: B008
    layout = Layout([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    grouping = group(pattern, layout, [str(i) for i in range(len(shapes))], output_axis)
    return cut_blocks(pruning.WithinOutputs(most), layout, grouping)


@pytest.mark.parametrize(
    ("shapes", "most", "options", "sizes"),
    [
        ([(3, 3, 4, 2)], 144, {}, [36] * 2),
        ([(3, 3, 4, 2)], 18, {}, [18] * 4),
        ([(3, 3, 4, 2)], 17, {}, [12] * 6),
        ([(3, 3, 4, 2)], 100, {"output_axis": 0}, [24] * 3),
        ([(12, 5), (7,)], 6, {}, [6] * 11 + [1]),
        ([(12, 5)], 7, {"pattern": pruning.NofM(2, 4)}, [4] * 15),
        ([(12, 5)], 8, {"pattern": pruning.NofM(2, 4)}, [4] * 15),
        ([(16, 3), (0, 3)], 8, {"pattern": pruning.BlocksOf(4)}, [8] * 6),
        # Inputs that are a prime number cannot be cut evenly.
        ([(31, 2)], 10, {}, [10] * 6 + [2]),
        ([(6, 4)], 4, {"pattern": pruning.BlocksOf(2, axis=-1)}, [4] * 6),
    ],
)
def test_blocks_hold_weights_of_one_output(shapes, most, options, sizes):
    assert list(cut(shapes, most, **options).blocks) == sizes


def test_a_step_within_outputs_is_one_with_the_sizes():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 8, 5)), jnp.float32)}
    gradients = jnp.asarray(oracles.gradients("correlated", 16, 120).reshape(16, 3, 8, 5))
    g = rows.as_rows({"w": gradients}, params)
    mask = pruning.initial_mask(params)
    results = [
        pruning.prune_step(params, mask, g, 0.6, damping=0.01, score="greedy", blocks=blocks)
        for blocks in (pruning.WithinOutputs(12), [12] * 10)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_where_outputs_mean_nothing():
    with pytest.raises(ValueError, match="most must be at least 1"):
        pruning.WithinOutputs(0)
    with pytest.raises(ValueError, match="blocks='leaf'"):
        pruning.prune_step(
            {"w": jnp.ones((4, 4))},
            {"w": jnp.ones((4, 4), bool)},
            rows.as_rows({"w": jnp.ones((2, 4, 4))}),
            0.5,
            damping=0.1,
            pattern=pruning.Slices(),
            blocks=pruning.WithinOutputs(),
        )
