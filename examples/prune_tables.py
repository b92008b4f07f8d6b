"""Tables and the figure of ``prune_resnet20.py``, from its results.

Not a program of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

DEFAULT = "default (calibrated)"
# Sparsities that patterns are pruned to.
PATTERNS = {"2:4": 0.5, "1:4": 0.75, "1 x 4": 0.8}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """A Markdown table for each experiment that has been run."""
    makers = {
        "one_shot": _one_shot,
        "recomputation": _recomputation,
        "patterns": _patterns,
        "gradual": _gradual,
        "influence": _influence,
    }
    made = {name: make(results[name]) for name, make in makers.items() if results.get(name)}
    if any(key.endswith(" 0 greedy, blocks") for key in results.get("recomputation", {})):
        made["gains"] = _gains(results["recomputation"])
    return made


def one_shot_cells(found: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Accuracies by method and sparsity, one a set of gradients."""
    cells: dict[str, dict[str, list[float]]] = {}
    for key, run in found.items():
        row = cells.setdefault(key.split(" ", 1)[1], {})
        for sparsity, outcome in run.items():
            if sparsity != "seconds":
                row.setdefault(f"{float(sparsity):.0%}", []).append(outcome["accuracy"])
    return cells


def recomputation_cells(
    found: dict[str, Any], what: str = "accuracy"
) -> dict[str, dict[tuple[int, float], list[float]]]:
    """Accuracies by method and by number of recomputations and sparsity."""
    cells: dict[str, dict[tuple[int, float], list[float]]] = {}
    for key, run in found.items():
        steps, sparsity, _, method = key.split(" ", 3)
        column = int(steps), float(sparsity)
        cells.setdefault(method, {}).setdefault(column, []).append(run[what])
    return cells


def _one_shot(found: dict[str, Any]) -> str:
    return _grid("one-shot", one_shot_cells(found))


def _recomputation(found: dict[str, Any]) -> str:
    cells = recomputation_cells(found)
    named = {
        method: {f"{s:.0%}, {k} x": row[k, s] for k, s in sorted(row, key=lambda c: (c[1], c[0]))}
        for method, row in cells.items()
        if not method.startswith("default, ")
    }
    columns = sorted({c for row in cells.values() for c in row}, key=lambda c: (c[1], c[0]))
    return _grid("recomputations", named, [f"{s:.0%}, {k} x" for k, s in columns])


def _gains(found: dict[str, Any]) -> str:
    """What each part of the default gains and costs, where all of them were tried."""
    end = " 0 greedy, blocks"
    columns = sorted(key.removesuffix(end) for key in found if key.endswith(end))
    methods = {key.split(" ", 3)[3]: None for key in found if key.startswith(columns[-1])}
    rows = []
    for method in methods:
        mine = [found.get(f"{column} 0 {method}") for column in columns]
        # The first steps compile; a step is timed without its gradients.
        seconds = np.median([second for run in mine if run for second in run["step_seconds"][2:]])
        cells = [f"{run['accuracy']:.1f}" if run else "" for run in mine]
        rows.append([method, *cells, f"{seconds:.1f} s"])
    head = [f"{float(c.split()[1]):.0%}, {c.split()[0]} x" for c in columns]
    return _table(["one set of gradients", *head, "a step"], rows)


def _patterns(found: dict[str, Any]) -> str:
    rows = []
    for name in PATTERNS:
        pair = [found.get(f"{name} {method}") for method in ("magnitude", DEFAULT)]
        if all(pair):
            cells = [f"{run['accuracy']:.1f}" for run in pair]
            steps = len(pair[0]["chosen"])
            rows.append([f"{name}, {steps} x", f"{pair[0]['sparsity']:.1%}", *cells])
    return _table(["pattern", "sparsity", "magnitude", DEFAULT], rows)


def _gradual(found: dict[str, Any]) -> str:
    cells: dict[str, dict[str, list[float]]] = {}
    for key, run in found.items():
        sparsity, method = key.split(" ", 1)
        cells.setdefault(method, {})[f"{float(sparsity):.1%}"] = [run["accuracy"]]
    steps = next(iter(found.values()))["training_steps"]
    return _grid(f"gradual, {steps} training steps", cells)


def _influence(found: dict[str, Any]) -> str:
    rows = []
    for key, run in found.items():
        n, kind, damping, block = key.split(" ")
        kind = "per example" if kind == "example" else "mini-batches"
        accuracies = [f"{run[s]:.1f}" for s in ("0.8", "0.9")]
        rows.append([kind, n, damping, block, *accuracies])
    rows.sort(key=lambda row: (row[0], int(row[1]), float(row[2]), int(row[3])))
    return _table(["gradients", "n", "damping", "block", "80%", "90%"], rows)


def _grid(
    title: str, cells: dict[str, dict[str, list[float]]], columns: list[str] | None = None
) -> str:
    if columns is None:
        columns = list(dict.fromkeys(c for row in cells.values() for c in row))
    rows = [
        [name, *[_spread(row[c]) if c in row else "" for c in columns]]
        for name, row in cells.items()
    ]
    return _table([title, *columns], rows)


def _spread(values: list[float]) -> str:
    """The mean, and the lowest and highest where there are several."""
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}-{max(values):.1f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """One-shot pruning and recomputation as curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, row in one_shot_cells(results.get("one_shot", {})).items():
        sparsities = [float(s.rstrip("%")) for s in row]
        values = list(row.values())
        left.plot(sparsities, [np.mean(v) for v in values], "o-", label=name, markersize=3)
        low, high = [min(v) for v in values], [max(v) for v in values]
        left.fill_between(sparsities, low, high, alpha=0.15)
    left.set(title="one-shot", xlabel="sparsity (%)", ylabel="test accuracy (%)")
    styles = {0.8: "o-", 0.9: "s--"}
    curves = recomputation_cells(results.get("recomputation", {}))
    for i, (method, row) in enumerate(curves.items()):
        for sparsity, style in styles.items():
            steps = sorted(k for k, s in row if s == sparsity)
            if len(steps) > 1 or (steps and len(curves) == 1):
                means = [np.mean(row[k, sparsity]) for k in steps]
                label = f"{method}, {sparsity:.0%}"
                right.plot(steps, means, style, color=f"C{i}", label=label, markersize=3)
    right.set(title="with recomputation", xlabel="recomputations", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.axhline(results["dense"], color="black", linewidth=0.8, linestyle=":", label="dense")
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=150)
