"""Writes what ``examples/prune_networks.py`` measured into the documentation.

    python examples/prune_networks.py --data-dir DIR --out DIR2
    python benchmarks/pruning_results.py DIR2/results.json

Copies the result file to ``results/prune_networks.json`` and writes the tables and the figure of
``docs/pruning-results.md`` and the table of the README from it. Networks may have files of their
own: several arguments become one. (The two without dampings of their own need the file of the
paper's ResNet-20.) Without an argument it uses the existing copy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import report

sys.path.insert(0, str(report.ROOT / "examples"))

import parallel
import prune_tables
import pruning_runs
from prune_tables import (
    CHITA,
    CHITA_BLOCKS,
    DEFAULT,
    MAGNITUDE,
    METHODS,
    REFERENCE_BLOCKS,
)

README = report.ROOT / "README.md"
PAGE = report.ROOT / "docs" / "pruning-results.md"
FIGURE = report.ROOT / "docs" / "assets" / "pruning.png"
NAME = "prune_networks"
# The networks in two halves, and the wanted time of training and of all runs of each on two cores.
HALVES = (("resnet20", "akamaster", "characters"), ("mlp", "squeezenet", "minilm"))
HOURS = 2
# The wanted time of a step of the paper's ResNet-20 beside its gradients, on one core: half of what
# was measured when trials did not share masks yet.
SECONDS = 6.65
RIVALS = tuple(method for method in METHODS if method != DEFAULT)
MISSING = "*Not measured yet.*"
# The network, the sparsity, the number of steps, the accuracy wanted of the default, and whether
# its spread may reach it, because that accuracy came from one set of gradients.
WANTED = (
    ("resnet20", 0.8, 8, 87.5, True),
    ("resnet20", 0.9, 8, 80.0, True),
    ("resnet20", 0.8, 8, 88.5, False),
    ("resnet20", 0.9, 8, 82.0, False),
)
# The network, the sparsity, the number of steps, and how far below dense the default may be.
LOSSES = (("minilm", 0.5, 8, 1.0), ("minilm", 0.8, 8, 4.0))


def markers() -> Iterator[str]:
    """The tables of the page."""
    yield from ("networks", "bars", "choices", "dampings", "rates", "times")
    for network in prune_tables.TITLES:
        yield from (f"{network}-recomputation", f"{network}-one_shot")
    yield "resnet20-authors"
    yield from ("resnet20-patterns", "minilm-patterns", "resnet20-gradual", "minilm-gradual")


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables by the names of their markers."""
    made = prune_tables.tables(results)
    found = {name: made.get(name, MISSING) for name in markers() if name != "bars"}
    found |= {"where": where(results), "bars": bars(results)}
    return {f"pruning-{name}": text for name, text in found.items()}


def where(results: dict[str, Any]) -> str:
    """The machines, versions and dates of the measurement."""
    at, runs = results["environment"], list(results["runs"].values())
    devices = sorted({run["device"] for run in runs})
    dates = sorted({run["date"] for run in runs})
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return (
        f"mfac_jax {at['mfac_jax']} (code {at['code']}), jax {at['jax']}, {' and '.join(devices)}, "
        f"one core a run, {days}. {len(runs)} runs and the training "
        f"before them took {hours(results, prune_tables.TITLES):.1f} hours of two cores."
    )


def hours(results: dict[str, Any], networks: Collection[str]) -> float:
    """The time of training and of all runs on two cores, by the processor's clock."""
    timed = [(prune_tables.parsed(key).network, run) for key, run in results["runs"].items()]
    timed += results["dense"].items()
    return sum(run["processor_seconds"] for name, run in timed if name in networks) / 7200


def _cells(results: dict[str, Any], network: str) -> prune_tables.Cells:
    """All accuracies. Magnitude moves no weights, so many steps prune the same as one."""
    cells = prune_tables.cells_of(results["runs"], network)
    row = cells.get(MAGNITUDE, {})
    of_sparsity = {sparsity: cell for (sparsity, _), cell in row.items()}
    for sparsity, steps in cells.get(DEFAULT, {}):
        if sparsity in of_sparsity:
            row.setdefault((sparsity, steps), of_sparsity[sparsity])
    return cells


def _mean(cell: prune_tables.Cell) -> float:
    """With stored statistics, as ``prune`` returns them."""
    return float(np.mean([*cell.stored.values()]))


def _width(cell: prune_tables.Cell) -> float:
    return max(cell.best.values()) - min(cell.best.values())


def bars(results: dict[str, Any]) -> str:
    """The bars."""
    rows = []
    for network, sparsity, steps, wanted, within in WANTED:
        cell = _cells(results, network).get(DEFAULT, {}).get((sparsity, steps))
        what = f"{network}, default, {sparsity:.0%}, {steps} steps, stored statistics"
        if cell and within:
            got = [prune_tables.spread(cell.stored.values())]
            got.append("met" if max(cell.stored.values()) >= wanted else "**not met**")
        else:
            got = _verdict(cell and _mean(cell), wanted)
        shown = f">= {wanted}{' within the spread' if within else ''}"
        rows.append([what, shown, *got])
    for network, sparsity, steps, most in LOSSES:
        cell = _cells(results, network).get(DEFAULT, {}).get((sparsity, steps))
        wanted = results["dense"][network]["test"] - most if network in results["dense"] else 0.0
        what = f"{network}, default, {sparsity:.0%}, {steps} steps: dense less {most:g}"
        shown = f">= {wanted:.1f}" if wanted else ""
        rows.append([what, shown, *_verdict(cell and _mean(cell), wanted)])
    dense = results["dense"].get("minilm", {}).get("test")
    rows.append(["minilm, dense", ">= 90.0", *_verdict(dense, 90.0)])
    rivals = (REFERENCE_BLOCKS, CHITA, CHITA_BLOCKS)
    rows += [_beside(results, "akamaster", (0.9, 8), rival) for rival in rivals]
    for network in prune_tables.TITLES:
        rows += _closest(results, network)
    rows.append(_at_the_authors_setting(results))
    seconds = prune_tables.step_seconds(results["runs"], "resnet20", DEFAULT)
    what = "resnet20, default, a step beside its gradients, one core"
    got = ["not yet", ""]
    if seconds is not None:
        got = [f"{seconds:.1f} s", "met" if seconds < SECONDS else "**not met**"]
    rows.append([what, f"< {SECONDS} s", *got])
    rows += [_hours_bar(results, networks) for networks in HALVES]
    return prune_tables.table(["what", "wanted", "measured", ""], rows)


def _hours_bar(results: dict[str, Any], networks: tuple[str, ...]) -> list[str]:
    planned = {run.key for run in _planned(networks)}
    took = hours(results, networks)
    verdict = "met" if took <= HOURS else "**not met**"
    if not planned <= results["runs"].keys():
        verdict = "not all runs are measured"
    return [f"{', '.join(networks)}, on two cores", f"<= {HOURS} h", f"{took:.1f} h", verdict]


def _gap(cell: prune_tables.Cell, rival: prune_tables.Cell) -> tuple[float, float]:
    """How far a cell is above its rival, and the larger of their spreads.

    Statistics are recalibrated where there are any. A cell that failed is below every rival.
    """
    gap = float(np.mean([*cell.best.values()]) - np.mean([*rival.best.values()]))
    if np.isnan(gap):
        return -np.inf, 0.0
    return gap, max(_width(cell), _width(rival))


def _judged(what: str, gap: float, width: float, where: str) -> list[str]:
    wanted = f"> {width:.1f}, the spread there" if width else "> 0"
    return [what, wanted, f"{gap:+.1f}{where}", "met" if gap > width else "**not met**"]


def _beside(
    results: dict[str, Any], network: str, column: tuple[float, int], rival: str
) -> list[str]:
    """The default less a rival."""
    cells = _cells(results, network)
    found = [cells.get(name, {}).get(column) for name in (DEFAULT, rival)]
    what = f"{network}, {_head(column)}, default less {rival}"
    if None in found:
        return [what, "> the spread", "not yet", ""]
    return _judged(what, *_gap(*found), "")


def _closest(results: dict[str, Any], network: str) -> list[list[str]]:
    """Where the default is nearest to the best rival, of the columns with reference in blocks.

    A gap counts beside the spread there.
    """
    cells = _cells(results, network)
    gaps = {}
    for column, cell in cells.get(DEFAULT, {}).items():
        others = {
            name: other
            for name in RIVALS
            if (other := cells.get(name, {}).get(column)) is not None
            if np.all(np.isfinite([*other.best.values()]))  # a run that failed has NaN
        }
        if REFERENCE_BLOCKS in others:
            best = max(others, key=lambda name: np.mean([*others[name].best.values()]))
            gaps[column] = *_gap(cell, others[best]), best
    if not gaps:
        return []
    column = min(gaps, key=lambda c: gaps[c][0] - gaps[c][1])
    gap, width, best = gaps[column]
    what = f"{network}, default less the best rival, in the column where it is smallest"
    return [_judged(what, gap, width, f" ({_head(column)}, {best})")]


def _at_the_authors_setting(results: dict[str, Any]) -> list[str]:
    found = prune_tables.of_part(results["runs"], "authors", "resnet20")
    cells = {
        key.method: prune_tables.Cell({}, {0: run.get("recalibrated", run["accuracy"])})
        for key, run in found.items()
    }
    what = "resnet20, default less CHITA, at the setting of its authors"
    if not {DEFAULT, CHITA, CHITA_BLOCKS} <= cells.keys():
        return [what, "> 0", "not yet", ""]
    gaps = {rival: _gap(cells[DEFAULT], cells[rival]) for rival in (CHITA, CHITA_BLOCKS)}
    closest = min(gaps, key=lambda rival: gaps[rival][0])
    return _judged(what, *gaps[closest], f" ({closest})")


def _verdict(got: float | None, wanted: float) -> list[str]:
    if got is None:
        return ["not yet", ""]
    return [f"{got:.1f}", "met" if got >= wanted else "**not met**"]


def _head(column: tuple[float, int]) -> str:
    return f"{column[0]:.0%}, {'one-shot' if column[1] == 1 else f'{column[1]} steps'}"


def summary(results: dict[str, Any]) -> str:
    """Eight recomputations with every network, for the README."""
    columns = (("resnet20", 0.8), ("resnet20", 0.9), ("akamaster", 0.9), ("minilm", 0.8))
    cells = {network: _cells(results, network) for network, _ in columns}
    shown = [(n, s) for n, s in columns if (s, 8) in cells[n].get(DEFAULT, {})]
    head = ["8 steps", *[f"{prune_tables.TITLES[n].split(',')[0]}, {s:.0%}" for n, s in shown]]
    rows = [["dense", *[f"{results['dense'][n]['test']:.1f}" for n, _ in shown]]]
    for name in (*RIVALS, DEFAULT):
        of_name = [cells[n].get(name, {}).get((s, 8)) for n, s in shown]
        if any(of_name):
            rows.append([name, *[prune_tables.both(cell) if cell else "" for cell in of_name]])
    at = results["environment"]
    device = parallel.main_device(results["runs"].values())
    return (
        prune_tables.table(head, rows)
        + f"\n\nmfac_jax {at['mfac_jax']}, {device}, jax {at['jax']}, {at['date']}."
    )


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of several files, each with networks of its own.

    Raises:
        SystemExit: the files come from other versions, or two hold the same network.
    """
    first, *others = results
    found = first | {"runs": dict(first["runs"]), "dense": dict(first["dense"])}
    free = {"date", "device", "cores"}  # every run has its own
    for other in others:
        at, there = first["environment"], other["environment"]
        differ = sorted(key for key in {*at, *there} - free if at.get(key) != there.get(key))
        twice = sorted(found["dense"].keys() & other["dense"].keys())
        if differ or twice:
            sys.exit(f"these results do not belong together: {differ} differ, {twice} are in both.")
        found["runs"] |= other["runs"]
        found["dense"] |= other["dense"]
    return found


def stale(results: dict[str, Any]) -> dict[str, str]:
    """The runs that are not planned or not of what validation data chose, with the reason."""
    found = {}
    planned = {run.key: run for run in _planned(prune_tables.TITLES)}
    for key, done in results["runs"].items():
        if key not in planned:
            found[key] = "not planned"
            continue
        try:
            run = pruning_runs.filled(planned[key], results["runs"], pruning_runs.FULL)
        except LookupError as error:
            found[key] = str(error)
            continue
        if not run.is_choice_of(done):
            found[key] = f"of another choice than {run.chosen}"
    return found


def _planned(networks: Collection[str]) -> list[pruning_runs.Run]:
    return [
        run
        for name in networks
        for kind in (pruning_runs.validation_runs, pruning_runs.test_runs)
        for run in kind(name, pruning_runs.FULL[name])
    ]


def main(arguments: list[str]) -> None:
    """Copies and renders."""
    if arguments:
        results = joined([json.loads(Path(path).read_text()) for path in arguments])
        for key, why in stale(results).items():
            print(f"left out: {key} ({why})")
            del results["runs"][key]
        report.save(NAME, results)
    results = report.load(NAME)
    for name, table in tables(results).items():
        report.write_table(PAGE, name, table)
    report.write_table(README, "pruning", summary(results))
    prune_tables.draw(results, FIGURE)


if __name__ == "__main__":
    main(sys.argv[1:])
