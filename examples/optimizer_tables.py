"""Tables and figure of ``optimizers.py``, from its results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import parallel

TRIAL_SEED = 100
TITLES = {
    "characters": "character transformer",
    "cifar": "ResNet-8, CIFAR-10",
    "mlp": "MLP, CIFAR-10",
    "sst2": "MiniLM-L6, SST-2",
    "mrpc": "MiniLM-L6, MRPC",
}
METHODS = (
    "SGD + momentum",
    "AdamW",
    "NAdamW",
    "Muon",
    "mfac",
    "mfacw",
    "empirical Fisher of examples",
    "improved Fisher of examples",
)
# The key of a run: task, optimizer (there may be commas in its name), rate, decay, seed, length.
KEY = re.compile(r"(\w+), (.+), ([^,]+), ([^,]+), seed (\d+)(?:, (short|long))?")
WIDE = 1.05  # a learning rate is good if its loss is at most this times the best


class Trained(NamedTuple):
    """One run with its key.

    Attributes:
        method: the optimizer.
        setting: learning rate and weight decay.
        seed: the seed.
        length: "short" or "long" if it had fewer or more than the task's steps, otherwise "".
        run: what was measured.
    """

    method: str
    setting: tuple[float, float]
    seed: int
    length: str
    run: dict[str, Any]


def trained(results: dict[str, Any], task: str) -> list[Trained]:
    """All runs of a task."""
    found = []
    for key, run in results["runs"].items():
        match = KEY.fullmatch(key)
        assert match is not None
        name, method, rate, decay, seed, length = match.groups("")
        if name == task:
            found.append(Trained(method, (float(rate), float(decay)), int(seed), length, run))
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
        if any(t.length == "long" for t in found):
            made[f"{task}-long"] = _table(found, "long")
    if made:
        tasks = [task for task in TITLES if task in made]
        made["ranges"] = _ranges(results, tasks)
        if any(t.method not in METHODS for task in tasks for t in trained(results, task)):
            made["variants"] = _variants(results, tasks)
    return made


def _table(found: list[Trained], length: str = "") -> str:
    """One line for each optimizer: its tuned setting, means over the seeds, costs."""
    methods = [method for method in METHODS if any(t.method == method for t in found)]
    adamw = chosen(found, "AdamW")
    shown = [t for t in found if (t.length == "long") == (length == "long")]
    device = parallel.main_device(t.run for t in shown if t.seed != TRIAL_SEED)
    lines: list[list[str]] = []
    names = [(method, chosen(found, method), method, length) for method in methods]
    if "mfacw" in methods:
        if adamw is not None and adamw != chosen(found, "mfacw"):
            names.append(("mfacw", adamw, "mfacw at AdamW's setting", length))
        if not length:
            names.append(("mfacw", chosen(found, "mfacw"), "mfacw, fewer steps", "short"))
    theirs = finals(found, "AdamW", adamw, length)
    goal = float(_smooth(theirs)[0][-1]) if theirs else None
    for method, setting, label, share in names:
        runs = finals(found, method, setting, share)
        if not runs:
            continue
        cells = [label, f"{setting[0]:g}, {setting[1]:g}"]
        cells += [_with_error(runs, "validation"), _with_error(runs, "test")]
        cells.append(_with_error(runs, "test_error", "{:.1f}"))
        cells.append(f"{_mean(runs, 'train'):.3f}")
        cells.append(f"{runs[0]['steps']}")
        ms = min((run["ms"] for run in runs if run["device"] == device), default=None)
        cells.append(_steps_to(runs, goal, ms))
        cells.append("" if ms is None else f"{ms:.0f}")
        size = runs[0]["state_bytes"]
        cells.append(f"{size / runs[0]['parameters']:.0f} ({size / 2**20:.1f} MiB)")
        lines.append(cells)
    head = ["optimizer", "rate, decay", "validation loss", "test loss", "test error, %"]
    head += ["training loss", "steps", "steps to AdamW's", "ms a step", "state, bytes a parameter"]
    return _markdown([head, *lines])


def finals(
    found: list[Trained],
    method: str,
    setting: tuple[float, float] | None,
    length: str = "",
) -> list[dict[str, Any]]:
    """The runs of a setting with the seeds of the tables."""
    return [
        t.run
        for t in found
        if (t.method, t.setting, t.length) == (method, setting, length) and t.seed != TRIAL_SEED
    ]


def _steps_to(runs: list[dict[str, Any]], goal: float | None, ms: float | None) -> str:
    """The steps after which the training loss is first below the goal, and their time."""
    if not all(np.isfinite(run["train"]) for run in runs):
        return "diverged"
    smooth, width = _smooth(runs)
    if goal is None or smooth[-1] > goal:
        return "not reached"
    share = (np.flatnonzero(smooth <= goal)[0] + width) / (len(smooth) + width - 1)
    steps = round(share * runs[0]["steps"])
    return f"{steps}" if ms is None else f"{steps} ({1e-3 * ms * steps:.0f} s)"


def _smooth(runs: list[dict[str, Any]]) -> tuple[np.ndarray, int]:
    """The training loss, as a mean over the runs and over an eighth of a training.

    Returns:
        The loss at the end of each such eighth, and the number of points of a curve in it.
    """
    curves = [run["curve"] for run in runs]
    length = min(map(len, curves))
    mean = np.mean([curve[:length] for curve in curves], axis=0)
    width = max(length // 8, 1)
    return np.convolve(mean, np.full(width, 1 / width), "valid"), width


def _ranges(results: dict[str, Any], tasks: list[str]) -> str:
    """For each optimizer the range of learning rates that are nearly as good as its best one."""
    head = ["good learning rates", *[TITLES[task] for task in tasks]]
    found = {task: trained(results, task) for task in tasks}
    lines = [head]
    for method in METHODS:
        cells = [method]
        for task in tasks:
            good = good_rates(found[task], method)
            cells.append(f"{min(good):g} to {max(good):g}" if good else "")
        if any(cells[1:]):
            lines.append(cells)
    return _markdown(lines)


def _variants(results: dict[str, Any], tasks: list[str]) -> str:
    """The loss of each variant of mfacw, its time and its memory."""
    found = {task: trained(results, task) for task in tasks}
    names = dict.fromkeys(t.method for task in tasks for t in found[task])
    head = ["mfacw", *[TITLES[task] for task in tasks]]
    devices = {task: parallel.main_device(t.run for t in found[task]) for task in tasks}
    lines = [head]
    for name in ["mfacw", *[name for name in names if name not in METHODS]]:
        cells = ["default" if name == "mfacw" else name]
        for task in tasks:
            setting = chosen(found[task], "mfacw")
            runs = [
                t.run
                for t in found[task]
                if (t.method, t.setting, t.seed) == (name, setting, TRIAL_SEED)
            ]
            cells.append(_cost(runs[0], devices[task]) if runs else "")
        lines.append(cells)
    return _markdown(lines)


def _cost(run: dict[str, Any], device: str) -> str:
    """Validation loss, time of a step on this machine and bytes of state."""
    time = f"{run['ms']:.0f} ms, " if run["device"] == device else ""
    return f"{run['validation']:.3f} ({time}{run['state_bytes'] / run['parameters']:.0f} B)"


def by_rate(found: list[Trained], method: str) -> dict[float, float]:
    """The validation loss of the trials with the usual weight decay, at each learning rate."""
    trials = [t for t in found if t.method == method and t.seed == TRIAL_SEED]
    decays = [t.setting[1] for t in trials]
    usual = max(decays, key=decays.count, default=None)  # one rate has another decay as well
    curve = {t.setting[0]: _or_inf(t.run["validation"]) for t in trials if t.setting[1] == usual}
    return dict(sorted(curve.items()))


def good_rates(found: list[Trained], method: str) -> list[float]:
    """The learning rates whose loss is nearly the best one of this optimizer."""
    curve = by_rate(found, method)
    rates, losses = [*curve], np.array([*curve.values()])
    if not np.isfinite(losses).any():
        return []
    is_good = losses <= WIDE * losses.min()
    first = last = int(losses.argmin())
    while first > 0 and is_good[first - 1]:
        first -= 1
    while last < len(rates) - 1 and is_good[last + 1]:
        last += 1
    return rates[first : last + 1]


def draw(results: dict[str, Any], path: Path) -> None:
    """Validation loss against learning rate: what an untuned user gets."""
    tasks = [task for task in TITLES if trained(results, task)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.6), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        found = trained(results, task)
        losses: list[float] = []
        for method in [m for m in METHODS if any(t.method == m for t in found)]:
            curve = by_rate(found, method)
            axis.semilogx([*curve], [*curve.values()], "o-", label=method)
            losses += [x for x in curve.values() if np.isfinite(x)]
        if losses:
            low, high = min(losses), np.quantile(losses, 0.8)
            axis.set_ylim(low - 0.05 * (high - low), high + 0.2 * (high - low) + 1e-6)
        axis.set(title=TITLES[task], xlabel="learning rate", ylabel="validation loss")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _mean(runs: list[dict[str, Any]], what: str) -> float:
    return float(np.mean([run[what] for run in runs])) if runs else float("nan")


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
