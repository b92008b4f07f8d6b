"""Writes what ``examples/prune_resnet20.py`` measured into the documentation.

    python examples/prune_resnet20.py --data-dir DIR --out DIR2
    python benchmarks/pruning_results.py DIR2/results.json

Copies the result file to ``results/prune_resnet20.json`` and writes the tables and the figure of
``docs/pruning-results.md`` from it; without a file, from the one that is there.
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
# Accuracies of the default with eight recomputations, by sparsity.
BARS = {0.8: 85.5, 0.9: 75.5}


def where(results: dict[str, Any]) -> str:
    """The dense network, and where and when all was measured."""
    at = results["environment"]
    return (
        f"Dense, the network has {results['dense']:.2f} %. The runs on this page took "
        f"{results['wall_seconds'] / 60:.0f} minutes on {at['device']}, {at['cores']} cores, "
        f"jax {at['jax']}, {at['date']}."
    )


def tables(results: dict[str, Any]) -> dict[str, str]:
    """By the name of their markers."""
    parts = ("one_shot", "recomputation", "gains", "patterns", "gradual", "influence")
    made = dict.fromkeys(parts, "*Not measured yet.*") | prune_tables.tables(results)
    made |= {"where": where(results), "bars": bars(results)}
    return {f"resnet20-{name}": table for name, table in made.items()}


def _means(results: dict[str, Any]) -> dict[str, dict[tuple[int, float], float]]:
    """Mean accuracies by method, and by number of recomputations (1: one-shot) and sparsity."""
    means = {
        method: {column: float(np.mean(found)) for column, found in row.items()}
        for method, row in prune_tables.recomputation_cells(results["recomputation"]).items()
    }
    for method, row in prune_tables.one_shot_cells(results.get("one_shot", {})).items():
        for sparsity, found in row.items():
            column = 1, float(sparsity.rstrip("%")) / 100
            means.setdefault(method, {})[column] = float(np.mean(found))
    # Magnitude moves nothing, so that many steps prune what one does.
    plain = means.setdefault("magnitude", {})
    for steps, sparsity in means[prune_tables.DEFAULT]:
        if (1, sparsity) in plain:
            plain[steps, sparsity] = plain[1, sparsity]
    return means


def summary(results: dict[str, Any]) -> str:
    """One-shot and eight recomputations, for the README."""
    means, columns = _means(results), [(1, 0.8), (8, 0.8), (8, 0.9)]
    columns = [column for column in columns if column in means[prune_tables.DEFAULT]]
    names = ["magnitude", "reference, whole", "reference, blocks", prune_tables.DEFAULT]
    head = [f"{results['dense']:.1f} % dense"]
    head += [f"{s:.0%}, {'one-shot' if k == 1 else f'{k} steps'}" for k, s in columns]
    lines = [head, ["---"] * len(head)]
    for name in names:
        row = means.get(name, {})
        if not row:
            continue
        lines.append([name, *[f"{row[column]:.1f}" if column in row else "" for column in columns]])
    at = results["environment"]
    cells = prune_tables.recomputation_cells(results["recomputation"])[prune_tables.DEFAULT]
    sets = min(len(cells[column]) for column in columns if column in cells)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    what = "Means of " + (f"{sets} sets" if sets > 1 else "one set") + " of gradients"
    return f"{table}\n\n{what}; {at['device']}, jax {at['jax']}, {at['date']}."


def bars(results: dict[str, Any]) -> str:
    """What the default is held to."""
    means = _means(results)
    default = means[prune_tables.DEFAULT]
    lines = [["what", "wanted", "measured", ""], ["---"] * 4]
    for sparsity, wanted in BARS.items():
        got = default.get((8, sparsity), math.nan)
        verdict = "met" if got >= wanted else "**not met**"
        what = f"the default, 8 recomputations, {sparsity:.0%}"
        lines.append([what, f">= {wanted:.1f}", f"{got:.1f}", verdict])
    others = [means.get(n, {}) for n in ("magnitude", "reference, whole", "reference, blocks")]
    gaps = {
        column: got - max(row[column] for row in others if column in row)
        for column, got in default.items()
        if any(column in row for row in others)
    }
    worst = min(gaps, key=lambda column: gaps[column])
    verdict = "met" if gaps[worst] >= 0 else "**not met**"
    at = f"{worst[1]:.0%}, {worst[0]} x"
    what = "the default above the best of magnitude and both references, where it is least"
    lines.append([what, ">= 0", f"{gaps[worst]:+.1f} ({at})", verdict])
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
