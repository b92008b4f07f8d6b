"""Arrays in place of numbers, in what prunes."""

import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import pruning, rows


@pytest.mark.parametrize("value", [jnp.float32(-1.0), np.float32(0.0), jnp.float32(jnp.nan), -1])
def test_a_damping_that_is_a_known_array(value):
    with pytest.raises(ValueError, match="damping must be finite and greater than 0"):
        pruning.saliency(jnp.ones(3), rows.as_rows(jnp.eye(3)), value)


@pytest.mark.parametrize("value", [jnp.float32(1.5), np.array(-0.5), 2])
def test_sparsity_that_is_a_known_array(value):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\]"):
        pruning.mask_to_sparsity(jnp.ones(4), jnp.ones(4, bool), value)
    half = pruning.mask_to_sparsity(jnp.ones(4), jnp.ones(4, bool), np.array(0.5))
    assert int(half.sum()) == 2
