"""Tables and the figure of ``prune_resnet20.py``, from its results.

Other programs import this module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT = "default (calibrated)"
# The settings of the paper's code.
REFERENCES = ("reference, whole", "reference, blocks")
# The sparsities of the patterns.
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


# Accuracies by method, by sparsity and number of steps, and by set of gradients.
Cells = dict[str, dict[tuple[float, int], dict[int, float]]]


def one_shot_cells(found: dict[str, Any]) -> Cells:
    """The cells of one-shot pruning."""
    cells: Cells = {}
    for key, run in found.items():
        seed, method = key.split(" ", 1)
        for sparsity, outcome in run.items():
            if isinstance(outcome, dict):  # not the times, the machine or the date of the run
                row = cells.setdefault(method, {}).setdefault((float(sparsity), 1), {})
                row[int(seed)] = outcome["accuracy"]
    return cells


def recomputation_cells(found: dict[str, Any]) -> Cells:
    """The cells of pruning in several steps."""
    cells: Cells = {}
    for key, run in found.items():
        steps, sparsity, seed, method = key.split(" ", 3)
        row = cells.setdefault(method, {}).setdefault((float(sparsity), int(steps)), {})
        row[int(seed)] = run["accuracy"]
    return cells


def _one_shot(found: dict[str, Any]) -> str:
    return _grid("one-shot", one_shot_cells(found), lambda column: f"{column[0]:.0%}")


def _recomputation(found: dict[str, Any]) -> str:
    cells = recomputation_cells(found)
    whole = {method: row for method, row in cells.items() if not method.startswith("default, ")}
    return _grid("recomputations", whole, lambda column: f"{column[0]:.0%}, {column[1]} x")


def _gains(found: dict[str, Any]) -> str:
    """The gain and the cost of each part of the default, where all parts were tried."""
    end = " 0 greedy, blocks"
    columns = sorted(key.removesuffix(end) for key in found if key.endswith(end))
    methods = {key.split(" ", 3)[3]: None for key in found if key.startswith(f"{columns[-1]} 0 ")}
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
    cells: Cells = {}
    for key, run in found.items():
        sparsity, method = key.split(" ", 1)
        cells.setdefault(method, {})[float(sparsity), 1] = {0: run["accuracy"]}
    steps = next(iter(found.values()))["training_steps"]
    return _grid(f"gradual, {steps} training steps", cells, lambda column: f"{column[0]:.1%}")


def _influence(found: dict[str, Any]) -> str:
    rows = []
    for key, run in found.items():
        n, kind, damping, block = key.split(" ")
        kind = "per example" if kind == "example" else "mini-batches"
        accuracies = [f"{run[s]:.1f}" for s in ("0.8", "0.9")]
        rows.append([kind, n, damping, block, *accuracies])
    rows.sort(key=lambda row: (row[0], int(row[1]), float(row[2]), int(row[3])))
    return _table(["gradients", "n", "damping", "block", "80%", "90%"], rows)


def _grid(title: str, cells: Cells, head: Callable[[tuple[float, int]], str]) -> str:
    columns = sorted({column for row in cells.values() for column in row})
    rows = [
        [name, *[spread([*row[c].values()]) if c in row else "" for c in columns]]
        for name, row in cells.items()
    ]
    return _table([title, *map(head, columns)], rows)


def spread(values: list[float]) -> str:
    """The mean, with the lowest and the highest of several values."""
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
    single = one_shot_cells(results.get("one_shot", {}))
    several = recomputation_cells(results.get("recomputation", {}))
    colors = {name: f"C{i}" for i, name in enumerate({**single, **several})}
    for name, row in single.items():
        sparsities = [100 * sparsity for sparsity, _ in row]
        values = [[*of_sets.values()] for of_sets in row.values()]
        means = [np.mean(v) for v in values]
        left.plot(sparsities, means, "o-", color=colors[name], label=name, markersize=3)
        low, high = [min(v) for v in values], [max(v) for v in values]
        left.fill_between(sparsities, low, high, color=colors[name], alpha=0.15, linewidth=0)
    left.set(title="one-shot", xlabel="sparsity (%)", ylabel="test accuracy (%)")
    styles = {0.8: "o-", 0.9: "s--"}
    for method, row in several.items():
        for sparsity, style in styles.items():
            steps = sorted(k for s, k in row if s == sparsity)
            if len(steps) > 1:
                means = [np.mean([*row[sparsity, k].values()]) for k in steps]
                label = f"{method}, {sparsity:.0%}"
                right.plot(steps, means, style, color=colors[method], label=label, markersize=3)
    right.set(title="with recomputation", xlabel="recomputations", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.axhline(results["dense"], color="black", linewidth=0.8, linestyle=":", label="dense")
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=150)
