"""Tables and the figure of ``prune_networks.py``, from its results.

A run has a key of seven parts: experiment, network, method, steps, sparsity, set of gradients, and
what else distinguishes it. Other programs import this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGNITUDE, OBD = "magnitude", "OBD"
# The settings of the paper's code; the second is also WoodFisher's.
REFERENCE, REFERENCE_BLOCKS = "reference, whole", "reference, blocks"
CHITA, CHITA_BLOCKS = "CHITA, whole", "CHITA, blocks"
DEFAULT = "default"
METHODS = (MAGNITUDE, OBD, REFERENCE, REFERENCE_BLOCKS, CHITA, CHITA_BLOCKS, DEFAULT)
# What the keys of trial runs say beside the damping.
OF_AUTHORS, WITHOUT = "authors ", "without first-order term "
TITLES = {
    "resnet20": "ResNet-20 of the M-FAC paper, CIFAR-10",
    "akamaster": "ResNet-20 of akamaster, CIFAR-10",
    "squeezenet": "SqueezeNet, CIFAR-10",
    "mlp": "MLP, MNIST",
    "characters": "character transformer, Shakespeare",
    "minilm": "MiniLM-L6, SST-2",
}
# The columns of the table of times.
_TIMED = (
    "training",
    "dampings",
    "choices",
    "rates",
    "recomputation",
    "one_shot",
    "authors",
    "patterns",
    "gradual",
)
_SEPARATOR = " | "


class Key(NamedTuple):
    """The parts of a run's key."""

    part: str
    network: str
    method: str
    steps: int
    sparsity: float
    seed: int
    what: str


def key_of(
    part: str, network: str, method: str, steps: int, sparsity: float, seed: int, what: str
) -> str:
    """The key of a run."""
    texts = (part, network, method, str(steps), f"{sparsity:g}", str(seed), what)
    return _SEPARATOR.join(texts)


def parsed(key: str) -> Key:
    """The parts of a key."""
    part, network, method, steps, sparsity, seed, what = key.split(_SEPARATOR)
    return Key(part, network, method, int(steps), float(sparsity), int(seed), what)


def of_part(runs: dict[str, Any], part: str, network: str | None = None) -> dict[Key, Any]:
    """The runs of an experiment, of all networks or of one."""
    found = {parsed(key): run for key, run in runs.items()}
    return {
        key: run
        for key, run in found.items()
        if key.part == part and network in (None, key.network)
    }


def mean_accuracy(run: dict[str, Any]) -> float:
    """The accuracy that chooses: the mean of all that the tables show; 0 if the run failed."""
    accuracy = (run["accuracy"] + run.get("recalibrated", run["accuracy"])) / 2
    return 0.0 if math.isnan(accuracy) else accuracy


def tables(results: dict[str, Any]) -> dict[str, str]:
    """A Markdown table for each experiment with each network that has been run."""
    runs, made = results["runs"], {"networks": _networks(results)}
    makers: dict[str, Callable[[dict[Key, Any]], str]] = {
        "one_shot": _one_shot,
        "recomputation": _recomputation,
        "authors": _authors,
        "patterns": _patterns,
        "gradual": _gradual,
    }
    for network in results["dense"]:
        for part, make in makers.items():
            found = of_part(runs, part, network)
            if found:
                made[f"{network}-{part}"] = make(found)
    for part, choose in (("choices", _choices), ("dampings", _dampings), ("rates", _rates)):
        found = of_part(runs, part)
        if found:
            made[part] = choose(found)
    return made | {"times": _times(results)}


def _networks(results: dict[str, Any]) -> str:
    rows = [
        [
            TITLES[name],
            f"{dense['weights']:,}",
            f"{dense['validation']:.2f}",
            f"{dense['test']:.2f}",
        ]
        for name, dense in results["dense"].items()
    ]
    return table(["network", "weights to prune", "validation", "test"], rows)


def _times(results: dict[str, Any]) -> str:
    """Minutes of one core, by network and part, as the processor's clock counts them."""
    minutes: dict[str, dict[str, float]] = {
        network: {"training": dense["processor_seconds"] / 60}
        for network, dense in results["dense"].items()
    }
    for text, run in results["runs"].items():
        key = parsed(text)
        of_network = minutes.setdefault(key.network, {})
        of_network[key.part] = of_network.get(key.part, 0.0) + run["processor_seconds"] / 60
    parts = sorted({part for row in minutes.values() for part in row}, key=_TIMED.index)
    rows = []
    for network, row in minutes.items():
        cells = [f"{row[part]:.0f}" if part in row else "" for part in parts]
        rows.append([network, *cells, f"{sum(row.values()):.0f}"])
    return table(["minutes of one core", *parts, "all"], rows)


class Cell(NamedTuple):
    """The accuracies of one method in one column, by set of gradients."""

    stored: dict[int, float]
    recalibrated: dict[int, float]

    def put(self, seed: int, run: dict[str, Any]) -> None:
        """Adds a run."""
        self.stored[seed] = run["accuracy"]
        if "recalibrated" in run:
            self.recalibrated[seed] = run["recalibrated"]

    @property
    def best(self) -> dict[int, float]:
        """With recalibrated statistics if there are any."""
        return self.recalibrated or self.stored


Column = tuple[float, int]  # sparsity and number of steps
Cells = dict[str, dict[Column, Cell]]


def cells_of(runs: dict[str, Any], network: str) -> Cells:
    """The accuracies of one-shot pruning and of pruning with recomputation."""
    cells: Cells = {}

    def put(method: str, column: Column, seed: int, run: dict[str, Any]) -> None:
        cells.setdefault(method, {}).setdefault(column, Cell({}, {})).put(seed, run)

    for key, run in of_part(runs, "one_shot", network).items():
        for sparsity, found in run.items():
            if isinstance(found, dict):  # not the times, the machine or the date of the run
                put(key.method, (float(sparsity), 1), key.seed, found)
    for key, run in of_part(runs, "recomputation", network).items():
        put(key.method, (key.sparsity, key.steps), key.seed, run)
    return cells


def _one_shot(found: dict[Key, Any]) -> str:
    return _grid("one-shot", found, lambda column: f"{column[0]:.0%}")


def _recomputation(found: dict[Key, Any]) -> str:
    return _grid("recomputations", found, lambda column: f"{column[0]:.0%}, {column[1]} x")


def _grid(title: str, found: dict[Key, Any], head: Callable[[Column], str]) -> str:
    runs = {key_of(*key): run for key, run in found.items()}
    first = next(iter(found))
    cells = cells_of(runs, first.network)
    columns = sorted({column for row in cells.values() for column in row})
    rows = []
    for method, row in sorted(cells.items(), key=lambda item: METHODS.index(item[0])):
        seconds = step_seconds(runs, first.network, method, first.part)
        rows.append([method, *[both(row[c]) if c in row else "" for c in columns]])
        rows[-1].append("" if seconds is None else f"{seconds:.1f} s")
    return table([title, *map(head, columns), "a step"], rows)


def step_seconds(
    runs: dict[str, Any], network: str, method: str, part: str = "recomputation"
) -> float | None:
    """The median time of a step beside its gradients, in the fastest run.

    The first two steps of a run do not count. A run of one-shot pruning has a step for each
    sparsity.
    """
    medians = []
    for key, run in of_part(runs, part, network).items():
        if key.method == method:
            parts = (
                [run] if "step_seconds" in run else [x for x in run.values() if isinstance(x, dict)]
            )
            seconds = [second for of in parts for second in of["step_seconds"]][2:]
            medians += [float(np.median(seconds))] if seconds else []
    return min(medians, default=None)


def both(cell: Cell) -> str:
    """With stored statistics, and after a slash with recalibrated ones."""
    texts = [spread([*values.values()]) for values in cell if values]
    return " / ".join(texts)


def _pair(run: dict[str, Any]) -> str:
    cell = Cell({}, {})
    cell.put(0, run)
    return both(cell)


def _authors(found: dict[Key, Any]) -> str:
    rows = [
        [key.method, f"{key.sparsity:.0%}, {key.steps} x", _pair(run), f"{run['seconds']:.0f} s"]
        for key, run in found.items()
    ]
    return table(
        ["at the setting of CHITA's authors", "sparsity", "accuracy", "the whole run"], rows
    )


def _patterns(found: dict[Key, Any]) -> str:
    rows = []
    for name in dict.fromkeys(key.what for key in found):
        of_name = {key.method: (key, run) for key, run in found.items() if key.what == name}
        key, _ = next(iter(of_name.values()))
        sparsities = [run["sparsity"] for _, run in of_name.values() if "sparsity" in run]
        reference = next((m for m in (REFERENCE_BLOCKS, REFERENCE) if m in of_name), REFERENCE)
        cells = [
            _pair(of_name[m][1]) if m in of_name else "" for m in (MAGNITUDE, reference, DEFAULT)
        ]
        rows.append([f"{name}, {key.steps} x", "".join(f"{s:.1%}" for s in sparsities[:1]), *cells])
    return table(["pattern", "sparsity", MAGNITUDE, "reference", DEFAULT], rows)


def _gradual(found: dict[Key, Any]) -> str:
    columns = sorted({key.sparsity for key in found})
    rows = []
    for method, what in dict.fromkeys((key.method, key.what) for key in found):
        of_row = {k.sparsity: r for k, r in found.items() if (k.method, k.what) == (method, what)}
        cells = [spread([of_row[c]["accuracy"]]) if c in of_row else "" for c in columns]
        rows.append([f"{method}, trained by {what}", *cells])
    epochs = next((f"{run['training']:.2g} " for run in found.values() if "training" in run), "")
    return table([f"gradual, {epochs}epochs a run", *[f"{c:.0%}" for c in columns]], rows)


def _choices(found: dict[Key, Any]) -> str:
    networks = list(dict.fromkeys(key.network for key in found))
    rows = []
    for kind in dict.fromkeys(key.method for key in found):
        cells = []
        for network in networks:
            cell = Cell({}, {})
            for key, run in found.items():
                if (key.method, key.network) == (kind, network):
                    cell.put(key.seed, run)
            cells.append(both(cell))
        rows.append([kind, *cells])
    heads = []
    for network in networks:
        key = next(key for key in found if key.network == network)
        heads.append(f"{network}, {key.sparsity:.0%}, {key.steps} x")
    return table(["validation accuracy", *heads], rows)


def _dampings(found: dict[Key, Any]) -> str:
    grid = sorted({float(key.what.split()[-1]) for key in found})
    rows = {}
    for key, run in found.items():
        authors = ", authors' setting" if key.what.startswith(OF_AUTHORS) else ""
        without = f" {WITHOUT.strip()}" if WITHOUT in key.what else ""
        name = (key.network, key.method + without, f"{key.sparsity:.0%}, {key.steps} x{authors}")
        rows.setdefault(name, {})[float(key.what.split()[-1])] = _pair(run)
    lines = [[*name, *[of.get(damping, "") for damping in grid]] for name, of in rows.items()]
    return table(["network", "method", "sparsity", *[f"{x:g}" for x in grid]], lines)


def _rates(found: dict[Key, Any]) -> str:
    rows = [[key.network, *key.what.split(), _pair(run)] for key, run in found.items()]
    return table(["network", "optimizer", "learning rate", "validation accuracy"], rows)


def spread(values: Iterable[float]) -> str:
    """The mean, with the lowest and the highest of several values; a run that failed has NaN."""
    values = list(values)
    if any(map(math.isnan, values)):
        return "failed"
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}-{max(values):.1f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """For each network, the accuracies over sparsity: one-shot, and with recomputation."""
    from matplotlib.figure import Figure

    names = list(results["dense"])
    figure = Figure(figsize=(4.2 * min(len(names), 3), 3.6 * -(-len(names) // 3)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(-(-len(names) // 3), min(len(names), 3), squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        cells = cells_of(results["runs"], name)
        for method in (m for m in METHODS if m in cells):
            row, color = cells[method], f"C{METHODS.index(method)}"
            for steps, style in ((1, "o-"), (_usual(row), "s:")):
                points = sorted(
                    (100 * sparsity, np.mean([*cell.best.values()]))
                    for (sparsity, count), cell in row.items()
                    if count == steps
                )
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=color, ms=3)
        axes.axhline(results["dense"][name]["test"], color="black", lw=0.8, ls="--")
        axes.set(title=TITLES[name], xlabel="sparsity (%)", ylabel="test accuracy (%)")
        axes.title.set_fontsize(9)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for i, method in enumerate(METHODS):
        grid[0].plot([], [], "o-", color=f"C{i}", label=method, ms=3)
    grid[0].legend(fontsize=6)
    figure.savefig(path, dpi=150)


def _usual(row: dict[Column, Cell]) -> int:
    """The number of recomputations with the most columns."""
    steps = [count for _, count in row if count > 1]
    return max(set(steps), key=steps.count, default=0)
