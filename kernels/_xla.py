"""The scans in plain ``jax.numpy``: the default where no kernel is better, and the oracle.

Accuracy decides their form. A matrix-vector product on the CPU adds up a row in one long
chain; its relative error is 2e-6 at d = 270,000 and 3e-4 at 5 million. A block in tiles is one
batched product of short chains, which is as fast and accurate to 5e-8. A block of one wide tile
(a single large parameter) is multiplied elementwise and added up in lanes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

# The largest number of columns of a tile. 8,192 float32 columns of 512 rows are 16 MiB. That is
# small against any window worth tiling, and a tile's matrix product still runs at full speed
# (measured on two CPU cores: 2,048 to 8,192 within 5 %).
MAX_TILE = 8192

# XLA for a CPU, before jax 0.11, widens a whole block for a product of matrices: it moves the
# widening of a tile out of the loop over tiles.
WIDENS_WHOLE_BLOCKS = jax.__version_info__ < (0, 11)

# A triangular product is cut into at most four panels of rows, which takes 10/16 of the operations.
# A symmetric product is cut into halves. Fewer rows than _MIN_ROWS leave a matrix unit idle.
_PANELS = 4
_MIN_ROWS = 128

# The number of rows that one product of combine adds up. Compared with its full bandwidth, a CPU
# reads 64 to 128 rows at a time 4 % slower, and 512 or all 1,024 rows 20 to 30 % slower (measured
# on two cores).
_ROWS_OF_A_SUM = 128

# The number of chunks into which a GPU cuts a product. Its temporary arrays, at most a copy of a
# chunk and the chunk's image, then take less than 20 % of the memory of the gradients (as
# compiled for an H200). A chunk takes two to five launches.
_CHUNKS = 16

# The products of all tiles, kept until they are added up, may take this share of the memory of
# the gradients.
_LARGEST_SHARE = 1 / 8


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that accumulates products of ``dtype``: float32 at least."""
    return np.promote_types(dtype, np.float32)


def _zeros(block: Array, shape: tuple[int, ...]) -> Array:
    """Zeros for sums of products of ``block``; under ``shard_map`` they vary like ``block``."""
    return jnp.zeros_like(block, shape=shape, dtype=accumulation_dtype(block.dtype))


def _matrices(block: Float[Array, "t m *shape"]) -> Float[Array, "t m k"]:
    return block.reshape(*block.shape[:2], math.prod(block.shape[2:]))


def _flat_columns(arrays: list[Array], block: Float[Array, "t m *shape"]) -> list[Array]:
    """Arrays (t, *_, *shape) that are cut like ``block``, as (t, *_, k)."""
    leading = [array.shape[: array.ndim - (block.ndim - 2)] for array in arrays]
    columns = math.prod(block.shape[2:])
    return [array.reshape(*lead, columns) for array, lead in zip(arrays, leading, strict=True)]


def _has_explicit_axes(block: Array) -> bool:
    """Whether the type spreads the block over a mesh; a dot_general would replicate it."""
    return any(part is not None for part in jax.typeof(block).sharding.spec)


def dots(block: Float[Array, "t m *shape"], vector: Float[Array, "t *shape"]) -> Float[Array, " m"]:
    """``G v``: the dot product of every row with ``vector``."""
    acc = accumulation_dtype(block.dtype)
    vector = vector.astype(acc)
    axes = tuple(range(2, block.ndim))
    is_long = block.ndim == 3 and block.shape[2] > MAX_TILE
    if block.dtype == acc and not is_long and not _has_explicit_axes(block):
        # A reshape would gather a sharded leaf.
        contract = (axes, tuple(axis - 1 for axis in axes))
        parts = lax.dot_general(block, vector, (contract, ((0,), (0,))), precision="highest")
    else:
        return dots_in_one_loop(block, vector)
    return jnp.sum(parts, axis=0)


def dots_in_one_loop(
    block: Float[Array, "t m *shape"], vector: Float[Array, "t *shape"]
) -> Float[Array, " m"]:
    """:func:`dots` as a fused product and sum.

    It widens on the fly; a dot_general would first make a wide copy. The loop may also run over
    columns that devices share.
    """
    acc = accumulation_dtype(block.dtype)
    products = block.astype(acc) * vector.astype(acc)[:, None]
    return jnp.sum(jnp.sum(products, axis=tuple(range(2, block.ndim))), axis=0)


def combine(
    block: Float[Array, "t m *shape"],
    coefficients: Float[Array, " m"],
    *,
    vector: Float[Array, "t *shape"] | None = None,
    scale: Float[Array, ""] | None = None,
) -> Float[Array, "t *shape"]:
    """``G^T c``, or ``(v - G^T c) scale``."""
    acc = accumulation_dtype(block.dtype)
    weights = coefficients.astype(acc)
    if _has_explicit_axes(block):
        out = combine_in_one_loop(block, weights)
    else:
        default = _combine_by_parts if block.dtype == acc else combine_in_one_loop
        out = lax.platform_dependent(block, weights, cuda=combine_at_once, default=default)
    if vector is not None:
        out = vector.astype(acc) - out
    return out if scale is None else out * scale.astype(acc)


def _combine_by_parts(
    block: Float[Array, "t m *shape"], weights: Float[Array, " m"]
) -> Float[Array, "t *shape"]:
    """``G^T c`` as one batched product over groups of rows."""
    t, m = block.shape[:2]
    rows = next(r for r in range(min(m, _ROWS_OF_A_SUM), 0, -1) if m % r == 0)
    rows = rows if 2 * rows > _ROWS_OF_A_SUM else m
    parts = block.reshape(t, m // rows, rows, *block.shape[2:])
    weights = jnp.broadcast_to(weights.reshape(-1, rows), parts.shape[:3])
    contract = (((2,), (2,)), ((0, 1), (0, 1)))
    out = lax.dot_general(weights, parts, contract, precision="highest")
    return jnp.sum(out, axis=1)


def combine_in_one_loop(
    block: Float[Array, "t m *shape"], weights: Float[Array, " m"]
) -> Float[Array, "t *shape"]:
    """``G^T c`` as a fused product and sum, as in :func:`dots_in_one_loop`."""
    weights = weights.reshape(1, -1, *[1] * (block.ndim - 2))
    return jnp.sum(block.astype(weights.dtype) * weights, axis=1)


def combine_at_once(
    block: Float[Array, "t m *shape"], weights: Float[Array, " m"]
) -> Float[Array, "t *shape"]:
    """``G^T c`` as one batched product of all rows, for a GPU.

    On a GPU, XLA compiles it to a fused loop. Under ``vmap`` over the weights, it compiles to a
    matrix product that widens its input as it reads. Products of groups of rows, and sums under
    that ``vmap``, would first make a transposed copy of the block. (XLA may still store the
    elementwise product of a block of 2 MiB, which stays in the GPU's cache.)
    """
    repeated = jnp.broadcast_to(weights, block.shape[:2])
    contract = (((1,), (1,)), ((0,), (0,)))
    return lax.dot_general(repeated, block.astype(weights.dtype), contract, precision="highest")


def write_row(
    block: Float[Array, "t m *shape"],
    row: Int[Array, ""],
    vector: Float[Array, "t *shape"],
    where: Bool[Array, ""],
) -> tuple[Float[Array, "t m *shape"], Float[Array, " m"]]:
    """Writes ``vector`` into ``row`` and returns the block and that row's ``G g``.

    If ``where`` is false, the block is unchanged and the dot products have no meaning. The dot
    products use the row as it is stored.
    """
    block = set_row(block, row, vector, where)
    return block, dots(block, vector.astype(block.dtype))


def set_row(
    block: Shaped[Array, "t m *shape"],
    row: Int[Array, ""],
    vector: Shaped[Array, "t *shape"],
    where: Bool[Array, ""],
) -> Shaped[Array, "t m *shape"]:
    """The block, with ``vector`` in ``row`` if ``where`` is true."""
    stored = vector.astype(block.dtype)

    def write(block: Array) -> Array:
        return lax.dynamic_update_index_in_dim(block, stored, row, axis=1)

    # A CPU gets a branch. XLA would fuse a select into both the write and the dot products and
    # then copy the whole block twice to keep them apart. Other devices get a select, because
    # XLA for a GPU copies the block into the branches.
    def write_or_not(block: Array) -> Array:
        return lax.cond(where, write, lambda block: block, block)

    def write_old_or_new(block: Array) -> Array:
        old = lax.dynamic_index_in_dim(block, row, axis=1, keepdims=False)
        new = jnp.where(where, stored, old)
        return lax.dynamic_update_index_in_dim(block, new, row, axis=1)

    return lax.platform_dependent(block, cpu=write_or_not, default=write_old_or_new)


def gram(
    block: Float[Array, "t m *shape"], mask: Bool[Array, "t *shape"] | None = None
) -> Float[Array, "m m"]:
    """``G G^T``, or ``G_S G_S^T`` over the coordinates where ``mask`` is true.

    Only the lower half is computed if that saves time.

    Args:
        block: ``G``.
        mask: the mask, cut into tiles like the rows; all coordinates by default.

    Returns:
        The Gram matrix, in the accumulation dtype.
    """
    masks = [] if mask is None else [mask]
    return lax.platform_dependent(block, *masks, cuda=gram_by_chunks, default=_gram_by_tiles)


def _gram_by_tiles(
    block: Float[Array, "t m *shape"], mask: Bool[Array, "t *shape"] | None = None
) -> Float[Array, "m m"]:
    m = block.shape[1]
    parts = _lower_parts(0, m)

    def step(totals: list[Array], tile: Array, keep: list[Array]) -> tuple[list[Array], list[Any]]:
        for part in keep:
            tile = jnp.where(part[None], tile, jnp.zeros((), tile.dtype))
        products = [jnp.dot(tile[i], tile[j].T, precision="highest") for i, j in parts]
        return [total + product for total, product in zip(totals, products, strict=True)], []

    zeros = [_zeros(block, (i.stop - i.start, j.stop - j.start)) for i, j in parts]
    totals, _ = _scan_tiles(step, zeros, block, [] if mask is None else [mask])
    if len(totals) == 1:
        return totals[0]
    lower = _zeros(block, (m, m))
    for (i, j), total in zip(parts, totals, strict=True):
        lower = lax.dynamic_update_slice(lower, total, (i.start, j.start))
    return jnp.tril(lower) + jnp.tril(lower, -1).T


def products(
    block: Float[Array, "t m *shape"],
    other: Float[Array, "t n *shape"],
    mask: Bool[Array, "t *shape"] | None = None,
) -> Float[Array, "m n"]:
    """``G H^T`` for another block ``H`` that is cut alike; over a mask as in :func:`gram`."""
    masks = [] if mask is None else [mask]
    return lax.platform_dependent(
        block, other, *masks, cuda=products_by_chunks, default=_products_by_tiles
    )


def _products_by_tiles(
    block: Float[Array, "t m *shape"],
    other: Float[Array, "t n *shape"],
    mask: Bool[Array, "t *shape"] | None = None,
) -> Float[Array, "m n"]:
    acc = accumulation_dtype(np.promote_types(block.dtype, other.dtype))

    def step(total: Array, tile: Array, parts: list[Array]) -> tuple[Array, list[Any]]:
        beside, *masks = parts
        for keep in masks:
            tile = jnp.where(keep[None], tile, jnp.zeros((), tile.dtype))
        pair = tile.astype(acc), beside.astype(acc).T
        return total + jnp.dot(*pair, precision="highest"), []

    start = jnp.zeros_like(block, shape=(block.shape[1], other.shape[1]), dtype=acc)
    masks = [] if mask is None else [mask]
    return _scan_tiles(step, start, block, [other, *masks])[0]


def _lower_parts(start: int, end: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the products that form the lower half of ``G G^T``.

    The products are square, and the two halves of the diagonal are cut again. Panels of rows
    as wide as the triangle take a tenth longer at m = 512 (measured on two CPU cores).
    """
    if end - start < 2 * _MIN_ROWS:
        return [(slice(start, end), slice(start, end))]
    middle = start + (end - start) // 2
    corner = (slice(middle, end), slice(start, middle))
    return [corner, *_lower_parts(start, middle), *_lower_parts(middle, end)]


def transform(
    block: Float[Array, "t m *shape"], matrix: Float[Array, "k m"], *, lower: bool = False
) -> Float[Array, "t k *shape"]:
    """``M G``, in the accumulation dtype.

    Args:
        block: ``G``.
        matrix: ``M``.
        lower: whether ``M`` is square and lower triangular, which saves time.

    Returns:
        The image of the rows; a block of k rows.
    """
    acc = accumulation_dtype(block.dtype)
    matrix = matrix.astype(acc)
    if block.shape[0] == 1:
        return jnp.tensordot(matrix, block[0].astype(acc), 1, precision="highest")[None]
    by_tiles = functools.partial(_transform_by_tiles, lower=lower)
    return lax.platform_dependent(block, matrix, cuda=transform_by_chunks, default=by_tiles)


def _transform_by_tiles(
    block: Float[Array, "t m *shape"], matrix: Float[Array, "k m"], *, lower: bool
) -> Float[Array, "t k *shape"]:
    acc = accumulation_dtype(block.dtype)
    tiles = _matrices(block)

    # Each panel is written to its final place. Concatenating the panels first would copy them
    # twice.
    def write(t: Int[Array, ""], image: Array) -> Array:
        tile = lax.dynamic_index_in_dim(tiles, t, keepdims=False).astype(acc)
        for start, panel in _panels(matrix, tile, lower):
            image = lax.dynamic_update_slice(image, panel[None], (t, start, 0))
        return image

    shape = (tiles.shape[0], matrix.shape[0], tiles.shape[2])
    image = lax.fori_loop(0, tiles.shape[0], write, _zeros(block, shape))
    return image.reshape(block.shape[0], matrix.shape[0], *block.shape[2:])


def column_square_sums(
    block: Float[Array, "t m *shape"],
    matrix: Float[Array, "k m"] | None = None,
    *,
    lower: bool = False,
) -> Float[Array, "t *shape"]:
    """``diag((M G)^T (M G))``, the squares of ``M G`` summed over its rows.

    At most a tile or a chunk of ``M G`` is in memory at a time.

    Args:
        block: ``G``.
        matrix: ``M``; the identity by default.
        lower: as in :func:`transform`.

    Returns:
        A number for each column, in the accumulation dtype.
    """
    if matrix is None:
        return _square_sums(block)
    matrix = matrix.astype(accumulation_dtype(block.dtype))
    by_tiles = functools.partial(_column_square_sums_by_tiles, lower=lower)
    return lax.platform_dependent(
        block, matrix, cuda=column_square_sums_by_chunks, default=by_tiles
    )


def _column_square_sums_by_tiles(
    block: Float[Array, "t m *shape"], matrix: Float[Array, "k m"], *, lower: bool
) -> Float[Array, "t *shape"]:
    def step(carry: None, tile: Array, _: list[Array]) -> tuple[None, list[Array]]:
        image = jnp.concatenate([panel for _, panel in _panels(matrix, tile, lower)])
        return carry, [jnp.sum(image * image, axis=0)]

    _, (sums,) = _scan_tiles(step, None, block, [])
    return sums.reshape(block.shape[0], *block.shape[2:])


# Jitted so that an eager caller does not store the squares either.
@jax.jit
def _square_sums(block: Float[Array, "t m *shape"]) -> Float[Array, "t *shape"]:
    return jnp.sum(jnp.square(block.astype(accumulation_dtype(block.dtype))), axis=1)


def _panel_ends(m: int) -> list[tuple[int, int]]:
    """The rows ``[start, end)`` of each panel."""
    count = min(max(m // _MIN_ROWS, 1), _PANELS)
    return list(itertools.pairwise(m * i // count for i in range(count + 1)))


def _panels(
    matrix: Float[Array, "k m"], tile: Float[Array, "m t"], lower: bool
) -> list[tuple[int, Float[Array, "_ t"]]]:
    """The product in panels of rows, each with the number of its first row.

    There is one panel unless ``lower`` is true.
    """
    if not lower:
        return [(0, jnp.dot(matrix, tile, precision="highest"))]
    return [
        (start, jnp.dot(matrix[start:end, :end], tile[:end], precision="highest"))
        for start, end in _panel_ends(matrix.shape[0])
    ]


def _scan_tiles(
    step: Callable[[Any, Array, list[Array]], tuple[Any, list[Array]]],
    carry: Any,
    block: Float[Array, "t m *shape"],
    vectors: list[Array],
) -> tuple[Any, list[Array]]:
    """Scans ``step(carry, tile, parts) -> (carry, outputs)`` over the tiles of a block.

    A tile is (m, k) in the accumulation dtype; only one tile is widened at a time. ``parts`` are
    the pieces of ``vectors``, (t, *_, *shape), at the columns of the tile. An output is (k,) for
    each tile; the outputs of all tiles are returned as (t, *). A block of one wide tile is cut
    into tiles, and their outputs are concatenated.
    """
    acc = accumulation_dtype(block.dtype)
    count = block.shape[0]
    matrices = _matrices(block)
    flat = _flat_columns(vectors, block)
    if count > 1:
        # The loop reads a tile by its number. A scan over the tiles themselves copies each tile
        # once more (15 % of a gram's time).
        def body(carry: Any, t: Int[Array, ""]) -> tuple[Any, list[Array]]:
            tile, *parts = (
                lax.dynamic_index_in_dim(x, t, keepdims=False) for x in (matrices, *flat)
            )
            return step(carry, tile.astype(acc), parts)

        return lax.scan(body, carry, jnp.arange(count))

    matrix, rows = matrices[0], [vector[0] for vector in flat]
    full, rest = divmod(matrix.shape[1], MAX_TILE)
    outputs: list[list[Array]] = []

    def cut(carry: Any, i: Int[Array, ""]) -> tuple[Any, list[Array]]:
        tile = lax.dynamic_slice_in_dim(matrix, i * MAX_TILE, MAX_TILE, axis=1)
        parts = [lax.dynamic_slice_in_dim(row, i * MAX_TILE, MAX_TILE, axis=-1) for row in rows]
        return step(carry, tile.astype(acc), parts)

    if full:
        carry, out = lax.scan(cut, carry, jnp.arange(full))
        outputs.append([o.reshape(1, -1) for o in out])
    if rest or not full:
        start = full * MAX_TILE
        rest_of_rows = [row[..., start:] for row in rows]
        carry, out = step(carry, matrix[:, start:].astype(acc), rest_of_rows)
        outputs.append([o[None] for o in out])
    return carry, [jnp.concatenate(parts, axis=1) for parts in zip(*outputs, strict=True)]


# On a GPU the host starts every round of a loop, and a large model has thousands of rounds. A GPU
# therefore gets one batched product of many tiles. It computes both halves of a symmetric or
# triangular product: to save one half, XLA would copy slices across the rows.


def gram_by_chunks(
    block: Float[Array, "t m *shape"], mask: Bool[Array, "t *shape"] | None = None
) -> Float[Array, "m m"]:
    """:func:`gram` as a batched product of all tiles, or of each chunk of tiles."""
    count, m = block.shape[:2]
    acc = accumulation_dtype(block.dtype)

    def step(total: Array, _: int, tiles: Array, *masks: Array) -> Array:
        for keep in masks:
            tiles = jnp.where(keep[:, None], tiles, jnp.zeros((), tiles.dtype))
        # Products of two low-precision numbers are exact, so no wide copy is needed.
        contract = (((2,), (2,)), ((0,), (0,)))
        products = lax.dot_general(
            tiles, tiles, contract, precision="highest", preferred_element_type=acc
        )
        return total + jnp.sum(products, axis=0)

    most = _LARGEST_SHARE * block.size * block.dtype.itemsize
    if mask is None and count > 1 and count * m**2 * acc.itemsize <= most:
        return step(_zeros(block, (m, m)), 0, _matrices(block))
    masks = [] if mask is None else [mask]
    return _chunk_by_chunk(step, _zeros(block, (m, m)), block, *masks)[-1]


def products_by_chunks(
    block: Float[Array, "t m *shape"],
    other: Float[Array, "t n *shape"],
    mask: Bool[Array, "t *shape"] | None = None,
) -> Float[Array, "m n"]:
    """:func:`products` as a batched product of each chunk of tiles."""
    dtype = np.promote_types(block.dtype, other.dtype)
    acc = accumulation_dtype(dtype)

    def step(total: Array, _: int, tiles: Array, beside: Array, *masks: Array) -> Array:
        for keep in masks:
            tiles = jnp.where(keep[:, None], tiles, jnp.zeros((), tiles.dtype))
        contract = (((2,), (2,)), ((0,), (0,)))
        pair = tiles.astype(dtype), beside.astype(dtype)
        found = lax.dot_general(*pair, contract, precision="highest", preferred_element_type=acc)
        return total + jnp.sum(found, axis=0)

    start = jnp.zeros_like(block, shape=(block.shape[1], other.shape[1]), dtype=acc)
    masks = [] if mask is None else [mask]
    return _chunk_by_chunk(step, start, block, other, *masks)[-1]


def transform_by_chunks(
    block: Float[Array, "t m *shape"], matrix: Float[Array, "k m"]
) -> Float[Array, "t k *shape"]:
    """:func:`transform` as one batched product, or one for each chunk if it has to be widened."""
    tiles = _matrices(block)
    shape = (block.shape[0], matrix.shape[0], tiles.shape[2])
    if block.dtype == matrix.dtype:
        image = _images(tiles, matrix)
    else:

        def step(image: Array, start: int, part: Array) -> Array:
            return lax.dynamic_update_slice(image, _images(part, matrix), (start, 0, 0))

        image = _chunk_by_chunk(step, _zeros(block, shape), block)[-1]
    return image.reshape(*shape[:2], *block.shape[2:])


def column_square_sums_by_chunks(
    block: Float[Array, "t m *shape"], matrix: Float[Array, "k m"]
) -> Float[Array, "t *shape"]:
    """:func:`column_square_sums` as a batched product of each chunk of tiles."""

    def step(_: Array, __: int, tiles: Array) -> Array:
        return jnp.sum(_images(tiles, matrix) ** 2, axis=1)

    sums = _chunk_by_chunk(step, _zeros(block, ()), block)
    flat = jnp.concatenate([part.reshape(-1) for part in sums])
    return flat.reshape(block.shape[0], *block.shape[2:])


def _images(tiles: Float[Array, "c m k"], matrix: Float[Array, "j m"]) -> Float[Array, "c j k"]:
    """``M G`` for every tile. ``M`` is repeated; otherwise XLA would transpose the tiles."""
    repeated = jnp.broadcast_to(matrix, (tiles.shape[0], *matrix.shape))
    return jnp.matmul(repeated, tiles.astype(matrix.dtype), precision="highest")


def _chunk_by_chunk(
    step: Callable[..., Array], carry: Array, block: Float[Array, "t m *shape"], *vectors: Array
) -> list[Array]:
    """All values of ``carry = step(carry, start, tiles, *parts)`` over a few chunks of tiles.

    ``tiles`` are (c, m, k), beginning with tile ``start``. ``parts`` are the pieces of
    ``vectors``, (t, *_, *shape), at the columns of these tiles. A block of one wide tile is cut
    into tiles.
    """
    count = block.shape[0]
    arrays = [_matrices(block), *_flat_columns(list(vectors), block)]
    columns = arrays[0].shape[2]
    tiles = count if count > 1 else columns // MAX_TILE
    size = max(-(-tiles // _CHUNKS), 1)
    cut = _some_tiles if count > 1 else _some_columns
    chunks: list[tuple[int, Callable[[Array], Array]]] = [
        (start, functools.partial(cut, start=start, stop=min(start + size, tiles)))
        for start in range(0, tiles, size)
    ]
    if count == 1 and (columns % MAX_TILE or not tiles):
        chunks.append((tiles, lambda array: array[..., tiles * MAX_TILE :]))
    carries = []
    for start, chunk in chunks:
        # A chunk waits for the previous one. Otherwise all chunks could be in memory at once.
        arrays, carry = lax.optimization_barrier((arrays, carry))
        carry = step(carry, start, *map(chunk, arrays))
        carries.append(carry)
    return carries


def _some_tiles(array: Array, *, start: int, stop: int) -> Array:
    return array[start:stop]


def _some_columns(array: Array, *, start: int, stop: int) -> Array:
    """Tiles ``start`` to ``stop`` of the columns of a single wide tile."""
    wide = array[0, ..., start * MAX_TILE : stop * MAX_TILE]
    return jnp.moveaxis(wide.reshape(*wide.shape[:-1], stop - start, MAX_TILE), -2, 0)
