"""The scans for Hopper and Blackwell GPUs, written with Pallas's Mosaic GPU backend.

A kernel reads ``G`` once, in the patches of ``_mosaic_gpu_stream``. Each thread adds up products
in its own registers. Sums across threads are taken once for many patches. Thread blocks get equal
parts of the work for every shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from mfac_jax.kernels.backends import Backend

# The range of compute capabilities, without its end, that have the asynchronous copies and the
# 200 KiB of shared memory that the kernels use. Blackwell for workstations (12.0) has half of it.
_CAPABILITIES = (9.0, 11.0)

# Thread blocks of a launch: two for each of the 132 multiprocessors of an H100 or H200. One
# computes while the other waits. The result is right for any number; a GPU with fewer
# multiprocessors runs them in turn.
_BLOCKS = 264

# The number of slabs whose products are added up in registers before the sums go to memory. The
# large number keeps the traffic of the sums below 0.1 % of G. The small number is for blocks that
# would otherwise have fewer than _UNITS pieces of work for each thread block. Some thread blocks
# would then be idle at the end.
_SLABS = (32, 8)
_UNITS = 16

# Rows have a multiple of so many columns: in every dtype, the copies of a row then start at
# multiples of 16 bytes. Other rows are left to XLA.
_COLUMNS = 16

_PIECES = 8  # pieces of LANES columns of a new row that are in flight at once


def unsupported(shape: tuple[int, ...], dtype: DTypeLike) -> str | None:
    """Why these kernels cannot scan a block of ``shape`` and ``dtype``; None if they can."""
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(jnp.float32), np.dtype(jnp.bfloat16)):
        return f"the kernels for GPUs need float32 or bfloat16 gradients, got {dtype}"
    if len(shape) not in (2, 3) or 0 in shape:
        return f"the kernels for GPUs need a block ([t,] m, k) that is not empty, got {shape}"
    if shape[-1] % _COLUMNS:
        return f"the kernels for GPUs need rows of a multiple of {_COLUMNS} columns, got {shape}"
    if shape[-1] > 2**31 - 2**16:  # leaves room for the end of the last chunk
        return f"the kernels for GPUs address rows with 32 bits, got a block {shape}"
    return None


def _place(row: Array, where: Array) -> Int[Array, "1"]:
    """``row``, or -1 if it is not to be written."""
    return jnp.where(where, row, -1)[None]


def _write(
    view: View,
    block_ref: Any,
    vector_ref: Any,
    place_ref: Any,
    where: tuple[Array, Array],
    width: int,
) -> None:
    """Writes ``width`` columns of the new row, beginning at ``where``: tile, first column.

    A thread writes single entries. The last piece moves back so that it ends with the row. It
    writes some entries twice, with the same values.
    """
    tile, column = where
    row_ref = block_ref.at[place_ref[0]] if view.t == 1 else block_ref.at[tile, place_ref[0]]

    if view.k < LANES:

        @loop(0, view.k)
        def _(i: Array) -> None:
            value = vector_ref[i] if view.t == 1 else vector_ref[tile, i]
            store(row_ref.at[i], value)

        return
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)

    # Several pieces are in flight at once, because each must first arrive from memory.
    @loop(0, pl.cdiv(width, _PIECES * LANES))
    def _(i: Array) -> None:
        starts = [column + (i * _PIECES + j) * LANES for j in range(_PIECES)]
        starts = [jnp.minimum(start, view.k - LANES) for start in starts]
        pieces = [view.columns(vector_ref, tile, start, LANES)[...] for start in starts]
        pieces = [plgpu.layout_cast(piece, layout) for piece in pieces]
        for start, piece in zip(starts, pieces, strict=True):
            store(row_ref.at[pl.ds(start, LANES)], piece)


def _dots(
    block: Float[Array, "*t m k"],
    vector: Float[Array, "*t k"],
    target: tuple[Array, Array] | None,
    interpret: bool,
) -> tuple[Float[Array, "*t m k"], Float[Array, " m"]]:
    """The block and its ``G v``.

    ``target`` is a row and whether to write it; ``v`` then replaces the row first.
    """
    view = View.of(block.shape, block.dtype)
    # A piece of work is one row block in one chunk of a tile's columns.
    most = next(
        (n for n in _SLABS if view.t * view.slabs * view.row_blocks >= n * _UNITS * _BLOCKS),
        _SLABS[-1],
    )
    chunks = pl.cdiv(view.slabs, most)
    slabs = pl.cdiv(view.slabs, chunks)
    width = slabs * view.slab
    units = view.t * chunks * view.row_blocks
    blocks = min(_BLOCKS, units)

    def body(block_ref: Any, vector_ref: Any, *refs: Any) -> None:
        *place_refs, out_ref, patch_ref, piece_ref, barrier = refs
        first, last = share(units, blocks)

        def locate(step: Array) -> tuple[Any, Any]:
            unit, slab = div_rem(step, slabs)
            chunk, row_block = div_rem(first + unit, view.row_blocks)
            tile, part = div_rem(chunk, chunks)
            column = part * width + slab * view.slab
            patch = view.patch(block_ref, tile, row_block, column)
            return patch, view.columns(vector_ref, tile, column, view.slab)

        steps = (last - first) * slabs
        stream = Stream((patch_ref, piece_ref, barrier), steps, locate)

        @loop(first, last)
        def _(unit: Array) -> None:
            chunk, row_block = div_rem(unit, view.row_blocks)
            tile, part = div_rem(chunk, chunks)
            start = part * width
            new = None
            if place_refs:
                row = place_refs[0][0] - row_block * ROWS
                new = index(0) == row

            def add(slab: Array, total: Array) -> Array:
                step = (unit - first) * slabs + slab
                patch_ref, piece_ref = stream.take(step)
                for part in parts(view):
                    v = per_column(piece_ref, part)
                    entries = plgpu.layout_cast(patch_ref[:, part], LAYOUT).astype(jnp.float32)
                    if new is not None:
                        entries = jnp.where(new, tile_of(v, 1), entries)
                    total += entries * tile_of(v, 1)
                stream.free(step)
                return total

            total = lax.fori_loop(np.int32(0), np.int32(slabs), add, zeros())

            # The old row has been read by now.
            if new is not None:

                @pl.when((row >= 0) & (row < ROWS))
                def _() -> None:
                    _write(view, block_ref, vector_ref, place_refs[0], (tile, start), width)

            sums = jnp.sum(total, axis=1)
            store(out_ref.at[chunk, pl.ds(row_block * ROWS, ROWS)], sums)

    out = jax.ShapeDtypeStruct(
        (view.t * chunks, view.row_blocks * ROWS),
        jnp.float32,
        manual_axis_type=varying(block, vector),
    )
    scratch = Stream.scratch(view, block.dtype, view.slab, vector.dtype)
    seen, row = block.reshape(view.shape), vector.reshape(view.row_shape)
    if target is None:
        partial = launch(body, "mfac_dots", blocks, out, scratch, interpret)(seen, row)
    else:
        run = launch(body, "mfac_write_row", blocks, out, scratch, interpret)
        place = _place(*target)

        # The Refs of jax.new_ref do not work inside a custom_vmap in jax 0.10.
        def change(refs: tuple[Any, Any]) -> None:
            refs[1][...] = run(refs[0], row, place)

        seen, partial = pl.run_state(change)((seen, jnp.zeros(out.shape, out.dtype)))
        block = seen.reshape(block.shape)
    return block, jnp.sum(partial, axis=0)[: view.m]


def dots(
    block: Float[Array, "*t m k"],
    vector: Float[Array, "*t k"],
    *,
    interpret: bool = False,
) -> Float[Array, " m"]:
    """``G v``."""
    return _dots(block, vector.astype(jnp.float32), None, interpret)[1]


def write_row(
    block: Float[Array, "*t m k"],
    row: Int[Array, ""],
    vector: Float[Array, "*t k"],
    where: Bool[Array, ""],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "*t m k"], Float[Array, " m"]]:
    """Writes ``vector`` into ``row`` if ``where`` is true; returns the block and its ``G g``."""
    row, vector = row.astype(jnp.int32), vector.astype(block.dtype)
    if not jax.typeof(block).manual_axis_type.varying:
        return _dots(block, vector, (row, where), interpret)
    # The kernel changes a block through a Ref, which must not vary over a mesh.
    axis = block.ndim - 2
    old = lax.dynamic_index_in_dim(block, row, axis, keepdims=False)
    new = jnp.where(where, vector, old)
    block = lax.dynamic_update_index_in_dim(block, new, row, axis)
    return _dots(block, vector, None, interpret)


def combine(
    block: Float[Array, "*t m k"],
    coefficients: Float[Array, " m"],
    *,
    vector: Float[Array, "*t k"] | None = None,
    scale: Float[Array, ""] | None = None,
    interpret: bool = False,
) -> Float[Array, "*t k"]:
    """``G^T c``, or ``vector - G^T c``; times ``scale``."""
    view = View.of(block.shape, block.dtype)
    units = view.t * view.slabs
    blocks = min(_BLOCKS, units)
    # The operands of the epilogue, which runs before a sum is written.
    epilogue = {}
    if vector is not None:
        epilogue["vector"] = vector.astype(jnp.float32).reshape(view.row_shape)
    if scale is not None:
        epilogue["scale"] = scale.astype(jnp.float32).reshape(1)

    def body(block_ref: Any, weights_ref: Any, *refs: Any) -> None:
        given, (out_ref, *scratch_refs) = refs[: len(epilogue)], refs[len(epilogue) :]
        operand_refs = dict(zip(epilogue, given, strict=True))
        *stream_refs, result_ref = scratch_refs[:4]
        vector_refs = scratch_refs[4:]
        first, last = share(units, blocks)

        def locate(step: Array) -> tuple[Any, Any]:
            unit, row_block = div_rem(step, view.row_blocks)
            tile, slab = div_rem(first + unit, view.slabs)
            patch = view.patch(block_ref, tile, row_block, slab * view.slab)
            return patch, weights_ref.at[pl.ds(row_block * ROWS, ROWS)]

        steps = (last - first) * view.row_blocks
        stream = Stream(stream_refs, steps, locate)

        @loop(first, last)
        def _(unit: Array) -> None:
            tile, slab = div_rem(unit, view.slabs)
            column = slab * view.slab
            if vector_refs:
                source = view.columns(operand_refs["vector"], tile, column, view.slab)
                plgpu.copy_gmem_to_smem(source, *vector_refs)

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

            totals = [zeros() for _ in parts(view)]
            totals = lax.fori_loop(np.int32(0), np.int32(view.row_blocks), add, totals)
            if vector_refs:
                plgpu.barrier_wait(vector_refs[1])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # result_ref is free again
            for part, total in zip(parts(view), totals, strict=True):
                result = jnp.sum(total, axis=0)
                if vector_refs:
                    result = per_column(vector_refs[0], part) - result
                if "scale" in epilogue:
                    result *= operand_refs["scale"][0]
                store(result_ref.at[part], result)
            plgpu.commit_smem()
            for part in parts(view):
                start = column + np.int32(part.start)

                @pl.when(start < view.k)
                def _(part: Any = part, start: Array = start) -> None:
                    target = view.columns(out_ref, tile, start, LANES)
                    plgpu.copy_smem_to_gmem(result_ref.at[part], target)

        plgpu.wait_smem_to_gmem(0)

    slab_of_row = plgpu.SMEM((view.slab,), jnp.float32)
    scratch = [*Stream.scratch(view, block.dtype, ROWS, jnp.float32), slab_of_row]
    if vector is not None:
        scratch += [slab_of_row, plgpu.Barrier()]
    out = jax.ShapeDtypeStruct(
        view.written_shape,
        jnp.float32,
        manual_axis_type=varying(block, coefficients, *epilogue.values()),
    )
    result = launch(body, "mfac_combine", blocks, out, scratch, interpret)(
        block.reshape(view.shape),
        jnp.pad(coefficients.astype(jnp.float32), (0, view.row_blocks * ROWS - view.m)),
        *epilogue.values(),
    )
    return result.reshape(*block.shape[:-2], -1)[..., : view.k]


_KERNELS: dict[str, Callable[..., Any]] = {"dots": dots, "write_row": write_row, "combine": combine}


def run(operation: str, operands: Mapping[str, Array], *, interpret: bool = False) -> Any:
    """Runs a kernel on rows of any shape; their axes are collapsed into one."""
    block = operands["block"]
    shapes = {"block": _one_axis(block.shape), "vector": (block.shape[0], -1)}
    flat = {name: x.reshape(shapes.get(name, x.shape)) for name, x in operands.items()}
    out = _KERNELS[operation](**flat, interpret=interpret)
    if operation == "write_row":
        return out[0].reshape(block.shape), out[1]
    return out.reshape(block.shape[0], *block.shape[2:]) if operation == "combine" else out


def _one_axis(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], math.prod(shape[2:]))


class _MosaicGpu(Backend):
    """Kernels for Hopper and Blackwell GPUs."""

    needs = "an NVIDIA GPU of compute capability 9 or 10, such as H100 or B200"
    operations = tuple(_KERNELS)

    def why_not(self, operation: str, block: jax.core.ShapedArray) -> str | None:
        del operation
        try:
            devices = jax.local_devices(backend="cuda")
        except RuntimeError:  # no GPU here: the program is for a supported GPU
            devices = []
        for capability in [float(device.compute_capability) for device in devices]:
            if not _CAPABILITIES[0] <= capability < _CAPABILITIES[1]:
                return f"it needs {self.needs}, got compute capability {capability}"
        return unsupported(_one_axis(block.shape), block.dtype)

    def run(self, operation: str, operands: Mapping[str, Array]) -> Any:
        return run(operation, operands)


BACKEND = _MosaicGpu()
