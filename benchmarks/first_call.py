"""The cost of the first call of a function: seconds to its result, and programs compiled.

    python benchmarks/first_call.py

Each case runs in its own processes with nothing cached. Then it is called again with other numbers
(sparsity, schedule, steps, damping, seed), which should compile nothing. Writes
``results/first_call.json`` and the table of ``docs/performance.md``. Takes five minutes on two CPU
cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import report
from tqdm import tqdm

PAGE = report.ROOT / "docs" / "performance.md"
GUIDE = report.ROOT / "docs" / "pruning.md"
sys.path[:0] = [str(report.ROOT), str(report.ROOT / "examples")]

# The bars: a measured figure and its largest value. Every product with the gradients is a separate
# program, which the rows compile. Rows may page or decompress, so no program of pruning reads them.
WANTED = {
    "guide": {"seconds": 10.0, "programs": 32},
    "resnet20": {"compilation": 30.0},
    "training": {"seconds": 5.0},
}


@contextlib.contextmanager
def measured(figures: dict[str, float]) -> Iterator[None]:
    """Measures its body: writes seconds, seconds of compilation and programs into ``figures``."""
    import jax

    inside, compilation, programs = True, 0.0, 0

    # JAX reports tracing, lowering and compiling when each of them ends.
    def listen(event: str, seconds: float, **_: Any) -> None:
        nonlocal compilation, programs
        if inside and event.startswith("/jax/core/compile/"):
            compilation += seconds
            programs += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.perf_counter()
    try:
        yield
    finally:
        inside = False
        figures["seconds"] = time.perf_counter() - began
        figures["compilation"], figures["programs"] = compilation, programs


def first_example(page: Path) -> str:
    """The first Python block of a page."""
    return page.read_text().split("```python\n", 1)[1].split("```\n", 1)[0]


def guide() -> dict[str, dict[str, float]]:
    """``prune`` as the first example of the guide to pruning calls it."""
    import jax

    from mfac_jax import pruning

    first: dict[str, float] = {}
    real = pruning.prune

    def prune(*args: Any, **options: Any) -> pruning.Pruned:
        with measured(first):
            return jax.block_until_ready(real(*args, **options))

    scope: dict[str, Any] = {}
    pruning.prune = prune
    try:
        exec(compile(first_example(GUIDE), GUIDE, "exec"), scope)
    finally:
        pruning.prune = real
    again: dict[str, float] = {}
    settings = [s._replace(damping=3 * s.damping) for s in pruning.default_settings()]
    params = jax.tree.map(lambda w: 1.1 * w, scope["params"])
    jax.block_until_ready(params)
    with measured(again):
        jax.block_until_ready(
            real(
                params,
                scope["loss_fn"],
                scope["batches"][1:],
                0.7,
                steps=pruning.sparsity_schedule(0.7, 6, kind="cubic"),
                gradients=pruning.Gradients(64),
                search=pruning.Search(settings),
            )
        )
    return {"first": first, "again": again}


def resnet20() -> dict[str, dict[str, float]]:
    """``prune`` of ResNet-20 with default settings, on made-up data."""
    import jax
    import jax.numpy as jnp
    import optax
    import resnet20 as network
    from flax import nnx

    from mfac_jax import pruning

    model = network.ResNet(nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: nnx.State, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    data = network.made_up()
    images = jnp.asarray(network.normalize(data.train, network.MFAC_MEAN, network.MFAC_STD))
    labels = jnp.asarray(data.train_labels)
    batches = [(images[i : i + 2], labels[i : i + 2]) for i in range(0, 64, 2)]
    jax.block_until_ready((params, batches))
    found: dict[str, dict[str, float]] = {}
    for name, sparsity, kind in (("first", 0.5, "geometric"), ("again", 0.7, "linear")):
        with measured(found.setdefault(name, {})):
            pruned = pruning.prune(
                params,
                loss_fn,
                batches,
                sparsity,
                steps=pruning.sparsity_schedule(sparsity, 2, kind=kind),
                scope=pruning.Scope(path_filter=network.is_pruned),
                gradients=pruning.Gradients(128),
                progress=False,
            )
            jax.block_until_ready(pruned.params)
    return found


def training() -> dict[str, dict[str, float]]:
    """A training step of the demo's CNN with ``mfac(0.1, window_size=64)``."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from quickstart import CNN

    from mfac_jax import mfac

    graph, params = nnx.split(CNN(nnx.Rngs(0)), nnx.Param)
    batch = jnp.asarray(jax.random.normal(jax.random.key(0), (64, 28, 28, 1))), jnp.arange(64) % 10
    jax.block_until_ready((params, batch))

    def loss_fn(params: nnx.State, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = nnx.merge(graph, params)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def train(tx: Any) -> tuple[Callable[[Any, Any], Any], Any]:
        @jax.jit
        def step(params: nnx.State, state: Any) -> tuple[nnx.State, Any]:
            updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        return step, tx.init(params)

    found: dict[str, dict[str, float]] = {"first": {}, "again": {}}
    with measured(found["first"]):
        step, state = train(mfac(0.1, window_size=64))
        out = jax.block_until_ready(step(params, state))
    with measured(found["again"]):
        jax.block_until_ready(step(*out))
    return found


CASES = {
    "guide": ("`prune`, first example of the guide", guide),
    "resnet20": ("`prune`, ResNet-20, default settings, two steps", resnet20),
    "training": ("step of `mfac(0.1, window_size=64)`, CNN of the demo", training),
}


def measure_once(name: str) -> dict[str, dict[str, float]]:
    """One case in a new process with nothing cached."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, __file__, "--only", name]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| what | first answer | of it compilation | programs | wanted | called again | programs |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    units = {"seconds": "{:g} s", "compilation": "{:g} s of compilation", "programs": "{} programs"}
    for name, (title, _) in CASES.items():
        first, again = results["cases"][name]["first"], results["cases"][name]["again"]
        bars = WANTED[name]
        wanted = ", ".join(units[key].format(most) for key, most in bars.items())
        met = all(first[key] <= most for key, most in bars.items())
        cells = [
            title,
            f"{first['seconds']:.1f} s",
            f"{first['compilation']:.1f} s",
            f"{first['programs']}",
            f"at most {wanted}: {'met' if met else '**not met**'}",
            f"{again['seconds']:.2f} s",
            f"{again['programs']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    environment = results["environment"]
    lines += [
        "",
        f"Medians of {results['repeats']} processes; {environment['device']}, "
        f"{environment['cores']} cores, jax {environment['jax']}, {environment['date']}.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures, saves, and writes the table into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, help="run one case here and print its figures")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    if args.only:
        print(json.dumps(CASES[args.only][1]()))
        return
    cases: dict[str, Any] = {}
    with tqdm(total=args.repeats * len(CASES), unit="process") as bar:
        for name in CASES:
            runs = []
            for _ in range(args.repeats):
                runs.append(measure_once(name))
                bar.update()
            cases[name] = {
                when: {key: statistics.median(run[when][key] for run in runs) for key in figures}
                for when, figures in runs[0].items()
            }
    environment = report.environment() | {"cores": len(os.sched_getaffinity(0))}
    results = {"environment": environment, "repeats": args.repeats, "cases": cases}
    report.save("first_call", results)
    report.write_table(PAGE, "first_call", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
