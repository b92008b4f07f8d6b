"""Tests whether swaps improve exact greedy masks, on the paper's ResNet-20.

    python benchmarks/swaps.py --data-dir DIR

Prunes one-shot with 256 gradients and the default blocks within outputs, by greedy masks and joint
updates, with and without swaps. A swap revives the pruned weight that lowers the loss most and
removes the alive weight that then costs least, both by the exact loss of the block's quadratic
model. A block swaps as long as its loss falls, at most 30 times. It uses NumPy in double precision:
this is a measurement, not a method. Writes ``results/swaps.json`` and the table in
``docs/pruning-results.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import report
from tqdm import tqdm

from mfac_jax import collect_gradients, pruning
from mfac_jax.pruning._blocks import cut_into_blocks
from mfac_jax.pruning._scope import select

sys.path.insert(0, str(report.ROOT / "examples"))

import pruning_tasks
from resnet20 import is_pruned

PAGE = report.ROOT / "docs" / "pruning-results.md"
SPARSITIES = (0.5, 0.8)
N, BLOCKS, SCOPE = 256, pruning.WithinOutputs(), pruning.Scope(path_filter=is_pruned)
RELATIVE_DAMPING = 0.03  # of the mean of the diagonal of the Fisher
MOST_SWAPS = 30  # a block


class Block:
    """A block of the quadratic model ``1/2 (x - w)^T F (x - w)``."""

    def __init__(self, gradients: np.ndarray, weights: np.ndarray, damping: float):
        wide = gradients.astype(float)
        self.fisher = wide.T @ wide / len(wide) + damping * np.eye(len(weights))
        self.weights = weights.astype(float)

    def solve(self, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """The inverse over the alive weights, their best values, and the loss there."""
        values = np.zeros_like(self.weights)
        inverse = np.linalg.inv(self.fisher[np.ix_(alive, alive)])
        pull = self.fisher[np.ix_(alive, ~alive)] @ self.weights[~alive]
        values[alive] = self.weights[alive] + inverse @ pull
        change = values - self.weights
        return inverse, values, float(change @ self.fisher @ change / 2)

    def swap(self, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float, int]:
        """The mask and the values after swaps, the loss before and after, and their number."""
        inverse, values, loss = self.solve(alive)
        before, swaps = loss, 0
        while swaps < MOST_SWAPS and 0 < alive.sum() < len(alive):
            pull = (self.fisher @ (values - self.weights))[~alive]
            across = self.fisher[np.ix_(~alive, alive)]
            own = np.diag(self.fisher)[~alive] - np.sum((across @ inverse) * across, axis=1)
            more = alive.copy()
            more[np.flatnonzero(~alive)[np.argmax(pull**2 / own)]] = True
            wider, moved, _ = self.solve(more)
            cost = moved[more] ** 2 / np.diag(wider)
            other = more.copy()
            other[np.flatnonzero(more)[np.argmin(cost)]] = False
            found = self.solve(other)
            if found[2] >= loss * (1 - 1e-6):
                break
            alive, (inverse, values, loss), swaps = other, found, swaps + 1
        return alive, values, before, loss, swaps


def measure(data_dir: Path) -> dict[str, Any]:
    """The results before and after swaps, by sparsity."""
    files = pruning_tasks.Files(data_dir, {}, None, data_dir)  # nothing is trained
    network = pruning_tasks.network("resnet20", files)
    params = network.params
    selection = select(SCOPE, params)
    runs = cut_into_blocks(BLOCKS, selection).runs
    sizes = [run.size for run in runs for _ in range(run.count)]
    rows = collect_gradients(network.loss, params, network.batches(0, 32), N)

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])[selection.order]

    def put(values: np.ndarray) -> Any:
        whole = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
        whole[selection.order] = values
        return rows.layout.unflatten(jnp.asarray(whole))

    damping = RELATIVE_DAMPING * float(np.mean(flat(rows.column_square_sums()))) / N

    def judge(tree: Any, predicted: float, seconds: float) -> dict[str, float]:
        losses = [float(network.loss(tree, batch)) for batch in network.calibration]
        accuracy = network.accuracy(tree, "validation")
        return {
            "predicted": predicted,
            "loss": float(np.mean(losses)),
            "accuracy": accuracy,
            "seconds": seconds,
        }

    results = {}
    weights = flat(params)
    for sparsity in SPARSITIES:
        began = time.perf_counter()
        pruned, mask, _ = pruning.prune_step(
            params,
            pruning.initial_mask(params),
            rows,
            sparsity,
            damping=damping,
            score="greedy",
            blocks=BLOCKS,
            scope=SCOPE,
        )
        jax.block_until_ready(pruned)
        greedy = time.perf_counter() - began
        alive = flat(mask)
        before = after = 0.0
        swaps, values, start, began = 0, np.zeros(len(weights)), 0, time.perf_counter()
        for size in tqdm(sizes, unit="block", disable=None):
            here = slice(start, start + size)
            gradients = rows.take(jnp.asarray(selection.order[here]))
            block = Block(np.asarray(gradients), weights[here], damping)
            kept, own, old, new, count = block.swap(alive[here])
            values[here] = own * kept
            before, after, swaps, start = before + old, after + new, swaps + count, start + size
        seconds = time.perf_counter() - began
        results[f"{sparsity:g}"] = {
            "greedy": judge(pruned, before, greedy),
            "swaps": judge(put(values), after, seconds),
            "count": swaps,
        }
    return results


def table(results: dict[str, Any]) -> str:
    """The table of the documentation."""
    head = ["one-shot", "mask", "predicted loss", "calibration loss", "accuracy", "time"]
    lines = [head, ["---"] * len(head)]
    for sparsity, found in results["sparsities"].items():
        for name, shown in (("greedy", "greedy"), ("swaps", f"{found['count']} swaps after it")):
            of = found[name]
            lines.append(
                [
                    f"{float(sparsity):.0%}",
                    shown,
                    f"+{of['predicted']:.4g}",
                    f"{of['loss']:.4f}",
                    f"{of['accuracy']:.2f}",
                    f"{of['seconds']:.0f} s",
                ]
            )
    at = results["environment"]
    where = f"{at['processor']}, {at['cores']} cores, jax {at['jax']}, {at['date']}."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{where}"


def main() -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    found = measure(options.data_dir)
    results = {"environment": machine.environment(), "sparsities": found}
    report.save("swaps", results)
    report.write_table(PAGE, "swaps", table(results))


if __name__ == "__main__":
    main()
