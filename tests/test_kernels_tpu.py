"""The TPU kernels on a simulated TPU, against exact sums.

The simulator fills memory that nothing has written with NaN, and so what a tile holds
beyond the end of an array.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from mfac_jax.kernels import _tpu, _tpu_blocks

ROWS, COLUMNS = 32, 256
# (t, m, k): less than the kernel's tile, tails of it each way, whole ones, many.
CASES = [
    ((1, 1, 7), jnp.float32),
    ((1, ROWS + 9, 3 * COLUMNS - 68), jnp.float32),
    ((2, 2 * ROWS, 2 * COLUMNS), jnp.float32),
    ((3, 70, 384), jnp.float32),
    ((1, 3, 33), jnp.bfloat16),
    ((3, 70, 384), jnp.bfloat16),
]
every_case = pytest.mark.parametrize(("shape", "dtype"), CASES)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    for name in ("DOTS", "COMBINE"):
        monkeypatch.setattr(_tpu, f"_{name}_ROWS", ROWS)
        monkeypatch.setattr(_tpu, f"_{name}_COLUMNS", COLUMNS)
    monkeypatch.setattr(_tpu, "_GROUP", 16)
    monkeypatch.setattr(_tpu_blocks, "_COLUMNS", 256)


# Compiling the simulation takes longer than running it.
simulate = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache  # one program for all tests that use the same shapes
def program(kernel, **options):
    return simulate(functools.partial(kernel, interpret=True, **options))


def run(kernel, *arguments, **options):
    return program(kernel, **options)(*arguments)


def wide(array):
    return np.asarray(array, np.float64)


def block_of(shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    block = rng.normal(size=shape).astype(dtype)
    return block, rng.normal(size=(shape[0], shape[2])).astype(np.float32)


def products(block, vector):
    """What ``dots`` adds up: (m, d) of a block (t, m, k) and a vector (t, k)."""
    terms = np.moveaxis(wide(block) * wide(vector)[:, None], 1, 0)
    return terms.reshape(terms.shape[0], -1)


def assert_sums(got, terms, axis, tolerance):
    """Fails where the sums of exact ``terms`` are off by more than that part of their size."""
    error = np.abs(wide(got) - np.sum(terms, axis))
    assert np.all(error <= tolerance * np.sum(np.abs(terms), axis))  # NaN compares as false


# Each lane adds the sums of a few tiles: rounding does not grow with d.
FEW_ROUNDINGS = 2 * float(jnp.finfo(jnp.float32).eps)


def assert_same_bits(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


@every_case
def test_dots(shape, dtype):
    block, vector = block_of(shape, dtype)
    got = run(_tpu.dots, block, vector)
    assert got.dtype == jnp.float32
    assert got.shape == (shape[1],)
    assert_sums(got, products(block, vector), 1, FEW_ROUNDINGS)


@every_case
def test_combine(shape, dtype):
    block, vector = block_of(shape, dtype)
    c = np.random.default_rng(1).normal(size=shape[1]).astype(np.float32)
    got = run(_tpu.combine, block, c)
    assert got.dtype == jnp.float32
    assert got.shape == vector.shape
    tolerance = oracles.tolerance(np.float32, shape[1]) / oracles.SAFETY
    assert_sums(got, wide(block) * wide(c)[:, None], 1, tolerance)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_combine_with_all_of_its_options(dtype):
    block, vector = block_of((3, 70, 384))
    rng = np.random.default_rng(1)
    c = rng.normal(size=70).astype(np.float32)
    mask = rng.random(vector.shape) < 0.5
    # What the mask leaves out may be anything.
    vector[~mask] = np.nan
    block = np.where(mask[:, None], block, np.float32(np.inf))
    combine = program(_tpu.combine, dtype=dtype)
    got = combine(block, c, vector=vector, scale=jnp.float32(0.3), mask=mask)
    assert got.dtype == dtype
    with np.errstate(invalid="ignore"):
        terms = np.concatenate([wide(vector)[:, None], -wide(block) * wide(c)[:, None]], axis=1)
    terms = np.where(mask[:, None], terms, 0) * wide(jnp.float32(0.3))
    tolerance = oracles.tolerance(np.float32, 70) + float(jnp.finfo(dtype).eps)
    assert_sums(got, terms, 1, tolerance)


@pytest.mark.parametrize("options", ["vector", "vector scale", "scale mask"])
def test_combine_with_some_of_its_options(options):
    block, vector = block_of((1, 5, 33))
    c = np.arange(5, dtype=np.float32)
    values = {"vector": vector, "scale": jnp.float32(-2), "mask": vector > 0}
    given = {name: values[name] for name in options.split()}
    got = program(_tpu.combine)(block, c, **given)
    want = wide(c) @ wide(block)
    if "vector" in given:
        want = wide(vector) - want
    if "scale" in given:
        want = -2 * want
    if "mask" in given:
        want = np.where(values["mask"], want, 0)
    oracles.assert_close(got, want, length=5)


@every_case
@pytest.mark.parametrize("old", [0.0, np.nan])
def test_write_row_stores_and_multiplies_what_is_stored(shape, dtype, old):
    block, vector = block_of(shape, dtype)
    for row in {0, shape[1] // 2, shape[1] - 1}:
        want = wide(block)
        want[:, row] = vector.astype(dtype)
        block[:, row] = old
        out, got = run(_tpu.write_row, block, jnp.int32(row), vector, jnp.bool_(True))
        assert_same_bits(out, want.astype(dtype))
        block = np.array(out)
        assert got.dtype == jnp.float32
        assert got.shape == (shape[1],)
        assert_sums(got, products(want, want[:, row]), 1, FEW_ROUNDINGS)


@pytest.mark.parametrize(("shape", "dtype"), [CASES[0], CASES[3], CASES[5]])
@pytest.mark.parametrize("bad", [1.0, np.nan])
def test_a_refused_row_leaves_every_bit(shape, dtype, bad):
    block, vector = block_of(shape, dtype)
    row = shape[1] // 2
    block[:, row, ::2] = np.nan
    vector *= np.float32(bad)
    out, _ = run(_tpu.write_row, block, jnp.int32(row), vector, jnp.bool_(False))
    assert_same_bits(out, block)


def cancelling(t, m, k):
    """Dot products that are a millionth of their terms and less, and their exact values."""
    rng = np.random.default_rng(0)
    d = t * k
    rows, vector = rng.normal(size=(m, d)), rng.normal(size=d)
    half = d // 2
    rows[:, half : 2 * half] = rows[:, :half] * (1 + 1e-7 * rng.normal(size=(m, half)))
    vector[half : 2 * half] = -vector[:half]
    vector[2 * half :] = 0
    order = rng.permutation(d)
    block = np.moveaxis(rows[:, order].reshape(m, t, k), 1, 0).astype(np.float32)
    vector = vector[order].reshape(t, k).astype(np.float32)
    terms = products(block, vector)  # exact: 48 bits
    return block, vector, terms, np.array([math.fsum(row) for row in terms])


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [("dots", CASES[1][0]), ("dots", CASES[3][0]), ("write_row", CASES[3][0])],
)
def test_compensated_sums_are_those_of_float64(kernel, shape):
    block, vector, terms, exact = cancelling(*shape)
    row = shape[1] - 1
    if kernel == "write_row":
        terms[row] = wide(vector).ravel() ** 2
        exact[row] = math.fsum(terms[row])

    def error(compensated):
        if kernel == "dots":
            got = run(_tpu.dots, block, vector, compensated=compensated)
        else:
            arguments = jnp.int32(row), vector, jnp.bool_(True)
            _, got = run(_tpu.write_row, block, *arguments, compensated=compensated)
        # The result is a float32 number all the same.
        rounding = np.abs(exact) * float(jnp.finfo(jnp.float32).eps) / 2
        beyond = np.maximum(np.abs(wide(got) - exact) - rounding, 0)
        return np.max(beyond / np.sum(np.abs(terms), axis=1))

    plain, compensated = error(False), error(True)
    assert compensated < 1e-13
    assert plain > 100 * max(compensated, 1e-13)


def test_compensated_sums_of_one_sign():
    rng = np.random.default_rng(0)
    block = rng.uniform(1, 2, (2, 2, 20 * COLUMNS)).astype(np.float32)
    vector = rng.uniform(1, 2, (2, 20 * COLUMNS)).astype(np.float32)
    exact = np.array([math.fsum(row) for row in products(block, vector)])
    got = run(_tpu.dots, block, vector, compensated=True)
    # Rounded once: the float32 number next to the exact sum.
    np.testing.assert_array_equal(got, exact.astype(np.float32))


def test_in_a_loop_the_block_stays_in_place():
    block = np.zeros((2, 9, 128), np.float32)
    vectors = np.random.default_rng(0).normal(size=(12, 2, 128)).astype(np.float32)

    @simulate
    def push_all(block):
        def push(block, row_and_vector):
            row, vector = row_and_vector
            where = jnp.bool_(True)
            return _tpu.write_row(block, row, vector, where, interpret=True)

        return jax.lax.scan(push, block, (jnp.arange(12) % 9, vectors))

    block, got = push_all(block)
    want = np.zeros((2, 9, 128))
    for i, vector in enumerate(wide(vectors)):
        want[:, i % 9] = vector
        assert_sums(got[i], products(want, vector), 1, FEW_ROUNDINGS)
    np.testing.assert_array_equal(block, want.astype(np.float32))


def test_each_device_scans_its_own_tiles():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    block, vector = block_of((2, 5, 128))
    c = jnp.arange(5, dtype=jnp.float32)

    @simulate
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=(P(), P("d"), P())
    )
    def scan(block, vector):
        plain = _tpu.dots(block, vector, interpret=True)
        block, new = _tpu.write_row(block, jnp.int32(3), vector, jnp.bool_(True), interpret=True)
        # A mask that all devices hold alike, and a vector.
        options = {"vector": vector, "scale": jnp.float32(2), "mask": jnp.ones((1, 128), bool)}
        out = _tpu.combine(block, c, **options, interpret=True)
        part = _tpu.dots(block, jnp.ones((1, 128), jnp.float32), interpret=True)
        for array in (plain, block, new, out, part):
            assert jax.typeof(array).manual_axis_type.varying == {"d"}
        return jax.lax.psum(plain, "d"), out, jax.lax.psum(new, "d")

    plain, out, new = scan(block, vector)
    assert_sums(plain, products(block, vector), 1, FEW_ROUNDINGS)
    written = wide(block)
    written[:, 3] = wide(vector)
    assert_sums(new, products(written, vector), 1, FEW_ROUNDINGS)
    oracles.assert_close(out, 2 * (wide(vector) - wide(c) @ written), length=6)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 3, 4), jnp.float32, None),
        ((1, 1, 1), jnp.bfloat16, None),
        ((1, 3, 4), jnp.float16, "float16"),
        ((1, 3, 4), jnp.float64, "float64"),
        ((1, 3, 0), jnp.float32, "empty"),
        ((1, 3), jnp.float32, "(1, 3)"),
        ((1, 3, 4, 5), jnp.float32, "(1, 3, 4, 5)"),
    ],
)
def test_what_is_refused_and_why(shape, dtype, reason):
    assert_refused(_tpu.unsupported(shape, dtype), reason)


def assert_refused(clause, reason):
    """Fails unless a clause for the middle of a sentence says so, or there is none."""
    if reason is None:
        assert clause is None
    else:
        assert reason in clause
        assert clause.startswith("the TPU kernels need ")
        assert not clause.endswith(".")


def all_kernels(block, coefficients, vector, row, where):
    """Every kernel, with every kind of operand."""
    for compensated in (False, True):
        yield _tpu.dots(block, vector, compensated=compensated)
        yield _tpu.write_row(block, row, vector, where, compensated=compensated)
    yield _tpu.combine(block, coefficients)
    yield _tpu.combine(block, coefficients, vector=vector, scale=vector[0, 0], mask=vector > 0)
    for size in (128, 256):
        yield _tpu_blocks.block_inverse_diagonal(block[0], vector[0, 0], size)
        yield _tpu_blocks.block_ihvp(block[0], vector[0], vector[0, 0], size)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 150, 768), t) for t in (jnp.float32, jnp.bfloat16)]
)
def test_lowering_for_a_tpu_asks_for_no_device(shape, dtype):
    block, vector = block_of(shape, dtype)
    arguments = block, vector[0, : shape[1]], vector, jnp.int32(3), jnp.bool_(True)
    checks = [export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
    function = jax.jit(lambda *arguments: list(all_kernels(*arguments)))
    exported = export.export(function, platforms=["tpu"], disabled_checks=checks)(*arguments)
    text = exported.mlir_module()
    for name, count in [("dots", 2), ("write_row", 2), ("combine", 2)]:
        assert text.count(f'kernel_name = "mfac_{name}"') == count
    for name in ("inverse_diagonal", "ihvp"):
        assert text.count(f'kernel_name = "mfac_block_{name}"') == 2


# (kind, n, blocks, B): the B x B side, the n x n side, one gradient, odd n.
BLOCKS = [
    ("correlated", 140, 1, 128),
    ("correlated", 1, 2, 128),
    ("correlated", 40, 2, 256),
    ("ill-conditioned", 140, 1, 128),
    ("low rank", 140, 1, 128),
    ("ill-conditioned", 37, 2, 128),
    ("low rank", 37, 2, 128),
    ("zero rows", 37, 2, 128),
    ("all 1e-12", 37, 2, 128),
]


@pytest.mark.parametrize(
    ("kind", "n", "count", "size", "dtype"),
    [(*case, jnp.float32) for case in BLOCKS] + [("correlated", 37, 3, 128, jnp.bfloat16)],
)
def test_block_inverse(kind, n, count, size, dtype):
    rows = oracles.gradients(kind, n, count * size).astype(dtype)
    damping = oracles.damping_for(rows, 1e-3)
    assert _tpu_blocks.unsupported_blocks(rows.shape, rows.dtype, size) is None
    vector = np.random.default_rng(1).normal(size=rows.shape[1]).astype(np.float32)
    diagonal = run(_tpu_blocks.block_inverse_diagonal, rows, jnp.float32(damping), size=size)
    ihvp = run(_tpu_blocks.block_ihvp, rows, vector, jnp.float32(damping), size=size)
    assert diagonal.dtype == ihvp.dtype == jnp.float32
    assert diagonal.shape == ihvp.shape == vector.shape

    inverse = oracles.block_inverse(wide(rows), damping, [size] * count)
    # Either matrix is formed in float32, which costs a part eps of its condition.
    parts = np.split(wide(rows), count, axis=1)
    if n < size:
        condition = max(oracles.condition(part, damping) for part in parts)
    else:
        condition = max(np.linalg.cond(oracles.fisher(part, damping)) for part in parts)
    allowed = oracles.tolerance(np.float32, 1, condition)
    assert np.max(np.abs(wide(diagonal) / np.diag(inverse) - 1)) < allowed
    assert oracles.relative_error(ihvp, inverse @ wide(vector)) < allowed


@pytest.mark.parametrize("n", [140, 37])
def test_the_diagonal_of_a_block_that_is_singular_to_float32(n):
    rows = oracles.gradients("low rank", n, 256)
    # One coordinate is all but known.
    rows[:, 3] = 0
    rows[n // 2] = 1e4 * np.eye(256)[3]
    damping = oracles.damping_for(rows, 1e-6)
    got = run(_tpu_blocks.block_inverse_diagonal, rows, jnp.float32(damping), size=128)
    fisher = damping + np.mean(wide(rows) ** 2, axis=0)
    assert np.all(wide(got) * fisher > 1 - 1e-5)
    assert np.all(wide(got) * damping < 1 + 1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "reason"),
    [
        ((1024, 512), jnp.float32, 256, None),
        ((1, 128), jnp.bfloat16, 128, None),
        ((5, 200), jnp.float32, 100, "128 or 256 columns, got 100"),
        ((5, 1024), jnp.float32, 512, "got 512"),
        ((5, 200), jnp.float32, 128, "(5, 200)"),
        ((1025, 128), jnp.float32, 128, "got 1025"),
        ((5, 128), jnp.float16, 128, "float16"),
        ((2, 5, 128), jnp.float32, 128, "(2, 5, 128)"),
    ],
)
def test_what_blocks_are_refused_and_why(shape, dtype, size, reason):
    assert_refused(_tpu_blocks.unsupported_blocks(shape, dtype, size), reason)
