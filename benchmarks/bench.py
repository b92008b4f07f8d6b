"""Speed: every operation against its floor on this machine, and against the alternatives.

    python benchmarks/bench.py [--device cpu|gpu|tpu] [--quick] [--output DIR] [--tables]

Measures the machine, then the operations at the named workloads, the n x n step, whole
training steps and time against d. Writes ``results/bench-DEVICE.json``, the tables of
``docs/performance.md`` and of the README, and the figures. ``--tables`` only writes the tables
and figures, from the existing result files. ``--quick`` uses small sizes, takes seconds and writes
nothing. With ``--output`` the result, tables and figure go to the named folder. The result file is
written after every part, so that a run that is stopped loses one part.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# JAX takes memory from a GPU as needed, so that PyTorch finds some. It may take nearly all of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import bench_tables
import figures
import jax
import machine
import memory
import numpy as np
import operations
import report
import small_step
import timing
import training_step
import workloads
from tqdm import tqdm
from workloads import DoesNotFit, Workload

from mfac_jax import incremental

PAGE = report.ROOT / "docs" / "performance.md"
README = report.ROOT / "README.md"
ASSETS = report.ROOT / "docs" / "assets"
TABLES = {
    "bench": bench_tables.bars,
    "bench-machines": bench_tables.machines,
    "bench-operations": bench_tables.operations,
    "bench-blocks": bench_tables.blocks,
    "bench-small-steps": bench_tables.small_steps,
    "bench-training": bench_tables.training,
    "bench-scaling": bench_tables.scaling,
    "bench-figures": bench_tables.figures,
}
_STEPS_A_CALL = 8

# The clock of an accelerator is steadier, and most of the time goes into compilation.
_ACCELERATOR_SECONDS = 0.5


class Sizes(NamedTuple):
    """The sizes of a measurement.

    Attributes:
        seconds: about how long each program is measured.
        workloads: the windows.
        sides: m of the n x n steps, and the sides of the matrix products.
        d: the number of coordinates of the windows that are timed beside the n x n steps.
        scaling: the numbers of coordinates, and m.
        optimizers: the optimizers of the training steps.
        batch: the batch size of the training steps.
        network: the width of the first stage and the number of blocks in a stage.
        largest: the number of bytes that are read and copied to measure the machine.
    """

    seconds: float
    workloads: tuple[Workload, ...]
    sides: tuple[int, ...]
    d: int
    scaling: tuple[tuple[int, ...], int]
    optimizers: tuple[str, ...]
    batch: int
    network: tuple[int, int]
    largest: int


FULL = Sizes(
    seconds=0.5,
    workloads=workloads.FULL,
    sides=(64, 128, 256, 512, 1024),
    d=workloads.RESNET20,
    scaling=((100_000, 300_000, 1_000_000, 3_000_000, 10_000_000), 128),
    optimizers=tuple(training_step.OPTIMIZERS),
    batch=training_step.BATCH,
    network=(16, 3),
    largest=2**32,
)
QUICK = Sizes(
    seconds=0.02,
    workloads=workloads.QUICK,
    sides=(16,),
    d=20_000,
    scaling=((10_000, 40_000), 4),
    optimizers=(training_step.BASELINE, "M-FAC, m = 64"),
    batch=4,
    network=(4, 1),
    largest=2**22,
)


def measure(sizes: Sizes, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures everything, and calls ``save`` with the results so far after every part.

    What a user asks first comes first: a run that is stopped leaves the tables shorter.
    """
    start = time.perf_counter()
    environment = machine.environment()
    results: dict[str, Any] = {"slug": machine.slug(environment), "environment": environment}
    parts = len(sizes.workloads) + len(sizes.sides) + len(sizes.scaling[0]) + 2
    with tqdm(total=parts, desc="machine", disable=None) as bar:

        def done() -> None:
            environment["minutes"] = round((time.perf_counter() - start) / 60, 1)
            save(results)
            bar.update()

        results["machine"] = machine.measure(sizes.seconds / 2, sizes.sides, sizes.largest)
        done()
        bar.set_description("training steps")
        results["training"] = training_step.measure(
            8 * sizes.seconds, sizes.optimizers, sizes.batch, *sizes.network
        )
        done()
        results["scaling"] = _scaling(sizes, bar)
        save(results)
        results |= {"operations": [], "left_out": []}
        for w in sizes.workloads:
            bar.set_description(w.name)
            _operations(w, sizes.seconds, results, bar)
            done()
        results["small_steps"] = []
        for m in sizes.sides:
            bar.set_description(f"n x n step, m = {m}")
            results["small_steps"].append(_small_step(Workload("", sizes.d, m), sizes.seconds))
            done()
    return results


def _operations(w: Workload, seconds: float, results: dict[str, Any], bar: tqdm) -> None:
    """Adds the operations of a workload to the results."""
    try:
        data = workloads.Data(w)
    except DoesNotFit as reason:
        results["left_out"].append({"name": w.name, "block": w.block, "reason": str(reason)})
        return
    bandwidth = results["machine"]["read_bandwidth"]
    for record in operations.measure(w, data, bandwidth, seconds):
        results["operations"].append(record)
        bar.set_postfix_str(record["operation"])


def _small_step(w: Workload, seconds: float) -> dict[str, Any]:
    """Times the methods for the n x n step, and the whole step that contains it."""
    data = workloads.Data(w)
    gram = data.windows[0].gram
    shift = jax.numpy.asarray(w.m * workloads.DAMPING, gram.dtype)
    start = small_step.age(gram, shift)
    again = workloads.compile_program(small_step.refactor_steps(_STEPS_A_CALL), (gram, shift))
    along = workloads.compile_program(small_step.update_factor_steps(_STEPS_A_CALL), (start, shift))
    newest = jax.numpy.zeros(w.m, gram.dtype).at[0].set(1)
    _, inverse = incremental.solve(incremental.empty(w.m, gram.dtype), gram, shift, newest)
    arguments = (gram, inverse, shift)
    kept = workloads.compile_program(small_step.update_inverse_steps(_STEPS_A_CALL), arguments)
    small = timing.interleave(
        {
            "refactor": lambda: again(gram, shift),
            "update factor": lambda: along(start, shift),
            "update inverse": lambda: kept(*arguments),
        },
        seconds,
    )
    for cell in small.values():
        for key in ("median", "low", "high"):
            cell[key] /= _STEPS_A_CALL
    whole = timing.interleave({"push + direction": _push_direction(data)}, seconds)
    return {"m": w.m, "d": w.d, "times": small | whole}


def _push_direction(data: workloads.Data) -> timing.Run:
    inputs = [(vector,) for vector in data.vectors]
    states = operations.OptimizerStates(data.windows)
    arguments = (states[0], *inputs[0])
    program = workloads.compile_program(operations.push_direction, arguments, (0,))
    return timing.in_turn(program, states, inputs, donates=True)


def _scaling(sizes: Sizes, bar: tqdm) -> dict[str, Any]:
    """Times all sizes turn by turn, so that a machine that slows down affects all of them."""
    sides, m = sizes.scaling
    runs = {}
    for d in sides:
        bar.set_description(f"push + direction, d = {d:,}")
        runs[d] = _push_direction(workloads.Data(Workload("", d, m)))
        bar.update()
    times = timing.interleave({str(d): run for d, run in runs.items()}, sizes.seconds)
    points = [{"d": d, "time": times[str(d)]} for d in sides]
    logarithms = np.log([[point["d"], point["time"]["median"]] for point in points])
    slope, intercept = np.polyfit(*logarithms.T, 1)
    return {"m": m, "points": points, "slope": float(slope), "intercept": float(intercept)}


def result_files(folder: Path = report.RESULTS) -> list[dict[str, Any]]:
    """All results; the CPU's results come first."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("bench-*.json"))]
    return sorted(files, key=lambda r: r["environment"]["platform"] != "cpu")


def write_tables(files: Sequence[dict[str, Any]]) -> None:
    """The tables of the documentation and the README, and the figures."""
    for name, table in TABLES.items():
        report.write_table(PAGE, name, table(files))
    report.write_table(README, "bench", TABLES["bench"](files))
    for results in filter(figures.has_figure, files):
        figures.draw(results, ASSETS / f"roofline-{results['slug']}.png")


def write_output(folder: Path, results: dict[str, Any]) -> None:
    """Writes the tables and the figure into a folder."""
    tables = [f"## {name}\n\n{table([results])}" for name, table in TABLES.items()]
    (folder / "tables.md").write_text("\n\n".join(tables) + "\n")
    figures.draw(results, folder / f"roofline-{results['slug']}.png")


def main(argv: list[str] | None = None) -> None:
    """Measures and renders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="JAX's choice by default")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--output", type=Path, help="a folder for all that is written")
    parser.add_argument("--tables", action="store_true", help="only render the result files")
    args = parser.parse_args(argv)
    if args.device is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(args.device, args.device))
    folder = args.output or (None if args.quick else report.RESULTS)

    def save(results: dict[str, Any]) -> None:
        if folder is not None:
            report.save(f"bench-{results['slug']}", results, folder)

    if not args.tables:
        sizes = QUICK if args.quick else FULL
        if jax.default_backend() != "cpu":
            sizes = sizes._replace(seconds=min(sizes.seconds, _ACCELERATOR_SECONDS))
        results = measure(sizes, save)
        print(bench_tables.machines([results]))
        if args.output is not None:
            write_output(args.output, results)
        if args.quick or args.output is not None:
            return
    write_tables(result_files())


if __name__ == "__main__":
    memory.keep_freed_memory()
    main()
