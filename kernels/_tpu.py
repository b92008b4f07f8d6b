"""The scans as Pallas kernels for TPUs.

Memory bandwidth limits all three kernels. A block passes once through VMEM, tile by tile. The
vector unit multiplies and adds in float32 while the next tile arrives. Sums stay in vector lanes,
so they are as accurate as a sum of ``d / 128`` terms. The reduction over the lanes comes last.

A tile may extend beyond the end of the block. The entries there are undefined, perhaps NaN. A
select removes them from every product.

The kernels read a block row by row. XLA lays an array out by columns if that needs less padding,
which is the case if m is a multiple of 128 and k is not. It then copies the whole block for each
kernel. Tiles of a multiple of 128 columns avoid this.

Vectors are passed and returned as float32 (t, 1, k). In memory this is the vector of all t k
numbers, so no copy is needed. Narrower numbers would be padded to 4 bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

_LANES = 128

# A tile of dots and write_row. 256 x 2,048 float32 numbers take 2 MiB, and 4 MiB with the next
# tile. That is a quarter of the VMEM that a kernel may use. 8 rows of a tile lie together in HBM
# and take 64 KiB, long enough for a DMA at full bandwidth.
_DOTS_ROWS = 256
_DOTS_COLUMNS = 2048

# A tile of combine, of the same size. It is tall, so the coefficients of a window of the usual size
# are loaded once.
_COMBINE_ROWS = 512
_COMBINE_COLUMNS = 1024

# Rows of one round of a loop. 8 vector registers of independent sums hide one another's latency
# and share one load of the vector. There are 64 registers.
_GROUP = 64


def unsupported(shape: tuple[int, ...], dtype: DTypeLike) -> str | None:
    """Why these kernels cannot scan a block of ``shape`` and ``dtype``; None if they can."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels need float32 or bfloat16 gradients, got {dtype.name}"
    if len(shape) != 3 or 0 in shape:
        # A block with more axes would be copied, because memory groups the last two axes.
        return f"the TPU kernels need a block (t, m, k) that is not empty, got shape {shape}"
    return None


def dots(
    block: Float[Array, "t m k"],
    vector: Float[Array, "t k"],
    *,
    interpret: bool = False,
) -> Float[Array, " m"]:
    """``G v``."""
    count, m, width = block.shape
    block, vector = _vary_alike(block, vector.astype(jnp.float32))
    rows, columns = _tile(block, _DOTS_ROWS, _DOTS_COLUMNS)
    steps = pl.cdiv(width, columns)
    out = _call(
        functools.partial(_dots_kernel, width=width),
        out_shape=_like(block, (m, 1), jnp.float32),
        grid=(pl.cdiv(m, rows), count, steps),
        in_specs=[
            pl.BlockSpec((None, rows, columns), lambda i, t, k: (t, i, k)),
            pl.BlockSpec((None, 1, columns), lambda _, t, k: (t, 0, k)),
        ],
        out_specs=pl.BlockSpec((rows, 1), lambda i, *_: (i, 0)),
        scratch_shapes=[pltpu.VMEM((rows, _LANES), jnp.float32)],
        name="mfac_dots",
        interpret=interpret,
    )(block, vector[:, None])
    return out[:, 0]


def write_row(
    block: Float[Array, "t m k"],
    row: Int[Array, ""],
    vector: Float[Array, "t k"],
    where: Bool[Array, ""],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "t m k"], Float[Array, " m"]]:
    """Writes ``vector`` into ``row`` in place and returns the block and that row's ``G g``.

    HBM holds rows in groups, as many as a vector register has sublanes: 8 in float32, 16 in
    bfloat16. The kernel therefore writes back the whole group of ``row``.
    """
    count, m, width = block.shape
    row, where = row.astype(jnp.int32), where.astype(jnp.int32)
    # XLA may drop a conversion to the block's dtype and back, but not reduce_precision.
    stored = jnp.finfo(block.dtype)
    vector = lax.reduce_precision(vector.astype(jnp.float32), stored.nexp, stored.nmant)
    block, row, vector, where = _vary_alike(block, row, vector, where)
    rows, columns = _tile(block, _DOTS_ROWS, _DOTS_COLUMNS)
    group = _sublanes(block.dtype)
    steps = pl.cdiv(width, columns)
    if interpret:
        # The simulator needs aliased arrays to be whole tiles.
        tail = ((0, 0), (0, -m % rows), (0, -width % columns))
        block = jnp.pad(block, tail, constant_values=jnp.nan)

    def written(i: Array, t: Array, k: Array, state: jax.Ref) -> tuple[Array, Array, Array]:
        # A piece of the group is written back when the index names another piece. So the index
        # names the first piece until the kernel reaches the group's rows, and the last piece
        # after them. Every piece is written.
        home = lax.div(state[0], rows)

        def clamp(index: Array, last: int) -> Array:
            return jnp.where(i < home, 0, jnp.where(i > home, last, index))

        return clamp(t, count - 1), lax.div(state[0], group), clamp(k, steps - 1)

    block, out = _call(
        functools.partial(_write_row_kernel, width=width),
        out_shape=(_like(block, block.shape, block.dtype), _like(block, (m, 1), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(m, rows), count, steps),
            in_specs=[
                pl.BlockSpec((None, rows, columns), lambda i, t, k, _: (t, i, k)),
                pl.BlockSpec((None, 1, columns), lambda _, t, k, __: (t, 0, k)),
            ],
            out_specs=(
                pl.BlockSpec((None, group, columns), written),
                pl.BlockSpec((rows, 1), lambda i, *_: (i, 0)),
            ),
            scratch_shapes=[pltpu.VMEM((rows, _LANES), jnp.float32)],
        ),
        input_output_aliases={1: 0},
        name="mfac_write_row",
        interpret=interpret,
    )(jnp.stack([row, where]), block, vector[:, None])
    return block[:, :m, :width], out[:, 0]


def combine(
    block: Float[Array, "t m k"],
    coefficients: Float[Array, " m"],
    *,
    vector: Float[Array, "t k"] | None = None,
    scale: Float[Array, ""] | None = None,
    interpret: bool = False,
) -> Float[Array, "t k"]:
    """``G^T c``, or ``v - G^T c``; times ``scale``."""
    count, m, width = block.shape
    rows, columns = _tile(block, _COMBINE_ROWS, _COMBINE_COLUMNS)
    tiles, padded = pl.cdiv(m, rows), _round_up(rows, _LANES)
    coefficients = jnp.pad(coefficients.astype(jnp.float32), (0, tiles * rows - m))
    coefficients = jnp.pad(coefficients.reshape(tiles, rows), ((0, 0), (0, padded - rows)))

    across = pl.BlockSpec((None, 1, columns), lambda t, k, _: (t, 0, k))
    operands = [coefficients.reshape(1, tiles * padded), block]
    in_specs = [
        pl.BlockSpec((1, padded), lambda _, __, i: (0, i)),
        pl.BlockSpec((None, rows, columns), lambda t, k, i: (t, i, k)),
    ]
    if vector is not None:
        operands.append(vector.astype(jnp.float32)[:, None])
        in_specs.append(across)
    if scale is not None:
        operands.append(scale.astype(jnp.float32).reshape(1, 1))
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    operands = list(_vary_alike(*operands))
    out = _call(
        functools.partial(
            _combine_kernel,
            m=m,
            subtract=vector is not None,
            scaled=scale is not None,
        ),
        out_shape=_like(operands[0], (count, 1, width), jnp.float32),
        grid=(count, pl.cdiv(width, columns), tiles),
        in_specs=in_specs,
        out_specs=across,
        scratch_shapes=[
            pltpu.VMEM((padded, _LANES), jnp.float32),
            pltpu.VMEM((_sublanes(block.dtype), columns), jnp.float32),
        ],
        name="mfac_combine",
        interpret=interpret,
    )(*operands)
    return out[:, 0]


def _sublanes(dtype: DTypeLike) -> int:
    """The number of rows that one vector register holds."""
    return 32 // jnp.dtype(dtype).itemsize


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _tile(block: Float[Array, "t m k"], rows: int, columns: int) -> tuple[int, int]:
    """The shape of a tile: at most this many rows and columns, fewer for a small block."""
    _, m, width = block.shape
    return min(rows, _round_up(m, _sublanes(block.dtype))), min(columns, _round_up(width, _LANES))


def _call(kernel: Callable[..., None], *, interpret: bool, **options: Any) -> Callable[..., Any]:
    """``pl.pallas_call`` with indices of 32 bits, in the simulator if ``interpret`` is true."""
    simulator = pltpu.InterpretParams() if interpret else False

    def run(*operands: Shaped[Array, "..."]) -> Any:
        with jax.enable_x64(False):
            return pl.pallas_call(kernel, interpret=simulator, **options)(*operands)

    return run


def _vary_alike(*arrays: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], ...]:
    """The arrays, made to vary over every mesh axis over which one of them varies."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset[str]().union(*axes)
    return tuple(
        lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    )


def _like(
    array: Shaped[Array, "..."], shape: tuple[int, ...], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """A result that varies over the same mesh axes as ``array``."""
    mesh_axes = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=mesh_axes)


def _add_tile(
    g_ref: jax.Ref,
    v_ref: jax.Ref,
    out_ref: jax.Ref,
    sums: jax.Ref,
    width: int,
    new_row: Int[Array, ""] | None = None,
) -> None:
    """Adds the products of a tile to the sums of its rows; the last tile writes the sums out.

    ``new_row`` is an index in the tile. The vector replaces that row.
    """
    rows, columns = g_ref.shape
    group = math.gcd(rows, _GROUP)
    t, k = pl.program_id(1), pl.program_id(2)

    @pl.when((t == 0) & (k == 0))
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    lane = lax.broadcasted_iota(jnp.int32, (group, _LANES), 1) + k * columns
    sublane = lax.broadcasted_iota(jnp.int32, (group, _LANES), 0)

    @pl.loop(0, rows // group)
    def _(step: Int[Array, ""]) -> None:
        first = pl.multiple_of(step * group, group)
        part = pl.ds(first, group)
        total = jnp.zeros((group, _LANES), jnp.float32)
        for start in range(0, columns, _LANES):
            piece = pl.ds(start, _LANES)
            inside = lane < width - start
            v = jnp.broadcast_to(v_ref[:, piece], inside.shape)
            g = g_ref[part, piece].astype(jnp.float32)
            if new_row is not None:
                g = jnp.where(sublane + first == new_row, v, g)
            total += jnp.where(inside, g, 0.0) * jnp.where(inside, v, 0.0)
        sums[part, :] += total

    @pl.when((t == pl.num_programs(1) - 1) & (k == pl.num_programs(2) - 1))
    def _() -> None:
        total = sums[...]
        distance = _LANES // 2
        while distance:  # until every lane holds the sum over all lanes
            total += pltpu.roll(total, distance, 1)
            distance //= 2
        out_ref[...] = total[:, :1]


def _dots_kernel(
    g_ref: jax.Ref, v_ref: jax.Ref, out_ref: jax.Ref, sums: jax.Ref, *, width: int
) -> None:
    _add_tile(g_ref, v_ref, out_ref, sums, width)


def _write_row_kernel(
    state: jax.Ref,
    g_ref: jax.Ref,
    v_ref: jax.Ref,
    group_ref: jax.Ref,
    out_ref: jax.Ref,
    sums: jax.Ref,
    *,
    width: int,
) -> None:
    row, where = state[0], state[1] != 0
    rows, group = g_ref.shape[0], group_ref.shape[0]
    new_row = row - pl.program_id(0) * rows
    _add_tile(g_ref, v_ref, out_ref, sums, width, jnp.where(where, new_row, -1))

    @pl.when((new_row >= 0) & (new_row < rows))
    def _() -> None:
        first = pl.multiple_of(lax.div(new_row, group) * group, group)
        old = g_ref[pl.ds(first, group), :]

        @pl.when(where)
        def _() -> None:
            new = jnp.broadcast_to(v_ref[...].astype(old.dtype), old.shape)
            sublane = lax.broadcasted_iota(jnp.int32, old.shape, 0)
            group_ref[...] = jnp.where(sublane == new_row - first, new, old)

        @pl.when(~where)
        def _() -> None:  # a select might change the bits of a NaN
            group_ref[...] = old


def _combine_kernel(
    c_ref: jax.Ref,
    g_ref: jax.Ref,
    *refs: jax.Ref,
    m: int,
    subtract: bool,
    scaled: bool,
) -> None:
    *optional, out_ref, c_rows, acc = refs
    inputs = iter(optional)
    rows = g_ref.shape[0]
    group, sublanes = math.gcd(rows, _GROUP), acc.shape[0]
    i = pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    # The coefficients lie along lanes. Each row needs its coefficient in every lane.
    c_rows[...] = jnp.broadcast_to(c_ref[...], (_LANES, c_ref.shape[1])).T
    sublane = lax.broadcasted_iota(jnp.int32, acc.shape, 0) + i * rows

    def add_rows(step: Int[Array, ""], total: Array) -> Array:
        for start in range(0, group, sublanes):
            first = pl.multiple_of(step * group + start, sublanes)
            part = pl.ds(first, sublanes)
            g = jnp.where(sublane < m - first, g_ref[part, :].astype(jnp.float32), 0.0)
            total += g * c_rows[part, :1]
        return total

    zero = jnp.zeros(acc.shape, jnp.float32)
    acc[...] += lax.fori_loop(0, rows // group, add_rows, zero)

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        out = jnp.sum(acc[...], axis=0, keepdims=True)
        if subtract:
            out = next(inputs)[...] - out
        if scaled:
            out *= next(inputs)[0, 0]
        out_ref[...] = out
