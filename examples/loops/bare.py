"""M-FAC in a plain training loop: parameters in a dict, one jitted step."""

import jax
import jax.numpy as jnp
import optax

from mfac_jax import mfac


def make_data():
    """Points in the plane, labelled by whether they lie outside a circle."""
    x = jax.random.normal(jax.random.key(0), (512, 2))
    return x, (jnp.sum(x**2, axis=1) > 1.4).astype(jnp.int32)


def make_params(key, hidden=32):
    """A network with one hidden layer."""
    key_1, key_2 = jax.random.split(key)
    return {
        "w1": jax.random.normal(key_1, (2, hidden)),
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(key_2, (hidden, 2)) / hidden**0.5,
    }


def loss_fn(params, x, y):
    """The mean cross-entropy."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def main(steps=200, batch_size=64):
    """Trains; returns the loss over all data before and after."""
    x, y = make_data()
    params = make_params(jax.random.key(1))
    tx = mfac(learning_rate=0.01, window_size=32)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, x, y):
        gradients = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    first = float(loss_fn(params, x, y))
    for step in range(steps):
        batch = jax.random.choice(jax.random.key(step), len(x), (batch_size,))
        params, state = train_step(params, state, x[batch], y[batch])
    return first, float(loss_fn(params, x, y))


if __name__ == "__main__":
    print("loss before and after: {:.3f} {:.3f}".format(*main()))
