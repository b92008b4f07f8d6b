"""Writes what ``examples/prune_resnet20.py`` measured into the documentation.

    python examples/prune_resnet20.py --data-dir DIR --out DIR2
    python benchmarks/pruning_results.py DIR2/results.json

Copies the result file to ``results/prune_resnet20.json`` and writes the tables and the figure of
``docs/pruning-results.md`` from it. Without an argument it uses the existing copy.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import report

sys.path.insert(0, str(report.ROOT / "examples"))

import prune_tables

README = report.ROOT / "README.md"
PAGE = report.ROOT / "docs" / "pruning-results.md"
FIGURE = report.ROOT / "docs" / "assets" / "prune_resnet20.png"
NAME = "prune_resnet20"
# The wanted accuracies of the default, by sparsity and number of steps; and the time for all runs.
BARS = {(0.8, 8): 85.5, (0.9, 8): 75.5}
MINUTES = 120
PARTS = ("one_shot", "recomputation", "gains", "patterns", "gradual", "influence")


def where(results: dict[str, Any]) -> str:
    """The accuracy of the dense network, and the machine and date of the measurement."""
    at = results["environment"]
    return (
        f"Dense, the network has {results['dense']:.2f} %. The runs of this program took "
        f"{minutes(results):.1f} minutes of all {at['cores']} cores of {at['device']}, "
        f"jax {at['jax']}, {at['date']}."
    )


def minutes(results: dict[str, Any]) -> float:
    """The time of all runs on all cores, in minutes; a run has one core.

    It is processor time, which other work on the machine hardly changes.
    """
    runs = [run for part in PARTS for run in results.get(part, {}).values()]
    seconds = sum(run["processor_seconds"] for run in runs)
    return seconds / results["environment"]["cores"] / 60


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables by the names of their markers."""
    made = dict.fromkeys(PARTS, "*Not measured yet.*") | prune_tables.tables(results)
    made |= {"where": where(results), "setup": setup(results), "bars": bars(results)}
    return {f"resnet20-{name}": table for name, table in made.items()}


def setup(results: dict[str, Any]) -> str:
    """The sizes of the experiments."""
    scale = results["environment"]["scale"]
    one_shot, several = scale["gradients"]
    _, pruning_steps, training = scale["gradual"]
    return (
        f"Gradients are of mini-batches of {scale['batch']} images, {one_shot} for one-shot "
        f"pruning and {several} in each of several steps. Patterns are pruned in "
        f"{scale['patterns'][1]} steps. Gradual pruning has {pruning_steps} steps with {training} "
        f"training steps (SGD with momentum, batches of {scale['train_batch']}) after each."
    )


def _cells(results: dict[str, Any]) -> prune_tables.Cells:
    """All accuracies. Magnitude moves no weights, so many steps prune the same as one."""
    cells = prune_tables.recomputation_cells(results["recomputation"])
    for method, row in prune_tables.one_shot_cells(results.get("one_shot", {})).items():
        cells.setdefault(method, {}).update(row)
    of_sparsity = {
        sparsity: accuracy
        for (sparsity, _), of_sets in cells.get("magnitude", {}).items()
        for accuracy in of_sets.values()
    }
    cells["magnitude"] = {
        column: dict.fromkeys(of_sets, of_sparsity[column[0]])
        for column, of_sets in cells[prune_tables.DEFAULT].items()
        if column[0] in of_sparsity
    }
    return cells


def summary(results: dict[str, Any]) -> str:
    """One-shot and eight recomputations, for the README."""
    cells, columns = _cells(results), [(0.8, 1), (0.8, 8), (0.9, 8)]
    columns = [column for column in columns if column in cells[prune_tables.DEFAULT]]
    names = ["magnitude", *prune_tables.REFERENCES, prune_tables.DEFAULT]
    head = [f"{results['dense']:.1f} % dense"]
    head += map(_head, columns)
    lines = [head, ["---"] * len(head)]
    for name in names:
        row = cells.get(name, {})
        means = [f"{np.mean([*row[c].values()]):.1f}" if c in row else "" for c in columns]
        if row:
            lines.append([name, *means])
    at = results["environment"]
    sets = min(len(cells[prune_tables.DEFAULT][column]) for column in columns)
    what = f"Means of {sets} sets of gradients" if sets > 1 else "One set of gradients"
    return f"{_table(lines)}\n\n{what}; {at['device']}, jax {at['jax']}, {at['date']}."


def bars(results: dict[str, Any]) -> str:
    """The bars."""
    cells = _cells(results)
    default = cells[prune_tables.DEFAULT]
    lines = [["what", "wanted", "measured", ""], ["---"] * 4]
    for column, wanted in BARS.items():
        got = float(np.mean([*default.get(column, {0: math.nan}).values()]))
        what = f"the default, {column[1]} recomputations, {column[0]:.0%}"
        lines.append([what, f">= {wanted:.1f}", f"{got:.1f}", _verdict(got >= wanted)])
    gaps = {}
    for column, of_sets in default.items():
        names = ("magnitude", *prune_tables.REFERENCES)
        others = [cells.get(name, {}).get(column, {}) for name in names]
        of_each = [
            np.mean([of_sets[seed] - other[seed] for seed in of_sets if seed in other])
            for other in others
            if set(of_sets) & set(other)
        ]
        if of_each:
            gaps[column] = float(min(of_each))
    widths = {column: max(d.values()) - min(d.values()) for column, d in default.items()}
    worst = min(gaps, key=lambda column: gaps[column] + widths[column])
    width = widths[worst]
    what = "the default above the best of magnitude and both references, where that is closest"
    wanted = f">= 0, within its spread there ({width:.1f})" if width else ">= 0"
    got = f"{gaps[worst]:+.1f} ({_head(worst)})"
    lines.append([what, wanted, got, _verdict(gaps[worst] >= -width)])
    took = minutes(results)
    is_there = set(prune_tables.tables(results)) >= set(PARTS)
    verdict = _verdict(took < MINUTES) if is_there else "not yet all of it"
    lines.append(["the whole of it", f"< {MINUTES} min", f"{took:.1f} min", verdict])
    return _table(lines)


def _head(column: tuple[float, int]) -> str:
    return f"{column[0]:.0%}, {'one-shot' if column[1] == 1 else f'{column[1]} steps'}"


def _verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str]) -> None:
    """Copies and renders."""
    if arguments:
        report.save(NAME, json.loads(Path(arguments[0]).read_text()))
    results = report.load(NAME)
    for name, table in tables(results).items():
        report.write_table(PAGE, name, table)
    report.write_table(README, "resnet20", summary(results))
    prune_tables.draw(results, FIGURE)


if __name__ == "__main__":
    main(sys.argv[1:])
