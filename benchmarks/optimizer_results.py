"""Writes what the comparisons of optimizers measured into the documentation.

    python examples/optimizers.py --data-dir DIR --out DIR2
    python examples/natural_gradients.py --out DIR3
    python examples/directions.py --data-dir DIR --out DIR4
    python benchmarks/optimizer_results.py DIR2/results.json DIR3/results.json DIR4/directions.json

Copies the result files to ``results/optimizers.json``, ``results/natural_gradients.json`` and
``results/directions.json`` and writes the tables and the figures of ``docs/choosing.md`` from them.
Without arguments it uses the existing copies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report
from flax import nnx

from mfac_jax import mfacw
from mfac_jax.rows import Dense, Storage, TopK

sys.path.insert(0, str(report.ROOT / "examples"))

import directions
import natural_gradients
import optimizer_tables
from optimizer_tables import TITLES, chosen, finals, trained
from optimizer_tasks import CharacterTransformer

PAGE = report.ROOT / "docs" / "choosing.md"
ASSETS = report.ROOT / "docs" / "assets"
NAMES = ("optimizers", "natural_gradients", "directions")
FIGURES = {"optimizers": "learning_rates.png", "natural_gradients": "natural_gradients.png"}
NOT_YET = "*Not measured yet.*"
# Wanted: the ratio of the ranges of good learning rates, and the points of test error of the
# paper's form above SGD; and the bytes of state for storages.
WIDER, POINTS = 2.0, 1.0
STATES = (
    ("bfloat16", Dense(jnp.bfloat16), 134),
    ("the largest 1 %", TopK(0.01, error_bits=4), 10),
)
OTHERS = ("SGD + momentum", "AdamW", "NAdamW", "Muon")


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of ``optimizers.py`` by the names of their markers."""
    made = dict.fromkeys((*TITLES, "characters-long", "ranges", "variants"), NOT_YET)
    made |= optimizer_tables.tables(results)
    made |= {"bars": bars(results), "where": where(results)}
    return {f"optimizers-{name}": table for name, table in made.items()}


def natural_tables(results: dict[str, Any] | None) -> dict[str, str]:
    """The table and the figure of ``natural_gradients.py`` by the names of their markers."""
    if results is None:
        return dict.fromkeys(("natural-errors", "natural-where", "natural-figure"), NOT_YET)
    image = f"assets/{FIGURES['natural_gradients']}"
    return {
        "natural-errors": natural_gradients.table(results),
        "natural-where": where(results),
        "natural-figure": f"```{{image}} {image}\n:alt: error along the steps\n```",
    }


def direction_tables(results: dict[str, Any] | None) -> dict[str, str]:
    """The table of ``directions.py`` by the name of its marker."""
    return {"directions": NOT_YET if results is None else directions.table(results)}


def load(name: str) -> dict[str, Any] | None:
    """Results; None if there are none yet."""
    return report.load(name) if (report.RESULTS / f"{name}.json").exists() else None


def where(results: dict[str, Any]) -> str:
    """The machines, the dates and the time of all runs."""
    runs = results["runs"].values()
    hours = sum(run["processor_seconds"] for run in runs) / 3600
    devices = " or ".join(sorted({run["device"] for run in runs}))
    days = sorted(run["date"] for run in runs)
    dates = " to ".join(dict.fromkeys([days[0], days[-1]]))
    return (
        f"{len(runs)} runs, {hours:.1f} hours of one core of {devices}, jax "
        f"{results['environment']['jax']}, {dates}. Each run has one core."
    )


def bars(results: dict[str, Any]) -> str:
    """What is wanted of ``mfacw`` and of the paper's form, and what was measured."""
    lines = ["| what | task | wanted | measured |  |", "| --- | --- | --- | --- | --- |"]
    for task, title in TITLES.items():
        found = trained(results, task)
        for what, wanted, measured, is_met in _bars_of(found, task):
            verdict = "met" if is_met else "not met"
            lines.append(f"| {what} | {title} | {wanted} | {measured} | {verdict} |")
    for name, storage, most in STATES:
        size = state_size(storage)
        what, verdict = f"state, m = 64, by leaf, {name}", "met" if size <= most else "not met"
        cells = (what, TITLES["characters"], f"<= {most} bytes a parameter", f"{size:.1f}", verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def state_size(storage: Storage) -> float:
    """The bytes a parameter of the state of ``mfacw`` on the character transformer."""
    model = CharacterTransformer(65, 64, 128, 2, nnx.Rngs(0))  # as in the task, without its data
    params = nnx.state(model, nnx.Param)
    tx = mfacw(1e-3, window_size=64, blocks="leaf", storage=storage)
    state = jax.eval_shape(tx.init, params)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return size / sum(leaf.size for leaf in jax.tree.leaves(params))


def _bars_of(found: list[Any], task: str) -> list[tuple[str, str, str, bool]]:
    made = []
    adamw = chosen(found, "AdamW")
    theirs = _losses(found, "AdamW", adamw)
    at_theirs = _losses(found, "mfacw", adamw)
    if len(theirs) and len(at_theirs):
        error = np.hypot(*[np.std(x, ddof=1) / np.sqrt(len(x)) for x in (theirs, at_theirs)])
        gap = at_theirs.mean() - theirs.mean()
        what = "validation loss at AdamW's setting, minus AdamW's"
        made.append((what, f"<= {error:.3f} (standard error)", f"{gap:+.3f}", gap <= error))
    short = _losses(found, "mfacw", chosen(found, "mfacw"), "short")
    if len(theirs) and len(short):
        gap = short.mean() - theirs.mean()
        what = "validation loss in two thirds of the steps, minus AdamW's"
        made.append((what, "<= 0", f"{gap:+.3f}", gap <= 0))
    ours = finals(found, "mfacw", chosen(found, "mfacw"))
    rivals = {name: finals(found, name, chosen(found, name)) for name in OTHERS}
    losses = {name: np.mean([r["test"] for r in runs]) for name, runs in rivals.items() if runs}
    if ours and losses:
        name = min(losses, key=losses.__getitem__)
        gap = np.mean([r["test"] for r in ours]) - losses[name]
        made.append(
            (f"test loss, minus the best other's ({name})", "<= 0", f"{gap:+.3f}", gap <= 0)
        )
    ranges = [optimizer_tables.good_rates(found, method) for method in ("mfacw", "AdamW")]
    if all(ranges):
        own, other = (max(good) / min(good) for good in ranges)
        what = "range of good learning rates, of AdamW's"
        made.append((what, f">= {WIDER:.0f} x", f"{own / other:.1f} x", own >= WIDER * other))
    if task == "cifar":
        errors = [
            np.mean([run["test_error"] for run in finals(found, name, chosen(found, name))])
            for name in ("mfac", "SGD + momentum")
            if finals(found, name, chosen(found, name))
        ]
        if len(errors) == 2:
            what = "test error of the paper's form, minus SGD's with momentum"
            gap = errors[0] - errors[1]
            made.append((what, f"<= {POINTS:.0f} point", f"{gap:+.1f}", gap <= POINTS))
    return made


def _losses(
    found: list[Any], method: str, setting: tuple[float, float] | None, length: str = ""
) -> np.ndarray:
    return np.array([r["validation"] for r in finals(found, method, setting, length)])


def main() -> None:
    """Saves the result files and writes the page."""
    for name, path in zip(NAMES, sys.argv[1:], strict=False):
        report.save(name, json.loads(Path(path).read_text()))
    results = report.load("optimizers")
    made = tables(results)
    optimizer_tables.draw(results, ASSETS / FIGURES["optimizers"])
    natural = load("natural_gradients")
    made |= natural_tables(natural) | direction_tables(load("directions"))
    if natural is not None:
        natural_gradients.draw(natural, ASSETS / FIGURES["natural_gradients"])
    for name, table in made.items():
        report.write_table(PAGE, name, table)


if __name__ == "__main__":
    main()
