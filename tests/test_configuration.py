"""The strictness that the other tests rely on is in force."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from mfac_jax import algebra


def test_shapes_and_dtypes_are_checked_at_run_time():
    with pytest.raises(jaxtyping.TypeCheckError):
        algebra.factor(jnp.zeros(3), jnp.ones(()))


@pytest.mark.wrong_types
def test_wrong_types_mark():
    with pytest.raises(ValueError, match="at least two dimensions"):
        algebra.factor(jnp.zeros(()), jnp.ones(()))


def test_mixed_dtypes_raise():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)


@pytest.mark.jax_defaults
def test_jax_defaults_mark():
    total = jnp.ones((2, 2), jnp.float32) + jnp.ones(2, jnp.bfloat16)
    assert total.dtype == jnp.float32


@pytest.mark.x64
def test_x64_mark():
    assert jnp.ones(2).dtype == jnp.float64


def test_single_precision_is_the_default():
    assert jnp.ones(2).dtype == jnp.float32


def test_there_are_several_devices():
    assert len(jax.devices("cpu")) == 4
