"""Counts the work of an NVIDIA GPU and its host in a step of the optimizer, without a GPU.

    python benchmarks/launches.py

Compiles an update of :func:`mfac_jax.mfac_precondition` for the H200 that
``tests/aot/h200.textproto`` describes. Counts what XLA launches there: launches, the CUDA graphs
that contain them, and the places where the host waits for a number from the device. Writes
``results/launches.json`` and a table of ``docs/implementations.md``. ``benchmarks/compiled.py``
also runs this script, and its docstring says what it needs.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import report
from jax.experimental import topologies

from mfac_jax import mfac_precondition

jax.config.update("jax_platforms", "cpu")  # the plugin compiles; there is no GPU to start

TARGET = report.ROOT / "tests" / "aot" / "h200.textproto"
DEVICE = "NVIDIA H200"
PARAMETERS = 272_474  # ResNet-20
WINDOW_SIZES = (64, 512)

# Groups hold other operations and launch nothing themselves.
_GROUPS = ("kCommandBuffer", "kSequential", "kConditional", "kWhile")
_WAITS = ("kConditional", "kWhile")


def count(sequence: str) -> dict[str, int]:
    """The operations of a program, from the sequence of thunks that XLA dumps.

    An operation begins with its number and kind. The operations of a group follow it, indented.
    Rare operations are those in a branch or a loop outside of the graphs.
    """
    found = {"launches": 0, "graphs": 0, "waits": 0, "rare_launches": 0, "rare_waits": 0}
    is_rare = is_graph = False
    for line in sequence.splitlines():
        for match in re.finditer(r"\d{3,}: (k\w+)", line):
            kind, is_outer = match[1], match.start() == 0
            if is_outer:
                is_rare, is_graph = False, kind == "kCommandBuffer"
                found["graphs"] += is_graph
            place = "rare_" if is_rare else ""
            found[f"{place}launches"] += kind not in _GROUPS
            found[f"{place}waits"] += kind in _WAITS and not is_graph
            if is_outer:
                is_rare = kind in _WAITS
    if not found["launches"]:
        raise RuntimeError(f"no operations in what XLA wrote: {sequence[:200]!r}.")
    return found


def compile_step(window_size: int, device: Any, dumps: Path) -> str:
    """The sequence of thunks of one update with a donated state."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    tx = mfac_precondition(window_size)
    gradient = jax.ShapeDtypeStruct((PARAMETERS,), jnp.float32)
    state = jax.eval_shape(tx.init, gradient)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (gradient, state),
    )
    lowered = jax.jit(tx.update, donate_argnums=1).lower(*placed)
    lowered.compile(compiler_options={"xla_dump_to": str(dumps)})
    # A pass dumps its sequence if it puts something into graphs.
    written = [*dumps.glob("*thunk_sequence_after_thunk_passes.txt")]
    (sequence,) = written or dumps.glob("*thunk_sequence.txt")
    return sequence.read_text()


def measure() -> dict[str, Any]:
    """Counts the operations of one update at every window size."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET.read_text(), topology="1x1x1"
    )
    steps = []
    for m in WINDOW_SIZES:
        with tempfile.TemporaryDirectory() as dumps:
            steps.append({"m": m, **count(compile_step(m, topology.devices[0], Path(dumps)))})
        print(steps[-1])
    environment = report.environment() | {"device": f"{DEVICE}, compiled for and not run on"}
    return {"environment": environment, "parameters": PARAMETERS, "steps": steps}


def table(results: dict[str, Any]) -> str:
    """The counts as a Markdown table."""
    lines = [
        "| m | launches | CUDA graphs | the host waits | operations for an inverse made anew | "
        "waits among them |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for step in results["steps"]:
        names = ("m", "launches", "graphs", "waits", "rare_launches", "rare_waits")
        lines.append(f"| {' | '.join(str(step[name]) for name in names)} |")
    environment = results["environment"]
    lines += [
        "",
        f"d = {results['parameters']:,}, float32, {DEVICE}, jax {environment['jax']}, "
        f"{environment['date']}.",
    ]
    return "\n".join(lines)


def write() -> None:
    """Compiles, saves, and writes the table into the documentation."""
    results = measure()
    report.save("launches", results)
    report.write_table(report.ROOT / "docs" / "implementations.md", "launches", table(results))
    print(table(results))


if __name__ == "__main__":
    write()
