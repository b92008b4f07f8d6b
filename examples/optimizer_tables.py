"""Tables and figure of ``optimizers.py``, from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

TRIAL_SEED = 100
TITLES = {
    "characters": "character transformer",
    "cifar": "ResNet-8, CIFAR-10",
    "mlp": "MLP, CIFAR-10",
    "sst2": "MiniLM-L6, SST-2",
    "mrpc": "MiniLM-L6, MRPC",
}
WIDE = 1.05  # a learning rate is good if its loss is at most this times the best


class Trained(NamedTuple):
    """One run with its key.

    Attributes:
        method: the optimizer.
        setting: learning rate and weight decay.
        seed: the seed.
        run: what was measured.
    """

    method: str
    setting: tuple[float, float]
    seed: int
    run: dict[str, Any]


def trained(results: dict[str, Any], task: str) -> list[Trained]:
    """All runs of a task."""
    found = []
    for key, run in results["runs"].items():
        name, method, rate, decay, seed = key.split(", ")
        if name == task:
            setting = (float(rate), float(decay))
            found.append(Trained(method, setting, int(seed.removeprefix("seed ")), run))
    return found


def chosen(found: list[Trained], method: str) -> tuple[float, float] | None:
    """The setting of a method with the smallest validation loss in the trials."""
    trials = [t for t in found if t.method == method and t.seed == TRIAL_SEED]
    if not trials:
        return None
    return min(trials, key=lambda t: _or_inf(t.run["validation"])).setting


def tables(results: dict[str, Any]) -> dict[str, str]:
    """A Markdown table for each task that has finished runs, and one of the range of rates."""
    made = {}
    for task in TITLES:
        found = trained(results, task)
        if any(t.seed != TRIAL_SEED for t in found):
            made[task] = _table(found)
    if made:
        made["ranges"] = _ranges(results, list(made))
    return made


def _table(found: list[Trained]) -> str:
    """One line for each optimizer: its tuned setting, means over the seeds, costs."""
    methods = list(dict.fromkeys(t.method for t in found))
    adamw = chosen(found, "AdamW")
    goal = None
    lines: list[list[str]] = []
    names = [(method, chosen(found, method), method) for method in methods]
    if adamw is not None and adamw != chosen(found, "mfacw"):
        names.append(("mfacw", adamw, "mfacw at AdamW's setting"))
    goal = _mean(_finals(found, "AdamW", adamw), "train") if adamw else None
    for method, setting, label in names:
        runs = _finals(found, method, setting)
        if not runs:
            continue
        cells = [label, f"{setting[0]:g}, {setting[1]:g}"]
        cells += [_with_error(runs, "validation"), _with_error(runs, "test")]
        if runs[0]["has_accuracy"]:
            cells.append(_with_error(runs, "test_error", "{:.1f}"))
        cells.append(f"{_mean(runs, 'train'):.3f}")
        cells.append(_steps_to(runs, goal))
        cells.append(f"{_median(runs, 'ms'):.0f}")
        cells.append(f"{runs[0]['state_bytes'] / runs[0]['parameters']:.0f}")
        lines.append(cells)
    has_accuracy = found[0].run["has_accuracy"]
    head = ["optimizer", "rate, decay", "validation loss", "test loss"]
    head += ["test error, %"] * has_accuracy
    head += ["training loss", "steps to AdamW's", "ms a step", "bytes a parameter"]
    return _markdown([head, *lines])


def _finals(
    found: list[Trained], method: str, setting: tuple[float, float] | None
) -> list[dict[str, Any]]:
    return [
        t.run for t in found if t.method == method and t.setting == setting and t.seed != TRIAL_SEED
    ]


def _steps_to(runs: list[dict[str, Any]], goal: float | None) -> str:
    """The share of the steps after which the mean training loss is below the goal."""
    curves = [run["curve"] for run in runs]
    length = min(map(len, curves))
    mean = np.mean([curve[:length] for curve in curves], axis=0)
    below = np.flatnonzero(mean <= goal) if goal is not None else []
    return f"{(below[0] + 1) / length:.0%}" if len(below) else "not reached"


def _ranges(results: dict[str, Any], tasks: list[str]) -> str:
    """For each optimizer the range of learning rates that are nearly as good as its best one."""
    head = ["good learning rates", *[TITLES[task] for task in tasks]]
    found = {task: trained(results, task) for task in tasks}
    methods = list(dict.fromkeys(t.method for task in tasks for t in found[task]))
    lines = [head]
    for method in methods:
        cells = [method]
        for task in tasks:
            curve = by_rate(found[task], method)
            least = min(map(_or_inf, curve.values()), default=np.inf)
            good = [rate for rate, loss in curve.items() if _or_inf(loss) <= WIDE * least]
            cells.append(f"{min(good):g} to {max(good):g}" if good else "")
        lines.append(cells)
    return _markdown(lines)


def by_rate(found: list[Trained], method: str) -> dict[float, float]:
    """The best validation loss of the trials at each learning rate."""
    curve: dict[float, float] = {}
    for t in found:
        if t.method == method and t.seed == TRIAL_SEED:
            rate, loss = t.setting[0], _or_inf(t.run["validation"])
            curve[rate] = min(curve.get(rate, np.inf), loss)
    return dict(sorted(curve.items()))


def draw(results: dict[str, Any], path: Path) -> None:
    """Validation loss against learning rate: what an untuned user gets."""
    tasks = [task for task in TITLES if trained(results, task)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.6), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        found = trained(results, task)
        losses: list[float] = []
        for method in dict.fromkeys(t.method for t in found):
            curve = by_rate(found, method)
            axis.semilogx([*curve], [*curve.values()], "o-", label=method)
            losses += [x for x in curve.values() if np.isfinite(x)]
        if losses:
            low, high = min(losses), np.quantile(losses, 0.8)
            axis.set_ylim(low - 0.05 * (high - low), high + 0.2 * (high - low) + 1e-6)
        axis.set(title=TITLES[task], xlabel="learning rate", ylabel="validation loss")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _mean(runs: list[dict[str, Any]], what: str) -> float:
    return float(np.mean([run[what] for run in runs])) if runs else float("nan")


def _median(runs: list[dict[str, Any]], what: str) -> float:
    return float(np.median([run[what] for run in runs]))


def _with_error(runs: list[dict[str, Any]], what: str, shape: str = "{:.3f}") -> str:
    """Mean and standard error."""
    values = np.array([run[what] for run in runs])
    text = shape.format(values.mean())
    if len(values) < 2:
        return text
    return f"{text} ± {shape.format(values.std(ddof=1) / np.sqrt(len(values)))}"


def _or_inf(value: float) -> float:
    return value if np.isfinite(value) else float("inf")


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])
