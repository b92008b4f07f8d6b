"""Storages beside dense float32: accuracy of the direction, memory and time.

    python benchmarks/storages.py [--only accuracy rounding time static sums disk] [--render]
    python benchmarks/storages.py --only time static --storage "Paged()"

Accuracy: windows of the last gradients of a training run (the digits and the network of the
quickstart). Rounding: ways to round such gradients to 8 bits. Time: one push and one direction, in
turn with dense float32. Static: an inverse and one product with it, likewise. Sums: the diagonal of
a block-wise inverse, likewise. Disk: the scans of files of more bytes than this machine has memory,
beside a plain read of them. Writes ``results/storages.json``, or ``storages-DEVICE.json`` on an
accelerator, after every answer, and the tables of ``docs/storages.md``; ``--render`` only writes
the tables. ``--storage`` measures one storage once more, on the machine and the day of the others.
Takes more than half an hour on two CPU cores, 13 GB of memory, and more disk than memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import operator
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
import report
import timing
from flax import nnx
from numpy.typing import NDArray
from tqdm import tqdm

from mfac_jax import fisher_inverse, mfac_precondition, planning, window
from mfac_jax.rows import Dense, FileRows, Files, InBlocks, Int8, Paged, Storage, TopK

sys.path.append(str(report.ROOT / "examples"))
from quickstart import CNN, load_digits

PAGE = report.ROOT / "docs" / "storages.md"
PAGES = {"storages-sums": report.ROOT / "docs" / "pruning.md"}  # the others are on PAGE
STORAGES: dict[str, Storage] = {
    "Dense()": Dense(),
    "Dense(bfloat16)": Dense(jnp.bfloat16),
    "Int8()": Int8(),
    **{
        f"TopK({density}{more})": TopK(density, error_bits=bits)
        for density in (0.05, 0.01, 0.005)
        for more, bits in (("", 16), (", error_bits=4", 4), (", error_bits=0", 0))
    },
}
WINDOWS = (64, 256)
DAMPING = 0.01  # of the trace
STEPS = 300
BLOCK = 128
TIMED = {
    name: (STORAGES | {"Paged()": Paged()})[name]
    for name in ("Dense()", "Dense(bfloat16)", "Int8()", "TopK(0.01)", "Paged()")
}
SIZES = {"ResNet-20": 272_474, "4 million": 4_000_000, "25 million": 25_000_000}
MOST_ENTRIES = 2**31 - 1  # of a dense window that is timed: 8 GiB
CASES = [
    (size, m)
    for size, m in itertools.product(SIZES.items(), (64, 256, 1024))
    if m * size[1] <= MOST_ENTRIES
]


def gradients(count: int) -> tuple[Any, list[Any]]:
    """The parameters and the last gradients of a training run."""
    (x, y), _ = load_digits()
    graph, params = nnx.split(CNN(nnx.Rngs(0)), nnx.Param)
    tx = optax.chain(mfac_precondition(), optax.scale_by_learning_rate(0.1))

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: Any, state: Any, index: jax.Array) -> Any:
        grads = jax.grad(loss_fn)(params, x[index], y[index])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    state, rng, held = tx.init(params), np.random.default_rng(0), []
    for _ in tqdm(range(STEPS), desc="training", disable=None):
        params, state, grads = step(params, state, rng.integers(0, len(x), 64))
        held = [*held, grads][-count:]
    return params, held


@jax.jit
def _push(held: window.Window, gradient: Any) -> window.Window:
    return window.push(held, gradient)[0]


@jax.jit
def _direction(held: window.Window) -> Any:
    return window.ihvp_newest(held, DAMPING * window.fisher_trace(held))


def filled(storage: Storage, params: Any, grads: list[Any], size: int) -> window.Window:
    """A window of the last gradients. The errors come from as many gradients before."""
    held = window.init(params, size, storage=storage)
    for gradient in grads:
        held = _push(held, gradient)
    return held


def exact(held: window.Window) -> NDArray[np.float64]:
    """The direction of the stored gradients in float64."""
    g = np.asarray(held.rows.columns(0, held.rows.layout.size), np.float64)
    gram = g @ g.T
    n = len(g)
    newest = np.asarray(window.newest_slot(held)) == np.arange(n)
    lam = DAMPING * np.trace(gram) / n
    return n * g.T @ np.linalg.solve(n * lam * np.eye(n) + gram, newest.astype(np.float64))


def nbytes(tree: Any) -> int:
    """The bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def accuracy() -> list[dict[str, Any]]:
    """Every storage and window size on the same gradients."""
    params, grads = gradients(2 * max(WINDOWS))
    d = sum(leaf.size for leaf in jax.tree.leaves(params))
    found = []
    for size in WINDOWS:
        plain = None
        for name, storage in tqdm(STORAGES.items(), desc=f"m = {size}", disable=None):
            held = filled(storage, params, grads[-2 * size :], size)
            got = np.asarray(held.rows.layout.flatten(_direction(held), jnp.float32, "direction"))
            want = exact(held)
            got = got.astype(np.float64)
            plain = got if plain is None else plain
            lengths = np.linalg.norm(got), np.linalg.norm(plain)
            found.append(
                {
                    "storage": name,
                    "m": size,
                    "bytes": nbytes(held.rows) / d,
                    "error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
                    "cosine": float(got @ plain / (lengths[0] * lengths[1])),
                    "length": float(lengths[0] / lengths[1]),
                }
            )
    return found


def times(only: str | None = None) -> Iterator[dict[str, Any]]:
    """One push and one direction, for windows that fit, of each storage in turn with dense."""
    for (name, d), m in CASES:
        gradient = jax.random.normal(jax.random.key(0), (d,))

        @functools.partial(jax.jit, donate_argnums=0)
        def step(held: window.Window, gradient: jax.Array) -> tuple[window.Window, jax.Array]:
            held, _ = window.push(held, gradient)
            return held, window.ihvp_newest(held, DAMPING * window.fisher_trace(held))

        def runs(
            storages: dict[str, Storage], m: int = m, gradient: Any = gradient, step: Any = step
        ) -> dict[str, timing.Run]:
            states = {s: window.init(gradient, m, storage=storages[s]) for s in storages}

            def run(s: str) -> Any:
                states[s], direction = step(states[s], gradient)
                return direction

            return {s: functools.partial(run, s) for s in storages}

        yield from in_pairs({"size": name, "d": d, "m": m}, TIMED, runs, only)


def static(only: str | None = None) -> Iterator[dict[str, Any]]:
    """An inverse and a product with it, for gradients that fit, in turn with dense."""
    with tempfile.TemporaryDirectory() as folder:
        for (name, d), m in CASES:

            def runs(storages: dict[str, Storage], d: int = d, m: int = m) -> dict[str, timing.Run]:
                held = {s: random_rows(d, m, storages[s]) for s in storages}
                vector = jax.random.normal(jax.random.key(1), (d,))

                def run(s: str) -> Any:
                    return fisher_inverse(held[s], 1e-3).ihvp(vector)

                return {s: functools.partial(run, s) for s in storages}

            stored = TIMED | {"Files(...)": Files(folder)}
            yield from in_pairs({"size": name, "d": d, "m": m}, stored, runs, only)


def sums() -> Iterator[dict[str, Any]]:
    """The diagonal of a block-wise inverse from sums in blocks, in turn with dense gradients."""
    d = SIZES["ResNet-20"]
    for m in (64, 256, 1024):

        def runs(storages: dict[str, Storage], m: int = m) -> dict[str, timing.Run]:
            def diagonal(rows: Any) -> Any:
                return fisher_inverse(rows, 1e-3, blocks=BLOCK).diagonal()

            gradients, like = jax.random.normal(jax.random.key(0), (m, d)), jnp.zeros(d)
            held = {s: storages[s].hold(gradients, like) for s in storages}
            return {s: functools.partial(diagonal, held[s]) for s in storages}

        stored = {"Dense()": Dense(), f"InBlocks({BLOCK})": InBlocks(BLOCK)}
        yield from in_pairs({"size": "ResNet-20", "d": d, "m": m}, stored, runs)


def in_pairs(
    case: dict[str, Any],
    storages: dict[str, Storage],
    runs: Callable[[dict[str, Storage]], dict[str, timing.Run]],
    only: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Each storage in turn with the first one, so that two of them are in memory at a time."""
    (plain, first), *others = storages.items()
    others = [(name, storage) for name, storage in others if only in (None, name)]
    seconds = 2.0 if jax.default_backend() == "cpu" else 0.5  # the other clocks are steadier
    for name, storage in tqdm(others, desc=f"{case['size']}, m = {case['m']}", disable=None):
        pair = runs({plain: first, name: storage})
        for run in pair.values():  # compiles, and touches all memory
            jax.block_until_ready(run())
        of_each = timing.interleave(pair, seconds)
        yield case | {"storage": name, "dense": of_each[plain]} | of_each[name]


def random_rows(d: int, m: int, storage: Storage, count: int = 8) -> Any:
    """Random gradients, ``count`` made at a time."""
    rows = storage.empty(jnp.zeros(d), m)

    def write(rows: Any, first: int, gradients: jax.Array) -> Any:
        return rows.write_rows(first, gradients, len(gradients))[0]

    if rows.is_traceable:
        write = jax.jit(write, donate_argnums=0)
    for i in range(0, m, count):
        rows = write(rows, i, jax.random.normal(jax.random.key(i), (count, d)))
    return rows


def disk() -> list[dict[str, Any]]:
    """Scans of files that no memory holds, an inverse with a product, and a plain read."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    m, columns = 64, 2**20
    d = math.ceil(1.1 * memory / (4 * m * columns)) * columns
    with tempfile.TemporaryDirectory() as folder:
        held = random_rows(d, m, Files(folder), count=2)
        assert isinstance(held, FileRows)
        descriptor, size = held.pages.file.fileno(), 4 * d * m
        buffer = bytearray(2**26)

        def read() -> None:
            for start in range(0, size, len(buffer)):
                os.preadv(descriptor, [buffer], start)

        vector, weights = jax.random.normal(jax.random.key(1), (d,)), jnp.ones(m)
        scans = {
            "a plain read": (1, read),
            "dots": (1, lambda: held.dots(vector)),
            "combine": (1, lambda: held.combine(weights)),
            "gram": (1, held.gram),
            "an inverse and a product": (3, lambda: fisher_inverse(held, 1e-3).ihvp(vector)),
        }
        small = random_rows(d // 100, m, Files(folder))
        jax.block_until_ready(fisher_inverse(small, 1e-3).ihvp(vector[: d // 100]))  # compiles
        seconds: dict[str, list[float]] = {name: [] for name in scans}
        for _ in range(3):
            for name, (_, scan) in tqdm(scans.items(), desc="disk", disable=None):
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                start = time.perf_counter()
                jax.block_until_ready(scan())
                seconds[name].append(time.perf_counter() - start)
        return [
            {"scan": name, "bytes": scans[name][0] * size, "memory": memory}
            | timing.summary(values)
            for name, values in seconds.items()
        ]


def rounded(grads: list[Any], how: str) -> list[NDArray[np.float32]]:
    """The gradients in 8 bits, as one vector each, with a scale for 256 numbers."""
    rng, error, found = np.random.default_rng(0), np.float32(0), []
    for gradient in grads:
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        tiles = np.pad(flat, (0, -len(flat) % 256)).reshape(-1, 256) + error
        scale = np.maximum(np.abs(tiles).max(axis=1, keepdims=True) / 127, np.float32(1e-38))
        offset = rng.random(tiles.shape, np.float32) - np.float32(0.5)
        levels = np.rint(tiles / scale + (offset if how == "unbiased" else np.float32(0)))
        stored = (levels * scale).astype(np.float32)
        if how == "error feedback":
            error = tiles - stored
        found.append(stored.reshape(-1)[: len(flat)])
    return found


def rounding() -> list[dict[str, Any]]:
    """Ways to round to 8 bits: the direction beside that of the gradients themselves."""
    _, grads = gradients(2 * max(WINDOWS))
    like = np.zeros(sum(leaf.size for leaf in jax.tree.leaves(grads[0])), np.float32)
    found = []
    for size in WINDOWS:
        own = grads[-2 * size :]
        plain = exact(filled(Dense(), grads[0], own, size))
        for how in ("to the nearest", "unbiased", "error feedback"):
            got = exact(filled(Dense(), like, rounded(own, how), size))
            lengths = np.linalg.norm(got), np.linalg.norm(plain)
            cosine = float(got @ plain / (lengths[0] * lengths[1]))
            found.append({"how": how, "m": size, "missing": 1 - cosine})
    return found


def rounding_table(results: list[dict[str, Any]]) -> str:
    """The table of ways to round."""
    lines = ["| rounding | m | 1 - cosine |", "| --- | --- | --- |"]
    lines += [f"| {r['how']} | {r['m']} | {r['missing']:.1e} |" for r in results]
    return "\n".join(lines)


def tables(results: dict[str, Any], on_accelerators: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The tables of the page by their names."""
    lines = [
        "| storage | m | bytes a parameter | error | cosine | length |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{r['storage']}` | {r['m']} | {r['bytes']:.1f} | {r['error']:.0e} | {r['cosine']:.4f} "
        f"| {r['length']:.3f} |"
        for r in results.get("accuracy", [])
    ]
    found = {"storages-accuracy": "\n".join(lines), "storages-bytes": bytes_table()}
    if "memory" in results:
        found["storages-memory"] = memory_table(results["memory"], results["memory environment"])
    found["storages-bars"] = bars_table(results)
    if "rounding" in results:
        found["storages-rounding"] = rounding_table(results["rounding"])
    for name in ("time", "static", "sums"):
        found[f"storages-{name}"] = "\n\n".join(
            time_table(r[name], r[f"{name} environment"])
            for r in (results, *on_accelerators)
            if name in r
        )
    if "disk" in results:
        found["storages-disk"] = disk_table(results["disk"], results["disk environment"])
    return found


def bytes_table() -> str:
    """What the gradients take a parameter, from the plans of the storages."""
    size, windows = 2**20, (16, 64, 256, 1024)
    storages = {
        "Dense()": Dense(),
        "Dense(bfloat16)": Dense(jnp.bfloat16),
        "Int8()": Int8(),
        **{f"TopK({density})": TopK(density) for density in (0.05, 0.01, 0.005)},
        "TopK(0.01, error_bits=4)": TopK(0.01, error_bits=4),
    }
    lines = [
        "| storage | " + " | ".join(f"m = {m:,}" for m in windows) + " |",
        "| --- " * (1 + len(windows)) + "|",
    ]
    for name, storage in storages.items():
        shapes = jax.ShapeDtypeStruct((size,), jnp.float32)
        rows = [storage.bytes_by_place(shapes, m) or {} for m in windows]
        each = [f"{sum(places.values()) / size:.1f}" for places in rows]
        lines.append(f"| `{name}` | {' | '.join(each)} |")
    return "\n".join(lines)


def memory() -> Iterator[dict[str, Any]]:
    """What a step and a static inverse take on a CPU, from their plans."""

    def taken(made: planning.Plan) -> int:
        return made.device_bytes + made.host_bytes

    for (size, d), m in CASES:
        shapes = jax.ShapeDtypeStruct((d,), jnp.float32)
        for name, storage in (TIMED | {"Files(...)": Files(tempfile.gettempdir())}).items():
            options: dict[str, Any] = {"storage": storage, "platform": "cpu"}
            on_disk = isinstance(storage, Files)
            step = None if on_disk else taken(planning.plan(shapes, m, **options))
            inverse = taken(planning.plan_inverse(shapes, m, **options))
            yield {"size": size, "m": m, "storage": name, "step": step, "inverse": inverse}


def memory_table(results: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """MiB of a step and of a static inverse."""
    storages = list(dict.fromkeys(r["storage"] for r in results))
    cases: dict[tuple[str, int], list[str]] = {}
    for r in results:
        step = "-" if r["step"] is None else f"{r['step'] / 2**20:,.0f}"
        cell = f"{step} / {r['inverse'] / 2**20:,.0f}"
        cases.setdefault((r["size"], r["m"]), []).append(cell)
    lines = [
        "| parameters | m | " + " | ".join(f"`{s}`" for s in storages) + " |",
        "| --- " * (2 + len(storages)) + "|",
    ]
    lines += [f"| {size} | {m} | {' | '.join(cells)} |" for (size, m), cells in cases.items()]
    # A plan does not depend on the machine.
    version = f"Planned with jax {environment['jax']}, {environment['date']}."
    newer = "XLA of jax 0.11 and newer needs less for an inverse of `Dense(bfloat16)`."
    return "\n".join([*lines, f"\n{version} {newer}"])


def time_table(results: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """The time of dense rows, and those of the others in its units."""
    storages = list(dict.fromkeys(r["storage"] for r in results))
    by_case: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for r in results:
        by_case.setdefault((r["size"], r["m"]), {})[r["storage"]] = r
    lines = [
        "| parameters | m | `Dense()` | " + " | ".join(f"`{s}`" for s in storages) + " |",
        "| --- " * (3 + len(storages)) + "|",
    ]
    for (size, m), of_each in by_case.items():
        dense = [r["dense"]["median"] for r in of_each.values()]
        cells = [f"{1e3 * min(dense):.1f} ms"]
        for s in storages:
            r = of_each[s]
            cells.append(r.get("left_out") or f"{r['median'] / r['dense']['median']:.2f} x")
        lines.append(f"| {size} | {m} | {' | '.join(cells)} |")
    lines.append("\n" + report.where(environment) + bus_rate(results, environment))
    return "\n".join(lines)


def bus_rate(results: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """How fast the pages of the largest window cross the bus, twice a step, if there is one."""
    paged = [r for r in results if r["storage"] == "Paged()" and "median" in r]
    if environment["device"] == "cpu" or not paged:
        return ""
    r = max(paged, key=lambda r: r["d"] * r["m"])
    rate = 2 * 4 * r["d"] * r["m"] / r["median"] / 1e9
    return f" `Paged()` moves {rate:.0f} GB a second over the bus ({r['size']}, m = {r['m']})."


def disk_table(results: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """Each scan beside a plain read."""
    size, plain = results[0]["bytes"] / 1e9, results[0]["median"]
    lines = ["| | GB read | seconds | beside a plain read of them |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {r['scan']} | {r['bytes'] / 1e9:.1f} | {r['median']:.1f} | {ratio:.2f} x |"
        for r, ratio in zip(results, beside_a_read(results), strict=True)
    ]
    memory = f"{results[0]['memory'] / 1e9:.1f} GB of memory"
    lines.append(f"\n{memory}, {size / plain:.2f} GB a second. {report.where(environment)}")
    return "\n".join(lines)


def beside_a_read(results: list[dict[str, Any]]) -> list[float]:
    """The time of each scan in units of that of a plain read of its bytes."""
    rate = results[0]["bytes"] / results[0]["median"]
    return [rate * r["median"] / r["bytes"] for r in results]


def bars_table(results: dict[str, Any]) -> str:
    """What is wanted of the storages on a CPU, and what is measured."""

    def ratios(part: str, storage: str) -> list[float]:
        own = [r for r in results.get(part, []) if r["storage"] == storage and "median" in r]
        return [r["median"] / r["dense"]["median"] for r in own]

    disk = results.get("disk", [])
    bars = [
        ("`Paged()`, the static algorithm, beside dense rows", 1.3, ratios("static", "Paged()")),
        ("`TopK(0.01)`, push and direction, beside dense rows", 1, ratios("time", "TopK(0.01)")),
        ("`Files(...)`, beside a plain read", 2, beside_a_read(disk)[1:] if disk else []),
    ]
    lines = ["| | wanted | measured | |", "| --- | --- | --- | --- |"]
    for what, most, found in bars:
        if found:
            verdict = "met" if max(found) <= most else "**not met**"
            measured = f"{min(found):.2f} to {max(found):.2f} x"
            lines.append(f"| {what} | <= {most} x | {measured} | {verdict} |")
    return "\n".join(lines)


MEASURES: dict[str, Callable[..., Iterable[dict[str, Any]]]] = {
    "accuracy": accuracy,
    "rounding": rounding,
    "time": times,
    "static": static,
    "sums": sums,
    "memory": memory,
    "disk": disk,
}


def accelerators() -> list[dict[str, Any]]:
    """The results of the accelerators that were measured."""
    return [json.loads(path.read_text()) for path in sorted(report.RESULTS.glob("storages-*.json"))]


def measured(results: dict[str, Any], measure: str) -> Iterator[dict[str, Any]]:
    """The results after each record of a measure."""
    results = results | {f"{measure} environment": report.environment(), measure: []}
    for record in MEASURES[measure]():
        results[measure].append(record)
        yield results


def measured_again(results: dict[str, Any], measure: str, storage: str) -> Iterator[dict[str, Any]]:
    """The results after each record of a storage, which takes the place of an old one.

    Raises:
        SystemExit: the records of the other storages are of another machine or day.
    """
    if measure not in ("time", "static"):
        raise SystemExit(f"--storage goes with --only time static, not with {measure}.")
    if results.get(f"{measure} environment") != report.environment():
        raise SystemExit(f"{measure} is of another machine, version or day: measure all storages.")
    case = operator.itemgetter("size", "m", "storage")
    for new in MEASURES[measure](storage):
        records = [new if case(new) == case(old) else old for old in results[measure]]
        results = results | {measure: records}
        yield results


def main() -> None:
    """Reads the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MEASURES)
    parser.add_argument(
        "--storage", choices=sorted({*TIMED, "Files(...)"}), help="measure it again"
    )
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="for the result file")
    parser.add_argument("--render", action="store_true", help="only write the tables")
    options = parser.parse_args()
    if not options.render:
        on_cpu = jax.default_backend() == "cpu"
        name = "storages" if on_cpu else f"storages-{machine.slug(report.environment())}"
        path = options.output / f"{name}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        for measure in options.only or MEASURES:
            steps = measured(results, measure)
            if options.storage is not None:
                steps = measured_again(results, measure, options.storage)
            for step in steps:
                report.save(name, results := step, options.output)
    if options.output == report.RESULTS:
        for name, text in tables(report.load("storages"), accelerators()).items():
            report.write_table(PAGES.get(name, PAGE), name, text)


if __name__ == "__main__":
    main()
