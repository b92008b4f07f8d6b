"""Pruning with nothing but the defaults, as a new user calls it.

    python benchmarks/plain_call.py --data-dir DIR

In ``examples/prune_networks.py`` the default has calibration batches of its own. Here ``prune``
takes them from the training batches, which are augmented. The program goes on after an interruption
and refuses the results of other versions. It writes ``results/plain_call.json`` and the table in
``docs/pruning-results.md``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import report

from mfac_jax import pruning

sys.path.insert(0, str(report.ROOT / "examples"))

import parallel
import prune_networks
import prune_tables
from prune_networks import Setup

NAME = "plain_call"
PAGE = report.ROOT / "docs" / "pruning-results.md"
NETWORKS, SPARSITY, STEPS, SEEDS = ("resnet20", "akamaster"), 0.9, 8, 3


def measure(setup: Setup, name: str, seed: int) -> dict[str, Any]:
    """Test accuracies with stored and with recalibrated statistics."""
    network = prune_networks.network_of(setup, name)
    pruned = pruning.prune(
        network.params,
        network.loss,
        network.batches(seed, network.batch),
        SPARSITY,
        steps=STEPS,
        scope=pruning.Scope(network.is_pruned),
    )
    return {
        "name": name,
        "seed": seed,
        "accuracy": network.accuracy(pruned.params, "test"),
        "recalibrated": network.accuracy(network.recalibrate(pruned.params), "test"),
    }


def table(results: dict[str, Any]) -> str:
    """The table of the documentation."""
    cells: dict[str, prune_tables.Cell] = {}
    for run in results["runs"].values():
        cells.setdefault(run["name"], prune_tables.Cell({}, {})).put(run["seed"], run)
    rows = [[prune_tables.TITLES[name], prune_tables.both(cell)] for name, cell in cells.items()]
    head = ["nothing but the defaults", f"{SPARSITY:.0%}, {STEPS} x"]
    where = report.where(results["environment"])
    return f"{prune_tables.table(head, rows)}\n\n{where}"


def main() -> None:
    """Measures what is missing, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    setup = Setup(options.data_dir, (), None, options.data_dir, smoke=False)  # trains nothing
    path = report.RESULTS / f"{NAME}.json"
    results = parallel.open_results(path, prune_networks.environment(setup))
    todo = {f"{name}, {seed}": (setup, name, seed) for name in NETWORKS for seed in range(SEEDS)}
    parallel.perform(measure, todo, results, path)
    report.write_table(PAGE, NAME, table(results))


if __name__ == "__main__":
    main()
