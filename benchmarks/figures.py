"""The figure of the benchmark: the roofline, and time against the number of coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

_MARKERS = "osD^vP*Xph<>"


def has_figure(results: dict[str, Any]) -> bool:
    """Whether a run went on long enough for both panels."""
    return bool(results.get("operations")) and "scaling" in results


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.4), width_ratios=(3, 2))
    _roofline(left, results)
    _scaling(right, results)
    where = results["environment"]
    device = where["processor"] if where["platform"] == "cpu" else where["device"]
    figure.suptitle(
        f"mfac_jax on {device}, {where['cores']} cores, jax {where['jax']}, {where['date']}"
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _roofline(axes: plt.Axes, results: dict[str, Any]) -> None:
    machine = results["machine"]
    measured = [r for r in results["operations"] if "median" in r["times"]["library"]]
    names = list(dict.fromkeys(_label(record) for record in measured))
    shapes = list(dict.fromkeys(record["workload"] for record in measured))
    colors = plt.get_cmap("tab10")
    for record in measured:
        axes.plot(
            record["flops"] / record["bytes"],
            record["flops"] / record["times"]["library"]["median"] / 1e9,
            marker=_MARKERS[shapes.index(record["workload"]) % len(_MARKERS)],
            color=colors(names.index(_label(record)) % 10),
            linestyle="none",
            markersize=7,
            alpha=0.85,
        )
    low = min(r["flops"] / r["bytes"] for r in measured) / 2
    high = max(r["flops"] / r["bytes"] for r in measured) * 2
    intensity = np.geomspace(low, high, 200)
    ceiling = np.minimum(intensity * machine["read_bandwidth"], machine["matrix_rate"]) / 1e9
    axes.plot(intensity, ceiling, color="black", linewidth=1.2)
    ridge = machine["matrix_rate"] / machine["read_bandwidth"]
    axes.annotate(
        f"read bandwidth {machine['read_bandwidth'] / 1e9:,.1f} GB/s",
        (low * 1.1, low * 1.1 * machine["read_bandwidth"] / 1e9),
        rotation=32,
        rotation_mode="anchor",
        textcoords="offset points",
        xytext=(0, 8),
    )
    axes.annotate(
        f"matrix products {machine['matrix_rate'] / 1e9:,.0f} GFLOP/s",
        (max(ridge, low) * 1.1, machine["matrix_rate"] / 1e9),
        textcoords="offset points",
        xytext=(0, 6),
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="arithmetic intensity of the floor (flop / byte)",
        ylabel="achieved (GFLOP/s of the floor's flops)",
        title="Operations under the measured ceilings",
    )
    axes.set_ylim(top=3 * machine["matrix_rate"] / 1e9)
    kinds = [
        plt.Line2D([], [], color=colors(i % 10), marker="o", linestyle="none", label=name)
        for i, name in enumerate(names)
    ]
    kinds += [
        plt.Line2D(
            [], [], color="gray", marker=_MARKERS[i % len(_MARKERS)], linestyle="none", label=name
        )
        for i, name in enumerate(shapes)
    ]
    axes.legend(handles=kinds, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    axes.grid(True, which="both", alpha=0.2)


def _scaling(axes: plt.Axes, results: dict[str, Any]) -> None:
    scaling = results["scaling"]
    d = np.array([point["d"] for point in scaling["points"]], float)
    times = np.array([point["time"]["median"] for point in scaling["points"]])
    spread = np.array(
        [
            [p["time"]["median"] - p["time"]["low"], p["time"]["high"] - p["time"]["median"]]
            for p in scaling["points"]
        ]
    )
    axes.errorbar(d, 1e3 * times, 1e3 * spread.T, fmt="o", capsize=3, label="measured, quartiles")
    fit = np.exp(scaling["intercept"]) * d ** scaling["slope"]
    axes.plot(d, 1e3 * fit, color="black", linewidth=1, label=f"slope {scaling['slope']:.3f}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="d (coordinates)",
        ylabel="ms",
        title=f"push + direction, m = {scaling['m']}, float32",
    )
    axes.legend()
    axes.grid(True, which="both", alpha=0.2)


def _label(record: dict[str, Any]) -> str:
    return record["operation"] + (" of blocks" if record["block"] else "")
