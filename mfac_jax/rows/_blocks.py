"""Rows of one parameter in blocks of its coordinates: every block has products of its own.

A window that has a Gram matrix for each block stores its gradients in such rows. The blocks are
the whole parameter (:class:`WholeRows`) or its outputs, the units of a layer (:class:`OutputRows`).
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from mfac_jax._layout import PyTree
from mfac_jax.kernels._xla import accumulation_dtype, set_row
from mfac_jax.rows._base import WritableRows, is_small_enough


class BlockRows(abc.ABC):
    """``m`` gradients of one parameter in ``k`` blocks; immutable, a pytree that ``jit`` can trace.

    Attributes:
        num_blocks: ``k``.
    """

    num_blocks: int

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The accumulation dtype."""

    def step_bytes(self, platform: str) -> int:  # noqa: ARG002
        """As :meth:`GradientRows.step_bytes`; 0 by default."""
        return 0

    @abc.abstractmethod
    def put(
        self, row: Int[Array, ""], gradient: Float[Array, "..."], accepted: Bool[Array, ""]
    ) -> tuple[BlockRows, Float[Array, "k m"]]:
        """Replaces a row, and multiplies all rows by it, block by block.

        Args:
            row: the row, 0 .. m-1.
            gradient: the new row, an array like the parameter. Zeros are stored in its place if
                the storage cannot hold it.
            accepted: if false, nothing changes and the products have no meaning.

        Returns:
            The new rows, and the products with the stored row in each block.
        """

    @abc.abstractmethod
    def combine(self, coefficients: Float[Array, "k m"]) -> Float[Array, "..."]:
        """``G^T c`` in every block; an array like the parameter, in the accumulation dtype."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeRows(BlockRows):
    """One block: the whole parameter, in the rows of any storage.

    Attributes:
        rows: the rows of the parameter.
    """

    rows: WritableRows
    num_blocks: int = field(metadata={"static": True}, default=1)

    @property
    def dtype(self) -> jnp.dtype:
        return self.rows.dtype

    def step_bytes(self, platform: str) -> int:
        return self.rows.step_bytes(platform)

    def put(
        self, row: Int[Array, ""], gradient: Float[Array, "..."], accepted: Bool[Array, ""]
    ) -> tuple[WholeRows, Float[Array, "1 m"]]:
        # Storage of few bits may reject a gradient that is finite. Zeros then stay in its place. If
        # the row were cleared afterwards, XLA would copy all rows.
        rows = self.rows.clear(jnp.where(accepted, row, self.rows.num_rows))
        bad = jnp.full_like(gradient, jnp.nan)
        rows, dots, stored = rows.put(row, jnp.where(accepted, gradient, bad))
        return replace(self, rows=rows), jnp.where(stored, dots, jnp.zeros_like(dots))[None]

    def combine(self, coefficients: Float[Array, "1 m"]) -> Float[Array, "..."]:
        combined: Array = self.rows.combine(coefficients[0].astype(self.dtype))
        return combined


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputRows(BlockRows):
    """A block for each output of a parameter, or for each of several neighbouring outputs.

    The gradients of an output are a matrix of their own, so all products are one batched product.

    Attributes:
        outputs: the gradients by output, ``(o, m, *rest)`` with the other axes of the parameter.
            They follow its sharding.
        axis: the axis of the outputs in the parameter (static).
        num_blocks: ``k``; it divides ``o`` (static).
    """

    outputs: PyTree
    axis: int = field(metadata={"static": True})
    num_blocks: int = field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        return accumulation_dtype(self.outputs.dtype)

    def put(
        self, row: Int[Array, ""], gradient: Float[Array, "..."], accepted: Bool[Array, ""]
    ) -> tuple[OutputRows, Float[Array, "k m"]]:
        new = jnp.moveaxis(gradient, self.axis, 0).astype(self.outputs.dtype)
        square = jnp.sum(jnp.square(new.astype(self.dtype)))
        new = jnp.where(is_small_enough(square, self.outputs.shape[1]), new, jnp.zeros_like(new))
        outputs = set_row(self.outputs, row, new, accepted)
        dots = self._totals(self._products(outputs, new.astype(self.dtype)))
        return replace(self, outputs=outputs), dots

    def step_bytes(self, platform: str) -> int:
        shape, itemsize = self.outputs.sharding.shard_shape(self.outputs.shape), self.dtype.itemsize
        rows = math.prod(shape) * itemsize
        widened = rows if platform == "cpu" and self.outputs.dtype != self.dtype else 0
        return (3 if platform == "cpu" else 1) * rows // shape[1] + widened

    def _products(
        self, outputs: Shaped[Array, "o m *rest"], vector: Float[Array, "o *rest"]
    ) -> Float[Array, "o m"]:
        """The products of every row with a vector, for each output."""
        axes = tuple(range(2, outputs.ndim))
        if outputs.dtype == self.dtype:
            contract = (axes, tuple(axis - 1 for axis in axes))
            return lax.dot_general(outputs, vector, (contract, ((0,), (0,))), precision="highest")
        # One fused loop, which widens as it reads.
        return jnp.sum(outputs.astype(self.dtype) * vector[:, None], axis=axes)

    def combine(self, coefficients: Float[Array, "k m"]) -> Float[Array, "..."]:
        each = self.outputs.shape[0] // self.num_blocks
        weights = jnp.repeat(coefficients.astype(self.dtype), each, axis=0)
        if self.outputs.dtype == self.dtype:
            contract = (((1,), (1,)), ((0,), (0,)))
            out = lax.dot_general(weights, self.outputs, contract, precision="highest")
        else:
            weights = weights.reshape(weights.shape + (1,) * (self.outputs.ndim - 2))
            out = jnp.sum(self.outputs.astype(self.dtype) * weights, axis=1)
        return jnp.moveaxis(out, 0, self.axis)

    def _totals(self, values: Float[Array, "o *n"]) -> Float[Array, "k *n"]:
        """The sums over the outputs of every block."""
        return jnp.sum(values.reshape(self.num_blocks, -1, *values.shape[1:]), axis=1)


def output_axis(leaf: Any, axis: int) -> int:
    """The axis of the outputs of a parameter, counted from the first.

    Raises:
        ValueError: the parameter has one axis or none, or not this one.
    """
    shape = tuple(jnp.shape(leaf))
    if len(shape) < 2 or not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"expected a parameter of at least two axes with axis {axis}, got {shape}."
        )
    return axis % len(shape)


def number_of_blocks(shape: tuple[int, ...], axis: int, num_rows: int) -> int:
    """The largest number of blocks of outputs whose Gram matrices take no more than the rows.

    A block then has at least ``m`` coordinates.
    """
    outputs, size = shape[axis], math.prod(shape)
    fitting = (k for k in range(outputs, 1, -1) if outputs % k == 0 and size >= k * num_rows)
    return next(fitting, 1)
