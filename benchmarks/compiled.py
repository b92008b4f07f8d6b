"""The compiler's report on the GPU kernels: registers, shared memory, spills, memory.

    python benchmarks/compiled.py

Compiles every kernel for the H200 that ``tests/aot/h200.textproto`` describes. This needs no GPU,
but the plugin and compiler that ``tests/aot/compile_cuda.py`` names. Writes
``results/compiled.json`` and the table of ``docs/implementations.md``. Then counts the launches of
a step of the optimizer (``benchmarks/launches.py``). Takes half a minute on two CPU cores, with
jax 0.12.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import launches
import report
from jax import Array
from jax.experimental import topologies

from mfac_jax.kernels import _mosaic_gpu

jax.config.update("jax_platforms", "cpu")  # the plugin compiles; there is no GPU to start

TARGET = report.ROOT / "tests" / "aot" / "h200.textproto"
DEVICE = "NVIDIA H200"


class Block(NamedTuple):
    """The gradients of a model: the shape ``([t,] m, k)`` and the dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape of one row."""
        return (*self.shape[:-2], self.shape[-1])

    @property
    def nbytes(self) -> int:
        """The size of the gradients in bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


BLOCKS = (
    Block("ResNet-20, m = 512", (34, 512, 8064), "float32"),
    Block("ResNet-20, m = 512, one tile", (512, 272_480), "float32"),
    Block("ResNet-50, m = 64", (3120, 64, 8192), "float32"),
    Block("ResNet-50, m = 512", (3120, 512, 8192), "float32"),
    Block("110 million parameters, m = 64", (13_428, 64, 8192), "bfloat16"),
)


# The multiprocessor that thread blocks share: registers, and bytes of shared memory. The driver
# takes some of these bytes for each thread block.
REGISTERS, SHARED, RESERVED = 65_536, 233_472, 1024
THREADS = 128


def scans(block: Block) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Each kernel, and the shapes and dtypes of its arguments."""
    vector, matrix = (block.columns, "float32"), (block.shape, block.dtype)
    weights = ((block.shape[-2],), "float32")

    def update(block: Array, c: Array, vector: Array, scale: Array) -> Array:
        return _mosaic_gpu.combine(block, c, vector=vector, scale=scale)

    return {
        "dots": (_mosaic_gpu.dots, [matrix, vector]),
        "write_row": (_mosaic_gpu.write_row, [matrix, ((), "int32"), vector, ((), "bool")]),
        "combine": (_mosaic_gpu.combine, [matrix, weights]),
        "combine, vector and scale": (update, [matrix, weights, vector, ((), "float32")]),
    }


def number(pattern: str, text: str) -> int:
    """The number in the one place where ``text`` matches ``pattern``."""
    (found,) = re.findall(pattern, text)
    return int(found)


def compile_one(
    function: Callable[..., Any], arguments: list[Any], device: Any, dumps: Path, *, donate: bool
) -> dict[str, int]:
    """The facts about one kernel that need no run."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    places = [jax.ShapeDtypeStruct(*argument, sharding=sharding) for argument in arguments]
    for old in dumps.iterdir():
        old.unlink()
    compiled = jax.jit(function, donate_argnums=0 if donate else ()).lower(*places).compile()
    if not any(dumps.glob("*.ptxas")):
        raise RuntimeError(f"jax {jax.__version__} keeps no report of the assembler; 0.12 does.")
    (assembler,), (resources,) = dumps.glob("*.ptxas"), dumps.glob("*.resources.txt")
    report_text, shared_text = assembler.read_text(), resources.read_text()
    memory = compiled.memory_analysis()
    registers = number(r"Used (\d+) registers", report_text)
    shared = number(r"smem_scratch_bytes=(\d+)", shared_text)
    allocated = -(-registers // 8) * 8 * THREADS  # the hardware allocates them in units of eight
    return {
        "registers": registers,
        "spilled_bytes": number(r"(\d+) bytes spill stores", report_text)
        + number(r"(\d+) bytes spill loads", report_text),
        "stack_bytes": number(r"(\d+) bytes stack frame", report_text),
        "shared_bytes": shared,
        "thread_blocks_per_multiprocessor": min(
            REGISTERS // allocated, SHARED // (shared + RESERVED)
        ),
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
    }


def measure(dumps: Path) -> dict[str, Any]:
    """All kernels on all blocks."""
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(dumps)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET.read_text(), topology="1x1x1"
    )
    kernels = []
    for block in BLOCKS:
        for name, (function, arguments) in scans(block).items():
            donate = name.startswith("write_row")
            found = compile_one(function, arguments, topology.devices[0], dumps, donate=donate)
            print(f"{block.name}: {name}: {found}")
            if found["spilled_bytes"]:
                raise RuntimeError(f"{name} for {block.name} runs out of registers.")
            kernels.append(
                {
                    "block": block.name,
                    "shape": block.shape,
                    "dtype": block.dtype,
                    "block_bytes": block.nbytes,
                    "kernel": name,
                    **found,
                }
            )
    environment = report.environment() | {"device": f"{DEVICE}, compiled for and not run on"}
    return {"environment": environment, "kernels": kernels}


def table(results: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = [
        "| gradients | kernel | registers | spilled | shared memory | thread blocks on a "
        "multiprocessor | extra memory, of G |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["kernels"]:
        kind = "bfloat16" if row["dtype"] == "bfloat16" else "float32"
        share = row["temporary_bytes"] / row["block_bytes"]
        cells = [
            f"{row['block']}, {kind}",
            row["kernel"],
            f"{row['registers']}",
            f"{row['spilled_bytes']} B",
            f"{row['shared_bytes'] / 1024:.0f} KiB",
            f"{row['thread_blocks_per_multiprocessor']}",
            f"{share:.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    environment = results["environment"]
    lines += ["", f"{DEVICE}, jax {environment['jax']}, {environment['date']}."]
    return "\n".join(lines)


def main() -> None:
    """Compiles, saves, and writes the table into the documentation."""
    with tempfile.TemporaryDirectory() as dumps:
        results = measure(Path(dumps))
    report.save("compiled", results)
    report.write_table(report.ROOT / "docs" / "implementations.md", "compiled", table(results))
    print(table(results))
    launches.write()


if __name__ == "__main__":
    main()
