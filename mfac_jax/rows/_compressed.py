"""Rows in fewer bits: every gradient is a code, tile of columns by tile.

A :class:`Compressed` storage knows its code. :class:`CompressedRows` are the rows of every such
storage. Gradients are flattened, cut into tiles of one width and padded with zeros.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.kernels._xla import accumulation_dtype, set_row
from mfac_jax.rows._base import ColumnRows, WritableRows, is_small_enough
from mfac_jax.rows._blocks import BlockRows, number_of_blocks, output_axis
from mfac_jax.rows._dense import DenseRows
from mfac_jax.rows._storage import Storage, rows_sharding, traced_bytes

# As many numbers are multiplied at a time; 64 MiB in float32.
_ENTRIES_AT_A_TIME = 2**24

# As many numbers are decoded at a time; 16 MiB in float32.
_DECODED_AT_A_TIME = 2**22

# A CPU takes half as long again for a loop of two rounds as for the rounds themselves (measured).
_MOST_ROUNDS = 8

# The code of some tiles: arrays (t, m, ...) for m rows, or (t, ...) for one gradient.
Code = tuple[Array, ...]


def check_width(value: Any, name: str) -> None:
    """Checks the width of a tile, in which a place has 15 bits.

    Raises:
        TypeError: it is not an int.
        ValueError: it is no power of two, or out of range.
    """
    size = _checks.positive_int(value, name)
    if size & (size - 1) or not 2 <= size <= 2**15:
        raise ValueError(f"{name} must be a power of two from 2 to 32768, got {size}.")


class Compressed(Storage):
    """A storage of fewer bits: a small immutable value that encodes tiles of gradients.

    Rows by output follow the sharding of the outputs: every device has the tiles of its outputs.
    Parameters that are sharded along other axes are gathered for a write, and other rows do not
    follow the sharding.
    """

    @property
    @abc.abstractmethod
    def most_columns(self) -> int:
        """The largest width of a tile, a power of two."""

    @abc.abstractmethod
    def blank(self, count: int, num_rows: int, width: int) -> Code:
        """The code of zero gradients, for ``count`` tiles."""

    def blank_error(self, count: int, width: int) -> PyTree:  # noqa: ARG002
        """The error of no gradient yet; None if errors are not kept."""
        return None

    @abc.abstractmethod
    def encode(self, tiles: Float[Array, "t k"], error: PyTree) -> tuple[Code, PyTree]:
        """The code of one gradient to which the error is added, and the error of the code.

        Args:
            tiles: the gradient.
            error: what earlier gradients have lost.
        """

    def with_error(self, tiles: Float[Array, "t k"], error: PyTree) -> Float[Array, "t k"]:
        """The gradient with the error added, as :meth:`encode` encodes it."""
        del error
        return tiles

    @abc.abstractmethod
    def decode(self, code: Code, width: int, dtype: jnp.dtype) -> Float[Array, "t m k"]:
        """The gradients of a code."""

    @abc.abstractmethod
    def dots(self, code: Code, vector: Float[Array, "t k"]) -> Float[Array, "t m"]:
        """The products of the gradients with a vector, for each tile."""

    @abc.abstractmethod
    def combine(
        self, code: Code, coefficients: Float[Array, "t m"], width: int
    ) -> Float[Array, "t k"]:
        """``G^T c`` in each tile, with coefficients for each tile."""

    @abc.abstractmethod
    def restrict(self, code: Code, error: PyTree, mask: Bool[Array, "t k"]) -> tuple[Code, PyTree]:
        """The code and the error with zeros where the mask is false."""

    @abc.abstractmethod
    def take(
        self, code: Code, tile: Int[Array, " j"], column: Int[Array, " j"], dtype: jnp.dtype
    ) -> Float[Array, "m j"]:
        """Some coordinates of every gradient."""

    @property
    def is_read_in_place(self) -> bool:
        """Whether XLA computes products with some tiles without a copy of them.

        If it copies them, they are multiplied in a loop, so that one copy is there at a time. That
        is the default.
        """
        return False

    def step_bytes(self, vector: int, code: int, piece: int, platform: str) -> int:
        """See :meth:`GradientRows.step_bytes`.

        Args:
            vector: the bytes of a vector in the accumulation dtype.
            code: the bytes of the code of all gradients.
            piece: the bytes of the code that is decoded at a time.
            platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        """
        if platform != "cpu":
            return 4 * vector
        return 14 * vector // 3 + (piece if piece < code else 0)  # a piece is a copy

    def empty(self, params: PyTree, num_rows: int) -> CompressedRows:
        """See :meth:`Storage.empty`."""
        m, layout = _checks.positive_int(num_rows, "num_rows"), Layout(params)
        count, width = self.tiling(layout.size)
        code, error = self.blank(count, m, width), self.blank_error(count, width)
        return CompressedRows(code, error, layout, m, self)

    def bytes_by_place(self, params: PyTree, num_rows: int) -> dict[str, int]:
        """See :meth:`Storage.bytes_by_place`."""
        return traced_bytes(self, params, num_rows)

    def scan_bytes(self, params: PyTree, num_rows: int, platform: str) -> dict[str, int]:
        """See :meth:`Storage.scan_bytes`.

        Tiles, what they are decoded from, a product, and the halves of a Gram matrix. On a CPU a
        process keeps what earlier products with a vector took.
        """
        layout = Layout(params)
        count, width = self.tiling(layout.size)
        tile = num_rows * width
        decoded = min(max(_DECODED_AT_A_TIME // tile, 1), count) * tile
        scan = (3 * decoded + 4 * num_rows**2) * layout.dtype.itemsize
        if platform != "cpu":
            return {"device": scan}
        rows: CompressedRows = jax.eval_shape(lambda: self.empty(params, num_rows))
        return {"device": scan + rows.step_bytes(platform)}

    def by_output(self, leaf: Any, num_rows: int, axis: int) -> CompressedOutputRows:
        """See :meth:`Storage.by_output`. Every output has tiles of its own."""
        layout = Layout(leaf)
        axis = output_axis(leaf, axis)
        shape = layout.shapes[0]
        each, width = self.tiling(layout.size // max(shape[axis], 1))
        count = shape[axis] * each

        def blank() -> tuple[Code, PyTree]:
            return self.blank(count, num_rows, width), self.blank_error(count, width)

        sharding = rows_sharding(leaf, axis)
        if sharding is not None:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
            # Plans read the sharding in the types; out_shardings alone does not change them.
            placed = jax.jit(lambda: jax.device_put(blank(), sharding), out_shardings=sharding)
        code, error = blank() if sharding is None else placed()
        blocks = number_of_blocks(shape, axis, num_rows)
        return CompressedOutputRows(code, error, layout, axis, blocks, sharding, self)

    def tiling(self, size: int) -> tuple[int, int]:
        """The number and the width of the tiles of ``size`` columns."""
        width = min(self.most_columns, 2 ** math.ceil(math.log2(max(size, 2))))
        return max(-(-size // width), 1), width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressedRows(WritableRows, ColumnRows):
    """Gradients in the code of a :class:`Compressed` storage.

    Products are exact, to rounding, for the gradients as they are stored.

    Attributes:
        code: arrays (t, m, ...) of t tiles.
        error: what the stored gradients have lost and the next one receives; None if errors are
            not kept.
        layout: the parameters that the gradients belong to.
        num_rows: ``m`` (static).
        storage: the storage, which knows the code (static).
    """

    code: PyTree  # a Code
    error: PyTree
    layout: Any  # a Layout, or what optax.tree.map_params puts in its place
    num_rows: int = field(metadata={"static": True})
    storage: Compressed = field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """float64 for float64 parameters, float32 for all others."""
        own: jnp.dtype = self.layout.dtype
        return own

    @property
    def num_tiles(self) -> int:
        """``t``."""
        return int(self.code[0].shape[0])

    @property
    def width(self) -> int:
        """The number of columns of a tile."""
        return self.storage.tiling(self.layout.size)[1]

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[CompressedRows, Float[Array, " m"], Bool[Array, ""]]:
        rows, accepted = self.write(row, gradient)
        return rows, rows._dots(_row(rows, row)), accepted

    def write(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[CompressedRows, Bool[Array, ""]]:
        tiles = self._tiles(self.layout.flatten(gradient, self.dtype, "gradient"))
        accepted = _is_storable(self.storage.with_error(tiles, self.error), self.num_rows)
        return _written(self, row, tiles, accepted), accepted

    def clear(self, row: Int[Array, ""]) -> CompressedRows:
        return replace(self, code=tuple(part.at[:, row].set(0) for part in self.code))

    def without_errors(self) -> CompressedRows:
        blank = self.storage.blank_error(self.num_tiles, self.width)
        return replace(self, error=blank)

    def restrict(self, mask: PyTree) -> CompressedRows:
        keep = self._tiles(self.layout.flat_mask(mask))
        code, error = self.storage.restrict(self.code, self.error, keep)
        return replace(self, code=code, error=error)

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        return _compiled_dots(self, self.layout.flatten(vector, self.dtype, "vector"))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        flat = None if vector is None else self.layout.flatten(vector, self.dtype, "vector")
        return self.layout.unflatten(_compiled_combine(self, coefficients, flat, scale))

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        return _compiled_gram(self, None if mask is None else self.layout.flat_mask(mask))

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> DenseRows:
        del lower
        return _compiled_transform(self, matrix)

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        del lower
        (sums,) = _compiled_square_sums(self, (matrix,))
        return self.layout.unflatten(sums)

    def both_column_square_sums(
        self, matrix: Float[Array, "k m"], *, lower: bool = False
    ) -> tuple[PyTree, PyTree]:
        del lower
        own, mixed = _compiled_square_sums(self, (None, matrix))
        return self.layout.unflatten(own), self.layout.unflatten(mixed)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        return _compiled_take(self, coordinates)

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        # Columns can start anywhere in a tile, so they can touch one tile more.
        touched = min(-(-size // self.width) + 1, self.num_tiles)
        first = jnp.minimum(start // self.width, self.num_tiles - touched)
        code = tuple(lax.dynamic_slice_in_dim(part, first, touched) for part in self.code)
        tiles = self.storage.decode(code, self.width, self.dtype)
        matrix = jnp.moveaxis(tiles, 0, 1).reshape(self.num_rows, -1)
        return lax.dynamic_slice_in_dim(matrix, start - first * self.width, size, axis=1)

    def on_each_device(self, function: Callable[..., Any], *tiles: Any) -> Any:
        """``function`` of the tiles, which one device has."""
        return function(*tiles)

    def step_bytes(self, platform: str) -> int:
        return _step_bytes(self, self.num_tiles, platform)

    def _tiles(self, flat: Array) -> Array:
        """A vector of all coordinates, cut into tiles."""
        padded = jnp.pad(flat, (0, self.num_tiles * self.width - flat.size))
        return padded.reshape(self.num_tiles, self.width)

    def _dots(self, vector: Float[Array, "t k"]) -> Float[Array, " m"]:
        parts = _multiplied(self, self.storage.dots, self.code, vector)
        return jnp.sum(parts, axis=0)

    @property
    def _tiles_at_a_time(self) -> int:
        """The number of tiles that are decoded at a time."""
        return max(_DECODED_AT_A_TIME // (self.num_rows * self.width), 1)

    def _decoded(self, code: Code) -> Float[Array, "t m k"]:
        return self.storage.decode(code, self.width, self.dtype)


def _in_equal_rounds(count: int, batch: int) -> int:
    """The number of tiles of a round, at most ``batch``, if all rounds are about as large."""
    rounds = max(-(-count // batch), 1)
    return -(-count // rounds)


def map_tiles(
    function: Callable[..., Array], batch: int, *tiles: Any, in_place: bool = False
) -> Array:
    """``function`` of tiles, at most ``batch`` tiles at a time, without a copy of them.

    Args:
        function: a function of some tiles; its result has an entry for each.
        batch: the number of tiles.
        tiles: trees of arrays (t, ...).
        in_place: see :attr:`Compressed.is_read_in_place`.
    """
    count = len(jax.tree.leaves(tiles)[0])
    if batch >= count:
        return function(*tiles)
    batch = _in_equal_rounds(count, batch)
    rounds = -(-count // batch)
    if in_place and rounds <= _MOST_ROUNDS:
        return _map_rounds(function, batch, tiles)

    def some(first: Int[Array, ""]) -> Array:
        return function(*jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, batch), tiles))

    def step(i: Int[Array, ""], out: Array) -> Array:
        first = jnp.minimum(i * batch, count - batch)  # the last batch may overlap another
        return lax.dynamic_update_slice_in_dim(out, some(first), first, axis=0)

    like = jax.eval_shape(some, jnp.int32(0))
    out = jnp.zeros((count, *like.shape[1:]), like.dtype)
    return lax.fori_loop(0, rounds, step, out)


def _map_rounds(function: Callable[..., Array], batch: int, tiles: tuple[Any, ...]) -> Array:
    """:func:`map_tiles` for a few rounds, which a program states one after another."""
    count, parts = len(jax.tree.leaves(tiles)[0]), []
    for first in range(0, count, batch):
        own = jax.tree.map(lambda x, i=first: x[i : i + batch], tiles)
        # A round waits for the previous one, so that a GPU has one in memory at a time.
        tiles, part = lax.optimization_barrier((tiles, function(*own)))
        parts.append(part)
    return jnp.concatenate(parts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressedOutputRows(BlockRows):
    """A block for each output of a parameter, or for each of several neighbouring outputs.

    Attributes:
        code: as in :class:`CompressedRows`, with the tiles of one output after those of another.
        error: as in :class:`CompressedRows`.
        layout: the parameter.
        axis: the axis of the outputs in the parameter (static).
        num_blocks: ``k``; it divides the number of outputs (static).
        sharding: how devices share the tiles; None for parameters without a ``NamedSharding``
            (static).
        storage: the storage, which knows the code (static).
    """

    code: PyTree  # a Code
    error: PyTree
    layout: Any
    axis: int = field(metadata={"static": True})
    num_blocks: int = field(metadata={"static": True})
    sharding: NamedSharding | None = field(metadata={"static": True})
    storage: Compressed = field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        return accumulation_dtype(self.layout.dtypes[0])

    @property
    def width(self) -> int:
        """The number of columns of a tile."""
        (shape,) = self.layout.shapes
        return self.storage.tiling(self.layout.size // max(shape[self.axis], 1))[1]

    def step_bytes(self, platform: str) -> int:
        shape = self.code[0].shape
        own = shape if self.sharding is None else self.sharding.shard_shape(shape)
        return _step_bytes(self, own[0], platform)

    def put(
        self, row: Int[Array, ""], gradient: Float[Array, "..."], accepted: Bool[Array, ""]
    ) -> tuple[CompressedOutputRows, Float[Array, "k m"]]:
        if not self.layout.size:
            return self, jnp.zeros((self.num_blocks, self.code[0].shape[1]), self.dtype)
        outputs = jnp.moveaxis(gradient, self.axis, 0).astype(self.dtype)
        outputs = outputs.reshape(len(outputs), -1)
        each = len(self.code[0]) // len(outputs)
        padded = jnp.pad(outputs, ((0, 0), (0, each * self.width - outputs.shape[1])))
        tiles = padded.reshape(-1, self.width)
        whole = self.storage.with_error(tiles, self.error)
        fits = _is_storable(whole, self.code[0].shape[1]) | ~accepted
        tiles, error = jax.tree.map(
            lambda x: jnp.where(fits, x, jnp.zeros_like(x)), (tiles, self.error)
        )
        rows = _written(replace(self, error=error), row, tiles, accepted)
        dots = _multiplied(self, self.storage.dots, rows.code, _row(rows, row))
        return rows, jnp.sum(dots.reshape(self.num_blocks, -1, dots.shape[1]), axis=1)

    def combine(self, coefficients: Float[Array, "k m"]) -> Float[Array, "..."]:
        (shape,) = self.layout.shapes
        if not self.layout.size:
            return jnp.zeros(shape, self.dtype)
        tiles = len(self.code[0])
        weights = jnp.repeat(coefficients.astype(self.dtype), tiles // self.num_blocks, axis=0)

        def combine(code: Code, weights: Float[Array, "t m"]) -> Float[Array, "t k"]:
            return self.storage.combine(code, weights, self.width)

        combined = _multiplied(self, combine, self.code, weights)
        rest = [length for i, length in enumerate(shape) if i != self.axis]
        outputs = combined.reshape(shape[self.axis], -1)[:, : math.prod(rest)]
        return jnp.moveaxis(outputs.reshape(shape[self.axis], *rest), 0, self.axis)

    def on_each_device(self, function: Callable[..., Any], *tiles: Any) -> Any:
        """``function`` of the tiles of each device.

        XLA would gather tiles for a loop over them, and share tiles that every device has.
        """
        if self.sharding is None:
            return function(*tiles)
        # The mesh in use has the same axes, but they can be of another type.
        mesh, spec = jax.sharding.get_abstract_mesh(), self.sharding.spec
        mesh = self.sharding.mesh.abstract_mesh if mesh.empty else mesh
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
            *tiles
        )


def _is_storable(tiles: Float[Array, "t k"], num_rows: int) -> Bool[Array, ""]:
    """Whether a gradient can be squared and summed, and its entries fit into 32 or 16 bits."""
    fits = is_small_enough(jnp.sum(jnp.sum(tiles**2, axis=1)), num_rows)
    if tiles.dtype == jnp.float64:
        fits &= jnp.max(jnp.abs(tiles)) <= float(jnp.finfo(jnp.bfloat16).max)
    return fits


Coded = TypeVar("Coded", CompressedRows, CompressedOutputRows)


def _products_at_a_time(code: PyTree) -> int:
    """The number of tiles that are multiplied at a time."""
    return max(_ENTRIES_AT_A_TIME // max(sum(math.prod(x.shape[1:]) for x in code), 1), 1)


def _multiplied(rows: Coded, function: Callable[..., Array], *tiles: Any) -> Array:
    """``function`` of all tiles, some of each device at a time.

    So intermediate results stay small.
    """
    batch, in_place = _products_at_a_time(rows.code), rows.storage.is_read_in_place
    some = functools.partial(map_tiles, function, batch, in_place=in_place)
    found: Array = rows.on_each_device(some, *tiles)
    return found


def _step_bytes(rows: Coded, num_tiles: int, platform: str) -> int:
    """See :meth:`GradientRows.step_bytes`, for a device that has so many of the tiles."""
    share = num_tiles / max(rows.code[0].shape[0], 1)
    code = share * sum(part.size * part.dtype.itemsize for part in rows.code)
    batch = _in_equal_rounds(num_tiles, _products_at_a_time(rows.code))
    piece = batch / max(num_tiles, 1) * code
    vector = share * rows.layout.size * rows.dtype.itemsize
    return rows.storage.step_bytes(int(vector), int(code), int(piece), platform)


def _written(
    rows: Coded, row: Int[Array, ""], tiles: Float[Array, "t k"], accepted: Bool[Array, ""]
) -> Coded:
    """The rows with one replaced, if the new one is accepted."""
    new, error = rows.on_each_device(rows.storage.encode, tiles, rows.error)
    pairs = zip(rows.code, new, strict=True)
    code = tuple(set_row(part, row, value, accepted) for part, value in pairs)
    error = jax.tree.map(lambda x, old: jnp.where(accepted, x, old), error, rows.error)
    return replace(rows, code=code, error=error)


def _row(rows: CompressedRows | CompressedOutputRows, row: Int[Array, ""]) -> Float[Array, "t k"]:
    """One gradient as stored."""
    own = tuple(lax.dynamic_slice_in_dim(part, row, 1, axis=1) for part in rows.code)

    def decode(own: Code) -> Float[Array, "t k"]:
        return rows.storage.decode(own, rows.width, rows.dtype)[:, 0]

    return rows.on_each_device(decode, own)


@jax.jit
def _compiled_dots(rows: CompressedRows, flat: Float[Array, " d"]) -> Float[Array, " m"]:
    return rows._dots(rows._tiles(flat))


@jax.jit
def _compiled_combine(
    rows: CompressedRows,
    coefficients: Float[Array, " m"],
    vector: Float[Array, " d"] | None,
    scale: Float[Array, ""] | None,
) -> Float[Array, " d"]:
    weights = jnp.broadcast_to(coefficients.astype(rows.dtype), (rows.num_tiles, rows.num_rows))

    def of_tiles(code: Code, weights: Float[Array, "t m"]) -> Float[Array, "t k"]:
        return rows.storage.combine(code, weights, rows.width)

    out = _multiplied(rows, of_tiles, rows.code, weights).reshape(-1)[: rows.layout.size]
    out = out if vector is None else vector - out
    return out if scale is None else scale.astype(out.dtype) * out


@jax.jit
def _compiled_gram(rows: CompressedRows, mask: Bool[Array, " d"] | None) -> Float[Array, "m m"]:
    batch = rows._tiles_at_a_time

    def term(first: Int[Array, ""] | int, count: int) -> Float[Array, "m m"]:
        parts = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, count), (rows.code, keep))
        tiles = rows._decoded(parts[0])
        if mask is not None:
            tiles = jnp.where(parts[1][:, None], tiles, jnp.zeros_like(tiles))
        return jnp.einsum("tik,tjk->ij", tiles, tiles, precision="highest")

    keep = () if mask is None else rows._tiles(mask)
    whole, rest = divmod(rows.num_tiles, batch)
    gram = term(whole * batch, rest) if rest else jnp.zeros((rows.num_rows,) * 2, rows.dtype)
    if whole:
        gram = lax.fori_loop(0, whole, lambda i, total: total + term(i * batch, batch), gram)
    return jnp.tril(gram) + jnp.tril(gram, -1).T


@jax.jit
def _compiled_transform(rows: CompressedRows, matrix: Float[Array, "k m"]) -> DenseRows:
    matrix = matrix.astype(rows.dtype)

    def mixed(code: Code) -> Float[Array, "t k w"]:
        return jnp.einsum("km,tmw->tkw", matrix, rows._decoded(code), precision="highest")

    blocks = map_tiles(mixed, rows._tiles_at_a_time, rows.code)
    return DenseRows(blocks, rows.layout, len(matrix), "flat")


@jax.jit
def _compiled_square_sums(
    rows: CompressedRows, matrices: tuple[Float[Array, "k m"] | None, ...]
) -> list[Float[Array, " d"]]:
    """``diag((M G)^T (M G))`` for every matrix; None stands for the identity."""

    def sums(code: Code) -> Float[Array, "t j w"]:
        tiles, found = rows._decoded(code), []
        for matrix in matrices:
            mixed = tiles
            if matrix is not None:
                wide = matrix.astype(rows.dtype)
                mixed = jnp.einsum("km,tmw->tkw", wide, tiles, precision="highest")
            found.append(jnp.sum(mixed**2, axis=1))
        return jnp.stack(found, axis=1)

    of_tiles = map_tiles(sums, rows._tiles_at_a_time, rows.code)
    flat = jnp.moveaxis(of_tiles, 1, 0).reshape(len(matrices), -1)
    return list(flat[:, : rows.layout.size])


@jax.jit
def _compiled_take(rows: CompressedRows, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
    tile, column = jnp.divmod(coordinates, rows.width)
    return rows.storage.take(rows.code, tile, column, rows.dtype)
