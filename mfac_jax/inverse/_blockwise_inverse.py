"""The inverse in blocks, each inverted on its cheaper side (:mod:`mfac_jax.inverse._factored`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mfac_jax._layout import PyTree
from mfac_jax.inverse import _block_functions as of_blocks
from mfac_jax.inverse import _stored, _whole_algebra
from mfac_jax.inverse._base import FisherInverse
from mfac_jax.inverse._block_products import block_ihvp, block_inverse_diagonal
from mfac_jax.inverse._coordinates import Pairs
from mfac_jax.inverse._factored import Inverted, invert_blocks
from mfac_jax.rows import Partition
from mfac_jax.rows._base import check_products


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockwiseInverse(FisherInverse):
    """:class:`FisherInverse` in blocks; each call inverts them unless :meth:`whiten` has.

    Attributes:
        inverted: the inverses of the blocks, run by run; None until :meth:`whiten` stores them.
    """

    inverted: tuple[Inverted, ...] | None = None

    @property
    def is_whole(self) -> bool:
        return False

    def _ihvp(self, tree: PyTree) -> PyTree:
        return self._call("apply", tree, alone=block_ihvp)

    def _combination(self, a: Float[Array, " n"]) -> PyTree:
        check_products(self.rows, "combination")
        combination = self._implemented(of_blocks.combination)
        return self._map("combination", self.blocks, combination, constants=(a,))

    def _compensate(self, tree: PyTree) -> PyTree:
        masks = () if self.mask is None else (self.mask,)
        return self._columns("compensate").map_blocks(
            self.blocks,
            self._implemented(of_blocks.compensate),
            *masks,
            tree,
            constants=(self.damping,),
        )

    def diagonal(self) -> PyTree:
        found = self._call("diagonal", alone=block_inverse_diagonal)
        return _whole_algebra.filled(found, self.damping)

    def _group_blocks(
        self, groups: Any, function: Callable[..., Any], vectors: tuple[PyTree, ...], constants: Any
    ) -> Any:
        if isinstance(groups, Partition):
            raise TypeError(
                "groups of an inverse in blocks must be an int or None, got a Partition."
            )
        self._neighbours(groups)
        in_blocks = of_blocks.GroupsInBlocks(function, len(vectors), groups)
        return self._map("group_blocks", self.blocks, in_blocks, *vectors, constants=constants)

    def _entries(self, pairs: Pairs) -> Float[Array, "..."]:
        return _stored.entries(self._inverses(), self.blocks, self.damping, pairs)

    def _quadratic_form(self, tree: PyTree) -> Float[Array, ""]:
        return jnp.sum(self._call("quadratic_form", tree))

    def log_det(self) -> Float[Array, ""]:
        layout = self.rows.layout
        everywhere = layout.unflatten(jnp.ones(layout.size, bool))
        return jnp.sum(self._call("log_det", everywhere))

    def _sample(self, noise: PyTree, key: Key[Array, ""]) -> PyTree:
        layout = self.rows.layout
        # A block of B > n coordinates needs n more numbers; it gets B.
        inner = jax.random.normal(key, (layout.size,), self.rows.dtype)
        return self._call("sample", noise, layout.unflatten(inner))

    def whiten(self) -> BlockwiseInverse:
        return replace(self, inverted=self._inverses())

    def _inverses(self) -> tuple[Inverted, ...]:
        """The inverses of all blocks: the stored ones, or new ones."""
        if self.inverted is not None:
            return self.inverted
        if self.blocks.order is not None:
            raise ValueError(
                "inverses are stored for blocks of consecutive coordinates only, got a "
                "partition with an order."
            )
        found: tuple[Inverted, ...] = self._map(
            "storing the inverses", self.blocks, invert_blocks, by_run=True
        )
        return found

    def _call(self, method: str, *vectors: PyTree, alone: Callable[..., Any] | None = None) -> Any:
        """Calls a method of inverted blocks on all blocks.

        Args:
            method: the name of the method.
            vectors: trees whose parts are the arguments of the method.
            alone: a function of the gradients with the same result. It is used if no inverses
                are stored.
        """
        if self.inverted:
            stored = self.inverted, self.blocks, self.rows.layout
            return _stored.call(*stored, vectors, method=method, dtype=self.rows.dtype)
        function = of_blocks.MethodOfInverse(method) if alone is None else self._implemented(alone)
        return self._map(method, self.blocks, function, *vectors)

    def _implemented(self, function: Callable[..., Any]) -> of_blocks.WithImplementation:
        return of_blocks.WithImplementation(function, self.rows.implementation)
