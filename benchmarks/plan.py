"""Plans beside XLA's own figures and the memory of a process.

    python benchmarks/plan.py [--only compiled process] [--render]

Compiled: a step of the optimizer for the shapes of five networks, which allocates nothing. Process:
the peak of a process that runs what the plan is for. Writes ``results/plan.json`` and the tables of
``docs/planning.md``; ``--render`` only writes the tables. Takes about half an hour on two CPU
cores, most of it in XLA.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import memory
import networks
import optax
import report
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from mfac_jax import collect_gradients, fisher_inverse, mfac_precondition, mfacw, planning
from mfac_jax._memory import arrays, on_mesh, with_unit
from mfac_jax.pruning import Gradients, prune
from mfac_jax.rows import Dense, Files, Int8, Paged, TopK

PAGE = report.ROOT / "docs" / "planning.md"
OPTIMIZERS = {
    "Dense()": mfac_precondition(64),
    "Dense(bfloat16)": mfac_precondition(64, storage=Dense(jnp.bfloat16)),
    'Dense(packing="leaf")': mfac_precondition(64, storage=Dense(packing="leaf")),
    "Int8()": mfac_precondition(64, storage=Int8()),
    "TopK(0.01)": mfac_precondition(64, storage=TopK(0.01)),
    "Paged()": mfac_precondition(64, storage=Paged()),
    "mfacw(1e-3)": mfacw(1e-3),
}
# XLA for a CPU takes many minutes for the batched factorizations of larger networks.
ONLY_SMALL = {"mfacw(1e-3)": ("ResNet-20",)}
WINDOW = 64
# As on the page.
EXAMPLE = {
    "kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.float32),
    "bias": jax.ShapeDtypeStruct((4096,), jnp.float32),
}
DEVICES = (1, 8, 64, 1024)
HELD = {
    "Dense()": Dense(),
    "Dense(bfloat16)": Dense(jnp.bfloat16),
    "Int8()": Int8(),
    "TopK(0.01)": TopK(0.01),
    "Paged()": Paged(),
    "Files(...)": Files(tempfile.gettempdir()),
}
PROCESSES = (
    ("step", "Dense()", 512),
    ("step", "Int8()", 512),
    ("step", "TopK(0.01)", 512),
    ("step", "Paged()", 512),
    ("inverse", "Dense()", 512),
    ("inverse", "Dense(bfloat16)", 512),
    ("inverse", "Int8()", 512),
    ("inverse", "TopK(0.01)", 512),
    ("inverse", "Paged()", 512),
    ("inverse", "Files(...)", 512),
    ("pruning", "Dense()", 128),
    ("pruning in blocks", "Dense()", 4096),
)


def compiled_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """The arguments, results and temporary arrays of a step, without the parameters."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        is_on_host = getattr(leaf, "memory_space", None) == jax.memory.Space.Host
        kind = "pinned_host" if is_on_host else "device"
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(placed, arrays(tx.init, on_mesh(params)))
    step = jax.jit(tx.update, donate_argnums=1)
    found = step.lower(params, state, params).compile().memory_analysis()
    taken = {
        what: getattr(found, f"{what}_size_in_bytes") + getattr(found, f"host_{what}_size_in_bytes")
        for what in ("argument", "output", "alias", "temp")
    }
    read = taken["argument"] - nbytes(params) - nbytes(state)
    return (
        taken["argument"]
        + taken["output"]
        - taken["alias"]
        + taken["temp"]
        - (nbytes(params) if read >= nbytes(params) else 0)  # parameters that the step reads
    )


def nbytes(tree: Any) -> int:
    """The bytes of arrays or shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled() -> list[dict[str, Any]]:
    """Every optimizer on every network."""
    found = []
    cases = [(name, network) for name in OPTIMIZERS for network in networks.NETWORKS]
    for name, network in tqdm(cases, desc="compiled", disable=None):
        if network not in ONLY_SMALL.get(name, networks.NETWORKS):
            continue
        actual = compiled_bytes(OPTIMIZERS[name], networks.NETWORKS[network]())
        found.append({"optimizer": name, "network": network, "XLA": actual})
    return found


def with_plans(results: dict[str, Any]) -> dict[str, Any]:
    """The results with the plan of each case."""

    def of_step(r: dict[str, Any]) -> int:
        params = networks.NETWORKS[r["network"]]()
        made = planning.plan_optimizer(OPTIMIZERS[r["optimizer"]], params)
        return made.device_bytes + made.host_bytes

    def of_process(r: dict[str, Any]) -> int:
        return planned(r["what"], r["storage"], r["count"])

    both = {"compiled": of_step, "process": of_process}
    return results | {
        name: [r | {"plan": plan(r)} for r in results[name]] for name, plan in both.items()
    }


def _loss(params: Any, batch: Any) -> jax.Array:
    """A loss whose gradient is dense and takes no memory beside the parameters."""
    return sum(jnp.sum((x - jnp.mean(batch)) ** 2) for x in jax.tree.leaves(params))


def planned(what: str, storage: str, count: int) -> int:
    """The bytes of the plan of one case of :data:`PROCESSES`."""
    shapes, held = networks.resnet20(), HELD[storage]
    if what == "step":
        made = planning.plan(shapes, count, storage=held)
    elif what == "inverse":
        made = planning.plan_inverse(shapes, count, storage=held)
    else:
        gradients = Gradients(count, storage=held, in_blocks=what == "pruning in blocks")
        made = planning.plan_pruning(shapes, steps=2, gradients=gradients)
    return made.device_bytes + made.host_bytes


def run(what: str, storage: str, count: int) -> None:
    """Measures one case in this process, and prints the bytes."""
    held, key = HELD[storage], jax.random.key(0)
    params = jax.tree.map(lambda x: jax.random.normal(key, x.shape), networks.resnet20())
    batches = [jax.random.normal(jax.random.key(i), (8,)) for i in range(4)]
    tx = mfac_precondition(count, storage=held)
    update = jax.jit(tx.update, donate_argnums=1)

    def measured() -> Any:
        if what == "step":
            return update(params, tx.init(params))
        if what == "inverse":
            with tempfile.TemporaryDirectory() as folder:
                kept = Files(folder) if isinstance(held, Files) else held
                rows = collect_gradients(
                    _loss, params, batches, count, storage=kept, progress=False
                )
                inverse = fisher_inverse(rows, 0.1)
                return inverse.ihvp(params), inverse.diagonal()
        gradients = Gradients(count, storage=held, in_blocks=what == "pruning in blocks")
        options = {"steps": 2, "gradients": gradients, "progress": False}
        return prune(params, _loss, batches, 0.5, **options).mask

    jax.block_until_ready(measured())  # compiles
    gc.collect()
    memory.return_freed_memory()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    jax.block_until_ready(measured())
    print(json.dumps({"process": _status("VmHWM") - before}))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def processes() -> list[dict[str, Any]]:
    """Every case in processes of its own; the median, for the peaks differ by some MiB."""
    return [
        {"what": what, "storage": storage, "count": count, "process": peak(what, storage, count)}
        for what, storage, count in tqdm(PROCESSES, desc="process", disable=None)
    ]


def peak(what: str, storage: str, count: int) -> int:
    """The rise of the peak memory of a process, the median of three."""
    command = [sys.executable, __file__, "--run", what, storage, str(count)]
    outputs = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)
    ]
    return sorted(json.loads(text.splitlines()[-1])["process"] for text in outputs)[1]


def spread(devices: int) -> Any:
    """The decoder, every parameter cut over all devices along an axis that they divide."""
    mesh = AbstractMesh((devices,), ("x",))

    def cut(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = next(i for i, size in enumerate(leaf.shape) if size % devices == 0)
        spec = PartitionSpec(*[None] * axis, "x")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(cut, networks.decoder())


def of_devices() -> str:
    """What the decoder takes on a device of many, and what a step communicates."""
    lines = [
        "| devices | parameters | gradients | everything | all-reduced in a step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for devices in DEVICES:
        params = spread(devices)
        made = planning.plan(params, WINDOW, storage=Dense(packing="leaf"), platform="gpu")
        sizes = [nbytes(params) // devices, made.components[0].nbytes, made.device_bytes]
        shared = 4 * len(jax.tree.leaves(params)) * (WINDOW + 1) if devices > 1 else 0
        lines.append("| " + " | ".join([f"{devices:,}", *map(with_unit, [*sizes, shared])]) + " |")
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the page by their names."""
    ratios: dict[str, dict[str, str]] = {}
    for r in results["compiled"]:
        ratios.setdefault(r["optimizer"], {})[r["network"]] = f"{r['plan'] / r['XLA']:.2f}"
    names = list(networks.NETWORKS)
    lines = ["| optimizer | " + " | ".join(names) + " |", "| --- " * (1 + len(names)) + "|"]
    for optimizer, of_each in ratios.items():
        lines.append(f"| `{optimizer}` | {' | '.join(of_each.get(n, '-') for n in names)} |")
    lines.append(_environment(results, "compiled"))
    made = {"plan-compiled": "\n".join(lines)}
    lines = ["| what | storage | gradients | plan | process |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r['what']} | `{r['storage']}` | {r['count']} | {r['plan'] / 2**20:.0f} MiB "
        f"| {r['process'] / 2**20:.0f} MiB |"
        for r in results["process"]
    ]
    lines.append(_environment(results, "process"))
    printed = planning.plan(EXAMPLE, window_size=256, platform="gpu")
    made["plan-printed"] = "\n".join(["```text", str(printed), "```"])
    return made | {"plan-process": "\n".join(lines), "plan-devices": of_devices()}


def _environment(results: dict[str, Any], name: str) -> str:
    return "\n" + report.where(results[f"{name} environment"])


def main() -> None:
    """Reads the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["compiled", "process"])
    parser.add_argument("--render", action="store_true", help="only write the tables")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        what, storage, count = options.run
        run(what, storage, int(count))
        return
    path = report.RESULTS / "plan.json"
    results = report.load("plan") if path.exists() else {}
    for name, measure in (("compiled", compiled), ("process", processes)):
        if not options.render and name in (options.only or [name]):
            results[name] = measure()
            results[f"{name} environment"] = report.environment()
    results = with_plans(results)
    report.save("plan", results)
    for name, text in tables(results).items():
        report.write_table(PAGE, name, text)


if __name__ == "__main__":
    main()
