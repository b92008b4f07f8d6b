"""The alternatives to the library: plain XLA, and the paper's sequential recursions.

Every function works on a plain ``(m, d)`` matrix of gradients. The recursions are those of
:mod:`mfac_jax.reference`; ``torch_recursions.py`` has them in PyTorch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from mfac_jax import reference


def plain_dots(gradients: jax.Array, vector: jax.Array) -> jax.Array:
    """``G v``."""
    vector = vector.astype(gradients.dtype)
    return jnp.dot(gradients, vector, precision="highest", preferred_element_type=jnp.float32)


def plain_combine(gradients: jax.Array, coefficients: jax.Array) -> jax.Array:
    """``G^T c``."""
    c = coefficients.astype(gradients.dtype)
    return jnp.dot(c, gradients, precision="highest", preferred_element_type=jnp.float32)


def plain_push(
    gradients: jax.Array, slot: jax.Array, vector: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes a row and returns it with the new row of ``K``."""
    gradients = gradients.at[slot].set(vector.astype(gradients.dtype))
    return gradients, plain_dots(gradients, vector)


def plain_gram(gradients: jax.Array) -> jax.Array:
    """``G G^T``."""
    return jnp.dot(gradients, gradients.T, precision="highest")


def plain_whiten(gradients: jax.Array, inverse_factor: jax.Array) -> jax.Array:
    """``L^-1 G`` as one product: faster than a triangular solve with ``G``."""
    return jnp.dot(inverse_factor, gradients, precision="highest")


def plain_static(gradients: jax.Array, damping: float) -> jax.Array:
    """``W = L^-1 G``."""
    n = gradients.shape[0]
    eye = jnp.eye(n, dtype=gradients.dtype)
    lower = jnp.linalg.cholesky(plain_gram(gradients) + n * damping * eye)
    return plain_whiten(gradients, solve_triangular(lower, eye, lower=True))


def plain_diagonal(gradients: jax.Array, damping: float) -> jax.Array:
    """``diag(F^-1)`` from ``W``."""
    return (1 - jnp.sum(plain_static(gradients, damping) ** 2, axis=0)) / damping


def plain_block_static(gradients: jax.Array, damping: float, size: int) -> jax.Array:
    """``L^-1`` of every block ``lambda I + G_b^T G_b / n``; (b, B, B)."""
    blocks = cut(gradients, size)
    eye = jnp.eye(size, dtype=gradients.dtype)
    fisher = jnp.einsum("bni,bnj->bij", blocks, blocks, precision="highest") / blocks.shape[1]
    lower = jnp.linalg.cholesky(fisher + damping * eye[None])
    return solve_triangular(lower, jnp.broadcast_to(eye, lower.shape), lower=True)


def plain_block_diagonal(gradients: jax.Array, damping: float, size: int) -> jax.Array:
    """``diag(F^-1)`` of the block-diagonal ``F``."""
    root = plain_block_static(gradients, damping, size)
    return jnp.sum(root * root, axis=1).reshape(-1)[: gradients.shape[1]]


def sequential_static(gradients: jax.Array, damping: float) -> reference.Recursion:
    """The paper's static recursion (equations 3 to 6)."""
    return reference.static_recursion(gradients, damping)


def sequential_blocks(gradients: jax.Array, damping: float, size: int) -> reference.Recursion:
    """The recursion of every block; each step handles all blocks."""
    return jax.vmap(lambda g: reference.static_recursion(g, damping))(cut(gradients, size))


def sequential_block_by_block(
    gradients: jax.Array, damping: float, size: int
) -> reference.Recursion:
    """The recursion of one block after another. A block fits into a CPU's cache."""
    return lax.map(lambda g: reference.static_recursion(g, damping), cut(gradients, size))


def sequential_push_direction(
    gradients: jax.Array, dots: jax.Array, slot: jax.Array, vector: jax.Array, damping: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A step of the paper's dynamic algorithm: the gradients, dot products and direction."""
    gradients, row = plain_push(gradients, slot, vector)
    dots = dots.at[slot].set(row).at[:, slot].set(row)
    coefficients = reference.dynamic_coefficients(dots, damping)
    return gradients, dots, reference.dynamic_direction(gradients, dots, coefficients, slot)


def cut(gradients: jax.Array, size: int) -> jax.Array:
    """Blocks of ``size`` columns, the last one padded with zeros; (b, n, B)."""
    n, d = gradients.shape
    padded = jnp.pad(gradients, ((0, 0), (0, -d % size)))
    return jnp.moveaxis(padded.reshape(n, -1, size), 1, 0)
