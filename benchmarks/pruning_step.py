"""Time and memory of a pruning step on ResNet-20, without its gradients.

    python benchmarks/pruning_step.py

A step scores 268,336 weights, selects 80 % of them and updates the others, with n = 256: whole, in
blocks of 128, and with greedy masks. Each case runs in its own process. Linux only: the peak comes
from ``/proc``. Writes ``results/pruning_step.json`` and the table in ``docs/pruning-results.md``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import memory
import numpy as np
import report

from mfac_jax import pruning, rows

N, SPARSITY, DAMPING = 256, 0.8, 1e-5
# The kernels of ResNet-20, without the 1 x 1 shortcuts.
SHAPES = [(3, 3, 3, 16), *[(3, 3, 16, 16)] * 6, (3, 3, 16, 32), *[(3, 3, 32, 32)] * 5]
SHAPES += [(3, 3, 32, 64), *[(3, 3, 64, 64)] * 5, (64, 10)]
CASES = {
    "whole": {"score": "mfac", "blocks": None},
    "blocks of 128": {"score": "mfac", "blocks": 128},
    "greedy, blocks of 128": {"score": "greedy", "blocks": 128},
}
BARS = {"whole": 4.0, "blocks of 128": 4.0, "greedy, blocks of 128": 8.0}
MEMORY_BAR = 2.5
PAGE = "pruning-results.md"


def measure(case: str, runs: int = 5) -> dict[str, Any]:
    """The seconds of each run and of compilation, and the peak as a multiple of the gradients."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.standard_normal(shape, np.float32)) / 20 for shape in SHAPES]
    d = sum(leaf.size for leaf in params)
    held = rows.Dense().empty(params, N)
    write = jax.jit(lambda held, i, g: held.write(i, g)[0], donate_argnums=0)
    for i in range(N):
        flat = rng.standard_normal(d, np.float32) / np.float32(np.sqrt(d))
        parts = np.split(flat, np.cumsum([leaf.size for leaf in params])[:-1])
        gradient = [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]
        held = write(held, jnp.int32(i), gradient)
    mask = pruning.initial_mask(params)
    jax.block_until_ready(held)
    options = {"damping": DAMPING, "scope": pruning.Scope(path_filter=""), **CASES[case]}
    seconds = []
    for _ in range(runs + 1):
        if seconds:  # everything is compiled: the peak from here is that of a step
            memory.return_freed_memory()
            before = _start_peak()
        start = time.perf_counter()
        done = pruning.prune_step(params, mask, held, SPARSITY, **options)
        jax.block_until_ready(done)
        seconds.append(time.perf_counter() - start)
    size = 4 * N * d
    return {
        "first": seconds[0],
        "seconds": seconds[1:],
        "peak": (size + _status("VmHWM") - before) / size,
    }


def _start_peak() -> int:
    """Resets the peak memory of this process (Linux); returns its present memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def table(results: dict) -> str:
    """The table of the documentation."""
    lines = [
        "| step, n = 256, 80 % | time | wanted | with compilation | peak, in gradients | wanted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case, found in results["ways"].items():
        median = float(np.median(found["seconds"]))
        lines.append(
            f"| {case} | {median:.2f} s | < {BARS[case]:.0f} s | {found['first']:.1f} s "
            f"| {found['peak']:.2f} x | < {MEMORY_BAR} x |"
        )
    where = results["environment"]
    device = f"{where['processor']}, {where['cores']} cores"
    lines += ["", f"{device}, jax {where['jax']}, {where['date']}."]
    return "\n".join(lines)


def main() -> None:
    """Measures every case in its own process; ``--render`` only writes the table."""
    if sys.argv[1:] == ["--render"]:
        report.write_table(
            report.ROOT / "docs" / PAGE, "pruning_step", table(report.load("pruning_step"))
        )
        return
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    cases = {}
    for case in CASES:
        command = [sys.executable, __file__, case]
        out = subprocess.run(command, check=True, capture_output=True, text=True)
        cases[case] = json.loads(out.stdout.splitlines()[-1])
        print(case, cases[case], flush=True)
    results = {"environment": machine.environment(), "ways": cases}
    report.save("pruning_step", results)
    report.write_table(report.ROOT / "docs" / PAGE, "pruning_step", table(results))


if __name__ == "__main__":
    main()
