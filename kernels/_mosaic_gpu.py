"""The scans for Hopper GPUs, written with Pallas's Mosaic GPU backend.

``G`` passes once, in the patches of ``_mosaic_gpu_stream``. Products are added up where
they arise, in the registers of each thread; sums across threads are taken once for many
patches. Thread blocks share the work out in equal parts, whatever the shape.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax.kernels._mosaic_gpu_stream import (
    LANES,
    LAYOUT,
    PER_ROW,
    ROWS,
    Stream,
    View,
    div_rem,
    index,
    launch,
    loop,
    parts,
    per_column,
    share,
    store,
    tile_of,
    varying,
    zeros,
)

# Thread blocks of a launch: two for each of the 132 multiprocessors of an H100 or H200,
# so that one computes while the other waits. The result is right for any number; GPUs
# with fewer multiprocessors run them in turn.
_BLOCKS = 264

# Slabs whose products are added up in registers before their sums go to memory, at two
# sizes: the large one keeps these sums, and so their traffic, below 0.1 % of G; the small
# one is for blocks that would otherwise leave fewer than _UNITS pieces of work for each
# thread block, and some idle at the end.
_SLABS = (32, 8)
_UNITS = 16

_PIECES = 8  # pieces of LANES columns of a new row that are on their way at once

_OUTPUTS = tuple(np.dtype(kind) for kind in (jnp.float32, jnp.bfloat16, jnp.float16))


def unsupported(shape: tuple[int, ...], dtype: DTypeLike) -> str | None:
    """Why these kernels cannot scan a block of ``shape`` and ``dtype``; None if they can."""
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(jnp.float32), np.dtype(jnp.bfloat16)):
        return f"the kernels for GPUs need float32 or bfloat16 gradients, got {dtype}"
    if len(shape) not in (2, 3) or 0 in shape:
        return f"the kernels for GPUs need a block ([t,] m, k) that is not empty, got {shape}"
    view = View.of(shape, dtype)
    if view.t > 1 and view.k % 16:
        return f"the kernels for GPUs need tiles of a multiple of 16 columns, got {shape}"
    if view.shape[-1] > 2**31 - 2**16:  # some room for the end of the last chunk
        return (
            "the kernels for GPUs address rows (all rows as one where their length and number "
            f"leave them unaligned) with 32 bits, got a block {shape}"
        )
    return None


def _place(view: View, row: Array, where: Array) -> Int[Array, "2"]:
    """Where the view has ``row``: row of the view (-1 for nowhere), and which of the q in it."""
    line, which = div_rem(jnp.clip(row, 0, view.m - 1), view.interleave)
    return jnp.stack([jnp.where(where, line, -1), which])


def _find(view: View, place_ref: Any, row_block: Array) -> Array:
    """Which row of ``row_block`` is the one at ``place_ref``; negative or too large: none."""
    which, group = div_rem(row_block, view.groups)
    here = (place_ref[0] >= 0) & (place_ref[1] == which)
    return jnp.where(here, place_ref[0] - group * ROWS, -1)


def _write(
    view: View,
    block_ref: Any,
    vector_ref: Any,
    place_ref: Any,
    where: tuple[Array, Array],
    width: int,
) -> None:
    """Writes ``width`` columns of the new row from ``where`` on: tile, first column.

    A thread writes single entries, since a row may start anywhere. The last piece is
    moved back to end with the row; what it writes twice is the same.
    """
    tile, column = where
    line, which = place_ref[0], place_ref[1]
    if view.flat:
        row_ref, origin = block_ref, line * view.k
    else:
        row_ref = block_ref.at[line] if view.t == 1 else block_ref.at[tile, line]
        origin = which * view.k

    if view.k < LANES:

        @loop(0, view.k)
        def _(i: Array) -> None:
            value = vector_ref[i] if view.t == 1 else vector_ref[tile, i]
            store(row_ref.at[origin + i], value)

        return
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)

    # Several pieces at once, since each has to come from memory first.
    @loop(0, pl.cdiv(width, _PIECES * LANES))
    def _(i: Array) -> None:
        starts = [column + (i * _PIECES + j) * LANES for j in range(_PIECES)]
        starts = [jnp.minimum(start, view.k - LANES) for start in starts]
        pieces = [view.columns(vector_ref, tile, start, LANES)[...] for start in starts]
        pieces = [plgpu.layout_cast(piece, layout) for piece in pieces]
        for start, piece in zip(starts, pieces, strict=True):
            store(row_ref.at[pl.ds(origin + start, LANES)], piece)


def _dots(
    block: Float[Array, "*t m k"],
    vector: Float[Array, "*t k"],
    target: tuple[Array, Array] | None,
    *,
    compensated: bool,
    interpret: bool,
) -> tuple[Float[Array, "*t m k"], Float[Array, " m"]]:
    """The block and its ``G v``.

    With ``target``, a row and whether to write it, the row is first replaced by ``v``.
    """
    view = View.of(block.shape, block.dtype)
    # A piece of work is a chunk of a tile's columns of a row block.
    most = next(
        (n for n in _SLABS if view.t * view.slabs * view.row_blocks >= n * _UNITS * _BLOCKS),
        _SLABS[-1],
    )
    chunks = pl.cdiv(view.slabs, most)
    slabs = pl.cdiv(view.slabs, chunks)
    width = slabs * view.slab
    units = view.t * chunks * view.row_blocks
    blocks = min(_BLOCKS, units)
    words = 2 if compensated else 1  # in which a float64 sum leaves the kernel

    def body(block_ref: Any, vector_ref: Any, *refs: Any) -> None:
        *place_refs, out_ref, patch_ref, piece_ref, barrier = refs
        first, last = share(units, blocks)

        def locate(step: Array) -> tuple[tuple[Array, Array, Array], Any]:
            unit, slab = div_rem(step, slabs)
            chunk, row_block = div_rem(first + unit, view.row_blocks)
            tile, part = div_rem(chunk, chunks)
            column = part * width + slab * view.slab
            return (tile, row_block, column), view.columns(vector_ref, tile, column, view.slab)

        steps = (last - first) * slabs
        stream = Stream(view, block_ref, (patch_ref, piece_ref, barrier), steps, locate)

        @loop(first, last)
        def _(unit: Array) -> None:
            chunk, row_block = div_rem(unit, view.row_blocks)
            tile, part = div_rem(chunk, chunks)
            start = part * width
            new = None
            if place_refs:
                row = _find(view, place_refs[0], row_block)
                new = index(0) == row

            def add(slab: Array, total: Array) -> Array:
                step = (unit - first) * slabs + slab
                patch_ref, piece_ref = stream.take(step)
                for part in parts(view):
                    v = per_column(piece_ref, part)
                    entries = plgpu.layout_cast(patch_ref[:, part], LAYOUT).astype(jnp.float32)
                    if view.bleeds:
                        end = view.k - (start + slab * view.slab + part.start)
                        entries = jnp.where(index(1) < end, entries, 0.0)
                    if new is not None:
                        entries = jnp.where(new, tile_of(v, 1), entries)
                    with jax.enable_x64(compensated):
                        wide = total.dtype
                        total += entries.astype(wide) * tile_of(v.astype(wide), 1)
                stream.free(step)
                return total

            with jax.enable_x64(compensated):
                total = zeros(jnp.float64 if compensated else jnp.float32)
            total = lax.fori_loop(np.int32(0), np.int32(slabs), add, total)

            # Now that what it replaces has come and gone. Patches that reach over the end
            # of another row may still be reading of this one what they mask.
            if new is not None:

                @pl.when((row >= 0) & (row < ROWS))
                def _() -> None:
                    _write(view, block_ref, vector_ref, place_refs[0], (tile, start), width)

            with jax.enable_x64(compensated):
                total = jnp.sum(total, axis=1)
                for word in range(words):
                    value = total.astype(jnp.float32)
                    total -= value.astype(total.dtype)
                    store(out_ref.at[chunk, word, pl.ds(row_block * ROWS, ROWS)], value)

    out = jax.ShapeDtypeStruct(
        (view.t * chunks, words, view.row_blocks * ROWS),
        jnp.float32,
        manual_axis_type=varying(block, vector),
    )
    scratch = Stream.scratch(view, block.dtype, view.slab, vector.dtype)
    seen, row = block.reshape(view.shape), vector.reshape(view.row_shape)
    if target is None:
        partial = launch(body, "mfac_dots", blocks, out, scratch, interpret)(seen, row)
    else:
        run = launch(body, "mfac_write_row", blocks, out, scratch, interpret)
        place = _place(view, *target)

        # Not jax.new_ref: in jax 0.10 its Refs do not work inside a custom_vmap.
        def change(refs: tuple[Any, Any]) -> None:
            refs[1][...] = run(refs[0], row, place)

        seen, partial = pl.run_state(change)((seen, jnp.zeros(out.shape, out.dtype)))
        block = seen.reshape(block.shape)
    with jax.enable_x64(compensated):
        partial = partial.astype(jnp.float64 if compensated else jnp.float32)
        return block, view.by_row(jnp.sum(partial, axis=(0, 1)).astype(jnp.float32))


def _combine(
    block: Float[Array, "*t m k"],
    coefficients: Float[Array, " m"],
    epilogue: dict[str, Array],
    dtype: np.dtype,
    interpret: bool,
) -> Float[Array, "*t k"]:
    """:func:`combine` with what it does at the end: vector, mask (int8) and scale (1,)."""
    view = View.of(block.shape, block.dtype)
    units = view.t * view.slabs
    blocks = min(_BLOCKS, units)
    fetched = [name for name in epilogue if name != "scale"]  # for each column a value

    def body(block_ref: Any, weights_ref: Any, *refs: Any) -> None:
        given, (out_ref, *refs_left) = refs[: len(epilogue)], refs[len(epilogue) :]
        operand_refs = dict(zip(epilogue, given, strict=True))
        *stream_refs, result_ref, ready = refs_left[:5]
        held_refs = dict(zip(fetched, refs_left[5:], strict=True))
        first, last = share(units, blocks)

        def locate(step: Array) -> tuple[tuple[Array, Array, Array], Any]:
            unit, row_block = div_rem(step, view.row_blocks)
            tile, slab = div_rem(first + unit, view.slabs)
            return (tile, row_block, slab * view.slab), weights_ref.at[
                pl.ds(row_block * ROWS, ROWS)
            ]

        steps = (last - first) * view.row_blocks
        stream = Stream(view, block_ref, stream_refs, steps, locate)

        @loop(first, last)
        def _(unit: Array) -> None:
            tile, slab = div_rem(unit, view.slabs)
            column = slab * view.slab
            for name, ref in held_refs.items():
                source = view.columns(operand_refs[name], tile, column, view.slab)
                plgpu.copy_gmem_to_smem(source, ref, ready)

            def add(row_block: Array, totals: list[Array]) -> list[Array]:
                step = (unit - first) * view.row_blocks + row_block
                patch_ref, piece_ref = stream.take(step)
                weights = tile_of(plgpu.layout_cast(piece_ref[...], PER_ROW), 0)
                totals = list(totals)
                for i, part in enumerate(parts(view)):
                    entries = plgpu.layout_cast(patch_ref[:, part], LAYOUT)
                    totals[i] += entries.astype(jnp.float32) * weights
                stream.free(step)
                return totals

            totals = [zeros(jnp.float32) for _ in parts(view)]
            totals = lax.fori_loop(np.int32(0), np.int32(view.row_blocks), add, totals)
            if held_refs:
                plgpu.barrier_wait(ready)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # result_ref is free again
            for part, total in zip(parts(view), totals, strict=True):
                result = jnp.sum(total, axis=0)
                if "vector" in epilogue:
                    result = per_column(held_refs["vector"], part) - result
                if "scale" in epilogue:
                    result *= operand_refs["scale"][0]
                if "mask" in epilogue:
                    result = jnp.where(per_column(held_refs["mask"], part) != 0, result, 0.0)
                store(result_ref.at[part], result.astype(dtype))
            plgpu.commit_smem()
            for part in parts(view):
                start = column + np.int32(part.start)

                @pl.when(start < view.k)
                def _(part: Any = part, start: Array = start) -> None:
                    target = view.columns(out_ref, tile, start, LANES)
                    plgpu.copy_smem_to_gmem(result_ref.at[part], target)

        plgpu.wait_smem_to_gmem(0)

    scratch = [
        *Stream.scratch(view, block.dtype, ROWS, jnp.float32),
        plgpu.SMEM((view.slab,), dtype),
        plgpu.Barrier(num_arrivals=max(len(fetched), 1)),
        *(plgpu.SMEM((view.slab,), epilogue[name].dtype) for name in fetched),
    ]
    out = jax.ShapeDtypeStruct(
        view.written_shape,
        dtype,
        manual_axis_type=varying(block, coefficients, *epilogue.values()),
    )
    operands = [
        operand.reshape(view.row_shape) if name in fetched else operand
        for name, operand in epilogue.items()
    ]
    result = launch(body, "mfac_combine", blocks, out, scratch, interpret)(
        block.reshape(view.shape), view.by_row_block(coefficients), *operands
    )
    return result.reshape(*block.shape[:-2], -1)[..., : view.k]


def dots(
    block: Float[Array, "*t m k"],
    vector: Float[Array, "*t k"],
    *,
    compensated: bool = False,
    interpret: bool = False,
) -> Float[Array, " m"]:
    """``G v``. With ``compensated``, products and sums are those of float64.

    The float64 units of an H100 or H200 keep up with its memory: it reads nothing more.
    """
    vector = vector.astype(jnp.float32)
    return _dots(block, vector, None, compensated=compensated, interpret=interpret)[1]


def write_row(
    block: Float[Array, "*t m k"],
    row: Int[Array, ""],
    vector: Float[Array, "*t k"],
    where: Bool[Array, ""],
    *,
    compensated: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "*t m k"], Float[Array, " m"]]:
    """Writes ``vector`` into ``row`` where ``where`` is true; that block and its ``G g``."""
    scan = functools.partial(_dots, compensated=compensated, interpret=interpret)
    row, vector = row.astype(jnp.int32), vector.astype(block.dtype)
    if not jax.typeof(block).manual_axis_type.varying:
        return scan(block, vector, (row, where))
    # The kernel changes a block through a Ref, which must not vary over a mesh.
    axis = block.ndim - 2
    old = lax.dynamic_index_in_dim(block, row, axis, keepdims=False)
    new = jnp.where(where, vector, old)
    return scan(lax.dynamic_update_index_in_dim(block, new, row, axis), vector, None)


def combine(
    block: Float[Array, "*t m k"],
    coefficients: Float[Array, " m"],
    *,
    vector: Float[Array, "*t k"] | None = None,
    scale: Float[Array, ""] | None = None,
    mask: Bool[Array, "*t k"] | None = None,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> Float[Array, "*t k"]:
    """``G^T c``, or ``(vector - G^T c)``, times ``scale``; zero where ``mask`` is false."""
    dtype = np.dtype(jnp.float32 if dtype is None else dtype)
    inside = dtype if dtype in _OUTPUTS else np.dtype(jnp.float32)
    epilogue = {
        "vector": None if vector is None else vector.astype(jnp.float32),
        "mask": None if mask is None else mask.astype(jnp.int8),
        "scale": None if scale is None else scale.astype(jnp.float32).reshape(1),
    }
    given = {name: value for name, value in epilogue.items() if value is not None}
    coefficients = coefficients.astype(jnp.float32)
    return _combine(block, coefficients, given, inside, interpret).astype(dtype)
