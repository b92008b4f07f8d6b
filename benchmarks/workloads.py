"""The named workloads, the floors of the operations on them, and their data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import memory
import numpy as np
from jax import lax

from mfac_jax import rows, window

RESNET20, RESNET50, TRANSFORMER = 272_474, 25_557_032, 110_000_000
BLOCK = 128

# Gradients have norm one; A then factors without trouble.
DAMPING = 1e-2

# The memory beside the gradients: float32 vectors for arguments and results, and the overhead of an
# allocator.
_VECTORS = 24

# Smaller windows exist several times and take turns; otherwise a cache would be measured. The limit
# is eight times the largest cache of the machines in mind.
_ALL_SETS, _MOST_SETS = 2**28, 64


class Workload(NamedTuple):
    """A window or a set of gradients.

    Attributes:
        model: the model of the gradients.
        d: the number of coordinates.
        m: the number of gradients.
        dtype: the dtype of the stored gradients.
        block: the number of coordinates in a block, for the block-wise inverse.
        only_steps: whether only the operations of the optimizer are measured.
    """

    model: str
    d: int
    m: int
    dtype: str = "float32"
    block: int | None = None
    only_steps: bool = False

    @property
    def name(self) -> str:
        """The name in the result file and the tables."""
        stored = "" if self.dtype == "float32" else f", {self.dtype}"
        blocks = f", blocks of {self.block}" if self.block else ""
        return f"{self.model}, m = {self.m}{stored}{blocks}"

    @property
    def nbytes(self) -> int:
        """The size of the gradients in bytes."""
        return self.m * self.d * jnp.dtype(self.dtype).itemsize


class Floor(NamedTuple):
    """The least work of an operation.

    Attributes:
        bytes: the bytes read from and written to memory.
        flops: the multiplications and additions.
    """

    bytes: float
    flops: float


FULL = (
    Workload("ResNet-20", RESNET20, 512),
    Workload("ResNet-20", RESNET20, 1024),
    Workload("ResNet-50", RESNET50, 64),
    Workload("ResNet-50", RESNET50, 256),
    Workload("ResNet-50", RESNET50, 512),
    Workload("ResNet-50", RESNET50, 512, "bfloat16", only_steps=True),
    Workload("transformer, 110 M", TRANSFORMER, 64, "bfloat16", only_steps=True),
    *(Workload("ResNet-20", RESNET20, n, block=BLOCK) for n in (64, 128, 256, 512, 1024)),
)
# Few rows: the sequential recursion has at most eight loops to compile.
QUICK = (Workload("tiny", 20_000, 4), Workload("tiny", 2_000, 4, block=4))


def floor(operation: str, w: Workload) -> Floor:
    """The floor of an operation, as in ``docs/performance.md``."""
    m, d, size = w.m, w.d, w.nbytes
    wide = 4 * m * d
    if w.block is not None:
        b = w.block
        side = min(m, b)
        flops = m * b * d if b <= m else 2 * m * m * d
        flops += 2 / 3 * side**3 * d / b
        answer = 4 * d * (side if operation == "static" else 1)
        return Floor(size + answer, flops)
    return {
        "dots": Floor(size, 2 * m * d),
        "push": Floor(size, 2 * m * d),
        "combine": Floor(size, 2 * m * d),
        "push + direction": Floor(2 * size, 4 * m * d),
        "gram": Floor(size, m * m * d),
        "whiten": Floor(size + wide, m * m * d),
        "diagonal": Floor(2 * size, 2 * m * m * d),
        "static": Floor(2 * size + wide, 2 * m * m * d),
    }[operation]


class DoesNotFit(Exception):
    """Memory is too small."""

    def __init__(self, needed: float, free: float):
        super().__init__(
            f"does not fit: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free"
        )


def require(needed: float) -> None:
    """Raises :class:`DoesNotFit` if fewer bytes than ``needed`` are free."""
    free = memory.free_memory()
    if free is not None and needed > free:
        raise DoesNotFit(needed, free)


class Data:
    """The arrays of a workload, in as many sets as keep them out of the caches.

    Attributes:
        windows: full windows of the library.
        plain: the arrays of the alternatives: gradients (m, d), dot products and the slot of the
            oldest gradient; empty until :meth:`make_plain`.
        vectors: gradients, and vectors to multiply.
        coefficients: ``c`` for ``G^T c``.
    """

    def __init__(self, w: Workload):
        """Raises :class:`DoesNotFit` if memory is too small for the gradients."""
        require(1.05 * w.nbytes + 4 * _VECTORS * w.d)
        self.workload = w
        self.sets = min(max(_ALL_SETS // w.nbytes, 1), _MOST_SETS)
        # NumPy does not compile a program for every shape.
        rng = np.random.default_rng(0)
        base = rng.standard_normal(2 * w.d, np.float32) / np.float32(np.sqrt(w.d))
        self.vectors = [jnp.asarray(base[i * (w.d // 4) : i * (w.d // 4) + w.d]) for i in range(4)]
        self.coefficients = jnp.asarray(rng.standard_normal(w.m, np.float32))
        self._base = jnp.asarray(base, w.dtype)
        make = (_pushing if w.only_steps else _filling)(self._base, w)
        # Waits: otherwise unfinished arrays would be measured with the first program.
        self.windows = jax.block_until_ready([make() for _ in range(self.sets)])
        self.plain: list[tuple[jax.Array, jax.Array, jax.Array]] = []

    def make_plain(self) -> None:
        """Makes the arrays of the alternatives, unless they exist."""
        w = self.workload
        if not self.plain:
            require(self.sets * w.nbytes * 1.05)
            dots = [jnp.array(held.gram) for held in self.windows]
            slot = jnp.zeros((), jnp.int32)
            plain = [(_matrix(self._base, w), k, jnp.copy(slot)) for k in dots]
            self.plain = jax.block_until_ready(plain)

    def drop_plain(self) -> None:
        """Frees the arrays of the alternatives."""
        self.plain = []


@functools.partial(jax.jit, static_argnums=1)
def _matrix(base: jax.Array, w: Workload) -> jax.Array:
    """Rows that are pieces of one long random vector, generated at the speed of a copy."""

    def write(i: jax.Array, matrix: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(matrix, _row(base, i, w), i, 0)

    return lax.fori_loop(0, w.m, write, jnp.zeros((w.m, w.d), w.dtype))


def _row(base: jax.Array, i: jax.Array, w: Workload) -> jax.Array:
    return lax.dynamic_slice_in_dim(base, i * (w.d // w.m), w.d)


def _filling(base: jax.Array, w: Workload) -> Callable[[], window.Window]:
    """A function that makes a window of the same rows."""

    def fill(base: jax.Array) -> window.Window:
        empty = rows.Dense(w.dtype).empty(_like(w), w.m)
        full = lax.fori_loop(0, w.m, lambda i, held: held.write(i, _row(base, i, w))[0], empty)
        return window.from_rows(full)

    return functools.partial(compile_program(fill, (base,)), base)


def _pushing(base: jax.Array, w: Workload) -> Callable[[], window.Window]:
    """The same, one row at a time, so that low-precision rows are never widened all at once."""

    def push(held: window.Window, base: jax.Array, i: jax.Array) -> window.Window:
        return window.push(held, _row(base, i, w).astype(jnp.float32))[0]

    def init() -> window.Window:
        return window.init(_like(w), w.m, storage=rows.Dense(w.dtype))

    empty = jax.eval_shape(init)
    program = compile_program(push, (empty, base, jnp.zeros((), jnp.int32)), donate=(0,))

    def make() -> window.Window:
        held = init()
        for i in range(w.m):
            held = program(held, base, jnp.int32(i))
        return held

    return make


def _like(w: Workload) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((w.d,), jnp.float32)


def implementations() -> Sequence[str]:
    """The implementations to measure beside the default: XLA if the default is a kernel."""
    return () if jax.default_backend() == "cpu" else ("xla",)


def compile_program(
    function: Callable[..., Any], arguments: Sequence[Any], donate: Sequence[int] = ()
) -> Callable[..., Any]:
    """Compiles for these arguments; raises :class:`DoesNotFit` if memory is too small."""
    lowered = jax.jit(function, donate_argnums=tuple(donate)).lower(*arguments)
    program = lowered.compile()
    sizes = program.memory_analysis()
    if sizes is not None:
        fresh = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        # Twice: a new result may be made while the last one leaves no hole that fits.
        require(2.1 * (sizes.temp_size_in_bytes + fresh))
    return program
