"""The speed of the machine: how fast it reads, copies and multiplies matrices."""

from __future__ import annotations

import functools
import re
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import memory
import report
import timing
import workloads
from jax import lax


def environment() -> dict[str, Any]:
    """The machine, the date and the software of a measurement."""
    free = memory.free_memory()
    return report.environment() | {
        "platform": jax.devices()[0].platform,
        "free_memory_gib": None if free is None else round(free / 2**30, 1),
        "jaxlib": metadata.version("jaxlib"),
        "torch": _version("torch"),
    }


def slug(environment: dict[str, Any]) -> str:
    """The device in a file name: ``cpu``, ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")


def measure(seconds: float, sides: tuple[int, ...], largest: int) -> dict[str, Any]:
    """Bandwidths in bytes a second and the float32 rate of matrix products in flops.

    The fastest of several programs counts, so the floors describe the machine and not one
    program.
    """
    free = memory.free_memory()
    size = largest if free is None else min(largest, free // 16)
    matrix = jnp.ones((size // 4 // 8192, 8192))
    vector = jnp.ones(8192)
    size = matrix.nbytes

    read = {
        "sum": lambda x, _: jnp.sum(x),
        "row sums": lambda x, _: jnp.sum(x, axis=1),
        "maximum": lambda x, _: jnp.max(x),
        "matrix-vector product": lambda x, v: jnp.dot(x, v, precision="highest"),
    }
    runs = {}
    for name, function in read.items():
        program = workloads.compile_program(function, (matrix, vector))
        runs[name] = functools.partial(program, matrix, vector)
    reads = timing.interleave(runs, seconds)

    # Copies into allocated memory: fresh memory costs page faults on a CPU.
    states = [(matrix, jnp.zeros_like(matrix))]
    copy = workloads.compile_program(lambda s: ((s[0], -s[0]), s[1][0, 0]), (states[0],), (0,))
    copies = timing.interleave({"copy": timing.in_turn(copy, states, [()], True)}, seconds)["copy"]
    del states, runs, matrix

    products = []
    for n in sides:
        d = size // 64 // n
        rows, square = jnp.ones((n, d)), jnp.ones((n, n))
        shapes = {
            "n x d by d x n": (lambda g, _: jnp.dot(g, g.T, precision=lax.Precision.HIGHEST)),
            "n x n by n x d": (lambda g, s: jnp.dot(s, g, precision=lax.Precision.HIGHEST)),
        }
        runs = {
            name: functools.partial(
                workloads.compile_program(function, (rows, square)), rows, square
            )
            for name, function in shapes.items()
        }
        for name, time in timing.interleave(runs, seconds).items():
            rate = 2 * n * n * d / time["median"]
            products.append({"n": n, "d": d, "shape": name, "time": time, "rate": rate})
    return {
        "bytes": size,
        "read": reads,
        "copy": copies,
        "products": products,
        "read_bandwidth": size / min(time["median"] for time in reads.values()),
        "copy_bandwidth": 2 * size / copies["median"],
        "matrix_rate": max(product["rate"] for product in products),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
