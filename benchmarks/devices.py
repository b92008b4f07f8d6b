"""The time of a step against the number of devices.

    python benchmarks/devices.py [--render]

A step writes a gradient into a window of 64 and multiplies it by the inverse. The devices are
devices of JAX on the cores of this machine: they share its work, so what more of them take is the
price of spreading. Each number has a process of its own. Writes ``results/devices.json`` and a
table of ``docs/planning.md``; ``--render`` only writes the table. Takes a minute.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import report
import timing
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mfac_jax import window
from mfac_jax.rows import Dense

PAGE = report.ROOT / "docs" / "planning.md"
WINDOW, DAMPING = 64, 1e-2
ROWS = COLUMNS = 2048
DEVICES = (1, 2, 4, 8)


@functools.partial(jax.jit, donate_argnums=0)
def step(held: window.Window, gradient: jax.Array) -> tuple[window.Window, jax.Array]:
    """One push and one direction."""
    held, _ = window.push(held, gradient)
    return held, window.ihvp_newest(held, DAMPING * window.fisher_trace(held))


def measure(count: int) -> dict[str, float]:
    """The time of a step of a matrix whose rows are cut over all devices of this process."""
    mesh = Mesh(np.array(jax.devices()), "x", axis_types=(AxisType.Auto,))
    assert mesh.size == count
    gradient = jax.random.normal(jax.random.key(0), (ROWS, COLUMNS))
    gradient = jax.device_put(gradient, NamedSharding(mesh, PartitionSpec("x")))
    held = [window.init(gradient, WINDOW, storage=Dense(packing="leaf"))]
    run = timing.in_turn(step, held, [(gradient,)], donates=True)
    return timing.interleave({"step": run}, seconds=5.0)["step"]


def measured() -> list[dict[str, Any]]:
    """Every number of devices in a process of its own."""
    found = []
    for count in DEVICES:
        # XLA's pool of threads: with as few as there are cores, the devices of a process can wait
        # for one another for ever (jaxlib 0.10).
        more = {"NPROC": str(16 * count)} if count > 1 else {}
        command = [sys.executable, __file__, "--run", str(count)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | more
        )
        found.append({"devices": count} | json.loads(done.stdout.splitlines()[-1]))
    return found


def table(results: dict[str, Any]) -> str:
    """The table of the page."""
    devices, environment = results["devices"], results["environment"]
    lines = [
        "| devices | " + " | ".join(str(r["devices"]) for r in devices) + " |",
        "| --- " * (1 + len(devices)) + "|",
        "| a step, ms | " + " | ".join(f"{1e3 * r['median']:.0f}" for r in devices) + " |",
        f"\n{environment['device']} with {results['cores']} cores, jax {environment['jax']}, "
        f"{environment['date']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="only write the tables")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        jax.config.update("jax_num_cpu_devices", options.run)
        print(json.dumps(measure(options.run)))
        return
    if not options.render:
        results = {
            "devices": measured(),
            "cores": len(os.sched_getaffinity(0)),
            "environment": report.environment(),
        }
        report.save("devices", results)
    report.write_table(PAGE, "devices-time", table(report.load("devices")))


if __name__ == "__main__":
    main()
