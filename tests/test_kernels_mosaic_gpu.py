"""What only the kernels for Hopper GPUs do: copies, threads, and how they are lowered.

The contract that they share with other implementations is in ``test_kernels.py``.
``tests/aot/compile_cuda.py`` compiles the same kernels to machine code.
"""

import functools
import math

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import launch_context
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir

from mfac_jax.kernels import _mosaic_gpu, _mosaic_gpu_stream

missing = kernel_cases.NO_GPU_INTERPRETER
interpreted = pytest.mark.skipif(bool(missing), reason=missing or "it is here")

CASES = kernel_cases.MOSAIC_GPU
every_case = pytest.mark.parametrize(("shape", "dtype"), CASES)


@pytest.fixture(autouse=True)
def _few_thread_blocks(monkeypatch):
    """So few that each has several pieces of work even here."""
    monkeypatch.setattr(_mosaic_gpu, "_BLOCKS", 3)


def run(name, *args, **kwargs):
    function = functools.partial(getattr(_mosaic_gpu, name), interpret=True, **kwargs)
    return jax.block_until_ready(jax.jit(function)(*args))


def problem(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    block = jnp.asarray(rng.normal(size=shape), dtype)
    vector = jnp.asarray(rng.normal(size=(*shape[:-2], shape[-1])), jnp.float32)
    coefficients = jnp.asarray(rng.normal(size=shape[-2]), jnp.float32)
    return block, vector, coefficients


@interpreted
@pytest.mark.parametrize(
    "shape", [(5, 48), (2, 40, 384), pytest.param((64, 1040), marks=pytest.mark.slow)]
)
def test_copies_and_threads_do_not_race(shape, monkeypatch):
    parameters = functools.partial(plgpu.InterpretGPUParams, detect_races=True)  # raises
    monkeypatch.setattr(plgpu, "InterpretGPUParams", parameters)
    # A slab and a half in bfloat16: stores of two pieces, and of one.
    block, vector, coefficients = problem(shape, jnp.bfloat16 if len(shape) == 3 else jnp.float32)
    run("dots", block, vector)
    combine = functools.partial(_mosaic_gpu.combine, interpret=True)
    jax.block_until_ready(jax.jit(combine)(block, coefficients, vector=vector))
    run("write_row", block, jnp.int32(3), vector, jnp.bool_(True))


@interpreted
@pytest.mark.x64
def test_double_precision_elsewhere_changes_nothing():
    block, vector, coefficients = problem((5, 272), jnp.float32)
    rows = np.asarray(block, np.float64)
    got = run("dots", block, vector)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, rows @ np.asarray(vector, np.float64), 1e-5)
    out = run("combine", block, coefficients)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, np.asarray(coefficients, np.float64) @ rows, 1e-5, 1e-5)
    _, got = run("write_row", block, jnp.int64(2), vector, jnp.bool_(True))
    np.testing.assert_allclose(got[0], rows[0] @ np.asarray(vector, np.float64), 1e-5)


def write_everywhere(block, vector, coefficients, *, interpret):
    block, products = _mosaic_gpu.write_row(
        block, jnp.int32(1), vector, jnp.bool_(True), interpret=interpret
    )
    again = _mosaic_gpu.dots(block, vector, interpret=interpret)
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


@pytest.fixture
def copies(monkeypatch):
    """Every copy between global and shared memory in what is lowered from now on.

    Whether it goes to global memory, the array's shape there, what is copied, in bytes an
    entry, and what happens beyond the ends of the array.
    """
    found = []
    copy = launch_context.LaunchContext.async_copy

    def watched(self, *, src_ref, dst_ref, **options):
        types = [ir.MemRefType(ref.type) for ref in (src_ref, dst_ref)]
        to_global = types[1].memory_space is None
        far, near = types[::-1] if to_global else types
        itemsize = launch_context.utils.bitwidth(far.element_type) // 8
        beyond = options["oob_mode"]  # an error if it is renamed: JAX gives it with every copy
        found.append((to_global, tuple(far.shape), tuple(near.shape), itemsize, beyond))
        return copy(self, src_ref=src_ref, dst_ref=dst_ref, **options)

    monkeypatch.setattr(launch_context.LaunchContext, "async_copy", watched)
    return found


@interpreted
def test_the_end_of_a_tile_is_not_the_end_of_an_array(monkeypatch):
    """The interpreter of the tests does not cut what hardware does not cut."""
    kernel_cases.copy_as_the_hardware_does(monkeypatch)
    narrow = property(lambda view: view.row_shape)
    monkeypatch.setattr(_mosaic_gpu_stream.View, "written_shape", narrow)
    block, _, coefficients = problem((2, 3, 48), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds store"):
        run("combine", block, coefficients)


@interpreted
def test_a_copy_starts_at_a_multiple_of_16_bytes(monkeypatch):
    """The interpreter of the tests refuses what hardware refuses."""
    kernel_cases.copy_as_the_hardware_does(monkeypatch)
    block, vector, _ = problem((3, 46), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Misaligned copy"):
        run("dots", block, vector)


def lowered(function, *args):
    """The program for CUDA, for which no device, plugin or interpreter is needed."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)
    return exported(*args).mlir_module()


# A copy to global memory is cut at the end of the array only and is made of pieces of 16
# bytes, so an array must hold a whole number of copies in every tile. One from global memory
# has a descriptor where what lies beyond an end is to be zeros; it starts at a multiple of 16
# bytes, which every column does that a multiple of the patch's width precedes.
@every_case
def test_every_kernel_lowers_for_cuda_and_no_copy_is_cut(copies, shape, dtype):
    block, vector, coefficients = problem(shape, dtype)

    def everything(block, vector, coefficients):
        extra = {"vector": vector, "scale": jnp.float32(2)}
        direction = _mosaic_gpu.combine(block, coefficients, **extra)
        sums, dots = _mosaic_gpu.combine(block, coefficients), _mosaic_gpu.dots(block, vector)
        written = _mosaic_gpu.write_row(block, jnp.int32(0), vector, jnp.bool_(True))
        return direction, sums, dots, written

    text = lowered(everything, block, vector, coefficients)
    assert text.count("mosaic_gpu_v2") == 4
    assert "stablehlo.case" not in text  # a branch would wait for the host
    assert "output_operand_alias" in text
    assert {to_global for to_global, *_ in copies} == {False, True}
    for to_global, array, part, itemsize, beyond in copies:
        assert math.prod(part) * itemsize % 16 == 0
        if to_global:
            (size,) = part
            assert array[-1] % size == 0
        else:
            assert beyond == launch_context.OOBFillMode.ZEROS
            assert len(array) == 1 or array[-1] * itemsize % 16 == 0


@pytest.mark.parametrize("check_vma", [False, True])
def test_lowers_inside_shard_map(check_vma):
    args = problem((4, 2080), jnp.float32)
    assert lowered(sharded(2, check_vma, interpret=False), *args).count("mosaic_gpu_v2") >= 3


@pytest.mark.parametrize("shape", [*[shape for shape, _ in CASES], (1, 512, 4816), (64, 50_256)])
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
        ((512, 4810), jnp.float32, "multiple of 16 columns"),
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
    assert _mosaic_gpu.unsupported((1024, 25_557_040), jnp.float32) is None
    assert _mosaic_gpu.unsupported((64, 110_000_000), jnp.bfloat16) is None
