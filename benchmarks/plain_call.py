"""Pruning with nothing but the defaults, as a new user calls it.

    python benchmarks/plain_call.py --data-dir DIR

In ``examples/prune_networks.py`` the default has calibration batches of its own. Here ``prune``
takes them from the training batches, which are augmented. Every run is written when it ends, and a
run that is there is not done again. Writes ``results/plain_call.json`` and the table in
``docs/pruning-results.md``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import machine
import report

from mfac_jax import pruning

sys.path.insert(0, str(report.ROOT / "examples"))

import prune_tables
import pruning_tasks
from pruning_network import Network

NAME = "plain_call"
PAGE = report.ROOT / "docs" / "pruning-results.md"
NETWORKS, SPARSITY, STEPS, SEEDS = ("resnet20", "akamaster"), 0.9, 8, 3


def measure(network: Network, seed: int) -> dict[str, float]:
    """Test accuracies with stored and with recalibrated statistics."""
    pruned = pruning.prune(
        network.params,
        network.loss,
        network.batches(seed, network.batch),
        SPARSITY,
        steps=STEPS,
        scope=pruning.Scope(network.is_pruned),
    )
    return {
        "accuracy": network.accuracy(pruned.params, "test"),
        "recalibrated": network.accuracy(network.recalibrate(pruned.params), "test"),
    }


def table(results: dict[str, Any]) -> str:
    """The table of the documentation."""
    rows = []
    for name in NETWORKS:
        cell = prune_tables.Cell({}, {})
        for seed, run in results["runs"].get(name, {}).items():
            cell.put(int(seed), run)
        if cell.stored:
            rows.append([prune_tables.TITLES[name], prune_tables.both(cell)])
    head = ["nothing but the defaults", f"{SPARSITY:.0%}, {STEPS} x"]
    where = report.where(results["environment"])
    return f"{prune_tables.table(head, rows)}\n\n{where}"


def main() -> None:
    """Measures what is missing, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    path = report.RESULTS / f"{NAME}.json"
    results = report.load(NAME) if path.exists() else {"runs": {}}
    for name in NETWORKS:
        done = results["runs"].setdefault(name, {})
        files = pruning_tasks.Files(options.data_dir, {}, None, options.data_dir)  # trains nothing
        network = pruning_tasks.network(name, files)
        for seed in range(SEEDS):
            if str(seed) not in done:
                done[str(seed)] = measure(network, seed)
                results["environment"] = machine.environment()
                report.save(NAME, results)
    report.write_table(PAGE, NAME, table(results))


if __name__ == "__main__":
    main()
