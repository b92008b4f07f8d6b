"""The gauge of directions against dense matrices."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import flat

from mfac_jax.gauge import gauge

X = jax.random.normal(jax.random.key(0), (16, 4))
Y = jnp.arange(16, dtype=jnp.int32) % 3
PARAMS = {
    "v": jax.random.normal(jax.random.key(1), (5, 3)),
    "w": jax.random.normal(jax.random.key(2), (4, 5)),
}


def logits(params):
    with jax.default_matmul_precision("highest"):  # some devices round to fewer bits
        return jnp.tanh(X @ params["w"]) @ params["v"]


def loss(z):
    return optax.softmax_cross_entropy_with_integer_labels(z, Y).mean()


def dense():
    """The gradient and the Gauss-Newton matrix, in float64."""
    flat_params, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    jacobian = np.asarray(jax.jacobian(lambda p: logits(unravel(p)).ravel())(flat_params), float)
    z = logits(PARAMS)
    hessian = np.asarray(jax.hessian(lambda z: loss(z.reshape(16, 3)))(z.ravel()), float)
    slopes = np.asarray(jax.grad(loss)(z), float).ravel()
    return jacobian.T @ slopes, jacobian.T @ hessian @ jacobian


def direction(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


def test_every_figure_is_that_of_the_dense_matrix():
    gradient, fisher = dense()
    for seed in range(3):
        d = direction(seed)
        found, v = jax.jit(lambda d: gauge(logits, loss, PARAMS, d))(d), flat(d)
        slope, curvature = v @ gradient, v @ fisher @ v
        want = (np.sqrt(curvature) / abs(slope), slope, curvature, slope / curvature)
        np.testing.assert_allclose(found[:4], want, rtol=1e-4)
        np.testing.assert_allclose(found.best_decrease, slope**2 / (2 * curvature), rtol=1e-4)
        np.testing.assert_allclose(found.best_decrease, 1 / (2 * found.gauge**2), rtol=1e-4)


def test_the_natural_gradient_is_best_and_the_length_does_not_count():
    gradient, fisher = dense()
    _, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    natural = np.linalg.solve(fisher + 1e-6 * np.eye(len(fisher)), gradient)
    best = gauge(logits, loss, PARAMS, unravel(jnp.asarray(natural, jnp.float32)))
    plain = gauge(logits, loss, PARAMS, unravel(jnp.asarray(gradient, jnp.float32)))
    longer = gauge(logits, loss, PARAMS, unravel(jnp.asarray(100 * gradient, jnp.float32)))
    assert best.gauge < plain.gauge
    np.testing.assert_allclose(longer.gauge, plain.gauge, rtol=1e-5)
    np.testing.assert_allclose(best.best_step, 1.0, rtol=0.05)


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_directions_of_any_length(scale):
    one = gauge(logits, loss, PARAMS, direction(0))
    other = gauge(logits, loss, PARAMS, jax.tree.map(lambda x: x * scale, direction(0)))
    np.testing.assert_allclose(other.gauge, one.gauge, rtol=1e-4)
    np.testing.assert_allclose(other.best_decrease, one.best_decrease, rtol=1e-4)
    np.testing.assert_allclose(float(other.best_step) * scale, one.best_step, rtol=1e-4)


def test_a_direction_of_zeros():
    found = gauge(logits, loss, PARAMS, jax.tree.map(jnp.zeros_like, PARAMS))
    assert found.gauge == np.inf
    assert tuple(found)[1:] == (0, 0, 0, 0)


def test_a_direction_that_changes_nothing():
    """All logits shift alike; what is left is rounding."""
    shift = {"v": jnp.ones((5, 3)), "w": jnp.zeros((4, 5))}
    found = gauge(logits, loss, PARAMS, shift)
    assert found.curvature >= 0
    assert found.best_decrease >= 0
    assert not np.isnan(found.gauge)


def test_many_directions_at_once():
    several = jax.tree.map(lambda *x: jnp.stack(x), *[direction(seed) for seed in range(3)])
    found = jax.vmap(lambda d: gauge(logits, loss, PARAMS, d))(several)
    for seed in range(3):
        one = gauge(logits, loss, PARAMS, direction(seed))
        np.testing.assert_allclose(found.gauge[seed], one.gauge, rtol=1e-5)


def test_low_precision_is_accumulated_in_float32():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)

    def outputs(p):
        hidden = jnp.tanh(X.astype(jnp.bfloat16) @ p["w"])
        return (hidden @ p["v"]).astype(jnp.float32)

    want = gauge(logits, loss, PARAMS, direction(0))
    for dtype in (jnp.float32, jnp.bfloat16):
        own = jax.tree.map(lambda x: x.astype(dtype), direction(0))  # noqa: B023
        found = gauge(outputs, loss, half, own)
        assert found.gauge.dtype == jnp.float32
        np.testing.assert_allclose(found.curvature, want.curvature, rtol=0.1)


def test_a_wrong_direction_is_refused():
    with pytest.raises(ValueError, match=r"direction\['w'\] has the wrong shape"):
        gauge(logits, loss, PARAMS, PARAMS | {"w": jnp.ones(3)})
