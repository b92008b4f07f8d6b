"""Runs the demo and writes its table and figure into the README.

    python benchmarks/demo.py [--render]

Writes ``results/quickstart.json``, ``docs/assets/quickstart.png`` and the table of the
README; ``--render`` only writes the figure and the table, from the result file.
"""

from __future__ import annotations

import argparse
import sys

import report

sys.path.insert(0, str(report.ROOT / "examples"))

import quickstart

FIGURE = report.ROOT / "docs" / "assets" / "quickstart.png"
README = report.ROOT / "README.md"


def table(results: dict) -> str:
    """Both tables of the demo, with the machine and the settings of the measurement."""
    where = results["settings"]
    return "\n\n".join(
        [
            quickstart.training_table(results),
            quickstart.pruning_table(results),
            f"MNIST digits, {where['train_images']:,} to train on, {where['epochs']} epochs, "
            f"{where['num_gradients']} gradients to prune with; {where['device']}, "
            f"jax {where['jax']}, {where['date']}.",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measures and renders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="only render the result file")
    args = parser.parse_args(argv)
    if not args.render:
        results = quickstart.main(["--figure", str(FIGURE)])
        report.save("quickstart", results)
    quickstart.draw(report.load("quickstart"), FIGURE)
    report.write_table(README, "quickstart", table(report.load("quickstart")))


if __name__ == "__main__":
    main()
