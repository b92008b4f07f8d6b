"""The results that ``gpu_check.py`` checks: every kernel, and steps of the optimizer.

A part is a list of items. An item has a name and a function that returns its record. A record with
``"ok": False`` is a wrong answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import oracles
from jax import lax

from mfac_jax import kernels, mfac_precondition, rows

Item = tuple[str, Callable[[], dict[str, Any]]]

RESNET20 = 272_474

# Shapes beside those of the tests: a window in bfloat16 with tiles of 31.5 slabs, single tiles with
# tails, and much work for all thread blocks.
LARGE_CASES = [
    ((34, 64, 8064), jnp.bfloat16),
    ((34, 64, 8064), jnp.float32),
    ((1, 512, 4816), jnp.float32),
    ((1, 1024, 8176), jnp.float32),
    ((1, 64, 50_256), jnp.float32),
    ((1, 64, 50_256), jnp.bfloat16),
    ((1, 63, 272_480), jnp.float32),
    ((1, 64, 272_480), jnp.bfloat16),
]
KERNELS = ("dots", "write_row", "combine", "update")


class Setting(NamedTuple):
    """Where the items run.

    Attributes:
        kernel: the implementation that is checked.
        small: whether to use the small sizes of a test on a CPU.
    """

    kernel: str
    small: bool


def interpret_kernels() -> None:
    """Makes this process interpret the GPU kernels on its CPU, for the tests."""
    from mfac_jax.kernels import _dispatch, _mosaic_gpu

    choose = _dispatch.run

    # This bypasses the choice at lowering, which does not support the interpreter's callbacks.
    def run(operation: str, implementation: str | None, plain_form: Any, operands: Any) -> Any:
        if implementation != "mosaic_gpu":
            return choose(operation, implementation, plain_form, operands)
        return _mosaic_gpu.run(operation, operands, interpret=True)

    _dispatch.run = run
    _mosaic_gpu._BLOCKS = 3


def kernels_part(setting: Setting) -> list[Item]:
    """Every kernel in every shape against float64; the large shapes first."""
    cases = [*LARGE_CASES, *kernel_cases.MOSAIC_GPU]
    checks = [(case, name) for case in cases for name in KERNELS]
    if setting.small:
        checks = [check for check in checks if check[0] == kernel_cases.MOSAIC_GPU[1]]
    return [
        (
            f"{name}, {'x'.join(map(str, shape))}, {jnp.dtype(dtype).name}",
            functools.partial(check_kernel, name, shape, dtype, setting),
        )
        for (shape, dtype), name in checks
    ]


def check_kernel(name: str, shape: tuple[int, ...], dtype: Any, setting: Setting) -> dict[str, Any]:
    """Checks one kernel: its error against the tolerance, and five bitwise equal runs."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(shape, np.float32).astype(dtype)
    vector = rng.standard_normal(kernel_cases.columns(shape), np.float32)
    c = rng.standard_normal(shape[1], np.float32)
    row, on, stored = shape[1] // 2, {"implementation": setting.kernel}, None
    if name in ("dots", "write_row"):
        given, axis = (block, vector), 1
        function = functools.partial(getattr(kernels, name), **on)
        if name == "write_row":
            stored = block.copy()
            stored[:, row] = vector.astype(dtype)
            block[:, row] = np.nan  # the replaced row does not affect the result
            given = (block, np.int32(row), vector, np.bool_(True))
            block, vector = stored, stored[:, row]
        terms = kernel_cases.as_matrix(block) * np.asarray(vector, np.float64).ravel()
    else:
        given, axis = (block, c), 0
        function = functools.partial(kernels.combine, **on)
        terms = kernel_cases.as_matrix(block) * np.asarray(c, np.float64)[:, None]
        if name == "update":
            given = (block, c, vector)
            terms = np.concatenate([np.asarray(vector, np.float64).reshape(1, -1), -terms])
            terms *= 0.5

            def function(block: Any, c: Any, vector: Any) -> Any:
                return kernels.combine(block, c, vector=vector, scale=jnp.float32(0.5), **on)

    program = jax.jit(function, donate_argnums=0 if stored is not None else ())
    results = []
    for _ in range(2 if setting.small else 5):
        poison(2**20 if setting.small else 2**31)
        got = jax.tree.map(np.asarray, program(*map(jnp.array, given)))
        results.append(jax.tree.leaves(got))
    share = kernel_cases.error_of_allowed(results[0][-1], terms, axis)
    right = share <= 1  # NaN compares as false
    repeats = all(
        first.tobytes() == other.tobytes()
        for result in results[1:]
        for first, other in zip(results[0], result, strict=True)
    )
    record = {"kernel": name, "shape": shape, "dtype": jnp.dtype(dtype).name}
    record |= {"error_of_allowed": share, "same_bits": repeats}
    if stored is not None:
        record["row_written"] = results[0][0].tobytes() == stored.tobytes()
    record["ok"] = right and repeats and record.get("row_written", True)
    return record


def poison(size: int) -> None:
    """Fills memory with NaN and frees it, so that missing writes become visible."""
    jnp.full(size // 4, jnp.nan).block_until_ready().delete()


def optimizer(setting: Setting) -> list[Item]:
    """Steps of the optimizer, by the kernels and by XLA."""
    sizes = (5,) if setting.small else (64, 512)
    return [
        (f"m = {m}, {dtype}", functools.partial(compare_optimizers, m, dtype, setting))
        for m in sizes
        for dtype in ("bfloat16", "float32")[: 1 if setting.small else 2]
    ]


def compare_optimizers(m: int, dtype: str, setting: Setting) -> dict[str, Any]:
    """The largest relative difference of the directions, and whether the rows are equal."""
    d, steps, damping = (300, 6, 0.01) if setting.small else (RESNET20, 50, 0.01)

    def train(implementation: str) -> Any:
        storage = rows.Dense(dtype, implementation=implementation)
        tx = mfac_precondition(m, relative_damping=damping, storage=storage)
        keys = jax.random.split(jax.random.key(0), steps + 1)
        common = 0.9 * jax.random.normal(keys[0], (d,))

        def step(state: Any, key: jax.Array) -> Any:
            direction, state = tx.update(common + 0.45 * jax.random.normal(key, (d,)), state)
            return state, direction

        state, directions = lax.scan(step, tx.init(jnp.zeros(d)), keys[1:])
        return state.window.rows, directions

    run = jax.jit(train, static_argnums=0)
    held, got = jax.tree.map(np.asarray, run(setting.kernel))
    want_held, want = jax.tree.map(np.asarray, run("xla"))
    difference = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    allowed = oracles.tolerance(np.float32, m, 1 / damping)
    same = all(
        a.tobytes() == b.tobytes()
        for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(want_held), strict=True)
    )
    return {
        "m": m,
        "d": d,
        "dtype": dtype,
        "steps": steps,
        "largest_difference": float(np.max(difference)),
        "allowed": float(allowed),
        "same_rows": same,
        "ok": bool(np.all(difference <= allowed)) and same,
    }
