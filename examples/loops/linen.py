"""M-FAC in a Flax Linen loop, with the optimizer in a TrainState."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from mfac_jax import mfac


class Network(nn.Module):
    """A network with one hidden layer."""

    @nn.compact
    def __call__(self, x):
        """The logits."""
        return nn.Dense(2)(nn.tanh(nn.Dense(32)(x)))


def make_data():
    """Points in the plane, labelled by whether they lie outside a circle."""
    x = jax.random.normal(jax.random.key(0), (512, 2))
    return x, (jnp.sum(x**2, axis=1) > 1.4).astype(jnp.int32)


@jax.jit
def loss_fn(params, state, x, y):
    """The mean cross-entropy."""
    logits = state.apply_fn({"params": params}, x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


@jax.jit
def train_step(state, x, y):
    """One step of M-FAC."""
    gradients = jax.grad(loss_fn)(state.params, state, x, y)
    return state.apply_gradients(grads=gradients)


def main(steps=200, batch_size=64):
    """Trains; returns the loss over all data before and after."""
    x, y = make_data()
    model = Network()
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(1), x)["params"],
        tx=mfac(learning_rate=0.01, window_size=32),
    )
    first = float(loss_fn(state.params, state, x, y))
    for step in range(steps):
        batch = jax.random.choice(jax.random.key(step), len(x), (batch_size,))
        state = train_step(state, x[batch], y[batch])
    return first, float(loss_fn(state.params, state, x, y))


if __name__ == "__main__":
    print("loss before and after: {:.3f} {:.3f}".format(*main()))
