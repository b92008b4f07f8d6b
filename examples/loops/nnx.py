"""M-FAC in a Flax NNX loop, with the optimizer in an nnx.Optimizer."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mfac_jax import mfac


class Network(nnx.Module):
    """A network with one hidden layer."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 32, rngs=rngs)
        self.out = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        return self.out(nnx.tanh(self.hidden(x)))


def make_data():
    """Points in the plane, labelled by whether they lie outside a circle."""
    x = jax.random.normal(jax.random.key(0), (512, 2))
    return x, (jnp.sum(x**2, axis=1) > 1.4).astype(jnp.int32)


@nnx.jit
def loss_fn(model, x, y):
    """The mean cross-entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(x), y))


@nnx.jit
def train_step(model, optimizer, x, y):
    """One step of M-FAC."""
    gradients = nnx.grad(loss_fn)(model, x, y)
    optimizer.update(model, gradients)


def main(steps=200, batch_size=64):
    """Trains; returns the loss over all data before and after."""
    x, y = make_data()
    model = Network(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, mfac(learning_rate=0.01, window_size=32), wrt=nnx.Param)
    first = float(loss_fn(model, x, y))
    for step in range(steps):
        batch = jax.random.choice(jax.random.key(step), len(x), (batch_size,))
        train_step(model, optimizer, x[batch], y[batch])
    return first, float(loss_fn(model, x, y))


if __name__ == "__main__":
    print("loss before and after: {:.3f} {:.3f}".format(*main()))
