"""A storage: a value that says how gradients are stored and makes the rows."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mfac_jax import _checks, _memory
from mfac_jax._layout import Layout, PyTree
from mfac_jax.kernels._xla import MAX_TILE, WIDENS_WHOLE_BLOCKS
from mfac_jax.kernels.backends import check_implementation
from mfac_jax.rows._base import ROWS_AT_A_TIME, GradientRows, WritableRows, check_writable
from mfac_jax.rows._blocks import BlockRows, OutputRows, number_of_blocks, output_axis
from mfac_jax.rows._dense import DenseRows, tiles_of, tiling
from mfac_jax.rows._partition import Partition
from mfac_jax.rows._room import require_room, require_room_of

PACKINGS = ("flat", "leaf")
DTYPES = ("float32", "bfloat16", "float64")

# Packings by name, for the error if a name is passed as a storage.
_PACKINGS_BY_NAME = {"flat": "flat", "leaf": "leaf", "per_leaf": "leaf"}


class Storage(abc.ABC):
    """A way to store gradients: a small immutable value that makes rows.

    Every entry point that stores gradients takes a storage as ``storage=``.
    """

    @abc.abstractmethod
    def empty(self, params: PyTree, num_rows: int) -> WritableRows:
        """``num_rows`` zero rows for gradients of ``params``.

        Args:
            params: the parameters, or a tree of ``jax.ShapeDtypeStruct``: a storage reads
                shapes and dtypes only, and a sharding if there is one.
            num_rows: ``m``, at least 1.
        """

    def resume(
        self,
        params: PyTree,
        num_rows: int,
        origin: Callable[[], Mapping[str, str]],  # noqa: ARG002
    ) -> tuple[WritableRows, int]:
        """Rows to collect gradients in, and how many of the first ones hold theirs already.

        A storage that outlives the process returns what an interrupted run has finished. Its rows
        then have a method ``gradients(first, count)``, which returns some of them, stacked: the
        first is compared with the one that the first batch gives now.

        Args:
            params: as in :meth:`empty`.
            num_rows: as in :meth:`empty`.
            origin: returns what the gradients depend on, by name. Gradients of another origin are
                an error.
        """
        what = f"collecting gradients with storage={self!r}"
        return check_writable(self.empty(params, num_rows), what), 0

    def bytes_by_place(self, params: PyTree, num_rows: int) -> dict[str, int] | None:  # noqa: ARG002
        """What :meth:`empty` allocates, for plans: bytes on each device, on the host and on disk.

        If ``jit`` can trace :meth:`empty`, :func:`traced_bytes` finds them.

        Args:
            params: shapes, as in :meth:`empty`.
            num_rows: ``m``.

        Returns:
            The bytes under ``"device"``, ``"host"`` and ``"disk"``, where they are not 0. None,
            the default, if they are unknown: such rows are never refused for their size.
        """
        return None

    @property
    def has_products(self) -> bool:
        """Whether rows compute products; see :attr:`GradientRows.has_products`."""
        return True

    def check_blocks(self, layout: Layout, wanted: Partition) -> None:
        """Checks that an inverse in these blocks can be computed from the rows.

        By default it can for all blocks.

        Args:
            layout: the parameters.
            wanted: the blocks.

        Raises:
            ValueError: it cannot.
        """
        del layout, wanted

    @property
    def is_traceable(self) -> bool:
        """Whether ``jit`` can trace the rows; see :attr:`GradientRows.is_traceable`."""
        return True

    @property
    def keeps_gradients(self) -> bool:
        """Whether :meth:`resume` finds what an earlier process has finished."""
        return False

    def scan_bytes(
        self,
        params: PyTree,
        num_rows: int,
        platform: str,  # noqa: ARG002
    ) -> dict[str, int]:
        """What a Gram matrix or the diagonal of a whole inverse takes, for plans.

        It counts the temporary arrays on each device and on the host, beside the rows and the
        result. The default is an estimate for the default methods of :class:`GradientRows`, which
        combine some rows at a time.

        Args:
            params: shapes, as in :meth:`empty`.
            num_rows: ``m``.
            platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        """
        return {"device": 2 * min(ROWS_AT_A_TIME, num_rows) * vector_bytes(params)}

    def whitened_bytes(self, params: PyTree, num_rows: int) -> dict[str, int]:
        """What ``transform`` of all rows returns, for plans, as :meth:`bytes_by_place`.

        By default these are dense rows on every device.
        """
        layout = Layout(params)
        return {"device": num_rows * layout.size * layout.dtype.itemsize}

    def by_output(self, leaf: Any, num_rows: int, axis: int) -> BlockRows:  # noqa: ARG002
        """``num_rows`` zero rows for gradients of one parameter, in blocks of its outputs.

        Args:
            leaf: the parameter, or a ``jax.ShapeDtypeStruct``; it has at least two axes.
            num_rows: ``m``, at least 1.
            axis: the axis of the outputs.

        Raises:
            TypeError: the storage has no such rows.
        """
        raise TypeError(
            f"{type(self).__name__} has no rows by output: use another storage, such as Dense, or "
            "other blocks than those of outputs."
        )

    def hold(self, gradients: PyTree, params: PyTree) -> GradientRows:
        """Stores existing gradients.

        A storage whose rows cannot be written overrides this method.

        Args:
            gradients: a tree like the parameters with leaves ``(n, *shape)``.
            params: the parameters or a tree of ``jax.ShapeDtypeStruct``, as in :meth:`empty`.

        Raises:
            TypeError: the rows cannot be written.
            FloatingPointError: the rows reject a gradient because it has NaN or Inf in it or is
                too large to square. Inside ``jit`` there is no error.
        """
        count = len(jax.tree.leaves(gradients)[0])
        require_room(self, params, count, "number of gradients")
        empty = check_writable(
            self.empty(params, count), f"the default hold of {type(self).__name__}"
        )
        rows, accepted = empty.write_rows(jnp.int32(0), gradients, jnp.int32(count))
        if not isinstance(accepted, jax.core.Tracer) and not accepted.all():
            raise FloatingPointError(
                f"row {int(np.argmin(accepted))} of gradients has NaN or Inf in it, or is too "
                "large to square."
            )
        return rows


def check_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """Checks the dtype in which gradients are to be stored, and returns it.

    Raises:
        TypeError: it is not a dtype.
        ValueError: gradients are not stored in this dtype, or float64 is off.
    """
    if dtype is None:
        return None
    chosen = _checks.dtype(dtype, "dtype", DTYPES)
    if chosen == jnp.float64 and jnp.result_type(float) != chosen:
        raise ValueError("dtype float64 needs jax_enable_x64, which is off.")
    return chosen


def dtype_for(layout: Layout, dtype: DTypeLike | None) -> np.dtype:
    """The dtype of stored gradients of these parameters, if ``dtype`` was asked for."""
    return layout.dtype if dtype is None else np.dtype(dtype)


def vector_bytes(params: PyTree) -> int:
    """The bytes on each device of a vector like the parameters, in the dtype of sums."""
    return Layout(params).dtype.itemsize * sum(_sizes_on_device(params))


def _sizes_on_device(params: PyTree) -> list[int]:
    """The number of entries of each leaf on each device."""

    def size(leaf: Any) -> int:
        sharding, shape = getattr(leaf, "sharding", None), jnp.shape(leaf)
        return math.prod(shape if sharding is None else sharding.shard_shape(shape))

    return [size(leaf) for leaf in jax.tree.leaves(params)]


def traced_bytes(storage: Storage, params: PyTree, num_rows: int) -> dict[str, int]:
    """:meth:`Storage.bytes_by_place` of a storage whose ``empty`` can be traced.

    Args:
        storage: the storage.
        params: the parameters or their shapes.
        num_rows: ``m``.
    """

    def leaves(params: PyTree) -> list[Any]:
        return jax.tree.leaves(storage.empty(params, num_rows))

    return _memory.bytes_by_place(_memory.arrays(leaves, _memory.on_mesh(params)))


@dataclass(frozen=True)
class Dense(Storage):
    """Stores every number of every gradient in the memory of the device.

    Attributes:
        dtype: the dtype of stored gradients: float32, bfloat16 or float64. By default it is
            float64 for float64 parameters and float32 for all others, and existing gradients
            keep their dtype.
        packing: ``"flat"`` stores one block for all parameters and is fastest. ``"leaf"`` stores
            one block for each parameter, with the sharding of the parameter if that is a
            ``NamedSharding``.
        implementation: which implementation the kernels use: ``"xla"``, ``"mosaic_gpu"``,
            ``"mosaic_tpu"`` or the name of your own backend; by default the first one that
            supports the gradients. A backend runs the operations that it has a kernel for, and
            XLA's form runs the others. There is an error if the backend does not support the
            shape, the dtype or the device.

    Raises:
        TypeError: ``dtype`` is not a dtype.
        ValueError: an attribute has an unknown value, or two attributes exclude each other.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import rows
        >>> rows.Dense().empty({"w": jnp.zeros((2, 3))}, 4).blocks.shape
        (1, 4, 6)
    """

    dtype: DTypeLike | None = None
    packing: str = "flat"
    implementation: str | None = None

    def __post_init__(self) -> None:
        _checks.one_of(self.packing, "packing", PACKINGS)
        check_implementation(self.implementation)
        object.__setattr__(self, "dtype", check_dtype(self.dtype))

    def empty(self, params: PyTree, num_rows: int) -> DenseRows:
        """``num_rows`` zero rows for gradients of ``params``.

        Args:
            params: the parameters, or anything with their shapes and dtypes.
            num_rows: ``m``.

        Raises:
            TypeError: ``num_rows`` is not an int, or a leaf is not real floating point.
            ValueError: ``num_rows`` is below 1, or the implementation does not support these
                gradients.
        """
        m = _checks.positive_int(num_rows, "num_rows")
        layout = Layout(params)
        dtype = dtype_for(layout, self.dtype)
        if self.packing == "flat":
            count, width = tiling(layout.size)
            blocks: PyTree = jnp.zeros((count, m, width), dtype)
        else:
            blocks = jax.tree.map(
                lambda leaf: jnp.zeros((m, *jnp.shape(leaf)), dtype, device=rows_sharding(leaf)),
                params,
            )
        return DenseRows(blocks, layout, m, self.packing, self.implementation).supported()

    def bytes_by_place(self, params: PyTree, num_rows: int) -> dict[str, int]:
        """See :meth:`Storage.bytes_by_place`."""
        return traced_bytes(self, params, num_rows)

    def whitened_bytes(self, params: PyTree, num_rows: int) -> dict[str, int]:
        """See :meth:`Storage.whitened_bytes`."""
        if self.packing == "flat":
            return super().whitened_bytes(params, num_rows)
        return {"device": num_rows * vector_bytes(params)}

    def scan_bytes(self, params: PyTree, num_rows: int, platform: str) -> dict[str, int]:
        """See :meth:`Storage.scan_bytes`."""
        return {"device": self._scan_bytes(params, num_rows, platform)}

    def _scan_bytes(self, params: PyTree, num_rows: int, platform: str) -> int:
        layout, sizes = Layout(params), _sizes_on_device(params)
        itemsize = layout.dtype.itemsize
        if self.packing == "leaf" and sizes != list(layout.sizes):
            # Leaves that devices share are multiplied one after another.
            return num_rows * itemsize * max(sizes)
        whole = num_rows * itemsize * layout.size
        if platform != "cpu":
            return whole // 8
        is_narrow = dtype_for(layout, self.dtype) == jnp.bfloat16
        if self.packing == "leaf":  # XLA copies them.
            return 5 * whole // 2 if is_narrow else whole
        tile = min(num_rows * MAX_TILE * itemsize, whole)
        return whole + tile if is_narrow and WIDENS_WHOLE_BLOCKS else 4 * tile

    def by_output(self, leaf: Any, num_rows: int, axis: int) -> OutputRows:
        """``num_rows`` zero rows for gradients of one parameter, in blocks of its outputs.

        They follow the sharding of the parameter. XLA multiplies them on every platform.

        Args:
            leaf: the parameter, or a ``jax.ShapeDtypeStruct``; it has at least two axes.
            num_rows: ``m``, at least 1.
            axis: the axis of the outputs.

        Raises:
            TypeError: the leaf is not real floating point.
            ValueError: the leaf has one axis or none, or not this one.
        """
        dtype, shape = dtype_for(Layout(leaf), self.dtype), list(jnp.shape(leaf))
        axis = output_axis(leaf, axis)
        count = number_of_blocks(tuple(shape), axis, num_rows)
        shape = [shape.pop(axis), num_rows, *shape]
        zeros = jnp.zeros(shape, dtype, device=rows_sharding(leaf, axis))
        return OutputRows(zeros, axis, count)

    def hold(self, gradients: PyTree, params: PyTree) -> DenseRows:
        """Stores existing gradients; see :meth:`Storage.hold`.

        NaN and Inf are stored too. If the gradients have several dtypes, flat packing uses the
        widest one.
        """
        layout = Layout(params)
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
        if self.dtype is not None:
            leaves = [leaf.astype(self.dtype) for leaf in leaves]
        n = len(leaves[0])
        if self.packing == "leaf":
            blocks: PyTree = jax.tree.unflatten(layout.treedef, leaves)
        else:
            dtype = functools.reduce(np.promote_types, [leaf.dtype for leaf in leaves])
            require_room_of(
                lambda params, count: jnp.zeros((count, Layout(params).size), dtype),
                params,
                n,
                "number of gradients",
            )
            flat = [leaf.reshape(n, -1).astype(dtype) for leaf in leaves]
            blocks = tiles_of(jnp.concatenate(flat, axis=1))
        return DenseRows(blocks, layout, n, self.packing, self.implementation).supported()


def as_rows(
    gradients: PyTree,
    params: PyTree | None = None,
    *,
    storage: Storage = Dense(),
) -> GradientRows:
    """Makes rows from gradients that are stacked along a leading axis.

    Args:
        gradients: a tree with leaves ``(n, *shape)``, or one array ``(n, d)``. Rows are returned
            as they are.
        params: the parameters. They are needed if ``gradients`` is one (n, d) array for a tree
            of parameters. By default they have the structure of one row of ``gradients``.
        storage: how the rows store the gradients.

    Returns:
        The rows.

    Raises:
        TypeError: a leaf is not real floating point, or ``storage`` is not a storage.
        ValueError: leading axes differ, there is no row, or ``params`` do not fit.
        MemoryError: the rows cannot fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import rows
        >>> rows.as_rows({"w": jnp.ones((4, 2, 3)), "b": jnp.ones((4, 3))}).num_rows
        4
    """
    check_storage(storage)
    if isinstance(gradients, GradientRows):
        if params is not None:
            gradients.layout.check(params, "params")
        return gradients
    stacked = Layout(gradients, "gradients")
    counts = {shape[0] if shape else None for shape in stacked.shapes}
    if len(counts) != 1 or counts & {None, 0}:
        raise ValueError(
            "gradients must have one leading axis of the same length >= 1 on every leaf, "
            f"got {stacked.describe()}."
        )
    n = counts.pop()
    if params is None:
        params = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), gradients)
    layout = Layout(params)
    one_matrix = len(stacked.shapes) == 1 and stacked.shapes[0] == (n, layout.size)
    if one_matrix and stacked.treedef == jax.tree.structure(0):
        gradients = jax.vmap(layout.unflatten)(jnp.asarray(gradients))
    row_layout = Layout(
        jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), gradients)
    )
    if row_layout.treedef != layout.treedef or row_layout.shapes != layout.shapes:
        raise ValueError(
            f"gradients do not fit params: expected rows of {layout.describe()}, "
            f"got rows of {row_layout.describe()}."
        )
    return storage.hold(gradients, params)


def rows_sharding(leaf: Any, output_axis: int | None = None) -> NamedSharding | None:
    """The leaf's sharding with an unsharded axis of rows; None without a ``NamedSharding``.

    The rows come first, or second after the axis of outputs.
    """
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [*sharding.spec, *[None] * (len(jnp.shape(leaf)) - len(sharding.spec))]
    first = [] if output_axis is None else [spec.pop(output_axis)]
    return NamedSharding(sharding.mesh, PartitionSpec(*first, None, *spec))


def check_storage(storage: Any) -> Storage:
    """Checks that ``storage`` is a storage, and returns it.

    Raises:
        TypeError: ``storage`` has another type.
    """
    if not isinstance(storage, Storage):
        packing = _PACKINGS_BY_NAME.get(storage) if isinstance(storage, str) else None
        example = f'packing="{packing}"' if packing else "dtype, packing"
        raise TypeError(
            f"storage must be a storage, such as mfac_jax.rows.Dense({example}), got {storage!r}."
        )
    return storage
