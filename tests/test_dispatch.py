"""The choice between implementations, and the rules around kernels."""

import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax import fisher_inverse, kernels, mfac_precondition, rows
from mfac_jax.kernels import _scans, backends
from mfac_jax.rows import Dense

SHAPE = (2, 6, 128)
KERNEL_CALLS = {"cuda": "mosaic_gpu_v2", "tpu": "tpu_custom_call"}


@pytest.fixture
def no_block_is_small(monkeypatch):
    monkeypatch.setattr(_scans, "MIN_ENTRIES", 0)


def operands(shape=SHAPE, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    block = jnp.asarray(rng.normal(size=shape), dtype)
    vector = jnp.asarray(rng.normal(size=(shape[0], *shape[2:])), jnp.float32)
    coefficients = jnp.asarray(rng.normal(size=shape[1]), jnp.float32)
    return block, vector, coefficients


def scans(implementation=None):
    """Every scan as a function of a block, a vector and coefficients."""
    on = {"implementation": implementation}

    def write_row(block, vector, coefficients):
        del coefficients
        return kernels.write_row(block, jnp.int32(1), vector, jnp.bool_(True), **on)

    return {
        "dots": lambda block, vector, c: kernels.dots(block, vector, **on),
        "write_row": write_row,
        "combine": lambda block, vector, c: kernels.combine(
            block, c, vector=vector, scale=jnp.float32(2), **on
        ),
    }


every_scan = pytest.mark.parametrize("name", ["dots", "write_row", "combine"])


def program(function, arguments, platform):
    """What ``function`` is lowered to for a platform that need not be there."""
    checks = [export.DisabledSafetyCheck.custom_call(call) for call in KERNEL_CALLS.values()]
    exported = export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)
    return exported(*arguments).mlir_module()


@every_scan
@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm", "cpu"])
def test_each_platform_gets_its_own(no_block_is_small, name, platform):
    text = program(scans()[name], operands(), platform)
    for owner, call in KERNEL_CALLS.items():
        assert (call in text) == (owner == platform)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_small_blocks_and_float64_go_to_xla(platform):
    assert KERNEL_CALLS[platform] not in program(scans()["dots"], operands(), platform)
    with jax.enable_x64(True):
        wide = operands((2, 4, 2**20), jnp.float64)
        assert KERNEL_CALLS[platform] not in program(scans()["dots"], wide, platform)


@every_scan
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.jax_defaults
def test_float32_gradients_get_the_kernel_beside_float64(no_block_is_small, name, platform):
    with jax.enable_x64(True):
        assert KERNEL_CALLS[platform] in program(scans()[name], operands(), platform)


@every_scan
@pytest.mark.parametrize(
    ("implementation", "needs"), [("mosaic_gpu", "NVIDIA"), ("mosaic_tpu", "TPU")]
)
def test_a_kernel_asked_for_on_the_wrong_platform_raises(name, implementation, needs):
    with pytest.raises(NotImplementedError, match=rf"needs an?.* {needs}.* compiled for cpu"):
        jax.jit(scans(implementation)[name])(*operands())


@every_scan
@pytest.mark.parametrize(
    ("implementation", "platform"), [("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu")]
)
def test_a_kernel_asked_for_is_used_whatever_the_size(name, implementation, platform):
    text = program(scans(implementation)[name], operands(), platform)
    assert KERNEL_CALLS[platform] in text


@every_scan
def test_xla_asked_for_is_used_whatever_the_platform(no_block_is_small, name):
    for platform, call in KERNEL_CALLS.items():
        assert call not in program(scans("xla")[name], operands(), platform)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_a_kernel_that_cannot_take_the_block_says_what_it_needs(implementation):
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"float32 or bfloat16.*float64"):
        scans(implementation)["dots"](*operands(dtype=jnp.float64))


@every_scan
@pytest.mark.parametrize(
    ("implementation", "shape", "words"),
    [
        ("mosaic_gpu", (2, 4, 24), r"rows of a multiple of 16 columns, got \(2, 4, 24\)"),
        ("mosaic_gpu", (2, 4, 3, 5), r"rows of a multiple of 16 columns, got \(2, 4, 15\)"),
        ("mosaic_gpu", (1, 4, 0), r"not empty, got \(1, 4, 0\)"),
        ("mosaic_tpu", (1, 4, 0), r"not empty, got shape \(1, 4, 0\)"),
        ("mosaic_tpu", (2, 4, 3, 5), r"a block \(t, m, k\).* got shape \(2, 4, 3, 5\)"),
    ],
)
def test_a_kernel_that_cannot_do_a_shape_says_why(name, implementation, shape, words):
    with pytest.raises(ValueError, match=rf"'{implementation}' cannot run: .*{words}"):
        scans(implementation)[name](*operands(shape))


@pytest.mark.parametrize("operation", ["block_inverse_diagonal", "block_ihvp"])
def test_an_implementation_without_a_kernel_says_so(operation):
    vectors = [jnp.ones((2, 128))] * (operation == "block_ihvp")
    given = (jnp.ones((2, 3, 128)), *vectors, jnp.float32(1))
    with pytest.raises(
        ValueError, match=f"'mosaic_gpu' cannot run: it has no kernel for {operation}"
    ):
        getattr(kernels, operation)(*given, plain=max, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: kernels.dots(*operands()[:2], implementation="cuda"),
        lambda: Dense(implementation="cuda"),
    ],
)
def test_an_unknown_implementation(make):
    with pytest.raises(
        ValueError, match=r"None or one of 'xla', 'mosaic_gpu', 'mosaic_tpu'; got 'cuda'"
    ):
        make()


def test_rows_pass_the_choice_on():
    tx = mfac_precondition(4, storage=Dense(implementation="mosaic_gpu"))
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        tx.update(jnp.ones(16), tx.init(jnp.ones(16)))
    for packing in ("flat", "leaf"):
        storage = Dense(packing=packing, implementation="mosaic_tpu")
        held = storage.empty({"a": jnp.ones(3)}, 2)
        with pytest.raises(NotImplementedError, match="mosaic_tpu"):
            held.combine(jnp.ones(2))
        with pytest.raises(NotImplementedError, match="mosaic_tpu"):
            held.dots({"a": jnp.ones(3)})


def test_rows_in_float64_are_not_for_kernels():
    refused = pytest.raises(ValueError, match=r"'mosaic_gpu' cannot run: .*bfloat16.* got float64")
    storage = Dense(implementation="mosaic_gpu")
    with jax.enable_x64(True):
        for chosen, params in (
            (Dense("float64", implementation="mosaic_gpu"), jnp.ones(3)),
            (storage, jnp.ones(3, "float64")),
        ):
            with refused:
                chosen.empty(params, 2)
            with refused:
                chosen.hold(jnp.ones((2, 3), "float64"), params)


@pytest.mark.parametrize("what", ["diagonal", "ihvp", "combination", "compensate"])
@pytest.mark.parametrize("stacked", [False, True])
def test_blocks_take_xla_where_it_is_asked_for(what, stacked):
    gradients, mask, v, c = jnp.ones((130, 256)), jnp.ones(256, bool), jnp.ones(256), jnp.ones(130)
    inputs = {"diagonal": (), "ihvp": (v,), "combination": (c,), "compensate": (v,)}[what]
    for implementation, has_kernel in ((None, True), ("xla", False)):
        held = rows.as_rows(gradients, storage=Dense(implementation=implementation))

        def ask(held):
            held = rows.StackedRows.of((held,), jnp.ones(1)) if stacked else held
            inverse = fisher_inverse(held, 1.0, mask=mask, blocks=128)
            return getattr(inverse, what)(*inputs)

        text = program(ask, (held,), "tpu")
        assert (KERNEL_CALLS["tpu"] in text) == has_kernel


def test_operations_without_a_kernel_export_as_they_are():
    held = rows.as_rows(jnp.ones((3, 20_000)))

    def diagonal(held):
        return fisher_inverse(held, 1.0, blocks=64).diagonal()

    for platform in ("cpu", "rocm"):
        export.export(jax.jit(diagonal), platforms=[platform])(held)


def close(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 1e-5, 1e-5), got, want)


@every_scan
def test_under_jit_scan_and_vmap(no_block_is_small, name):
    scan, plain = scans()[name], scans("xla")[name]
    block, vector, c = operands()
    want = plain(block, vector, c)
    close(jax.jit(scan)(block, vector, c), want)
    _, looped = jax.lax.scan(lambda _, c: (None, scan(block, vector, c)), None, jnp.stack([c, c]))
    close(jax.tree.map(lambda x: x[1], looped), want)
    for axes in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)):
        given = [
            x if axis is None else jnp.stack([x, 2 * x])
            for x, axis in zip((block, vector, c), axes, strict=True)
        ]
        close(jax.jit(jax.vmap(scan, axes))(*given), jax.vmap(plain, axes)(*given))


@every_scan
def test_operation_by_operation(no_block_is_small, name):
    scan, arguments = scans()[name], operands()
    want = scans("xla")[name](*arguments)
    with jax.disable_jit():
        close(scan(*arguments), want)
    close(jax.checkpoint(scan)(*arguments), want)
    traced = jax.make_jaxpr(scan)(*arguments)
    close(jax.extend.core.jaxpr_as_fun(traced)(*arguments), jax.tree.leaves(want))


def test_blocks_operation_by_operation():
    held = rows.as_rows(jnp.arange(48.0).reshape(3, 16))
    want = fisher_inverse(held, 1.0, blocks=4).diagonal()
    with jax.disable_jit():
        close(fisher_inverse(held, 1.0, blocks=4).diagonal(), want)


def test_the_value_beside_a_derivative_is_that_of_the_kernel_asked_for():
    block, vector, _ = operands()

    def value(vector):
        return jnp.sum(kernels.dots(block, vector, implementation="mosaic_tpu"))

    with pytest.raises(NotImplementedError, match="mosaic_tpu"):
        jax.jit(jax.value_and_grad(value))(vector)


@every_scan
def test_derivatives(no_block_is_small, name):
    def loss(function):
        return lambda *given: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(function(*given)))

    scan, plain = loss(scans()[name]), loss(scans("xla")[name])
    close(jax.jit(jax.grad(scan, (0, 1, 2)))(*operands()), jax.grad(plain, (0, 1, 2))(*operands()))
    small = operands((1, 2, 3))
    close(jax.hessian(scan, 1)(*small), jax.hessian(plain, 1)(*small))


def over_columns(kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    block = NamedSharding(mesh, PartitionSpec("x", None, "y"))
    return mesh, block, NamedSharding(mesh, PartitionSpec("x", "y"))


@every_scan
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_columns(no_block_is_small, name, kind):
    _, of_block, of_vector = over_columns(kind)
    block, vector, c = operands()
    spread = jax.device_put(block, of_block), jax.device_put(vector, of_vector), c
    close(jax.jit(scans()[name])(*spread), scans("xla")[name](block, vector, c))


@every_scan
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_inside_shard_map(no_block_is_small, name, platform):
    mesh, of_block, of_vector = over_columns(AxisType.Auto)
    specs = (of_block.spec, of_vector.spec, PartitionSpec())

    def sums(dots):
        return jax.lax.psum(dots, ("x", "y"))

    def local(*given):
        out = scans()[name](*given)
        if name == "dots":
            return sums(out)
        return (out[0], sums(out[1])) if name == "write_row" else out

    results = {
        "dots": PartitionSpec(),
        "write_row": (of_block.spec, PartitionSpec()),
        "combine": of_vector.spec,
    }
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=results[name])
    close(jax.jit(mapped)(*operands()), scans("xla")[name](*operands()))
    assert KERNEL_CALLS[platform] in program(mapped, operands(), platform)


@every_scan
def test_a_program_spread_by_xla_gathers_nothing(no_block_is_small, name):
    _, of_block, of_vector = over_columns(AxisType.Auto)
    block, vector, c = operands()
    spread = jax.device_put(block, of_block), jax.device_put(vector, of_vector), c
    text = jax.jit(scans()[name]).lower(*spread).compile().as_text()
    assert ("all-reduce" in text) == (name != "combine")
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


@every_scan
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_a_program_spread_by_xla_runs_no_kernel(no_block_is_small, name, implementation):
    _, of_block, of_vector = over_columns(AxisType.Auto)
    shardings = (of_block, of_vector, NamedSharding(of_block.mesh, PartitionSpec()))
    spread = jax.device_put(operands(), shardings)
    platform = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}[implementation]
    assert KERNEL_CALLS[platform] not in program(scans()[name], spread, platform)
    with pytest.raises(NotImplementedError, match=r"over devices; call it inside jax\.shard_map"):
        program(scans(implementation)[name], spread, platform)


class _Gpu:
    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "uses_kernel"), [("8.0", False), ("9.0", True), ("10.0", True), ("12.0", False)]
)
def test_other_gpus_get_xla(no_block_is_small, monkeypatch, capability, uses_kernel):
    local_devices = jax.local_devices

    def with_a_gpu(*arguments, backend=None, **options):
        if backend == "cuda":
            return [_Gpu(capability)]
        return local_devices(*arguments, backend=backend, **options)

    monkeypatch.setattr(jax, "local_devices", with_a_gpu)
    assert ("mosaic_gpu_v2" in program(scans()["dots"], operands(), "cuda")) == uses_kernel
    if not uses_kernel:
        with pytest.raises(ValueError, match=r"such as H100 or B200, got compute capability"):
            scans("mosaic_gpu")["dots"](*operands())


class NarrowBlocks(backends.Backend):
    """A backend for CPUs and blocks of at most ``most`` columns. It marks its results."""

    needs = "a CPU"
    operations = ("dots",)

    def __init__(self, most, mark):
        self.most, self.mark = most, mark

    def why_not(self, operation, block):
        if block.shape[-1] > self.most:
            return f"it needs at most {self.most} columns, got {block.shape[-1]}"
        return None

    def run(self, operation, operands):
        return self.mark + kernels.dots(**operands, implementation="xla")


@pytest.fixture
def two_backends(monkeypatch, no_block_is_small):
    """For one platform; the registry is as before after the test."""
    monkeypatch.setattr(backends, "_registry", dict(backends._registry))
    backends.register("narrow", "cpu", lambda: NarrowBlocks(128, 1000.0))
    backends.register("wide", "cpu", lambda: NarrowBlocks(256, 2000.0))


def mark(columns, **options):
    """Which backend ran: what it added to the dot products."""
    block, vector, _ = operands((2, 6, columns))
    got = jax.jit(lambda b, v: kernels.dots(b, v, **options))(block, vector)
    added = got - kernels.dots(block, vector, implementation="xla")
    return float(jnp.round(added[0]))


@pytest.mark.parametrize(("columns", "added"), [(128, 1000), (256, 2000), (512, 0)])
def test_the_first_backend_that_can_work_on_a_block_does(two_backends, columns, added):
    assert backends.names() == ("xla", "mosaic_gpu", "mosaic_tpu", "narrow", "wide")
    assert mark(columns) == added


def test_a_backend_asked_for_by_name(two_backends):
    assert mark(128, implementation="wide") == 2000
    assert mark(128, implementation="xla") == 0
    with pytest.raises(ValueError, match="'narrow' cannot run: it needs at most 128 columns, got"):
        mark(256, implementation="narrow")
    block, vector, _ = operands()
    with pytest.raises(ValueError, match="'narrow' cannot run: it has no kernel for write_row"):
        kernels.write_row(block, jnp.int32(0), vector, jnp.bool_(True), implementation="narrow")


@pytest.mark.parametrize("packing", ["flat", "leaf"])
def test_a_storage_names_a_backend_with_a_kernel_for_some_operations(two_backends, packing):
    params, gradient = jnp.ones(3), jnp.array([1.0, 2.0, 3.0])
    narrow = Dense(packing=packing, implementation="narrow")
    tx, plain = (mfac_precondition(4, storage=s) for s in (narrow, Dense(packing=packing)))
    direction, state = jax.jit(tx.update)(gradient, tx.init(params))
    close(direction, plain.update(gradient, plain.init(params))[0])
    held = state.window.rows
    close(held.dots(gradient), 1000 + jnp.array([14.0, 0.0, 0.0, 0.0]))
    close(held.gram()[0], jnp.array([14.0, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="'narrow' cannot run: it needs at most 128 columns, got"):
        narrow.empty(jnp.ones(129), 4)


class BlocksInAnyPrecision(backends.Backend):
    """A backend for the diagonals of blocks. It marks its results."""

    needs = "a CPU"
    operations = ("block_inverse_diagonal",)

    def why_not(self, operation, block):
        return None

    def run(self, operation, operands):
        return jnp.full(operands["batch"].shape[::2], 7, operands["batch"].dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_storage_names_a_backend_for_blocks(two_backends, dtype):
    backends.register("blocks", "cpu", BlocksInAnyPrecision)
    with jax.enable_x64(True):
        storage = Dense(dtype, implementation="blocks")
        held = rows.as_rows(jnp.ones((3, 4), dtype), storage=storage)
        inverse = fisher_inverse(held, 1.0, blocks=2)
        close(inverse.diagonal(), jnp.full(4, 7.0))
        plain = fisher_inverse(rows.as_rows(jnp.ones((3, 4), dtype)), 1.0, blocks=2)
        close(inverse.ihvp(jnp.arange(4.0)), plain.ihvp(jnp.arange(4.0)))


@pytest.mark.parametrize("name", ["write_row", "combine"])
def test_an_operation_without_a_kernel_in_any_backend(two_backends, name):
    close(jax.jit(scans()[name])(*operands()), scans("xla")[name](*operands()))


@pytest.mark.parametrize("name", ["xla", "mosaic_gpu", "wide"])
def test_the_name_of_a_backend_is_new(two_backends, name):
    with pytest.raises(ValueError, match=f"an implementation of this name; got '{name}'"):
        backends.register(name, "cpu", lambda: NarrowBlocks(1, 0.0))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, "cpu", max), TypeError, "name must be a str, got int"),
        (("", "cpu", max), ValueError, "name must be a word, got ''"),
        (("mine", None, max), TypeError, "platform must be a str, got NoneType"),
        (("mine", "CUDA", max), ValueError, "platform must be in lower case, .* got 'CUDA'"),
        (("mine", "cpu", "module"), TypeError, "load must be a function .* got str"),
    ],
)
def test_what_is_no_backend_is_not_registered(arguments, error, message):
    before = backends.names()
    with pytest.raises(error, match=message):
        backends.register(*arguments)
    assert backends.names() == before


def test_a_backend_is_not_loaded_for_another_platform(monkeypatch, no_block_is_small):
    monkeypatch.setattr(backends, "_registry", dict(backends._registry))

    def load():
        raise AssertionError("loaded")

    backends.register("mine", "rocm", load)
    for platform in ("cpu", "cuda", "tpu"):
        program(scans()["dots"], operands(), platform)
    with pytest.raises(AssertionError, match="loaded"):
        program(scans()["dots"], operands(), "rocm")


def test_a_program_for_a_cpu_imports_no_kernel():
    script = """
import sys
import jax, jax.numpy as jnp
from mfac_jax import fisher_inverse, kernels
from mfac_jax.rows import as_rows
kernels.dots(jnp.ones((1, 2, 2**21)), jnp.ones((1, 2**21)))
fisher_inverse(as_rows(jnp.ones((2, 256))), 1.0, blocks=128).diagonal()
public = "jax.experimental.pallas", "mfac_jax.kernels._mosaic", "mfac_jax.kernels._tpu"
print([name for name in sys.modules if name.startswith(public)])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
