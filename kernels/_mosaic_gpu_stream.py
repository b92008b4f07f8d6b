"""How gradients reach the registers of a GPU: a stream of patches.

The copy engine (TMA) moves ``G`` into shared memory in *patches*, several steps ahead of their
use. A patch is a *row block* (32 rows) by a *slab* (128 or 256 columns). Its entries are spread
over the 128 threads of a thread block in *register tiles* of 32 by 128.

The hardware moves whole pieces of 16 bytes. A copy *from* global memory carries a descriptor of the
array. Rows must be a multiple of 16 bytes apart, and a copy must start at such a multiple. Another
copy is an illegal instruction, which no compiler reports. What lies beyond the end of an axis
arrives as zeros. Mosaic turns a contiguous copy *to* global memory into a plain one
(``cp.async.bulk``). It is cut at the end of the array, not of a tile. The width of an array that a
kernel writes is therefore a whole number of copies. The surplus columns are cut off afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

# The number of patches in flight. Six patches of 16 KiB take 100 KiB, the largest size that leaves
# room for two thread blocks on a multiprocessor (227 KiB). By Little's law, 4.8 TB/s at a latency
# of 1 us need 36 KiB on each multiprocessor.
_STAGES = 6

# Rows of a patch. Every patch needs a piece of v, so fewer rows would add to the traffic from the
# L2 cache (3 to 6 % of it at 32). More rows would need more registers for the sums.
ROWS = 32

# Bytes of a row of a patch: 128 float32 or 256 bfloat16, the largest that one copy can move.
_SLAB_BYTES = 512

LANES = 128  # columns of a register tile: four for each of the 32 threads of a warp

# The threads of a warp lie along a row. Each has four columns, so accesses take 16 bytes without
# bank conflicts. Each of the four warps has eight rows, so the sum along a row stays in a warp.
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, LANES), (ROWS // 4, LANES), (4,))),
    warp_dims=(-5,),
    lane_dims=(-2,),
    vector_dim=-1,
)
PER_ROW = LAYOUT.reduce(1)
PER_COLUMN = LAYOUT.reduce(0)


@dataclasses.dataclass(frozen=True)
class View:
    """How the copy engine sees ``G``, and how it cuts ``G`` into patches."""

    t: int
    m: int
    k: int
    slab: int  # columns of a patch

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: DTypeLike) -> View:
        *tiles, m, k = shape
        return cls(math.prod(tiles), m, k, _SLAB_BYTES // np.dtype(dtype).itemsize)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.m, self.k) if self.t == 1 else (self.t, self.m, self.k)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row; the copy engine does not accept an axis of length 1."""
        return (self.k,) if self.t == 1 else (self.t, self.k)

    @property
    def written_shape(self) -> tuple[int, ...]:
        """Shape of a row that a kernel writes, in whole pieces of ``LANES`` columns."""
        width = pl.cdiv(self.k, LANES) * LANES
        return (width,) if self.t == 1 else (self.t, width)

    @property
    def slabs(self) -> int:
        """The number of slabs in a tile."""
        return pl.cdiv(self.k, self.slab)

    @property
    def row_blocks(self) -> int:
        return pl.cdiv(self.m, ROWS)

    def patch(self, block_ref: Any, tile: Array, row_block: Array, column: Array) -> Any:
        """The patch of a row block that starts at a column."""
        rows_ref = block_ref if self.t == 1 else block_ref.at[tile]
        return rows_ref.at[pl.ds(row_block * ROWS, ROWS), pl.ds(column, self.slab)]

    def columns(self, row_ref: Any, tile: Array, column: Array, size: int) -> Any:
        """``size`` columns of a row."""
        part = pl.ds(column, size)
        return row_ref.at[part] if self.t == 1 else row_ref.at[tile, part]


def loop(first: int | Array, last: int | Array) -> Callable[[Callable[..., None]], None]:
    """Runs the decorated function for ``first, .., last - 1``."""

    def run(step: Callable[..., None]) -> None:
        start, stop = (np.int32(n) if isinstance(n, int) else n for n in (first, last))
        lax.fori_loop(start, stop, lambda i, _: step(i), None)

    return run


def div_rem(number: Array, divisor: int) -> tuple[Array, Array]:
    return lax.div(number, np.int32(divisor)), lax.rem(number, np.int32(divisor))


def store(ref: Any, value: Array) -> None:
    """``ref[...] = value`` for so few values that coalescing does not matter."""
    if hasattr(plgpu, "store"):  # jax 0.12 and later, where assignment insists on coalescing
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def per_column(ref: Any, part: Any) -> Array:
    """A value for each column, as float32."""
    return plgpu.layout_cast(ref[part], PER_COLUMN).astype(jnp.float32)


def tile_of(values: Array, axis: int) -> Array:
    """A register tile made from a value for each row (``axis`` 0) or each column (1)."""
    wide = lax.broadcast_in_dim(values, (ROWS, LANES), (axis,))
    return plgpu.layout_cast(wide, LAYOUT)


def zeros() -> Array:
    return plgpu.layout_cast(jnp.zeros((ROWS, LANES), jnp.float32), LAYOUT)


def index(axis: int) -> Array:
    """Row or column numbers of a register tile."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, LANES), axis, layout=LAYOUT)


def parts(view: View) -> list[Any]:
    """The columns of a patch, in pieces as wide as a register tile."""
    return [pl.ds(start, LANES) for start in range(0, view.slab, LANES)]


class Stream:
    """Patches of ``G``, each with a piece of a vector, fetched ahead of their use.

    ``locate(step)`` returns the patch and the piece in global memory.
    """

    def __init__(
        self,
        scratch: Sequence[Any],
        steps: Array,
        locate: Callable[[Array], tuple[Any, Any]],
    ) -> None:
        self._patch_ref, self._piece_ref, self._barrier = scratch
        self._steps, self._locate = steps, locate
        loop(0, _STAGES)(self._fetch)

    @staticmethod
    def scratch(view: View, dtype: DTypeLike, piece: int, piece_dtype: DTypeLike) -> list[Any]:
        return [
            plgpu.SMEM((_STAGES, ROWS, view.slab), dtype),
            plgpu.SMEM((_STAGES, piece), piece_dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        ]

    def _fetch(self, step: Array) -> None:
        @pl.when(step < self._steps)
        def _() -> None:
            slot = div_rem(step, _STAGES)[1]
            barrier = self._barrier.at[slot]
            patch, piece = self._locate(step)
            plgpu.copy_gmem_to_smem(patch, self._patch_ref.at[slot], barrier)
            plgpu.copy_gmem_to_smem(piece, self._piece_ref.at[slot], barrier)

    def take(self, step: Array) -> tuple[Any, Any]:
        """Waits for the patch and the piece of ``step`` and returns them."""
        slot = div_rem(step, _STAGES)[1]
        plgpu.barrier_wait(self._barrier.at[slot])
        return self._patch_ref.at[slot], self._piece_ref.at[slot]

    def free(self, step: Array) -> None:
        """Lets a later step overwrite the patch and the piece of ``step``."""
        plgpu.commit_smem()  # orders the reads so far before the copy that overwrites
        self._fetch(step + np.int32(_STAGES))


def share(total: int, blocks: int) -> tuple[Array, Array]:
    """The pieces of work of this thread block: the first, and one past the last."""
    return share_of(lax.axis_index("block").astype(jnp.int32), total, blocks)


def share_of(block: Array, total: int, blocks: int) -> tuple[Array, Array]:
    """The pieces of one of ``blocks`` thread blocks; the first ones get one more piece.

    No product is larger than ``total``, so nothing overflows.
    """
    each, more = divmod(total, blocks)
    first = block * np.int32(each) + jnp.minimum(block, np.int32(more))
    return first, first + np.int32(each) + (block < more).astype(jnp.int32)


def launch(
    body: Callable[..., None],
    name: str,
    blocks: int,
    out: jax.ShapeDtypeStruct,
    scratch: Sequence[Any],
    interpret: bool,
) -> Callable[..., Any]:
    def scoped(*refs: Any) -> None:
        with jax.enable_x64(False):  # indices have 32 bits
            pl.run_scoped(functools.partial(body, *refs), *scratch)

    # jax 0.10 has no InterpretGPUParams.
    return pl.kernel(
        scoped,
        out_type=out,
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name=name,
        interpret=vars(plgpu)["InterpretGPUParams"]() if interpret else False,
    )


def varying(*operands: Array) -> jax.sharding.ManualAxisType:
    """How a result of ``operands`` varies over the mesh of a ``shard_map``."""
    axes = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    return jax.sharding.ManualAxisType(varying=frozenset().union(*axes))
