"""What only the TPU kernels do: what they refuse, how they are lowered.

The contract that they share with other implementations is in ``test_kernels.py``. There as
here a TPU is simulated: memory that nothing has written holds NaN, and so does what a tile
holds beyond the end of an array.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import oracles
import pytest
from jax import export

from mfac_jax.kernels import _tpu, _tpu_blocks

# Compiling the simulation takes longer than running it.
simulate = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run(kernel, *arguments, **options):
    return simulate(functools.partial(kernel, interpret=True, **options))(*arguments)


def block_of(shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    block = rng.normal(size=shape).astype(dtype)
    return block, rng.normal(size=(shape[0], shape[2])).astype(np.float32)


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
    yield _tpu.dots(block, vector)
    yield _tpu.write_row(block, row, vector, where)
    yield _tpu.combine(block, coefficients)
    yield _tpu.combine(block, coefficients, vector=vector, scale=vector[0, 0])
    for size in (128, 256):
        batch, vectors = kernel_cases.as_batch(block[0], size), vector[0].reshape(-1, size)
        yield _tpu_blocks.block_inverse_diagonal(batch, vector[0, 0])
        yield _tpu_blocks.block_ihvp(batch, vectors, vector[0, 0])


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
    for name, count in [("dots", 1), ("write_row", 1), ("combine", 2)]:
        assert text.count(f'kernel_name = "mfac_{name}"') == count
    for name in ("inverse_diagonal", "ihvp"):
        assert text.count(f'kernel_name = "mfac_block_{name}"') == 2


@pytest.mark.parametrize("n", [140, 37])
def test_the_diagonal_of_a_block_that_is_singular_to_float32(n):
    rows = oracles.gradients("low rank", n, 256)
    # One coordinate is all but known.
    rows[:, 3] = 0
    rows[n // 2] = 1e4 * np.eye(256)[3]
    damping = oracles.damping_for(rows, 1e-6)
    batch = kernel_cases.as_batch(rows, 128)
    got = np.ravel(run(_tpu_blocks.block_inverse_diagonal, batch, jnp.float32(damping)))
    fisher = damping + np.mean(np.asarray(rows, np.float64) ** 2, axis=0)
    assert np.all(np.asarray(got, np.float64) * fisher > 1 - 1e-5)
    assert np.all(np.asarray(got, np.float64) * damping < 1 + 1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 1024, 256), jnp.float32, None),
        ((1, 1, 128), jnp.bfloat16, None),
        ((2, 5, 100), jnp.float32, "128 or 256 columns, got 100"),
        ((2, 5, 512), jnp.float32, "got 512"),
        ((0, 5, 128), jnp.float32, "(0, 5, 128)"),
        ((1, 1025, 128), jnp.float32, "got 1025"),
        ((1, 5, 128), jnp.float16, "float16"),
        ((5, 128), jnp.float32, "(5, 128)"),
    ],
)
def test_what_blocks_are_refused_and_why(shape, dtype, reason):
    assert_refused(_tpu_blocks.unsupported(shape, dtype), reason)
