"""One contract for every implementation of the kernels, against float64.

An implementation is one line of :data:`IMPLEMENTATIONS`: a module with the same functions,
and the shapes at which it can go wrong. What only one of them promises stands in a file of
its own, ``test_kernels_*.py``.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec as P
from kernel_cases import as_matrix, columns

from mfac_jax.inverse import _block_products
from mfac_jax.kernels import _mosaic_gpu, _tpu, _tpu_blocks, _xla


class Implementation(NamedTuple):
    """Kernels and where to test them.

    Attributes:
        name: for the ids of the tests.
        scans: module with ``dots``, ``write_row`` and ``combine``.
        cases: shape (t, m, ...) and storage of each block.
        quick: how many of these, from the first on, every run of the suite takes.
        options: what makes the functions run here.
        blocks: module with ``block_inverse_diagonal`` and ``block_ihvp``, if there is one.
        small: settings of modules under which small blocks are cut into many pieces.
        devices: that one program can be tested on.
        roundings: of a dot product, where they do not grow with its length.
        missing: why it cannot run here, or an empty text.
    """

    name: str
    scans: Any
    cases: list[tuple[tuple[int, ...], Any]]
    quick: int
    options: dict[str, Any]
    blocks: Any = None
    small: tuple[tuple[Any, str, int], ...] = ()
    devices: int = 2
    roundings: float | None = None
    missing: str = ""


_ON_TPU = {f"_{kind}": 32 for kind in ("DOTS_ROWS", "COMBINE_ROWS")}
_ON_TPU |= {f"_{kind}": 256 for kind in ("DOTS_COLUMNS", "COMBINE_COLUMNS")} | {"_GROUP": 16}

# fmt: off
IMPLEMENTATIONS = [
    Implementation("xla", _xla, kernel_cases.XLA, 5, {}, _block_products),
    Implementation(
        "mosaic_gpu", _mosaic_gpu, kernel_cases.MOSAIC_GPU, 3, {"interpret": True},
        # Several pieces of work for each thread block. The interpreter does not keep the
        # barriers of several devices apart.
        small=((_mosaic_gpu, "_BLOCKS", 3),), devices=1, missing=kernel_cases.NO_GPU_INTERPRETER,
    ),
    Implementation(
        "mosaic_tpu", _tpu, kernel_cases.TPU, 2, {"interpret": True}, _tpu_blocks,
        small=(*((_tpu, *pair) for pair in _ON_TPU.items()), (_tpu_blocks, "_COLUMNS", 256)),
        roundings=2,  # each lane adds the sums of a few tiles
    ),
]
# fmt: on


def _marks(implementation, *, slow=False):
    missing = implementation.missing
    marks = [pytest.mark.skipif(bool(missing), reason=missing or "it is here")]
    return marks + [pytest.mark.slow] * slow


def case_id(implementation, shape, dtype):
    return f"{implementation.name}-{'x'.join(map(str, shape))}-{jnp.dtype(dtype).name}"


def every_case(which=lambda shape: True, quick=None):
    """Every case of every implementation; all but its first ``quick`` ones are slow."""
    return pytest.mark.parametrize(
        ("implementation", "shape", "dtype"),
        [
            pytest.param(
                i, *case, id=case_id(i, *case), marks=_marks(i, slow=index >= (quick or i.quick))
            )
            for i in IMPLEMENTATIONS
            for index, case in enumerate(i.cases)
            if which(case[0])
        ],
    )


def every_implementation(which=lambda implementation: True):
    chosen = [pytest.param(i, id=i.name, marks=_marks(i)) for i in IMPLEMENTATIONS if which(i)]
    return pytest.mark.parametrize("implementation", chosen)


@pytest.fixture(autouse=True)
def _cut_small_blocks_into_pieces(monkeypatch):
    for implementation in IMPLEMENTATIONS:
        for module, name, value in implementation.small:
            monkeypatch.setattr(module, name, value)


@pytest.fixture(autouse=True)
def _nothing_is_cut_off_at_the_end_of_a_tile(monkeypatch):
    kernel_cases.copy_as_the_hardware_does(monkeypatch)


# Compiling a simulation takes longer than running it.
simulate = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache  # one program for all tests of one shape
def _program(function, options):
    return simulate(functools.partial(function, **dict(options)))


def run(implementation, name, *arguments, keywords=None):
    module = implementation.blocks if name.startswith("block_") else implementation.scans
    options = {} if module is _block_products else implementation.options
    program = _program(getattr(module, name), tuple(options.items()))
    return jax.block_until_ready(program(*arguments, **(keywords or {})))


def combine(implementation, block, c, keywords=None):
    return run(implementation, "combine", block, c, keywords=keywords)


def write_row(implementation, block, row, vector, where):
    arguments = block, jnp.int32(row), vector, jnp.bool_(where)
    return run(implementation, "write_row", *arguments)


def problem(shape, dtype, seed=0):
    """A block, a vector and coefficients; NumPy's, so that making them compiles nothing."""
    rng = np.random.default_rng(seed)
    block = rng.normal(size=shape).astype(dtype)
    vector = rng.normal(size=columns(shape)).astype(np.float32)
    return block, vector, rng.normal(size=shape[1]).astype(np.float32)


def products(block, vector):
    """What ``dots`` adds up: (m, d)."""
    return as_matrix(block) * np.asarray(vector, np.float64).ravel()


def assert_dots(implementation, got, terms):
    assert got.dtype == jnp.float32
    assert got.shape == terms.shape[:1]
    assert kernel_cases.error_of_allowed(got, terms, 1) <= 1  # NaN compares as false
    if implementation.roundings is not None:
        allowed = implementation.roundings * float(jnp.finfo(jnp.float32).eps)
        error = np.abs(np.asarray(got, np.float64) - np.sum(terms, 1))
        assert np.all(error <= allowed * np.sum(np.abs(terms), 1))


def assert_same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(np.uint8) if got.ndim else got,
        np.ascontiguousarray(want).view(np.uint8) if want.ndim else want,
    )


def assert_combined(got, terms):
    assert got.dtype == jnp.float32
    assert kernel_cases.error_of_allowed(got, terms, 0) <= 1


@every_case()
def test_dots(implementation, shape, dtype):
    block, vector, _ = problem(shape, dtype)
    got = run(implementation, "dots", block, vector)
    assert_dots(implementation, got, products(block, vector))


@every_case()
def test_combine(implementation, shape, dtype):
    block, _, c = problem(shape, dtype)
    got = combine(implementation, block, c)
    assert got.shape == columns(shape)
    assert_combined(got, as_matrix(block) * np.asarray(c, np.float64)[:, None])


@every_case()
def test_combine_with_all_that_it_can_do_at_the_end(implementation, shape, dtype):
    block, vector, c = problem(shape, dtype)
    extra = {"vector": vector, "scale": jnp.float32(0.3)}
    got = combine(implementation, block, c, extra)
    assert got.shape == columns(shape)
    terms = -as_matrix(block) * np.asarray(c, np.float64)[:, None]
    terms = np.concatenate([np.asarray(vector, np.float64).reshape(1, -1), terms])
    assert_combined(got, terms * np.float64(np.float32(0.3)))


@every_implementation()
@pytest.mark.parametrize("given", ["vector", "scale"])
def test_combine_with_a_part_of_it(implementation, given):
    block, vector, c = problem((1, 5, 48), jnp.float32)
    values = {given: {"vector": vector, "scale": jnp.float32(-2)}[given]}
    terms = as_matrix(block) * np.asarray(c, np.float64)[:, None]
    if "vector" in values:
        terms = np.concatenate([np.asarray(vector, np.float64), -terms])
    terms = terms * np.float64(values.get("scale", 1))
    assert_combined(combine(implementation, block, c, values), terms)


@every_case()
def test_write_row_stores_and_multiplies_what_is_stored(implementation, shape, dtype):
    block, vector, _ = problem(shape, dtype)
    stored = vector.astype(dtype)
    for row in {0, shape[1] // 2, shape[1] - 1}:
        want = block.copy()
        want[:, row] = stored
        block[:, row] = np.nan  # what it replaces is never a part of the result
        out, got = write_row(implementation, block, row, vector, True)
        assert_same_bits(out, want)
        assert_dots(implementation, got, products(want, stored))
        block = want


@every_case(quick=1)
def test_a_refused_row_leaves_every_bit(implementation, shape, dtype):
    block, vector, _ = problem(shape, dtype)
    row = shape[1] // 2
    block[:, row] = np.nan
    for bad in (1, np.nan):
        out, _ = write_row(implementation, block, row, vector * np.float32(bad), False)
        assert_same_bits(out, block)


@every_case(lambda shape: shape[1] > 1 and math.prod(columns(shape)) > 1, quick=1)
def test_no_row_and_no_column_sees_another(implementation, shape, dtype):
    block, vector, c = problem(shape, dtype)
    block.reshape(shape[0], shape[1], -1)[0, 1, 0] = np.nan
    got = np.asarray(run(implementation, "dots", block, vector))
    np.testing.assert_array_equal(np.isnan(got), np.arange(shape[1]) == 1)
    sums = np.ravel(combine(implementation, block, c))
    np.testing.assert_array_equal(np.isnan(sums), np.arange(sums.size) == 0)


@every_implementation()
def test_a_window_in_a_loop(implementation):
    block, vector, _ = problem((1, 4, 260), jnp.float32)
    vectors = np.stack([vector, 2 * vector, 3 * vector])
    on = implementation.options

    @simulate
    def push_all(block, vectors):
        def push(block, x):
            row, vector = x
            block, got = implementation.scans.write_row(block, row, vector, row != 1, **on)
            return block, (got, implementation.scans.combine(block, got, **on))

        return jax.lax.scan(push, block, (jnp.arange(3, dtype=jnp.int32), vectors))

    out, (got, sums) = push_all(block, vectors)
    want = block.copy()
    want[:, 0], want[:, 2] = vectors[0], vectors[2]
    assert_same_bits(out, want)
    assert_dots(implementation, got[2], products(want, vectors[2]))
    assert_combined(sums[2], as_matrix(want) * np.asarray(got[2], np.float64)[:, None])


@every_implementation()
@pytest.mark.parametrize("check_vma", [False, True])
def test_each_device_scans_its_own_tiles(implementation, check_vma):
    devices = jax.devices()[: implementation.devices]
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("x",), kind, devices=devices)
    block, vector, c = problem((2, 5, 128), jnp.float32)
    on, scans = implementation.options, implementation.scans

    def local(block, vector):
        plain = scans.dots(block, vector, **on)
        block, new = scans.write_row(block, jnp.int32(3), vector, jnp.bool_(True), **on)
        # Coefficients and a scale that all devices hold, beside a vector of which each has a part.
        out = scans.combine(block, jnp.asarray(c), vector=vector, scale=jnp.float32(2), **on)
        if check_vma:
            for array in (plain, block, new, out):
                assert jax.typeof(array).manual_axis_type.varying == {"x"}
        return jax.lax.psum(plain, "x"), block, jax.lax.psum(new, "x"), out

    part, whole = P("x"), P()
    specs = {"in_specs": (part, part), "out_specs": (whole, part, whole, part)}
    mapped = jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs)
    plain, out, new, sums = simulate(mapped)(block, vector)
    assert_dots(implementation, plain, products(block, vector))
    block[:, 3] = vector
    assert_same_bits(out, block)
    assert_dots(implementation, new, products(block, vector))
    terms = -as_matrix(block) * np.asarray(c, np.float64)[:, None]
    terms = np.concatenate([np.asarray(vector, np.float64).reshape(1, -1), terms])
    assert_combined(sums, 2 * terms)


# Of the block-wise inverse: (kind, n, blocks, B). The B x B side, the n x n side, one
# gradient, odd n.
BLOCKS = [
    ("correlated", 140, 1, 128, jnp.float32),
    ("low rank", 37, 2, 128, jnp.float32),
    ("correlated", 1, 2, 128, jnp.float32),
    ("correlated", 40, 2, 256, jnp.float32),
    ("ill-conditioned", 140, 1, 128, jnp.float32),
    ("low rank", 140, 1, 128, jnp.float32),
    ("ill-conditioned", 37, 2, 128, jnp.float32),
    ("zero rows", 37, 2, 128, jnp.float32),
    ("all 1e-12", 37, 2, 128, jnp.float32),
    ("correlated", 37, 3, 128, jnp.bfloat16),
]
_QUICK_BLOCKS = 2
every_implementation_of_blocks = every_implementation(lambda i: i.blocks is not None)


@every_implementation_of_blocks
@pytest.mark.parametrize(
    ("kind", "n", "count", "size", "dtype"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (index >= _QUICK_BLOCKS))
        for index, case in enumerate(BLOCKS)
    ],
)
def test_block_inverse(implementation, kind, n, count, size, dtype):
    rows = oracles.gradients(kind, n, count * size).astype(dtype)
    damping = oracles.damping_for(rows, 1e-3)
    vector = np.random.default_rng(1).normal(size=rows.shape[1]).astype(np.float32)
    batch, vectors = kernel_cases.as_batch(rows, size), vector.reshape(count, size)
    damped = jnp.float32(damping)
    diagonal = run(implementation, "block_inverse_diagonal", batch, damped)
    ihvp = run(implementation, "block_ihvp", batch, vectors, damped)
    assert diagonal.dtype == ihvp.dtype == jnp.float32
    assert diagonal.shape == ihvp.shape == vectors.shape

    wide = np.asarray(rows, np.float64)
    inverse = oracles.block_inverse(wide, damping, [size] * count)
    # Either matrix is formed in float32, which costs a part eps of its condition.
    parts = np.split(wide, count, axis=1)
    if n < size:
        condition = max(oracles.condition(part, damping) for part in parts)
    else:
        condition = max(np.linalg.cond(oracles.fisher(part, damping)) for part in parts)
    allowed = oracles.tolerance(np.float32, 1, condition)
    diagonal, ihvp = np.ravel(diagonal), np.ravel(ihvp)
    assert np.max(np.abs(np.asarray(diagonal, np.float64) / np.diag(inverse) - 1)) < allowed
    assert oracles.relative_error(ihvp, inverse @ vector.astype(np.float64)) < allowed
