"""The kernels for Hopper GPUs, run by JAX's interpreter, against float64.

``tests/aot/compile_cuda.py`` compiles the same kernels to machine code.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from mfac_jax.kernels import _mosaic_gpu, _mosaic_gpu_stream

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no interpreter for GPU kernels; 0.11.2 has one",
)

# ([t,] m, k): what each is for, in the words of the kernels' module.
CASES = [
    ((1, 7), jnp.float32),  # one row, far narrower than a slab, flat
    ((5, 33), jnp.bfloat16),  # flat
    ((33, 1025), jnp.float32),  # flat, two row blocks, a tail of one column and one row
    ((40, 260), jnp.float32),  # aligned, tails of rows and columns
    ((64, 1026), jnp.float32),  # interleaved by 2
    ((2, 1026), jnp.float32),  # the same, one row of each set
    ((8, 301), jnp.float32),  # interleaved by 4
    ((24, 301), jnp.bfloat16),  # interleaved by 8
    ((32, 2304), jnp.bfloat16),  # aligned, more slabs than one chunk
    ((3, 1, 384), jnp.float32),  # several tiles of one row
    ((3, 5, 384), jnp.float32),  # several tiles
    ((2, 3, 48), jnp.float32),  # several narrow ones
    ((2, 40, 272), jnp.bfloat16),  # several tiles with tails
]
every_case = pytest.mark.parametrize(("shape", "dtype"), CASES)
unaligned = pytest.mark.parametrize("shape", [(5, 33), (64, 1026)])


@pytest.fixture(autouse=True)
def few_thread_blocks(monkeypatch):
    """So few that each has several pieces of work even here."""
    monkeypatch.setattr(_mosaic_gpu, "_BLOCKS", 3)


def run(name, *args, **kwargs):
    function = functools.partial(getattr(_mosaic_gpu, name), interpret=True, **kwargs)
    return jax.block_until_ready(jax.jit(function)(*args))


def columns(shape):
    return (*shape[:-2], shape[-1])


def wide(values, rows):
    """Float64 rows whose columns are those of one tile after the other."""
    return np.moveaxis(np.asarray(values, np.float64), -2, 0).reshape(rows, -1)


def problem(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    block = jnp.asarray(rng.normal(size=shape), dtype)
    vector = jnp.asarray(rng.normal(size=columns(shape)), jnp.float32)
    coefficients = jnp.asarray(rng.normal(size=shape[-2]), jnp.float32)
    return block, vector, coefficients


def assert_near(got, want, scale, length, dtype=np.float32):
    error = np.linalg.norm(np.asarray(got, np.float64).ravel() - want)
    assert error <= oracles.tolerance(dtype, length) * scale


@interpreted
@every_case
@pytest.mark.parametrize("compensated", [False, True])
def test_dots(shape, dtype, compensated):
    block, vector, _ = problem(shape, dtype)
    got = run("dots", block, vector, compensated=compensated)
    assert got.dtype == jnp.float32
    rows, v = wide(block, shape[-2]), np.asarray(vector, np.float64).ravel()
    if compensated:  # rounded once, at the end
        np.testing.assert_allclose(got, rows @ v, 1e-7)
    else:
        assert_near(got, rows @ v, np.linalg.norm(rows) * np.linalg.norm(v), v.size)


@interpreted
@every_case
def test_combine(shape, dtype):
    block, _, coefficients = problem(shape, dtype)
    got = run("combine", block, coefficients)
    assert got.dtype == jnp.float32
    assert got.shape == columns(shape)
    rows, c = wide(block, shape[-2]), np.asarray(coefficients, np.float64)
    assert_near(got, c @ rows, np.linalg.norm(rows) * np.linalg.norm(c), c.size)


@interpreted
@every_case
def test_combine_with_all_that_it_can_do_at_the_end(shape, dtype):
    out = dtype
    block, vector, coefficients = problem(shape, dtype)
    mask = np.random.default_rng(1).random(columns(shape)) < 0.7
    extra = {"vector": vector, "scale": jnp.float32(0.3), "mask": jnp.asarray(mask)}
    combine = functools.partial(_mosaic_gpu.combine, dtype=out, interpret=True)
    got = jax.jit(combine)(block, coefficients, **extra)
    assert got.dtype == out
    rows, c = wide(block, shape[-2]), np.asarray(coefficients, np.float64)
    want = np.where(mask.ravel(), (np.asarray(vector, np.float64).ravel() - c @ rows) * 0.3, 0)
    scale = np.linalg.norm(rows) * np.linalg.norm(c) + np.linalg.norm(want)
    assert_near(got, want, scale, c.size, out)
    assert not np.any(np.asarray(got, np.float32)[~mask])


@interpreted
@pytest.mark.parametrize("given", ["scale", "mask"])
def test_combine_with_a_part_of_it(given):
    block, _, coefficients = problem((5, 384), jnp.float32)
    value = jnp.float32(0.3) if given == "scale" else jnp.arange(384) % 3 == 0
    combine = functools.partial(_mosaic_gpu.combine, interpret=True)
    got = jax.jit(combine)(block, coefficients, **{given: value})
    want = np.asarray(coefficients, np.float64) @ np.asarray(block, np.float64)
    np.testing.assert_allclose(got, want * np.asarray(value), 1e-5, 1e-6)


@interpreted
@every_case
def test_write_row_never_reads_what_it_replaces(shape, dtype):
    block, vector, _ = problem(shape, dtype)
    write = jax.jit(functools.partial(_mosaic_gpu.write_row, interpret=True))
    for row in {0, shape[-2] - 1}:
        old = block.at[..., row, :].set(jnp.nan)
        out, got = write(old, jnp.int32(row), vector, jnp.bool_(True))
        assert out.dtype == dtype
        assert out.shape == shape
        stored = np.asarray(vector.astype(dtype), np.float64).ravel()
        rows = wide(block, shape[-2])
        rows[row] = stored
        np.testing.assert_array_equal(wide(out, shape[-2]), rows)
        scale = np.linalg.norm(rows) * np.linalg.norm(stored)
        assert_near(got, rows @ stored, scale, stored.size)


@interpreted
@pytest.mark.parametrize(("shape", "dtype"), CASES[1::3])  # flat, interleaved, tiles
def test_a_refused_row_leaves_every_bit(shape, dtype):
    block, vector, _ = problem(shape, dtype)
    block = block.at[..., 0, :].set(jnp.nan)
    new = jnp.full_like(vector, jnp.inf)
    out, _ = run("write_row", block, jnp.int32(0), new, jnp.bool_(False))
    assert np.asarray(out).tobytes() == np.asarray(block).tobytes()


@interpreted
@unaligned
def test_a_row_does_not_see_the_one_that_follows_it(shape):
    block, vector, coefficients = problem(shape, jnp.float32)
    bad = block.at[1, 0].set(jnp.nan)
    products = np.asarray(run("dots", bad, vector))
    np.testing.assert_array_equal(np.isnan(products), np.arange(shape[0]) == 1)
    sums = np.asarray(run("combine", bad, coefficients))
    np.testing.assert_array_equal(np.isnan(sums), np.arange(shape[1]) == 0)


@interpreted
@pytest.mark.parametrize("operation", ["dots", "write_row"])
def test_compensated_products_survive_cancellation(operation):
    rng = np.random.default_rng(0)
    half = rng.normal(size=(3, 600)).astype(np.float32)
    rows = np.concatenate([half, -half * (1 + 1e-5 * rng.normal(size=half.shape))], 1)
    rows = rows.astype(np.float32)
    vector = np.tile(rng.normal(size=600), 2).astype(np.float32)
    if operation == "write_row":
        rows[1] = vector
    products = rows.astype(np.float64) * vector.astype(np.float64)  # exact: 48 bits of 53
    exact = np.array([math.fsum(row) for row in products])
    size = np.sum(np.abs(products), axis=1)

    def error(compensated):
        if operation == "dots":
            got = run("dots", jnp.asarray(rows), jnp.asarray(vector), compensated=compensated)
        else:
            args = (jnp.asarray(rows), jnp.int32(1), jnp.asarray(vector), jnp.bool_(True))
            _, got = run("write_row", *args, compensated=compensated)
        # The rounding to float32 at the end is none of the sum's.
        error = np.abs(np.asarray(got, np.float64) - exact) - 2.0**-24 * np.abs(exact)
        return np.max(np.maximum(error, 0) / size)

    assert error(True) < 1e-13
    assert error(False) > 1e-11


@interpreted
@pytest.mark.parametrize("shape", [(5, 33), (64, 1026), (2, 40, 384)])
def test_copies_and_threads_do_not_race(shape, monkeypatch):
    parameters = functools.partial(plgpu.InterpretGPUParams, detect_races=True)  # raises
    monkeypatch.setattr(plgpu, "InterpretGPUParams", parameters)
    block, vector, coefficients = problem(shape, jnp.float32)
    run("dots", block, vector)
    combine = functools.partial(_mosaic_gpu.combine, interpret=True)
    jax.block_until_ready(jax.jit(combine)(block, coefficients, vector=vector, mask=vector > 0))
    if len(shape) == 3:  # in a lone tile one row's patches reach into the next row
        run("write_row", block, jnp.int32(33), vector, jnp.bool_(True))


@interpreted
def test_a_window_in_a_loop():
    block, vector, _ = problem((4, 260), jnp.float32)
    vectors = jnp.stack([vector, 2 * vector, 3 * vector])

    def step(block, x):
        row, vector = x
        block, products = _mosaic_gpu.write_row(block, row, vector, row != 1, interpret=True)
        return block, (products, _mosaic_gpu.combine(block, products, interpret=True))

    scan = jax.jit(lambda b: jax.lax.scan(step, b, (jnp.arange(3, dtype=jnp.int32), vectors)))
    out, (products, sums) = scan(block)
    want = np.array(block)
    want[0], want[2] = vectors[0], vectors[2]
    np.testing.assert_array_equal(out, want)
    np.testing.assert_allclose(products[2], want @ np.asarray(vectors[2]), 1e-5, 1e-4)
    np.testing.assert_allclose(sums[2], np.asarray(products[2]) @ want, 1e-5, 1e-2)


@interpreted
@pytest.mark.x64
def test_double_precision_elsewhere_changes_nothing():
    block, vector, coefficients = problem((5, 260), jnp.float32)
    rows = np.asarray(block, np.float64)
    got = run("dots", block, vector, compensated=True)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, rows @ np.asarray(vector, np.float64), 1e-7)
    out = run("combine", block, coefficients, dtype=jnp.float64)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, np.asarray(coefficients, np.float64) @ rows, 1e-5, 1e-5)
    _, got = run("write_row", block, jnp.int64(2), vector, jnp.bool_(True))
    np.testing.assert_allclose(got[0], rows[0] @ np.asarray(vector, np.float64), 1e-5)


def write_everywhere(block, vector, coefficients, *, interpret):
    block, products = _mosaic_gpu.write_row(
        block, jnp.int32(1), vector, jnp.bool_(True), interpret=interpret
    )
    again = _mosaic_gpu.dots(block, vector, compensated=True, interpret=interpret)
    sums = _mosaic_gpu.combine(block, coefficients, vector=vector, interpret=interpret)
    return block, jax.lax.psum(products, "x"), jax.lax.psum(again, "x"), sums


def sharded(devices, check_vma, interpret):
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("x",), kind, devices=jax.devices()[:devices])
    return jax.jit(
        jax.shard_map(
            functools.partial(write_everywhere, interpret=interpret),
            mesh=mesh,
            in_specs=(P(None, "x"), P("x"), P()),
            out_specs=(P(None, "x"), P(), P(), P("x")),
            check_vma=check_vma,
        )
    )


# One device, since the interpreter does not keep the barriers of several apart.
@interpreted
@pytest.mark.parametrize("check_vma", [False, True])
def test_inside_shard_map(check_vma):
    block, vector, coefficients = problem((4, 260), jnp.float32)
    out, products, again, sums = sharded(1, check_vma, interpret=True)(block, vector, coefficients)
    np.testing.assert_array_equal(out, block.at[1].set(vector))
    np.testing.assert_allclose(products, out @ vector, 1e-5, 1e-4)
    np.testing.assert_allclose(again, out @ vector, 1e-5, 1e-4)
    np.testing.assert_allclose(sums, vector - coefficients @ out, 1e-5, 1e-5)


def lowered(function, *args):
    """The program for CUDA, for which no device, plugin or interpreter is needed."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)
    return exported(*args).mlir_module()


@every_case
def test_every_kernel_lowers_for_cuda(shape, dtype):
    block, vector, coefficients = problem(shape, dtype)
    place = (jnp.int32(0), vector, jnp.bool_(True))
    assert "mosaic_gpu_v2" in lowered(_mosaic_gpu.dots, block, vector)
    assert "mosaic_gpu_v2" in lowered(_mosaic_gpu.combine, block, coefficients)
    text = lowered(_mosaic_gpu.write_row, block, *place)
    assert "mosaic_gpu_v2" in text
    assert "stablehlo.case" not in text  # a branch would wait for the host
    assert "output_operand_alias" in text


@pytest.mark.parametrize("check_vma", [False, True])
def test_lowers_inside_shard_map(check_vma):
    args = problem((4, 2080), jnp.float32)
    assert lowered(sharded(2, check_vma, interpret=False), *args).count("mosaic_gpu_v2") >= 3


@pytest.mark.parametrize("shape", [shape for shape, _ in CASES])
def test_supported(shape):
    assert _mosaic_gpu.unsupported(shape, jnp.float32) is None
    assert _mosaic_gpu.unsupported(shape, jnp.bfloat16) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((4, 8), jnp.float16, "float32 or bfloat16 gradients, got float16"),
        ((4, 8), np.float64, "float32 or bfloat16 gradients, got float64"),
        ((4,), jnp.float32, r"\[t,\] m, k"),
        ((4, 0), jnp.float32, "not empty"),
        ((2, 4, 24), jnp.float32, "multiple of 16 columns"),
        ((65, 2**25 + 2), jnp.float32, "32 bits"),
        ((1, 2**31), jnp.float32, "32 bits"),
    ],
)
def test_unsupported(shape, dtype, words):
    with pytest.raises(ValueError, match=words):
        raise ValueError(_mosaic_gpu.unsupported(shape, dtype))


@pytest.mark.parametrize("total", [264, 1000, 2**30])
def test_thread_blocks_share_all_of_the_work(total):
    first, last = _mosaic_gpu_stream.share_of(jnp.arange(264, dtype=jnp.int32), total, 264)
    assert first[0] == 0
    assert last[-1] == total
    np.testing.assert_array_equal(first[1:], last[:-1])
    assert set(np.asarray(last - first)) <= {total // 264, -(-total // 264)}


def test_large_blocks_are_supported():
    assert _mosaic_gpu.unsupported((1024, 25_557_032), jnp.float32) is None
    assert _mosaic_gpu.unsupported((64, 110_000_000), jnp.bfloat16) is None
