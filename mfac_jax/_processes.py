"""Whether all processes that share the parameters do the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from mfac_jax._layout import PyTree


class Agreement:
    """Compares what the processes ask for; without effect if each has parameters of its own.

    Without it they would wait for one another for ever, or compute with different data.

    Args:
        params: the parameters.
        num_rows: the number of gradients that this process asks for.

    Raises:
        ValueError: another process asks for another number.
    """

    def __init__(self, params: PyTree, num_rows: int) -> None:
        leaves = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
        self._is_shared = not all(leaf.is_fully_addressable for leaf in leaves)
        counts = self._of_all(num_rows)
        if len(set(counts)) > 1:
            raise ValueError(
                f"all processes must ask for the same number of gradients, got {counts} from "
                f"process 0 to {len(counts) - 1}."
            )

    def watch(self, batches: Iterator[tuple[int, PyTree]]) -> Iterator[tuple[int, PyTree]]:
        """The numbered batches, each compared before it is used.

        Processes with batches of other lengths would run other programs and wait for ever.

        Raises:
            ValueError: one differs between processes.
        """
        is_first = True
        for number, batch in batches:
            if self._is_shared:
                own = _digest(batch, zlib.crc32(str(number).encode()), is_first)
                if len(set(self._of_all(own))) > 1:
                    numbers = self._of_all(number)
                    raise ValueError(
                        "processes that share the parameters must read the same batches in the "
                        f"same order; batches {numbers} of process 0 to {len(numbers) - 1} differ. "
                        "An array over all devices is the same batch whatever its parts: see "
                        "jax.make_array_from_process_local_data."
                    )
                is_first = False
            yield number, batch

    def on(self, tree: PyTree, what: str) -> None:
        """Compares an argument, a tree of arrays, numbers and texts.

        Raises:
            ValueError: it differs between processes.
        """
        if self._is_shared and len(set(self._of_all(_digest(tree, 0, True)))) > 1:
            raise ValueError(f"processes that share the parameters must have the same {what}.")

    def _of_all(self, number: int) -> list[int]:
        if not self._is_shared:
            return [number]
        return multihost_utils.process_allgather(np.uint32(number)).tolist()


def _digest(batch: PyTree, start: int, is_first: bool) -> int:
    """A sum over the shapes of a batch, and over the numbers that each process has for itself.

    Those on a device are read for the first batch only, since the host would wait for them. Arrays
    over all devices count with their shapes.
    """
    for leaf in jax.tree.leaves(batch):
        dtype = getattr(leaf, "dtype", type(leaf))
        start = zlib.crc32(f"{np.shape(leaf)} {dtype}".encode(), start)
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not isinstance(leaf, jax.Array) or (is_first and leaf.is_fully_addressable):
            start = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), start)
    return start
