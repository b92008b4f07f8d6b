"""The measurements of ``gpu_check.py``, and the list of its parts.

Times are those of the device: every operation runs many times in one program. Each run has inputs
that the previous run has changed.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import alternatives
import gpu_answers
import jax
import jax.numpy as jnp
import numpy as np
import oracles
from gpu_answers import Item, Setting, interpret_kernels
from jax import lax

from mfac_jax import fisher_inverse, kernels, mfac_precondition, rows

__all__ = ["PARTS", "Setting", "environment", "interpret_kernels"]


class Workload(NamedTuple):
    """Gradients of a network, in flat packing or as the block of a single parameter."""

    name: str
    shape: tuple[int, int, int]
    dtype: str

    @property
    def nbytes(self) -> int:
        """The size of the gradients in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * jnp.dtype(self.dtype).itemsize

    def block(self) -> jax.Array:
        """The gradients, generated on the device at the speed of a copy."""

        def make(key: jax.Array) -> jax.Array:
            t, m, k = self.shape
            tile = jax.random.normal(key, (1, m, k)) / np.sqrt(t * k)
            return (tile * (1 + jnp.arange(t)[:, None, None] / t)).astype(self.dtype)

        return jax.jit(make)(jax.random.key(0))


WORKLOADS = (
    Workload("ResNet-20, m = 512", (34, 512, 8064), "float32"),
    Workload("ResNet-20, m = 512", (34, 512, 8064), "bfloat16"),
    Workload("ResNet-20 as one parameter, m = 512", (1, 512, 272_480), "float32"),
    Workload("ResNet-50, m = 64", (3120, 64, 8192), "float32"),
)
SMALL_WORKLOADS = (Workload("small", (2, 4, 384), "bfloat16"),)


# Time on the device.


def touch(values: Any, results: Any) -> Any:
    """``values`` with a first entry of each that depends on ``results``.

    Every value changes. Otherwise XLA would prepare the unchanged ones once for all runs. The old
    entry must not count: where it is read, XLA for GPUs rewrites the whole array.
    """
    y = jnp.ravel(jax.tree.leaves(results)[0])[0] * 1e-30

    def change(x: jax.Array) -> jax.Array:
        corner = lax.broadcast(y.astype(x.dtype), (1,) * x.ndim)
        return lax.dynamic_update_slice(x, corner, (0,) * x.ndim)

    return jax.tree.map(lambda x: change(x) if x.ndim else x, values)


def seconds_a_run(
    step: Callable[[jax.Array, Any], Any], carry: Any, estimate: float, setting: Setting
) -> float:
    """Seconds of one ``carry = step(i, carry)`` in a loop on the device.

    ``estimate`` sets the length of the loop.
    """
    runs = 2 if setting.small else int(min(max(0.1 / estimate, 8), 4000))

    # The number of rounds is static: otherwise the host asks the device in every round.
    @functools.partial(jax.jit, donate_argnums=0)
    def loop(carry: Any) -> Any:
        return lax.fori_loop(0, runs, step, carry)

    # Separate arguments: donated ones may otherwise be one array twice, or a constant.
    carry = jax.block_until_ready(loop(jax.tree.map(jnp.array, carry)))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        carry = jax.block_until_ready(loop(carry))
        times.append(time.perf_counter() - start)
    return statistics.median(times) / runs


def repeated(function: Callable[..., Any], *given: Any, estimate: float, setting: Setting) -> float:
    """The seconds of ``function(*given)``."""
    out = jax.eval_shape(function, *given)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out)

    def step(_: jax.Array, carry: Any) -> Any:
        given, _ = carry
        out = function(*given)
        return touch(given, out), out

    return seconds_a_run(step, (given, zeros), estimate, setting)


# The parts.


def environment() -> dict[str, Any]:
    """The device, and whether the kernels support it."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    with contextlib.suppress(TypeError, ValueError):  # absent, or a name such as gfx942
        capability = float(capability)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "capability": capability,
        "memory_gib": round(((device.memory_stats() or {}).get("bytes_limit", 0)) / 2**30, 1),
        "jax": jax.__version__,
    }


def bandwidth(setting: Setting) -> list[Item]:
    """The bytes per second of reading, and of reading and writing."""
    size = 2**12 if setting.small else 2**32
    estimate = size / 3e12

    def read() -> dict[str, Any]:
        def above(threshold: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(x > threshold, x, 0))

        x = jnp.ones(size // 4)
        taken = repeated(above, jnp.zeros(1), x, estimate=estimate, setting=setting)
        return {"seconds": taken, "bytes": size, "rate": size / taken}

    def copy() -> dict[str, Any]:
        x = jnp.ones(size // 4)
        taken = repeated(jnp.negative, x, estimate=2 * estimate, setting=setting)
        return {"seconds": taken, "bytes": 2 * size, "rate": 2 * size / taken}

    return [("read", read), ("copy", copy)]


OPERATIONS = ("dots", "write_row", "combine", "step")


def scans(setting: Setting) -> list[Item]:
    """Scans and then whole steps, by the kernels, by XLA, and by plain products."""
    workloads = SMALL_WORKLOADS if setting.small else WORKLOADS
    operations = [(operation, w) for w in workloads for operation in OPERATIONS]
    # Steps take longest to compile: the scans of all workloads come first.
    operations.sort(key=lambda pair: pair[0] == "step")
    return [
        (
            f"{operation}, {w.name}, {w.dtype}, {implementation}",
            functools.partial(time_scan, operation, w, implementation, setting),
        )
        for operation, w in operations
        for implementation in (setting.kernel, "xla", "plain")
        # An optimizer holds what it has as tiles; a row is written by no product.
        if not (operation == "step" and w.shape[0] == 1)
        and not (operation in ("write_row", "step") and implementation == "plain")
    ]


def time_scan(operation: str, w: Workload, implementation: str, setting: Setting) -> dict[str, Any]:
    """The seconds of a scan, and the bytes of the gradients that it reads."""
    passes = 2 if operation == "step" else 1
    options = {"estimate": passes * w.nbytes / 3e12, "setting": setting}
    t, m, k = w.shape
    vector, c = jnp.full((t, k), 1e-3), jnp.full(m, 1e-3)
    if operation == "step":
        taken = time_step(m, t * k, w.dtype, implementation, options["estimate"], setting)
    elif implementation == "plain":
        plain = {"dots": alternatives.plain_dots, "combine": alternatives.plain_combine}[operation]
        value = vector.reshape(-1) if operation == "dots" else c
        matrix = w._replace(shape=(1, m, t * k)).block().reshape(m, t * k)
        taken = repeated(plain, matrix, value, **options)
    elif operation == "write_row":
        taken = time_write_row(w, implementation, **options)
    else:
        scan = functools.partial(getattr(kernels, operation), implementation=implementation)
        value = vector if operation == "dots" else c
        taken = repeated(scan, w.block(), value, **options)
    return {
        "workload": w.name,
        "dtype": w.dtype,
        "operation": operation,
        "implementation": "kernel" if implementation == setting.kernel else implementation,
        "seconds": taken,
        "bytes": passes * w.nbytes,
    }


def time_write_row(
    w: Workload, implementation: str | None, *, estimate: float, setting: Setting
) -> float:
    """The seconds of writing a row with its dot products; the block changes in place."""
    t, m, k = w.shape

    def step(i: jax.Array, carry: Any) -> Any:
        block, vector, out = carry
        row, where = (i % m).astype(jnp.int32), jnp.bool_(True)
        block, out = kernels.write_row(block, row, vector, where, implementation=implementation)
        return block, touch(vector, out), out

    carry = w.block(), jnp.full((t, k), 1e-3), jnp.zeros(m)
    return seconds_a_run(step, carry, estimate, setting)


def time_step(
    m: int, d: int, dtype: str, implementation: str | None, estimate: float, setting: Setting
) -> float:
    """The seconds of a step of the optimizer in a loop on the device."""
    tx = mfac_precondition(m, storage=rows.Dense(dtype, implementation=implementation))

    def step(_: jax.Array, carry: Any) -> Any:
        state, gradient, _ = carry
        direction, state = tx.update(gradient, state)
        return state, touch(gradient, direction), direction

    gradient = jax.random.normal(jax.random.key(0), (d,))
    carry = tx.init(gradient), gradient, jnp.zeros(d)
    return seconds_a_run(step, carry, estimate, setting)


def steps(setting: Setting) -> list[Item]:
    """The cost of a step without its scans, in a loop on the device and called by the host."""
    if setting.small:
        sizes = [(4, (1, 4, 384))]
    else:
        sizes = [(m, (t, m, k)) for m, t, k in ((64, 2, 8192), (64, 34, 8064), (512, 34, 8064))]

    def measure(m: int, shape: tuple[int, int, int]) -> dict[str, Any]:
        w, d = Workload("", shape, "float32"), shape[0] * shape[2]
        estimate = max(w.nbytes / 3e12, 20e-6)
        combine = repeated(
            kernels.combine,
            w.block(),
            jnp.full(m, 1e-3),
            estimate=estimate,
            setting=setting,
        )
        write_row = time_write_row(w, None, estimate=estimate, setting=setting)
        step = time_step(m, d, "float32", None, 2 * estimate, setting)
        return {
            "m": m,
            "d": d,
            "step": step,
            "write_row": write_row,
            "combine": combine,
            "beside_scans": step - write_row - combine,
            "called": time_calls(m, d, 2 if setting.small else 200),
        }

    return [(f"m = {m}, d = {s[0] * s[2]}", functools.partial(measure, m, s)) for m, s in sizes]


def time_calls(m: int, d: int, calls: int) -> float:
    """The seconds of a step if the host calls one after another, as a training loop does."""
    tx = mfac_precondition(m)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any) -> Any:
        state, gradient = carry
        direction, state = tx.update(gradient, state)
        return state, touch(gradient, direction)

    gradient = jax.random.normal(jax.random.key(0), (d,))
    carry = jax.block_until_ready(step((tx.init(gradient), jnp.array(gradient))))
    start = time.perf_counter()
    for _ in range(calls):
        carry = step(carry)
    jax.block_until_ready(carry)
    return (time.perf_counter() - start) / calls


def products(setting: Setting) -> list[Item]:
    """Operations that matrix products limit, against one large product in full float32."""
    workloads = SMALL_WORKLOADS if setting.small else (WORKLOADS[0], WORKLOADS[3])
    names = ("one product", "gram", "whiten", "block diagonal")
    return [
        (f"{name}, {w.name}", functools.partial(time_product, name, w, setting))
        for w in workloads
        for name in names
    ]


def time_product(name: str, w: Workload, setting: Setting) -> dict[str, Any]:
    """The seconds of an operation, and the multiplications and additions that it needs."""
    w, (t, m, k) = w._replace(dtype="float32"), w.shape
    d, size = t * k, 128
    side = min(m, size)
    flops = {
        "one product": 2 * m * m * d,
        "gram": m * m * d,
        "whiten": m * m * d,
        "block diagonal": (m * size if size <= m else 2 * m * m) * d + 2 * side**3 * d / size / 3,
    }[name]
    options = {"estimate": flops / 20e12 + w.nbytes / 1e12, "setting": setting}
    record = {"operation": name, "workload": w.name, "flops": flops}
    if name == "one product":
        matrix = w._replace(shape=(1, m, d)).block().reshape(m, d)
        taken = repeated(lambda g: jnp.dot(g, g.T, precision="highest"), matrix, **options)
    elif name == "gram":
        block = w.block()
        got = np.asarray(jax.jit(kernels.gram)(block), np.float64)
        sample = range(0, m, max(m // 4, 1))  # a few rows of K, by float64 sums
        want = [_row_of_gram(block, i) for i in sample]
        error = max(np.max(np.abs(got[i] - row)) for i, row in zip(sample, want, strict=True))
        record["error_of_allowed"] = error / (oracles.tolerance(np.float32, d) * np.max(got))
        record["ok"] = bool(record["error_of_allowed"] <= 1)
        taken = repeated(kernels.gram, block, **options)
    elif name == "whiten":
        matrix = jnp.tril(jnp.full((m, m), 1e-2)) + jnp.eye(m)
        whiten = functools.partial(kernels.transform, lower=True)
        taken = repeated(whiten, w.block(), matrix, **options)
    else:
        whole = d // size * size
        held = rows.as_rows(w._replace(shape=(1, m, whole)).block().reshape(m, whole))
        taken = repeated(
            lambda held: fisher_inverse(held, 1e-2, blocks=size).diagonal(), held, **options
        )
    return record | {"seconds": taken, "rate": flops / taken}


def _row_of_gram(block: jax.Array, i: int) -> np.ndarray[Any, Any]:
    """Row ``i`` of ``G G^T`` by float64 sums; one tile at a time is widened."""

    def row(block: jax.Array) -> jax.Array:
        def add(total: jax.Array, tile: jax.Array) -> tuple[jax.Array, None]:
            wide = tile.astype(jnp.float64)
            return total + jnp.sum(wide * wide[i], axis=1), None

        return jax.lax.scan(add, jnp.zeros(block.shape[1], jnp.float64), block)[0]

    with jax.enable_x64(True):
        return np.asarray(jax.jit(row)(block))


PARTS: dict[str, Callable[[Setting], list[Item]]] = {
    "bandwidth": bandwidth,
    "kernels": gpu_answers.kernels_part,
    "optimizer": gpu_answers.optimizer,
    "scans": scans,
    "steps": steps,
    "steps without CUDA graphs": steps,
    "products": products,
}
